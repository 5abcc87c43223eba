"""Records as OTLP messages: what comes back, and what MLflow's server makes of them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import mlflow
import pytest
from mlflow.entities import Span
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData
from packaging.version import Version

from mlflow_ctx_autolog.spans.otlp import decode, encode
from mlflow_ctx_autolog.spans.record import (
    OpenSpan,
    SpanContext,
    SpanEvent,
    SpanLink,
    SpanRecord,
)
from mlflow_ctx_autolog.spans.values import dump

VALUES: dict[str, Any] = {
    "text": "a text",
    "empty": "",
    "digits": "7",
    "json.text": '{"a": 1}',
    "object": {"a": [1, {"b": None}], "ü": "\U0001f600"},
    "nothing": {},
    "list": [{"a": 1}, "b", 2.5, None, True],
    "no.list": [],
    "number": 7,
    "negative": -7,
    "fraction": 0.25,
    "true": True,
    "false": False,
    "huge": 1 << 70,
}


def record(**more: Any) -> SpanRecord:
    span = OpenSpan("Completions", "CHAT_MODEL", SpanContext("ab" * 16, "cd" * 8))
    span.update(VALUES)
    span.add_event(SpanEvent("mlflow.chunk.item.0", 3, {"mlflow.chunk.value": "{}", "n": 1}))
    span.add_link(SpanLink("12" * 16, "34" * 8))
    ended = span.finish(level=20)
    assert ended is not None
    return replace(ended, **more)


@pytest.mark.parametrize(
    "span",
    [
        pytest.param(record(), id="ended"),
        pytest.param(record(end=None, status="UNSET"), id="open"),
        pytest.param(record(parent_id=None), id="a root"),
        pytest.param(record(status="ERROR", message="no"), id="failed"),
    ],
)
def test_a_record_comes_back_as_it_was(span: SpanRecord) -> None:
    """Ids, times, status, attributes, events and links; of numbers, those that OTLP has."""
    (back,) = decode(encode(span))
    huge = {"huge": dump(float(VALUES["huge"]))}
    assert back == replace(span, attributes={**span.attributes, **huge})
    assert next(decode(encode(span, all_texts=True))) == span


def test_messages_one_after_the_other_are_one_message() -> None:
    """A batch is what lies in the spool, joined."""
    spans = [record(name=str(number)) for number in range(3)]
    assert [span.name for span in decode(b"".join(map(encode, spans)))] == ["0", "1", "2"]


def stored(payload: bytes) -> dict[str, Any]:
    """Return what a server of this release of MLflow keeps of a message's span."""
    from mlflow.tracing.otel.translation import translate_span_when_storing

    (resource,) = TracesData.FromString(payload).resource_spans
    span = Span.from_otel_proto(resource.scope_spans[0].spans[0])
    kept: dict[str, Any] = translate_span_when_storing(span)
    return kept


def test_the_server_keeps_values_as_they_were() -> None:
    """Every value that an attribute can have is stored as MLflow stores its own."""
    span = record()
    kept = stored(encode(span))
    attributes = {name: json.loads(text) for name, text in kept["attributes"].items()}
    expected = {**VALUES, "huge": float(VALUES["huge"]), "mlflow.traceRequestId": "tr-" + "ab" * 16}
    for name, value in expected.items():
        assert attributes[name] == value, name
    assert attributes["mlflow.spanType"] == "CHAT_MODEL"
    assert kept["name"] == "Completions"
    assert kept["status"]["code"] == "STATUS_CODE_OK"
    (event,) = kept["events"]
    assert dict(event["attributes"]) == {"mlflow.chunk.value": "{}", "n": 1}
    if Version(mlflow.__version__) >= Version("3.12"):
        assert kept["links"][0]["span_id"] == "34" * 8


def test_half_a_surrogate_pair_does_not_lose_a_span() -> None:
    """What protobuf takes for no text is replaced, as MLflow does."""
    span = record(name="\ud83d", attributes={"text": '"\ud83d"'})
    (back,) = decode(encode(span))
    assert back.name == "?"
    assert back.get("text") == "?"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (("00-" + "ab" * 16 + "-" + "cd" * 8 + "-01", None), SpanContext("ab" * 16, "cd" * 8)),
        (
            ("00-" + "ab" * 16 + "-" + "cd" * 8 + "-00", "a=1"),
            SpanContext("ab" * 16, "cd" * 8, is_sampled=False, tracestate="a=1"),
        ),
        (("00-" + "0" * 32 + "-" + "cd" * 8 + "-01", None), None),
        (("ff-" + "ab" * 16 + "-" + "cd" * 8 + "-01", None), None),
        (("no traceparent", None), None),
        ((None, None), None),
    ],
)
def test_w3c_headers(headers: tuple[str | None, str | None], expected: SpanContext | None) -> None:
    """They are read as they are written, and nothing is read from what is none."""
    found = SpanContext.from_headers(*headers)
    assert found == expected
    if found is not None:
        assert found.headers["traceparent"] == headers[0]


def test_a_span_ends_once() -> None:
    """What comes later is left out, whoever was first."""
    span = OpenSpan("a", "TASK")
    assert span.finish(end=5) is not None
    span.update({"late": 1})
    span.fail("late")
    assert span.finish() is None
    assert span.get("late") is None
