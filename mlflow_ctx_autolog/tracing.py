"""All that touches MLflow's tracing internals, on the driver and on the workers."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import Token
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
import mlflow.tracing.provider as mlflow_provider
from mlflow.entities import LiveSpan, Span, TraceInfo, TraceState
from mlflow.entities.span import NoOpSpan, create_mlflow_span
from mlflow.environment_variables import MLFLOW_USE_DEFAULT_TRACER_PROVIDER
from mlflow.tracing.client import TracingClient
from mlflow.tracing.constant import TraceTagKey
from mlflow.tracing.trace_manager import InMemoryTraceManager
from mlflow.tracing.utils import (
    encode_span_id,
    generate_mlflow_trace_id_from_otel_trace_id,
    get_experiment_id_for_trace,
)
from mlflow.utils.uri import is_databricks_uri
from opentelemetry.context import Context
from opentelemetry.proto.trace.v1.trace_pb2 import Span as OTelProtoSpan
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace import Span as OTelSpan
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from mlflow_ctx_autolog.context import DriverContext
from mlflow_ctx_autolog.delivery import Destination
from mlflow_ctx_autolog.exceptions import UnsupportedStoreError
from mlflow_ctx_autolog.patching import Patch

__all__ = [
    "WorkerTracing",
    "active_span_headers",
    "add_to_trace",
    "current_experiment_id",
    "current_tracking_uri",
    "has_active_span",
    "parent_activated",
    "send_spans",
    "snapshot",
    "span_from_bytes",
    "span_to_bytes",
    "store_takes_spans",
    "store_version",
    "task_span_activated",
    "worker_tracking_uri",
]

_propagator = TraceContextTextMapPropagator()

# A trace's session and tags can be written through attributes of its root span, which spares a
# request of their own. Older servers keep the tags as plain attributes.
_TRACE_NAME_ATTRIBUTE = f"mlflow.traceTag.{TraceTagKey.TRACE_NAME}"
_SESSION_ATTRIBUTE = "session.id"


def active_span_headers() -> dict[str, str]:
    """Return W3C ``traceparent`` (and ``tracestate``) of the active span; empty if there is none.

    Also for a span that was dropped by sampling: its children must be dropped with it.
    """
    headers: dict[str, str] = {}
    _propagator.inject(headers, context=mlflow_provider.get_current_context())
    return headers


def has_active_span() -> bool:
    """Whether a span, recorded or not, is active in this execution context."""
    span = mlflow_provider.get_current_otel_span()
    return span is not None and span.get_span_context().is_valid


def current_experiment_id() -> str:
    """Return the experiment of the active trace, else the one a new trace would go to.

    May ask the tracking server, where the experiment is known by name only.
    """
    if span := mlflow.get_current_active_span():
        with InMemoryTraceManager.get_instance().get_trace(span.trace_id) as trace:
            if trace is not None and trace.info.trace_location is not None:
                return str(trace.info.experiment_id)
    return str(get_experiment_id_for_trace(ReadableSpan(name="", attributes={})))


def current_tracking_uri() -> str:
    """Return this process's tracking URI, with whatever password it holds."""
    return str(mlflow.get_tracking_uri())


def store_takes_spans() -> bool:
    """Whether the tracking store takes single spans, not only a whole trace with its root."""
    uri = mlflow.get_tracking_uri()
    return not is_databricks_uri(uri) and urlsplit(uri).scheme not in ("", "file")


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
        _forget_server_version(store)
    return None if version is None else str(version)


def _forget_server_version(store: Any) -> None:
    # MLflow remembers for good that it could not read the server's version, which is also what
    # happens when the server was away for a moment.
    version = getattr(type(store), "_get_server_version", None)
    if version is not None and hasattr(version, "cache_clear"):
        version.cache_clear()


def worker_tracking_uri() -> tuple[str | None, str]:
    """Return the tracking URI as workers can use it, and why that is so.

    Returns:
        The URI, absolute and without a password, or None where workers cannot store spans
        there; and a sentence that says why.

    Raises:
        UnsupportedStoreError: Neither can the driver store them for the workers.
    """
    uri = mlflow.get_tracking_uri()
    destination = mlflow_provider._MLFLOW_TRACE_USER_DESTINATION.get()
    if hasattr(destination, "catalog_name"):
        raise UnsupportedStoreError(
            "The traces of this process go to a Unity Catalog schema, which is not supported yet. "
            "Set an MLflow experiment as their destination."
        )
    if not store_takes_spans():
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


@contextmanager
def parent_activated(context: DriverContext) -> Iterator[None]:
    """Make the driver's span the active one, or none active where there is no driver's span."""
    token = _attach_parent(context)
    try:
        yield
    finally:
        mlflow_provider.get_context_api().detach(token)


@contextmanager
def task_span_activated(span: LiveSpan, context: DriverContext) -> Iterator[None]:
    """Make a task's span the active one; where it is not recorded, the driver's."""
    if isinstance(span, NoOpSpan):
        with parent_activated(context):
            yield
    else:
        with mlflow_provider.safe_set_span_in_context(span):
            yield


def _attach_parent(context: DriverContext) -> Token[Context]:
    headers = {"traceparent": context.traceparent, "tracestate": context.tracestate}
    carrier = {name: value for name, value in headers.items() if value is not None}
    parent = _propagator.extract(carrier, context=Context())
    token: Token[Context] = mlflow_provider.get_context_api().attach(parent)
    return token


@functools.lru_cache(maxsize=8)
def _client(tracking_uri: str) -> TracingClient:
    return TracingClient(tracking_uri)


def send_spans(destination: Destination, spans: Sequence[Span]) -> None:
    """Store spans in one request. Storing a span again replaces it.

    Raises:
        Exception: Whatever MLflow raises when the store does not take them.
    """
    client = _client(str(destination.tracking_uri))
    try:
        client.log_spans(destination.experiment_id, list(spans))
    except NotImplementedError:
        _forget_server_version(client.store)
        raise


def span_to_bytes(span: Span) -> bytes:
    """Serialise a finished span, in OpenTelemetry's protobuf format."""
    return bytes(span.to_otel_proto().SerializeToString())


def span_from_bytes(payload: bytes) -> Span:
    """Parse what :func:`span_to_bytes` returned.

    Raises:
        Exception: The bytes are not a span.
    """
    return Span.from_otel_proto(OTelProtoSpan.FromString(payload))


def add_to_trace(span: Span) -> bool:
    """Add a finished span to its trace, if that is still open in this process.

    MLflow stores it together with the trace's root, whatever the store.
    """
    with InMemoryTraceManager.get_instance().get_trace(span.trace_id) as trace:
        if trace is None:
            return False
        trace.span_dict[span.span_id] = _ArrivedSpan(span._span)
        return True


class _ArrivedSpan(Span):  # type: ignore[misc]
    """A finished span of another process, among the live ones of this process's trace."""

    def to_immutable_span(self) -> Span:
        return self


def snapshot(span: LiveSpan) -> Span | None:
    """Return an open span as if it ended now; None for one that is not recorded."""
    if isinstance(span, NoOpSpan) or not span._span.is_recording():
        return None
    readable = span._span._readable_span()
    readable._end_time = time.time_ns()
    return Span(readable)


class WorkerTracing:
    """MLflow's tracing in a worker process: finished spans go to ``submit``, none to MLflow.

    Args:
        submit: Takes a finished span and where it belongs; must return at once.
        destination: Tells where a span that starts now belongs; None where no task is open.
    """

    def __init__(
        self,
        submit: Callable[[Destination, Span], None],
        destination: Callable[[], Destination | None],
    ) -> None:
        self._processor = _WorkerSpanProcessor(submit, destination)
        self._patch = Patch(mlflow_provider, "_get_span_processors", self._span_processors)

    def _span_processors(
        self, original: Callable[..., list[SpanProcessor]], disabled: bool = False
    ) -> list[SpanProcessor]:
        # A factory rather than a provider: MLflow builds a new provider whenever the user's
        # function sets a tracking URI or a destination.
        return original(disabled) if disabled else [self._processor]

    def install(self) -> None:
        """Take over from MLflow's own processors. Idempotent."""
        if not self._patch.active:
            self._patch.apply()
            _rebuild_provider()

    def uninstall(self) -> None:
        """Give tracing in this process back to MLflow. Idempotent."""
        if self._patch.active:
            self._patch.revert()
            self._processor.forget_traces()
            _rebuild_provider()

    def start_task_span(
        self, name: str, context: DriverContext, attributes: Mapping[str, Any]
    ) -> LiveSpan:
        """Start a task's span below the driver's, and leave it active in this context."""
        recorded = dict(attributes)
        if context.traceparent is None:
            recorded[_TRACE_NAME_ATTRIBUTE] = name
            recorded[_SESSION_ATTRIBUTE] = context.session_id
        _attach_parent(context)
        span = mlflow.start_span_no_context(name, span_type="TASK", attributes=recorded)
        # Below a parent that sampling dropped, the parent stays active, so that its calls are
        # dropped with it.
        if not isinstance(span, NoOpSpan):
            mlflow_provider.set_span_in_context(span)
        return span


def _rebuild_provider() -> None:
    # A provider shared with other OpenTelemetry libraries is not ours to drop.
    if MLFLOW_USE_DEFAULT_TRACER_PROVIDER.get():
        mlflow_provider.provider.reset()


class _WorkerSpanProcessor(SpanProcessor):
    """Registers spans as MLflow expects when they start, and hands them over when they end.

    Other than MLflow's processors it keeps nothing of a finished span, and it does not need the
    trace to be known beforehand: the trace's root is in another process.
    """

    def __init__(
        self,
        submit: Callable[[Destination, Span], None],
        destination: Callable[[], Destination | None],
    ) -> None:
        self._submit = submit
        self._destination = destination
        self._lock = threading.Lock()
        self._destinations: dict[int, Destination] = {}
        self._otel_trace_ids: set[int] = set()

    def on_start(self, span: OTelSpan, parent_context: Context | None = None) -> None:  # noqa: ARG002
        destination = self._destination()
        if destination is None:
            return
        manager = InMemoryTraceManager.get_instance()
        otel_trace_id = span.context.trace_id
        trace_id = generate_mlflow_trace_id_from_otel_trace_id(otel_trace_id)
        with self._lock:
            self._destinations[span.context.span_id] = destination
            with manager.get_trace(trace_id) as known:
                if known is None:
                    manager.register_trace(otel_trace_id, _placeholder(trace_id), True)
                    self._otel_trace_ids.add(otel_trace_id)
                manager.register_span(create_mlflow_span(span, trace_id))

    def on_end(self, span: ReadableSpan) -> None:
        if span.context is None:
            return
        with self._lock:
            destination = self._destinations.pop(span.context.span_id, None)
        if destination is None:
            return
        trace_id = generate_mlflow_trace_id_from_otel_trace_id(span.context.trace_id)
        with InMemoryTraceManager.get_instance().get_trace(trace_id) as trace:
            if trace is not None:
                trace.span_dict.pop(encode_span_id(span.context.span_id), None)
        self._submit(destination, Span(span))

    def forget_traces(self) -> None:
        """Drop the placeholders of traces whose spans have all been handed over."""
        with self._lock:
            manager = InMemoryTraceManager.get_instance()
            for otel_trace_id in self._otel_trace_ids:
                manager.pop_trace(otel_trace_id)
            self._otel_trace_ids.clear()


def _placeholder(trace_id: str) -> TraceInfo:
    return TraceInfo(
        trace_id=trace_id, trace_location=None, request_time=None, state=TraceState.IN_PROGRESS
    )
