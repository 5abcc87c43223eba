"""Texts that were taken from documents, as every store takes them."""

from __future__ import annotations

import json

import pytest
from mlflow.entities import Span, TraceInfo
from mlflow.entities.trace_location import TraceLocation
from mlflow.entities.trace_state import TraceState
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

from mlflow_ctx_autolog.spans.values import storable
from mlflow_ctx_autolog.stores.tracking_store import span_record, trace_record


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("page 1\0 page 2", "page 1\ufffd page 2"),
        (json.dumps({"a": "x\0y"}), r'{"a": "x\ufffdy"}'),
        (json.dumps({"a": "x\ud83dy"}), r'{"a": "x\ufffdy"}'),
        (json.dumps({"a": "x\udc00"}), r'{"a": "x\ufffd"}'),
        ("half \ud83d of it", "half ? of it"),
    ],
)
def test_what_no_store_takes_is_replaced(text: str, stored: str) -> None:
    assert storable(text) == stored


@pytest.mark.parametrize(
    "text",
    [
        *("", "grüße 😀", json.dumps("😀 and \u4e2d"), json.dumps("😀", ensure_ascii=False)),
        *(
            json.dumps(r"a path like c:\u0000"),
            json.dumps("\\\\ud800"),
            json.dumps("tab \t, bell \a"),
        ),
    ],
)
def test_all_else_stays_as_it_is(text: str) -> None:
    assert storable(text) == text


def test_no_field_of_a_record_has_them() -> None:
    """Neither a span's name, status and attributes, nor what is known of its trace."""
    context = SpanContext(1, 2, False, TraceFlags(1))
    attributes = {
        "mlflow.traceRequestId": json.dumps(f"tr-{1:032x}"),
        "mlflow.llm.model": json.dumps("gpt\0"),
        "session.id": "a\0b",
    }
    inner = ReadableSpan(
        "na\0me",
        context,
        attributes=attributes,
        status=Status(StatusCode.ERROR, "said \0"),
        start_time=1,
        end_time=2,
    )
    payload = span_record(Span(inner)).payload
    assert b"\\u0000" not in payload
    (resource,) = TracesData.FromString(payload).resource_spans
    (span,) = resource.scope_spans[0].spans
    texts = [span.name, span.status.message, *(a.value.string_value for a in span.attributes)]
    assert not any("\0" in text for text in texts)
    assert span.name == "na\ufffdme"

    info = TraceInfo(
        trace_id="tr-1",
        trace_location=TraceLocation.from_experiment_id("1"),
        request_time=1,
        state=TraceState.OK,
        request_preview="page \0 \ud83d",
        tags={"a": "\0"},
    )
    document = json.loads(trace_record(info).payload)
    assert document["request_preview"] == "page \ufffd ?"
    assert document["tags"] == {"a": "\ufffd"}
