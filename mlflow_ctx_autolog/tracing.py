"""What span is active, by MLflow's tracing, and making another one so."""

from __future__ import annotations

import copy
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import Token
from typing import Any

import mlflow
import mlflow.tracing.provider as mlflow_provider
from mlflow.entities import Span, TraceInfo
from mlflow.entities.span import NoOpSpan
from mlflow.environment_variables import MLFLOW_TRACE_SAMPLING_RATIO
from mlflow.tracing.distributed import set_tracing_context_from_http_request_headers
from mlflow.tracing.trace_manager import InMemoryTraceManager
from mlflow.tracing.utils import get_experiment_id_for_trace
from opentelemetry.context import Context, create_key, get_value, set_value
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import (
    INVALID_SPAN,
    SpanContext,
    TraceFlags,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from mlflow_ctx_autolog.context import DriverContext, is_traceparent
from mlflow_ctx_autolog.patching import Patch

try:
    from mlflow.utils import workspace_context
except ImportError:
    # Of a release without workspaces.
    workspace_context = None

__all__ = [
    "FallbackSpan",
    "JoinedTrace",
    "activate",
    "activated",
    "active_context",
    "active_otel_span",
    "active_run_id",
    "active_span_headers",
    "active_span_ids",
    "active_trace",
    "active_workspace",
    "attach_parent",
    "current_context",
    "current_experiment_id",
    "declared_traces",
    "has_active_span",
    "has_ended",
    "has_span",
    "is_on",
    "is_valid",
    "lone_span",
    "new_trace",
    "parent_activated",
    "sampling_ratio",
    "session_and_user",
    "tracing_problem",
    "without_span",
]

_propagator = TraceContextTextMapPropagator()


def active_span_headers() -> dict[str, str]:
    """Return W3C ``traceparent`` (and ``tracestate``) of the active span; empty if there is none.

    Also for a span that was dropped by sampling: its children must be dropped with it.
    """
    return headers_of(active_context())


def has_active_span() -> bool:
    """Whether a span, recorded or not, is active in this execution context."""
    return is_valid(mlflow_provider.get_current_otel_span())


def active_context() -> Context:
    """Return what is active in this execution context, to be the parent of spans elsewhere."""
    span = mlflow_provider.get_current_otel_span()
    return set_span_in_context(span if is_valid(span) else INVALID_SPAN, Context())


def active_otel_span() -> Any:
    """Return the span that is active in this execution context, as cheaply as can be."""
    # MLflow looks up first whether it shares OpenTelemetry's contexts. If so, its own have no span.
    span = get_current_span(current_context())
    return span if is_valid(span) else mlflow_provider.get_current_otel_span()


# Returns MLflow's own context, another object wherever another span is active in it. It has none
# where MLflow shares OpenTelemetry's contexts. Asked with each command to the JVM.
current_context: Callable[[], Context] = mlflow_provider.mlflow_runtime_context.get_current


def active_run_id() -> str | None:
    """Return the id of MLflow's run that is active on this thread; None for none."""
    # mlflow-tracing has no runs.
    active_run = getattr(mlflow, "active_run", None)
    run = None if active_run is None else active_run()
    return None if run is None else str(run.info.run_id)


def is_valid(span: Any) -> bool:
    """Whether something is a span that others can be below."""
    # Where MLflow could not start a span, the one that it pretends to be in has no context.
    context = None if span is None else span.get_span_context()
    return context is not None and context.is_valid


def headers_of(active: Context) -> dict[str, str]:
    """Return W3C headers of what :func:`active_context` returned, to be sent elsewhere."""
    headers: dict[str, str] = {}
    _propagator.inject(headers, context=active)
    return headers


def context_of(context: DriverContext) -> Context:
    """Return what is active where a span of another process is."""
    headers = {"traceparent": context.traceparent, "tracestate": context.tracestate}
    carrier = {name: value for name, value in headers.items() if value is not None}
    return _propagator.extract(carrier, context=Context())


def current_experiment_id() -> str:
    """Return the experiment of the active trace, else the one a new trace would go to.

    May ask the tracking server, where the experiment is known by name only.
    """
    if span := mlflow.get_current_active_span():
        with InMemoryTraceManager.get_instance().get_trace(span.trace_id) as trace:
            if trace is not None and trace.info.experiment_id is not None:
                return str(trace.info.experiment_id)
    return str(get_experiment_id_for_trace(ReadableSpan(name="", attributes={})))


def is_on() -> bool:
    """Whether spans are made here: neither tracing nor this context is switched off."""
    declared = _declared()
    return (
        bool(mlflow_provider.is_tracing_enabled()) and getattr(declared, "enabled", 1) is not False
    )


def declared_traces() -> tuple[dict[str, str], dict[str, str]]:
    """Return tags and metadata of new traces, as ``mlflow.tracing.context()`` has them."""
    declared = _declared()
    return dict(getattr(declared, "tags", {})), dict(getattr(declared, "metadata", {}))


def session_and_user() -> tuple[str | None, str | None]:
    """Return session and user of the trace of the active span, where it has them."""
    info = active_trace()
    metadata = {} if info is None else info.trace_metadata
    return metadata.get("mlflow.trace.session"), metadata.get("mlflow.trace.user")


def _declared() -> Any:
    # A function of the same name hides the module, which older releases of MLflow do not have.
    module = sys.modules.get("mlflow.tracing.context")
    variable = getattr(module, "_USER_TRACE_CONTEXT", None)
    return None if variable is None else variable.get()


def active_span_ids() -> tuple[str, str] | None:
    """Return MLflow's ids of the active span's trace and of the span; None if there is none."""
    span = mlflow.get_current_active_span()
    return None if span is None or isinstance(span, NoOpSpan) else (span.trace_id, span.span_id)


def active_trace() -> TraceInfo | None:
    """Return what is known of the trace of the active span; None if it is not ours to export."""
    span = mlflow.get_current_active_span()
    if span is None or isinstance(span, NoOpSpan):
        return None
    with InMemoryTraceManager.get_instance().get_trace(span.trace_id) as trace:
        if trace is None or trace.is_remote_trace or trace.info.trace_location is None:
            return None
        return copy.deepcopy(trace.info)


def active_workspace() -> str | None:
    """Return the workspace of the active span's trace, or of a new one; None for none."""
    span = mlflow.get_current_active_span()
    if span is not None:
        with InMemoryTraceManager.get_instance().get_trace(span.trace_id) as trace:
            if trace is not None:
                return getattr(trace, "workspace", None)
    return None if workspace_context is None else workspace_context.get_request_workspace()


@contextmanager
def parent_activated(context: DriverContext) -> Iterator[None]:
    """Make the driver's span the active one, or none active where there is no driver's span."""
    token = attach_parent(context)
    try:
        yield
    finally:
        mlflow_provider.get_context_api().detach(token)


def attach_parent(context: DriverContext) -> Token[Context]:
    """Make the driver's span the active one, as :func:`parent_activated` does, from now on."""
    token: Token[Context] = mlflow_provider.get_context_api().attach(context_of(context))
    return token


def activate(traceparent: str | None) -> None:
    """Make the span of a ``traceparent`` the active one from now on; none where that is None."""
    headers = {} if traceparent is None else {"traceparent": traceparent}
    mlflow_provider.get_context_api().attach(_propagator.extract(headers, context=Context()))


@contextmanager
def activated(context: Context) -> Iterator[None]:
    """Make what :func:`active_context` returned the active one, for a block."""
    token = mlflow_provider.get_context_api().attach(context)
    try:
        yield
    finally:
        mlflow_provider.get_context_api().detach(token)


_WITHOUT_SPAN = create_key("ctx_autolog_without_span")


def without_span() -> Context:
    """Return what is active where no span is to be, whatever handed the work over."""
    return set_value(_WITHOUT_SPAN, True, Context())


def has_span(context: Context) -> bool:
    """Whether a span is active in a context."""
    return is_valid(get_current_span(context))


def has_ended(context: Context) -> bool:
    """Whether the span of what :func:`active_context` returned has ended."""
    return getattr(get_current_span(context), "end_time", None) is not None


class FallbackSpan:
    """Has another span be active where none is.

    Args:
        context: Returns what is active then, as :func:`active_context` does; None for nothing. A
            span that has ended is nothing.
    """

    def __init__(self, context: Callable[[], Context | None]) -> None:
        self._context = context
        # All of MLflow asks here, with every autolog of it.
        self._patch = Patch(mlflow_provider, "get_current_context", self._current)

    def install(self) -> None:
        """Idempotent."""
        self._patch.apply()

    def uninstall(self) -> None:
        """Idempotent."""
        self._patch.revert()

    def _current(self, original: Callable[[], Context | None]) -> Context | None:
        context = original()
        if is_valid(get_current_span(context)) or get_value(_WITHOUT_SPAN, context):
            return context
        other = self._context()
        if other is None or has_ended(other):
            return context
        return set_span_in_context(get_current_span(other), context)


class JoinedTrace:
    """Makes the span that ``TRACEPARENT`` names the active one, in the context of :meth:`enter`."""

    def __init__(self) -> None:
        self._entered = ExitStack()
        self._traceparent: str | None = None

    def enter(self, environ: Mapping[str, str] = os.environ) -> None:
        """Idempotent. Where there is no such variable, nothing happens.

        Raises:
            ValueError: The variable does not hold a ``traceparent``.
        """
        traceparent = environ.get("TRACEPARENT")
        if not traceparent or traceparent == self._traceparent:
            return
        if not is_traceparent(traceparent):
            raise ValueError(
                f"TRACEPARENT={traceparent!r} is not a W3C traceparent, as 00-<32 hexadecimal "
                "digits>-<16 hexadecimal digits>-01; unset it, or join_trace"
            )
        self.leave()
        headers = {"traceparent": traceparent, "tracestate": environ.get("TRACESTATE", "")}
        self._entered.enter_context(set_tracing_context_from_http_request_headers(headers))
        self._traceparent = traceparent

    def leave(self) -> None:
        """Idempotent."""
        if self._traceparent is not None:
            self._traceparent = None
            # MLflow drops what it has not exported when the trace is left.
            mlflow.flush_trace_async_logging()
            # It may have been entered elsewhere, as in another cell of a notebook.
            with suppress(ValueError):
                self._entered.close()


def tracing_problem() -> str | None:
    """Return why this process makes no spans; None if it does."""
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return "OTEL_SDK_DISABLED is true"
    if not mlflow_provider.is_tracing_enabled():
        return "mlflow.tracing.disable() was called"
    return None


def sampling_ratio() -> float:
    """Return the share of traces that this process records."""
    ratio = MLFLOW_TRACE_SAMPLING_RATIO.get()
    return 1.0 if ratio is None or not 0.0 <= ratio <= 1.0 else float(ratio)


def lone_span(name: str, trace_id: str) -> Span:
    """Return a finished span of its own, in a trace of that id (``tr-`` and 32 hex digits)."""
    now = time.time_ns()
    context = SpanContext(
        trace_id=int(trace_id.removeprefix("tr-"), 16),
        span_id=random.getrandbits(64) or 1,
        is_remote=False,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
    )
    attributes = {"mlflow.traceRequestId": json.dumps(trace_id)}
    return Span(ReadableSpan(name, context, attributes=attributes, start_time=now, end_time=now))


@contextmanager
def new_trace(name: str) -> Iterator[str]:
    """Run a block in a trace of its own, whatever span is active; yield the trace's id."""
    with activated(without_span()), mlflow.start_span(name) as span:
        yield str(span.trace_id)
