"""All that is said to an MLflow tracking store, and heard from it."""

from __future__ import annotations

import base64
import functools
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import urlsplit

import mlflow
import mlflow.tracing.provider as mlflow_provider
from mlflow.entities import Span, Trace, TraceData, TraceInfo
from mlflow.entities.trace_metrics import AggregationType, MetricAggregation, MetricViewType
from mlflow.environment_variables import MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT
from mlflow.exceptions import MlflowException, MlflowNotImplementedException
from mlflow.protos.service_pb2 import (
    GetTrace,
    GetTraceInfoV3,
    QueryTraceMetrics,
    StartTraceV3,
)
from mlflow.tracing.client import TracingClient
from mlflow.tracing.constant import SpanAttributeKey, SpanMetricKey
from mlflow.tracing.utils.otlp import (
    MLFLOW_EXPERIMENT_ID_HEADER,
    OTLP_TRACES_PATH,
    resource_to_otel_proto,
    should_use_otlp_exporter,
)
from mlflow.utils.proto_json_utils import message_to_json, parse_dict
from mlflow.utils.rest_utils import _V3_TRACE_REST_API_PATH_PREFIX as TRACES_PATH
from mlflow.utils.rest_utils import http_request
from mlflow.utils.uri import is_databricks_uri
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, TracesData

from mlflow_ctx_autolog.delivery.spool import Destination, Record
from mlflow_ctx_autolog.exceptions import StoreError, UnsupportedStoreError
from mlflow_ctx_autolog.stores.answers import excerpt, failure, root_cause
from mlflow_ctx_autolog.stores.otlp import is_collector, send_to_collector
from mlflow_ctx_autolog.stores.stored_trace import TRACE_KEY, StoredSpan, StoredTrace

try:
    from mlflow.utils.workspace_context import ServerWorkspaceContext
except ImportError:
    # Of a release without workspaces, whose name nobody sets.
    ServerWorkspaceContext = None

__all__ = [
    "access",
    "count_spans",
    "current_tracking_uri",
    "delete_trace",
    "exports_to_collector",
    "find_traces",
    "is_of_this_host",
    "log_text",
    "read_stored_trace",
    "read_trace",
    "send",
    "send_to",
    "span_record",
    "span_table",
    "spans_of",
    "store_takes_spans",
    "store_version",
    "sum_of_costs",
    "trace_record",
    "worker_tracking_uri",
]

P = ParamSpec("P")
T = TypeVar("T")

# Tag of a trace that was made to try the store, where it cannot be deleted.
PROBE_TAG = "mlflow_ctx_autolog.probe"

# Seconds that the store may take to answer one request, and to answer whether it is there.
_ANSWER_TIME = 30.0
_PROBE_TIME = 5.0
_EXPERIMENT_PATH = "/api/2.0/mlflow/experiments/get"
_MISSING = "RESOURCE_DOES_NOT_EXIST"
# Seconds that it may take to return all spans of a trace.
_READING_TIME = 300.0
# Traces that are found at most, and in one request.
_TRACES_FOUND, _TRACES_AT_ONCE = 1000, 100
# Where MLflow's own UI reads a trace's spans, in the form in which they are stored.
_SPANS_PATH = "/ajax-api/2.0/mlflow/get-trace-artifact"


def _in_its_workspace(
    ask: Callable[Concatenate[Destination, P], T],
) -> Callable[Concatenate[Destination, P], T]:
    """Have MLflow speak of the destination's workspace, on whatever thread it is asked."""

    @functools.wraps(ask)
    def asks(destination: Destination, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if destination.workspace is None or ServerWorkspaceContext is None:
            return ask(destination, *args, **kwargs)
        with ServerWorkspaceContext(destination.workspace):
            return ask(destination, *args, **kwargs)

    return asks


def current_tracking_uri() -> str:
    """Return this process's tracking URI, with whatever password it holds."""
    return str(mlflow.get_tracking_uri())


def store_takes_spans() -> bool:
    """Whether the tracking store takes single spans, not only a whole trace with its root."""
    uri = mlflow.get_tracking_uri()
    return not is_databricks_uri(uri) and urlsplit(uri).scheme not in ("", "file")


def exports_to_collector() -> bool:
    """Whether MLflow sends this process's traces to an OTLP endpoint, not to the tracking store."""
    if mlflow_provider._MLFLOW_TRACE_USER_DESTINATION.get() is not None:
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


def store_version() -> str | None:
    """Return the version of MLflow that keeps the traces: the server's, or this one's.

    Asks the server, for three seconds at most; None where it does not answer.
    """
    uri = mlflow.get_tracking_uri()
    if urlsplit(uri).scheme not in ("http", "https"):
        return str(mlflow.__version__)
    store = _client(uri).store
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
    parts = urlsplit(uri)
    if parts.password is not None or "password" in parts.query.lower():
        return None, "the tracking URI holds a password, which is not sent to workers"
    if parts.username is not None:
        # Which is where a token stands that needs no password.
        return None, "the tracking URI holds a user name, which is not sent to workers"
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
    resource = ResourceSpans(
        resource=resource_to_otel_proto(getattr(span._span, "resource", None)),
        scope_spans=[ScopeSpans(spans=[span.to_otel_proto()])],
    )
    payload = TracesData(resource_spans=[resource]).SerializeToString()
    return Record("span", str(span.span_id), bytes(payload), owner)


def spans_of(records: Sequence[Record]) -> list[Span]:
    """Return the spans of records that :func:`span_record` made.

    Raises:
        Exception: A payload is not OTLP.
    """
    return [
        Span.from_otel_proto(span, **({"resource": resource.resource} if _TAKES_RESOURCE else {}))
        for record in records
        if record.kind == "span"
        for resource in TracesData.FromString(record.payload).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


# In older releases of MLflow a span's resource was not read.
_TAKES_RESOURCE = "resource" in inspect.signature(Span.from_otel_proto).parameters


def trace_record(info: TraceInfo) -> Record:
    """Return what is known of a trace as a record."""
    return Record("trace", str(info.trace_id), json.dumps(info.to_dict()).encode())


@_in_its_workspace
def send(destination: Destination, records: Sequence[Record]) -> None:
    """Store records, spans in one request. Storing a record again replaces it.

    Raises:
        StoreError: The store does not answer, or refuses them.
    """
    spans = [record for record in records if record.kind == "span"]
    uri = destination.tracking_uri
    if uri is not None and is_collector(uri):
        send_to_collector(uri, spans)
        return
    if spans:
        _send_spans(destination, spans)
    for record in records:
        if record.kind == "trace":
            _send_trace_info(destination, TraceInfo.from_dict(json.loads(record.payload)))


def send_to(
    tracking_uri: str | None, destination: Destination, records: Sequence[Record]
) -> Destination:
    """Store records in ``tracking_uri``, wherever they were to go; return where they went.

    Without one, those that had no address of their own go to MLflow's configured store.

    Raises:
        StoreError: The store does not answer, or refuses them.
    """
    uri = tracking_uri or destination.tracking_uri or current_tracking_uri()
    used = replace(destination, tracking_uri=uri)
    send(used, records)
    return used


def _send_spans(destination: Destination, records: Sequence[Record]) -> None:
    store = _store(destination)
    if not _is_remote(store) or is_databricks_uri(destination.tracking_uri):
        try:
            spans = spans_of(records)
        except Exception as error:
            raise StoreError(f"this is no span: {error!r}", refused=True) from error
        with _own_errors():
            _client(str(destination.tracking_uri)).log_spans(destination.experiment_id, spans)
        return
    headers = {
        "Content-Type": "application/x-protobuf",
        MLFLOW_EXPERIMENT_ID_HEADER: destination.experiment_id,
    }
    # OTLP messages one after the other are one message with the spans of all.
    body = b"".join(record.payload for record in records)
    answer = _request(store, "POST", OTLP_TRACES_PATH, extra_headers=headers, data=body)
    kind = answer.headers.get("Content-Type", "nothing")
    if not kind.startswith(("application/x-protobuf", "application/json")):
        raise StoreError(
            f"{store.get_host_creds().host} answered with {kind}, as no MLflow server does"
        )


def _send_trace_info(destination: Destination, info: TraceInfo) -> None:
    store = _store(destination)
    if not _is_remote(store):
        with _own_errors():
            store.start_trace(info)
        return
    message = StartTraceV3(trace=Trace(info=info, data=TraceData(spans=[])).to_proto())
    _ask(store, "POST", TRACES_PATH, json=json.loads(message_to_json(message)))


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


@_in_its_workspace
def _metric(
    destination: Destination, trace_id: str, name: str, aggregation: AggregationType
) -> float | None:
    store = _store(destination)
    question: dict[str, Any] = {
        "experiment_ids": [destination.experiment_id],
        "metric_name": name,
        "filters": [f"trace.metadata.{TRACE_KEY} = '{trace_id}'"],
    }
    view, aggregations = MetricViewType.SPANS, [MetricAggregation(aggregation)]
    if _is_remote(store):
        message = QueryTraceMetrics(
            view_type=view.to_proto(),
            aggregations=[each.to_proto() for each in aggregations],
            max_results=10,
            **question,
        )
        document = json.loads(message_to_json(message))
        answer = _ask(store, "POST", f"{TRACES_PATH}/metrics", json=document)
        values = [point.get("values", {}) for point in answer.get("data_points", [])]
    else:
        with _own_errors():
            points = store.query_trace_metrics(
                view_type=view, aggregations=aggregations, **question
            )
            values = [point.values for point in points]
    amounts = [each[str(aggregation.value)] for each in values if str(aggregation.value) in each]
    return sum(amounts) if amounts else None


@_in_its_workspace
def read_trace(destination: Destination, trace_id: str) -> tuple[TraceInfo, list[Span]]:
    """Return what the store has of a trace: its info and all its spans.

    Raises:
        StoreError: The store does not answer, or has no such trace.
    """
    # Not by the client's method, which takes what this process knows of an open trace for what is
    # stored.
    store = _store(destination)
    try:
        if _is_remote(store):
            question = {"trace_id": trace_id, "allow_partial": "true"}
            answer = GetTrace.Response()
            parse_dict(_ask(store, "GET", f"{TRACES_PATH}/get", params=question), answer)
            trace = Trace.from_proto(answer.trace)
        else:
            with _own_errors():
                trace = store.get_trace(trace_id, allow_partial=True)
    except StoreError as error:
        if not error.unsupported:
            raise
        # A store for whole traces keeps the spans in a file.
        with _own_errors():
            trace = _client(str(destination.tracking_uri)).get_trace(trace_id)
    return trace.info, list(trace.data.spans)


@_in_its_workspace
def delete_trace(destination: Destination, trace_id: str) -> None:
    """Delete a trace with all its spans; where that is not allowed, tag it as a probe.

    Raises:
        StoreError: The store allows neither.
    """
    client = _client(str(destination.tracking_uri))
    try:
        with _own_errors():
            client.delete_traces(destination.experiment_id, trace_ids=[trace_id])
    except StoreError:
        with _own_errors():
            client.set_trace_tag(trace_id, PROBE_TAG, "true")


def access(
    tracking_uri: str,
    experiment_id: str | None = None,
    records: Sequence[Record] = (),
    workspace: str | None = None,
) -> dict[str, str | None]:
    """Return how far this process gets with a tracking store, in seconds rather than minutes.

    Args:
        tracking_uri: The store.
        experiment_id: An experiment in it; None to ask no further than for the log-in.
        records: What to store there, to see whether that is allowed.
        workspace: The workspace of the server that the experiment is in.

    Returns:
        For each step that was taken what is wrong there, None where nothing is. The steps are
        ``"reach"``, ``"login"``, ``"experiment"`` and ``"write"``; the first that fails is the
        last.
    """
    destination = Destination(tracking_uri, experiment_id or "0", workspace=workspace)
    last, problem = _try_experiment(destination)
    if experiment_id is None and last == "experiment":
        last, problem = "login", None
    elif problem is None and records:
        last, problem = _try_write(destination, records)
    steps = ("reach", "login", "experiment", "write")
    return {**dict.fromkeys(steps[: steps.index(last)]), last: problem}


@_in_its_workspace
def _try_experiment(destination: Destination) -> tuple[str, str | None]:
    """Return the last step towards reading an experiment, and what is wrong there."""
    named = f"the experiment {destination.experiment_id}"
    try:
        store = _store(destination)
        if _is_remote(store):
            question = {"experiment_id": destination.experiment_id}
            answer = _exchange(store, "GET", _EXPERIMENT_PATH, timeout=_PROBE_TIME, params=question)
            if answer.status_code == 401:
                return "login", "it answered 401 to this process's log-in"
            if answer.status_code == 403:
                return "experiment", f"this log-in may not read {named}"
            document = _json_object(answer) or {}
            experiment = document.get("experiment")
            stage = experiment.get("lifecycle_stage") if isinstance(experiment, dict) else None
            is_missing = document.get("error_code") == _MISSING
            if stage is None and not is_missing:
                return "reach", f"it answered {answer.status_code}, and with no experiment"
        else:
            with _own_errors():
                stage, is_missing = _local_stage(store, destination.experiment_id)
    except StoreError as error:
        return "reach", str(error)
    if is_missing:
        return "experiment", f"{named} does not exist"
    return "experiment", None if stage == "active" else f"{named} is {stage}"


def _try_write(destination: Destination, records: Sequence[Record]) -> tuple[str, str | None]:
    """Return the last step towards storing spans, and what is wrong there."""
    try:
        send(destination, records)
    except StoreError as error:
        # To take whole traces only is no failure.
        return ("experiment", None) if error.unsupported else ("write", str(error))
    return "write", None


def _local_stage(store: Any, experiment_id: str) -> tuple[str | None, bool]:
    try:
        return str(store.get_experiment(experiment_id).lifecycle_stage), False
    except MlflowException as error:
        if error.error_code != _MISSING:
            raise
        return None, True


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
    store = _store(destination)
    if _is_remote(store):
        question = {"request_id": trace_id}
        try:
            answer = _ask(store, "GET", f"{TRACES_PATH}/{trace_id}")
            found = GetTraceInfoV3.Response()
            parse_dict(answer, found)
            info = TraceInfo.from_proto(found.trace.trace_info)
            content = _request(
                store, "GET", _SPANS_PATH, params=question, timeout=_READING_TIME
            ).content
            return _stored_trace(info, _spans_in(content), wanted)
        except StoreError as error:
            if error.unsupported and "RESOURCE_DOES_NOT_EXIST" in str(error):
                raise StoreError(f"there is no trace {trace_id} in {tracking_uri}") from error
            if not error.unsupported:
                raise
    try:
        info, spans = read_trace(destination, trace_id)
    except StoreError as error:
        if not _says_missing(error):
            raise
        raise StoreError(f"there is no trace {trace_id} in {tracking_uri}") from error
    return _stored_trace(info, (span.to_dict() for span in spans), wanted)


def _says_missing(error: StoreError) -> bool:
    """Whether MLflow found no such trace, by its code or, where it has none, by its words."""
    cause = error.__cause__
    code = getattr(cause, "error_code", None)
    return code == _MISSING or (isinstance(cause, MlflowException) and "not found" in str(cause))


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
    client = _client(tracking_uri)
    conditions = [
        f"trace.timestamp_ms {sign} {moment}"
        for sign, moment in ((">=", start), ("<=", end))
        if moment is not None
    ]
    found: list[str] = []
    with _own_errors():
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


def log_text(text: str, name: str) -> None:
    """Log a text to the active run as an artifact.

    Raises:
        RuntimeError: No run is active.
    """
    if mlflow.active_run() is None:
        raise RuntimeError("No MLflow run is active; log inside with mlflow.start_run():")
    mlflow.log_text(text, name)


@functools.lru_cache(maxsize=8)
def _client(tracking_uri: str) -> TracingClient:
    return TracingClient(tracking_uri)


def _store(destination: Destination) -> Any:
    with _own_errors():
        return _client(str(destination.tracking_uri)).store


def _is_remote(store: Any) -> bool:
    return hasattr(store, "get_host_creds")


@contextmanager
def _own_errors() -> Iterator[None]:
    """Turn what MLflow raises into a :class:`StoreError`."""
    try:
        yield
    except StoreError:
        raise
    except (NotImplementedError, MlflowNotImplementedException) as error:
        raise StoreError(str(error), unsupported=True) from error
    except Exception as error:
        refused = isinstance(error, MlflowException) and error.get_http_status_code() == 400
        text = f"{type(error).__name__}: {excerpt(str(error))}"
        raise StoreError(text, refused=refused) from error


def _ask(store: Any, method: str, path: str, **content: Any) -> dict[str, Any]:
    """Make one request whose answer is a JSON object, and return that."""
    document = _json_object(_request(store, method, path, **content))
    if document is None:
        raise StoreError(f"{store.get_host_creds().host} did not answer in JSON to {path}")
    return document


def _json_object(answer: Any) -> dict[str, Any] | None:
    """Return the JSON object of an answer; None where it is none."""
    try:
        document = answer.json()
    except ValueError:
        document = None
    return document if isinstance(document, dict) else None


def _exchange(
    store: Any, method: str, path: str, *, timeout: float = _ANSWER_TIME, **content: Any
) -> Any:
    """Make one request, with MLflow's own log-in, and without its retries of several minutes."""
    try:
        return http_request(
            host_creds=store.get_host_creds(),
            endpoint=path,
            method=method,
            max_retries=0,
            raise_on_status=False,
            timeout=timeout,
            **content,
        )
    except MlflowException as error:
        raise StoreError(f"it cannot be reached: {root_cause(error)}") from error


def _request(store: Any, method: str, path: str, **content: Any) -> Any:
    """Make one request that has to succeed."""
    answer = _exchange(store, method, path, **content)
    if answer.status_code == 200:
        return answer
    raise failure(
        answer,
        "set MLflow's MLFLOW_TRACKING_TOKEN, or _USERNAME and _PASSWORD, where this process runs",
    )
