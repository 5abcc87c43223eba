"""All that is said to an MLflow tracking store, and heard from it."""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
import mlflow.tracing.provider as mlflow_provider
from mlflow.entities import Span, Trace, TraceData, TraceInfo
from mlflow.entities.model_registry import PromptVersion
from mlflow.entities.trace_metrics import AggregationType, MetricAggregation, MetricViewType
from mlflow.environment_variables import MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT
from mlflow.protos.service_pb2 import GetTrace, QueryTraceMetrics, StartTraceV3
from mlflow.tracing.constant import SpanMetricKey
from mlflow.tracing.otel.translation import sanitize_attributes
from mlflow.tracing.utils.otlp import (
    MLFLOW_EXPERIMENT_ID_HEADER,
    OTLP_TRACES_PATH,
    resource_to_otel_proto,
    should_use_otlp_exporter,
)
from mlflow.utils.databricks_utils import get_databricks_host_creds
from mlflow.utils.proto_json_utils import message_to_json, parse_dict
from mlflow.utils.rest_utils import _V3_TRACE_REST_API_PATH_PREFIX as TRACES_PATH
from mlflow.utils.uri import is_databricks_uri
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, TracesData

from mlflow_ctx_autolog.delivery.records import Destination, Record
from mlflow_ctx_autolog.exceptions import StoreError, UnsupportedStoreError
from mlflow_ctx_autolog.log_ins import has_log_in
from mlflow_ctx_autolog.spans.values import storable
from mlflow_ctx_autolog.stores.mlflow_client import (
    ask,
    client_of,
    in_its_workspace,
    is_remote,
    own_errors,
    request,
    store_of,
)
from mlflow_ctx_autolog.stores.stored_trace import TRACE_KEY
from mlflow_ctx_autolog.stores.tracking_server import check_has_spans, check_has_trace

__all__ = [
    "PROBE_TAG",
    "count_spans",
    "current_tracking_uri",
    "delete_trace",
    "exports_to_collector",
    "is_of_this_host",
    "link_prompts",
    "log_text",
    "read_trace",
    "send_by_mlflow",
    "span_record",
    "span_table",
    "spans_of",
    "store_takes_spans",
    "store_version",
    "store_whole_trace",
    "sum_of_costs",
    "table_workspace",
    "trace_destination",
    "trace_record",
    "worker_tracking_uri",
]

# Tag of a trace that was made to try the store, where it cannot be deleted.
PROBE_TAG = "mlflow_ctx_autolog.probe"


def current_tracking_uri() -> str:
    """Return this process's tracking URI, with whatever password it holds."""
    return str(mlflow.get_tracking_uri())


def store_takes_spans() -> bool:
    """Whether the tracking store takes single spans, not only a whole trace with its root."""
    uri = mlflow.get_tracking_uri()
    return not is_databricks_uri(uri) and urlsplit(uri).scheme not in ("", "file")


def trace_destination() -> Any:
    """Return MLflow's trace destination, which the user has set; None for none."""
    return mlflow_provider._MLFLOW_TRACE_USER_DESTINATION.get()


def exports_to_collector() -> bool:
    """Whether MLflow sends this process's traces to an OTLP endpoint, not to the tracking store."""
    if trace_destination() is not None:
        return False
    return bool(should_use_otlp_exporter()) and not MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT.get()


def span_table() -> str | None:
    """Return the Unity Catalog table that this process's spans are stored in, if it is one.

    Such a table takes single spans, but from a process that has MLflow's trace destination set.

    Raises:
        UnsupportedStoreError: The table cannot be told.
    """
    destination = mlflow_provider._MLFLOW_TRACE_USER_DESTINATION.get()
    if not hasattr(destination, "catalog_name"):
        return None
    table = getattr(destination, "full_otel_spans_table_name", None)
    if table is None:
        raise UnsupportedStoreError(
            "The traces of this process go to a Unity Catalog location whose table MLflow does "
            "not know. Set the experiment anew with mlflow.set_experiment(), or upgrade MLflow."
        )
    return str(table)


def table_workspace() -> str | None:
    """Return the address of the workspace whose Unity Catalog table takes this process's spans.

    None where they go elsewhere.
    """
    uri = mlflow.get_tracking_uri()
    if not is_databricks_uri(uri) or span_table() is None:
        return None
    return _workspace(uri)


@functools.lru_cache(maxsize=8)
def _workspace(uri: str) -> str:
    # Which may ask the network who logs in.
    return str(get_databricks_host_creds(uri).host).rstrip("/")


def store_version() -> str | None:
    """Return the version of MLflow that keeps the traces: the server's, or this one's.

    Asks the server, for three seconds at most; None where it does not answer.
    """
    uri = mlflow.get_tracking_uri()
    if urlsplit(uri).scheme not in ("http", "https"):
        return str(mlflow.__version__)
    store = client_of(uri).store
    version = store._get_server_version(store.get_host_creds())
    if version is None:
        # MLflow remembers for good that it could not read the server's version, which is also
        # what happens when the server was away for a moment.
        forget = getattr(type(store)._get_server_version, "cache_clear", None)
        if forget is not None:
            forget()
    return None if version is None else str(version)


def worker_tracking_uri() -> tuple[str | None, str]:
    """Return the tracking URI as workers can use it, and why that is so.

    Returns:
        The URI, absolute and without a password, or None where workers cannot store spans
        there; and a sentence that says why.

    Raises:
        UnsupportedStoreError: Neither can the driver store them for the workers.
    """
    uri = mlflow.get_tracking_uri()
    if not store_takes_spans():
        span_table()
        kind = "a Databricks workspace" if is_databricks_uri(uri) else "MLflow's file store"
        return None, f"{kind} does not take spans from other processes"
    if has_log_in(uri):
        # Whatever is not known as harmless may be one, and stays home.
        return None, (
            "the tracking URI holds a user, a password, or parameters that may be one, and they "
            "are not sent to workers"
        )
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///")).absolute()
        return f"sqlite:///{path}", f"workers write to the file {path}, which they must share"
    return uri, f"{uri} takes spans from other processes"


def is_of_this_host(uri: str) -> bool:
    """Whether an address names this host only by a name that means another one elsewhere."""
    parts = urlsplit(uri)
    if parts.scheme.startswith("sqlite"):
        return True
    host = (parts.hostname or "").lower()
    return host in ("localhost", "::1", "0.0.0.0") or host.startswith("127.")


def span_record(span: Span, owner: str = "") -> Record:
    """Return a span as a record, whose payload is an OTLP message with that one span."""
    message = span.to_otel_proto()
    message.name = storable(message.name)
    message.status.message = storable(message.status.message)
    for attribute in message.attributes:
        if attribute.value.WhichOneof("value") == "string_value":
            attribute.value.string_value = storable(attribute.value.string_value)
    resource = ResourceSpans(
        resource=resource_to_otel_proto(getattr(span._span, "resource", None)),
        scope_spans=[ScopeSpans(spans=[message])],
    )
    payload = TracesData(resource_spans=[resource]).SerializeToString()
    return Record("span", str(span.span_id), bytes(payload), owner)


def spans_of(records: Sequence[Record]) -> list[Span]:
    """Return the spans of records that :func:`span_record` made.

    Raises:
        Exception: A payload is not OTLP.
    """
    return [
        _read(span, **({"resource": resource.resource} if _TAKES_RESOURCE else {}))
        for record in records
        if record.kind == "span"
        for resource in TracesData.FromString(record.payload).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _read(message: Any, **resource: Any) -> Span:
    span = Span.from_otel_proto(message, **resource)
    # What came as JSON is JSON, not the text of it: as the store has it when it comes by HTTP.
    span._span._attributes = sanitize_attributes(dict(span._span.attributes or {}))
    return span


# In older releases of MLflow a span's resource was not read.
_TAKES_RESOURCE = "resource" in inspect.signature(Span.from_otel_proto).parameters


def trace_record(info: TraceInfo) -> Record:
    """Return what is known of a trace as a record."""
    told = copy.copy(info)
    for name in ("request_preview", "response_preview"):
        if (text := getattr(info, name)) is not None:
            setattr(told, name, storable(text))
    for name in ("tags", "trace_metadata"):
        texts = {key: storable(value) for key, value in getattr(info, name).items()}
        setattr(told, name, texts)
    return Record("trace", str(info.trace_id), json.dumps(told.to_dict()).encode())


@in_its_workspace
def send_by_mlflow(destination: Destination, records: Sequence[Record]) -> None:
    """Store records by MLflow's own client, with whatever log-in it makes.

    Raises:
        StoreError: The store does not answer, or refuses them.
    """
    spans = [record for record in records if record.kind == "span"]
    if spans:
        _send_spans(destination, spans)
    for record in records:
        if record.kind == "trace":
            _send_trace_info(destination, TraceInfo.from_dict(json.loads(record.payload)))


def _send_spans(destination: Destination, records: Sequence[Record]) -> None:
    store = store_of(destination)
    if not is_remote(store) or is_databricks_uri(destination.tracking_uri):
        try:
            spans = spans_of(records)
        except Exception as error:
            raise StoreError(f"this is no span: {error!r}", refused=True) from error
        with own_errors():
            client_of(str(destination.tracking_uri)).log_spans(destination.experiment_id, spans)
        return
    headers = {
        "Content-Type": "application/x-protobuf",
        MLFLOW_EXPERIMENT_ID_HEADER: destination.experiment_id,
    }
    # OTLP messages one after the other are one message with the spans of all.
    body = b"".join(record.payload for record in records)
    check_has_spans(request(store, "POST", OTLP_TRACES_PATH, extra_headers=headers, data=body))


def _send_trace_info(destination: Destination, info: TraceInfo) -> None:
    store = store_of(destination)
    if not is_remote(store):
        with own_errors():
            store.start_trace(info)
        return
    message = StartTraceV3(trace=Trace(info=info, data=TraceData(spans=[])).to_proto())
    content = json.loads(message_to_json(message))
    check_has_trace(request(store, "POST", TRACES_PATH, json=content))


def count_spans(destination: Destination, trace_id: str) -> int:
    """Return how many spans the store has of a trace that was announced with :data:`TRACE_KEY`.

    Raises:
        StoreError: The store does not answer, or cannot count.
    """
    counted = _metric(destination, trace_id, SpanMetricKey.SPAN_COUNT, AggregationType.COUNT)
    return int(counted or 0)


def sum_of_costs(destination: Destination, trace_id: str) -> dict[str, float]:
    """Return what the store has found the calls of a trace to have cost, by MLflow's names.

    Raises:
        StoreError: The store does not answer, or cannot sum them up.
    """
    found: dict[str, float] = {}
    for name in (SpanMetricKey.TOTAL_COST, SpanMetricKey.INPUT_COST, SpanMetricKey.OUTPUT_COST):
        amount = _metric(destination, trace_id, name, AggregationType.SUM)
        if amount is None:
            break
        found[name] = amount
    return found


@in_its_workspace
def _metric(
    destination: Destination, trace_id: str, name: str, aggregation: AggregationType
) -> float | None:
    store = store_of(destination)
    question: dict[str, Any] = {
        "experiment_ids": [destination.experiment_id],
        "metric_name": name,
        "filters": [f"trace.metadata.{TRACE_KEY} = '{trace_id}'"],
    }
    view, aggregations = MetricViewType.SPANS, [MetricAggregation(aggregation)]
    if is_remote(store):
        message = QueryTraceMetrics(
            view_type=view.to_proto(),
            aggregations=[each.to_proto() for each in aggregations],
            max_results=10,
            **question,
        )
        document = json.loads(message_to_json(message))
        answer = ask(store, "POST", f"{TRACES_PATH}/metrics", json=document)
        values = [point.get("values", {}) for point in answer.get("data_points", [])]
    else:
        with own_errors():
            points = store.query_trace_metrics(
                view_type=view, aggregations=aggregations, **question
            )
            values = [point.values for point in points]
    amounts = [each[str(aggregation.value)] for each in values if str(aggregation.value) in each]
    return sum(amounts) if amounts else None


@in_its_workspace
def read_trace(destination: Destination, trace_id: str) -> tuple[TraceInfo, list[Span]]:
    """Return what the store has of a trace: its info and all its spans.

    Raises:
        StoreError: The store does not answer, or has no such trace.
    """
    # Not by the client's method, which takes what this process knows of an open trace for what is
    # stored.
    store = store_of(destination)
    try:
        if is_remote(store):
            question = {"trace_id": trace_id, "allow_partial": "true"}
            answer = GetTrace.Response()
            parse_dict(ask(store, "GET", f"{TRACES_PATH}/get", params=question), answer)
            trace = Trace.from_proto(answer.trace)
        else:
            with own_errors():
                trace = store.get_trace(trace_id, allow_partial=True)
    except StoreError as error:
        if not error.unsupported:
            raise
        # A store for whole traces keeps the spans in a file.
        with own_errors():
            trace = client_of(str(destination.tracking_uri)).get_trace(trace_id)
    return trace.info, list(trace.data.spans)


@in_its_workspace
def store_whole_trace(destination: Destination, info: TraceInfo, spans: Sequence[Span]) -> bool:
    """Store a trace with all its spans, as MLflow does at its end. Storing it again replaces it.

    Raises:
        StoreError: The store does not answer, or refuses it.
    """
    client = client_of(str(destination.tracking_uri))
    with own_errors():
        try:
            stored = client.start_trace(info)
        except Exception:
            # A folder of files has a trace once and for all.
            client.delete_traces(destination.experiment_id, trace_ids=[info.trace_id])
            stored = client.start_trace(info)
        client._upload_trace_data(stored, TraceData(spans=list(spans)))
    return True


@in_its_workspace
def link_prompts(
    destination: Destination, trace_id: str, prompts: Iterable[Mapping[str, Any]]
) -> None:
    """Have the store find a trace by the prompts that it was made with.

    Args:
        destination: Where the trace is.
        trace_id: Its id.
        prompts: The ``name`` and ``version`` of each.

    Raises:
        StoreError: The store does not answer, or knows of no prompts.
    """
    with own_errors():
        versions = [PromptVersion(each["name"], int(each["version"]), "") for each in prompts]
        client_of(str(destination.tracking_uri)).link_prompt_versions_to_trace(trace_id, versions)


@in_its_workspace
def delete_trace(destination: Destination, trace_id: str) -> None:
    """Delete a trace with all its spans; where that is not allowed, tag it as a probe.

    Raises:
        StoreError: The store allows neither.
    """
    client = client_of(str(destination.tracking_uri))
    try:
        with own_errors():
            client.delete_traces(destination.experiment_id, trace_ids=[trace_id])
    except StoreError:
        with own_errors():
            client.set_trace_tag(trace_id, PROBE_TAG, "true")


def log_text(text: str, name: str) -> None:
    """Log a text to the active run as an artifact.

    Raises:
        RuntimeError: No run is active.
    """
    if mlflow.active_run() is None:
        raise RuntimeError("No MLflow run is active; log inside with mlflow.start_run():")
    mlflow.log_text(text, name)
