"""Reading back what a tracking store has: whole traces, however large, and which there are."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import mlflow
from mlflow.entities import Span, TraceInfo
from mlflow.protos.service_pb2 import GetTraceInfoV3
from mlflow.tracing.constant import SpanAttributeKey
from mlflow.utils.proto_json_utils import parse_dict
from mlflow.utils.rest_utils import _V3_TRACE_REST_API_PATH_PREFIX as TRACES_PATH

from mlflow_ctx_autolog.delivery.records import Destination
from mlflow_ctx_autolog.exceptions import StoreError
from mlflow_ctx_autolog.stores.answers import excerpt
from mlflow_ctx_autolog.stores.mlflow_client import (
    ask,
    client_of,
    is_remote,
    own_errors,
    request,
    store_of,
)
from mlflow_ctx_autolog.stores.stored_trace import TRACE_KEY, StoredSpan, StoredTrace
from mlflow_ctx_autolog.stores.tracking_store import read_trace

__all__ = ["find_traces", "read_stored_trace"]

# Seconds that the store may take to return all spans of a trace.
_READING_TIME = 300.0
# Traces that are found at most, and in one request.
_TRACES_FOUND, _TRACES_AT_ONCE = 1000, 100
# Where MLflow's own UI reads a trace's spans, in the form in which they are stored.
_SPANS_PATH = "/ajax-api/2.0/mlflow/get-trace-artifact"


def read_stored_trace(
    tracking_uri: str, trace_id: str, wanted: Callable[[str], bool]
) -> StoredTrace:
    """Return what is needed of a trace, however large it is.

    Args:
        tracking_uri: Where it is stored.
        trace_id: MLflow's id.
        wanted: Which attributes of its spans to keep, by their names.

    Raises:
        StoreError: The store does not answer, or has no such trace.
    """
    destination = Destination(tracking_uri, "")
    store = store_of(destination)
    if is_remote(store):
        question = {"request_id": trace_id}
        try:
            answer = ask(store, "GET", f"{TRACES_PATH}/{trace_id}")
            found = GetTraceInfoV3.Response()
            parse_dict(answer, found)
            info = TraceInfo.from_proto(found.trace.trace_info)
            content = request(
                store, "GET", _SPANS_PATH, params=question, timeout=_READING_TIME
            ).content
            return _stored_trace(info, _spans_in(content), wanted)
        except StoreError as error:
            if error.unsupported and "RESOURCE_DOES_NOT_EXIST" in str(error):
                raise StoreError(f"there is no trace {trace_id} in {tracking_uri}") from error
            if not error.unsupported:
                raise
    info, spans = read_trace(destination, trace_id)
    return _stored_trace(info, (span.to_dict() for span in spans), wanted)


def _stored_trace(
    info: TraceInfo, spans: Iterable[dict[str, Any]], wanted: Callable[[str], bool]
) -> StoredTrace:
    return StoredTrace(
        str(info.trace_id),
        str(info.experiment_id),
        str(getattr(info.state, "value", info.state)),
        dict(info.trace_metadata),
        (_stored_span(span, str(info.trace_id), wanted) for span in spans),
    )


def _spans_in(content: bytes) -> Iterator[dict[str, Any]]:
    """Yield the spans of a trace's JSON one by one, since all at once take far more memory."""
    text = content.decode()
    del content
    decoder = json.JSONDecoder()
    position = text.find("[", text.find('"spans"')) + 1
    while position:
        while position < len(text) and text[position] in ", \r\n\t":
            position += 1
        if position >= len(text) or text[position] != "{":
            return
        span, position = decoder.raw_decode(text, position)
        yield span


def _stored_span(
    document: dict[str, Any], trace_id: str, wanted: Callable[[str], bool]
) -> StoredSpan:
    if "span_id" not in document:
        # As releases before 3 have stored it.
        document = Span.from_dict(document).to_dict()
    attributes = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in document.get("attributes", {}).items()
    }
    status = document.get("status") or {}
    events = document.get("events") or []
    kind = attributes.get(SpanAttributeKey.SPAN_TYPE, "")
    return StoredSpan(
        trace_id,
        _span_id(document["span_id"]) or "",
        _span_id(document.get("parent_span_id")),
        str(document.get("name")),
        kind.strip('"'),
        int(document["start_time_unix_nano"]),
        _whole(document.get("end_time_unix_nano")),
        str(status.get("code", "")).removeprefix("STATUS_CODE_"),
        {name: value for name, value in attributes.items() if wanted(name)},
        next((_exception(event) for event in events if event.get("name") == "exception"), None),
        next(
            (_whole(event.get("time_unix_nano")) for event in events if _is_chunk(event)),
            None,
        ),
    )


def _span_id(text: str | None) -> str | None:
    if not text:
        return None
    # Eight bytes, in base64; some releases have used hexadecimal digits.
    return text.removeprefix("0x") if len(text) >= 16 else base64.b64decode(text).hex()


def _whole(nanoseconds: Any) -> int | None:
    return None if nanoseconds is None else int(nanoseconds)


def _exception(event: dict[str, Any]) -> str:
    attributes = event.get("attributes") or {}
    kind = str(attributes.get("exception.type", "error")).rpartition(".")[2]
    return f"{kind}: {excerpt(str(attributes.get('exception.message', '')))}"


def _is_chunk(event: dict[str, Any]) -> bool:
    return str(event.get("name")).startswith("mlflow.chunk.item.")


def find_traces(
    tracking_uri: str,
    run_id: str | None,
    experiment_id: str | None,
    start: int | None,
    end: int | None,
) -> list[str]:
    """Return the ids of the traces of a run, or of an experiment, the latest first.

    Args:
        tracking_uri: Where to look.
        run_id: The run, if not an experiment.
        experiment_id: The experiment, if not a run.
        start: Milliseconds since the epoch at which the first may have begun.
        end: The same for the last.

    Raises:
        StoreError: The store does not answer, or has no such run or experiment.
    """
    client = client_of(tracking_uri)
    conditions = [
        f"trace.timestamp_ms {sign} {moment}"
        for sign, moment in ((">=", start), ("<=", end))
        if moment is not None
    ]
    found: list[str] = []
    with own_errors():
        mlflow_client = mlflow.MlflowClient(tracking_uri)
        if run_id is not None:
            experiment_id = str(mlflow_client.get_run(run_id).info.experiment_id)
            conditions.append(f"trace.run_id = '{run_id}'")
        else:
            mlflow_client.get_experiment(experiment_id)
        token: str | None = None
        while len(found) < _TRACES_FOUND:
            page = client.search_traces(
                experiment_ids=[str(experiment_id)],
                filter_string=" AND ".join(conditions) or None,
                max_results=_TRACES_AT_ONCE,
                order_by=["timestamp_ms DESC"],
                page_token=token,
                include_spans=False,
            )
            # A linked trace stands for the one that it is linked to.
            found += [
                str(trace.info.trace_metadata.get(TRACE_KEY, trace.info.trace_id)) for trace in page
            ]
            token = page.token
            if not token:
                break
    return list(dict.fromkeys(found))
