"""MLflow's tracing: what the driver and the workers both need to know, and the driver's part."""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import Token
from typing import Any, Protocol, TypeVar

import mlflow
import mlflow.entities.span as mlflow_span
import mlflow.tracing.provider as mlflow_provider
import mlflow.tracing.utils as mlflow_utils
from mlflow import environment_variables
from mlflow.entities import LiveSpan, Span, Trace, TraceInfo, TraceLocation, TraceState
from mlflow.entities.span import NoOpSpan
from mlflow.entities.span_status import SpanStatusCode
from mlflow.environment_variables import (
    MLFLOW_TRACE_SAMPLING_RATIO,
)
from mlflow.tracing.config import get_config
from mlflow.tracing.distributed import set_tracing_context_from_http_request_headers
from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter
from mlflow.tracing.trace_manager import InMemoryTraceManager
from mlflow.tracing.utils import (
    add_size_stats_to_trace_metadata,
    aggregate_usage_from_spans,
    generate_mlflow_trace_id_from_otel_trace_id,
    get_experiment_id_for_trace,
)
from opentelemetry.context import Context, create_key, get_value, set_value
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import (
    INVALID_SPAN,
    Link,
    SpanContext,
    Status,
    TraceFlags,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from mlflow_ctx_autolog.context import DriverContext, is_traceparent
from mlflow_ctx_autolog.patching import Patch
from mlflow_ctx_autolog.spans.amounts import Amounts, parse_amounts
from mlflow_ctx_autolog.spans.attributes import FINGERPRINT
from mlflow_ctx_autolog.spans.content import ContentPolicy
from mlflow_ctx_autolog.spans.usage import usage_of_answer

try:
    from mlflow.utils import workspace_context
except ImportError:
    # Of a release without workspaces.
    workspace_context = None

__all__ = [
    "TASK_TYPE",
    "DriverTracing",
    "FallbackSpan",
    "JoinedTrace",
    "SpanEndings",
    "TakesTraces",
    "activate",
    "activated",
    "active_context",
    "active_otel_span",
    "active_run_id",
    "active_span_headers",
    "active_span_ids",
    "active_trace",
    "active_workspace",
    "add_to_trace",
    "attach_parent",
    "complete_info",
    "cost_of",
    "current_experiment_id",
    "declared_traces",
    "end_info",
    "filter_open_span",
    "filtered",
    "flush_exports",
    "for_collector",
    "has_active_span",
    "has_ended",
    "has_failed",
    "info_of_json",
    "info_of_trace",
    "is_client_call",
    "is_in_progress",
    "is_on",
    "is_recorded",
    "is_task",
    "is_valid",
    "list_price",
    "lone_span",
    "model_asked",
    "new_trace",
    "open_spans",
    "parent_activated",
    "priced",
    "record_no_totals",
    "record_totals",
    "record_usage",
    "sampling_ratio",
    "session_and_user",
    "snapshot",
    "span_processors",
    "task_span_activated",
    "totals_of",
    "trace_id_of",
    "tracing_problem",
    "usage_of",
    "with_attributes",
    "without_span",
]

_logger = logging.getLogger(__name__)

OwnerT = TypeVar("OwnerT")

# Not in all releases, which then know of no cost.
_sum_of_costs = getattr(mlflow_utils, "aggregate_cost_from_spans", None)

_propagator = TraceContextTextMapPropagator()

TASK_TYPE = "TASK"

# By MLflow's names; not all releases have constants for them.
_USAGE_OF_SPAN, _COST_OF_SPAN = "mlflow.chat.tokenUsage", "mlflow.llm.cost"
_USAGE_OF_TRACE, _COST_OF_TRACE = "mlflow.trace.tokenUsage", "mlflow.trace.cost"


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
    return mlflow_provider.get_current_otel_span()


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


def deactivate_spans() -> None:
    """Leave no span active in this execution context; in a forked child, for good."""
    mlflow_provider.get_context_api().attach(Context())


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


def open_spans(trace_id: str) -> list[Span]:
    """Return the spans of a trace of this process that have not ended, as they are now."""
    with InMemoryTraceManager.get_instance().get_trace(trace_id) as trace:
        spans = [] if trace is None else list(trace.span_dict.values())
    found = (snapshot(span) for span in spans if isinstance(span, LiveSpan))
    return [span for span in found if span is not None]


def is_task(span: Span) -> bool:
    """Whether a span is that of a task attempt."""
    return span.span_type == TASK_TYPE and span.get_attribute("spark.task.outcome") is not None


def usage_of(span: Span) -> Amounts:
    """Return the token usage that a span reports itself."""
    return parse_amounts(span.get_attribute(_USAGE_OF_SPAN))


def is_client_call(span: Span) -> bool:
    """Whether a span is that of a call of the OpenAI client."""
    return span.get_attribute(FINGERPRINT) is not None


def model_asked(span: Span) -> str:
    """Return the model that a call of the OpenAI client asks. Reads all of the request."""
    inputs = span.inputs
    return str(inputs.get("model")) if isinstance(inputs, dict) else str(None)


def has_failed(span: Span) -> bool:
    """Whether a span has ended with an error."""
    return bool(span.status.status_code == SpanStatusCode.ERROR)


def record_usage(span: LiveSpan, usage: Any) -> None:
    """Write the tokens that the server has counted, unless MLflow has.

    Args:
        span: The span of a call.
        usage: The ``usage`` of the client's reply, by the names of any of its APIs; or None.
    """
    if usage is None or span.get_attribute(_USAGE_OF_SPAN):
        return
    if counts := usage_of_answer(usage.model_dump(warnings=False)):
        span.set_attribute(_USAGE_OF_SPAN, counts)


def cost_of(span: Span) -> Amounts:
    """Return the cost that a span reports itself, in US dollars."""
    return parse_amounts(span.get_attribute(_COST_OF_SPAN))


def priced(span: Span) -> Amounts:
    """Return the cost of a call: as its span reports it, else as the store would find it."""
    # Not in older releases.
    calculate = getattr(mlflow_utils, "calculate_span_cost", None)
    cost = cost_of(span)
    return cost if cost or calculate is None else parse_amounts(calculate(span))


@functools.lru_cache(maxsize=256)
def list_price(model: str) -> tuple[float, float] | None:
    """Return US dollars for a million input and output tokens of a model, if MLflow knows."""
    calculate = getattr(mlflow_utils, "calculate_cost_by_model_and_token_usage", None)
    million = {"input_tokens": 1_000_000, "output_tokens": 1_000_000}
    cost = None if calculate is None else calculate(model, million)
    return None if not cost else (float(cost["input_cost"]), float(cost["output_cost"]))


def totals_of(spans: Sequence[Span]) -> tuple[Amounts, Amounts]:
    """Return token usage and cost of the spans of one tree, as MLflow adds them up."""
    return (
        parse_amounts(aggregate_usage_from_spans(list(spans))),
        {} if _sum_of_costs is None else parse_amounts(_sum_of_costs(list(spans))),
    )


def record_totals(info: TraceInfo, usage: Amounts, cost: Amounts) -> None:
    """Write the token usage and the cost of a whole trace where MLflow keeps them."""
    if usage:
        info.trace_metadata[_USAGE_OF_TRACE] = json.dumps(usage)
    if cost:
        info.trace_metadata[_COST_OF_TRACE] = json.dumps(cost)


def record_no_totals(info: TraceInfo) -> None:
    """Write that a trace has come to nothing yet.

    Else the store would add up all its spans anew with each that comes. Of the cost it is just a
    part, lest a price be shown where none is known.
    """
    nothing: Amounts = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    record_totals(info, nothing, {"input_cost": 0.0})


@contextmanager
def parent_activated(context: DriverContext) -> Iterator[None]:
    """Make the driver's span the active one, or none active where there is no driver's span."""
    token = attach_parent(context)
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


def filtered(span: Span, policy: ContentPolicy) -> Span:
    """Return a finished span with the content that may be sent."""
    changed = copy.copy(span._span)
    changed._attributes = policy.attributes(changed._attributes or {})
    changed._events = tuple(_filtered_events(changed, policy))
    changed._links = tuple(
        Link(link.context, policy.attributes(link.attributes or {})) for link in changed.links
    )
    changed._status = _filtered_status(changed, policy)
    return Span(changed)


def filter_open_span(span: LiveSpan, policy: ContentPolicy) -> None:
    """Leave in an open span, which is about to end, the content that may be sent."""
    inner = span._span
    if isinstance(span, NoOpSpan) or not inner.is_recording():
        return
    allowed = policy.attributes(inner.attributes)
    for name in list(inner.attributes):
        if name not in allowed:
            del inner._attributes[name]
        elif inner.attributes[name] != allowed[name]:
            inner._attributes[name] = allowed[name]
    if not policy.changes_content:
        return
    events = list(_filtered_events(inner, policy))
    inner._events = type(inner._events).from_seq(len(events), events)
    inner._status = _filtered_status(inner, policy)
    # Images and audio, which MLflow has taken out of the inputs to upload them.
    getattr(span, "_attachments", {}).clear()


def _filtered_events(span: ReadableSpan, policy: ContentPolicy) -> Iterator[Event]:
    for event in span.events:
        yield Event(event.name, policy.attributes(event.attributes or {}), event.timestamp)


def _filtered_status(span: ReadableSpan, policy: ContentPolicy) -> Status:
    # An exception's message is there as well.
    return Status(span.status.status_code, policy.text(span.status.description))


def for_collector(span: Span) -> ReadableSpan:
    """Return a finished span as MLflow exports it by OTLP.

    That is with the attributes of OpenTelemetry's conventions on generative AI where
    ``MLFLOW_ENABLE_OTEL_GENAI_SEMCONV`` is set, else with MLflow's own.
    """
    readable: ReadableSpan = span._span
    # Not in older releases.
    variable = getattr(environment_variables, "MLFLOW_ENABLE_OTEL_GENAI_SEMCONV", None)
    if variable is not None and variable.get():
        from mlflow.tracing.export.genai_semconv.translator import translate_span_to_genai

        readable = translate_span_to_genai(readable)
    return readable


class SpanEndings:
    """Has each span of MLflow's changed before it ends, and after MLflow's own span processors.

    Args:
        change: Changes a span that is still open. May raise nothing.
    """

    def __init__(self, change: Callable[[LiveSpan], None]) -> None:
        self._change = change
        self._patch = Patch(mlflow_span, "apply_span_processors", self._apply)

    def install(self) -> None:
        """Idempotent."""
        self._patch.apply()

    def uninstall(self) -> None:
        """Idempotent."""
        self._patch.revert()

    def _apply(self, original: Callable[[LiveSpan], None], span: LiveSpan) -> None:
        original(span)
        self._change(span)


def span_processors() -> list[Callable[[LiveSpan], None]]:
    """Return the functions that ``mlflow.tracing.configure(span_processors=...)`` was given."""
    return list(get_config().span_processors)


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
            flush_exports()
            # It may have been entered elsewhere, as in another cell of a notebook.
            with suppress(ValueError):
                self._entered.close()


def is_recorded(span: Span) -> bool:
    """Whether a span was made, rather than dropped by sampling or since tracing is off."""
    return not isinstance(span, NoOpSpan)


def trace_id_of(context: DriverContext) -> str | None:
    """Return the id of the driver's trace, if its spans are recorded."""
    if context.traceparent is None:
        return None
    _, otel_trace_id, _, flags = context.traceparent.split("-")
    if not int(flags, 16) & TraceFlags.SAMPLED:
        return None
    return str(generate_mlflow_trace_id_from_otel_trace_id(int(otel_trace_id, 16)))


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


def do_not_display(trace_id: str) -> None:
    """Have MLflow not show a trace below a notebook's cell, as it does with those that end."""
    # Only where a notebook has imported it.
    if (display := sys.modules.get("mlflow.tracing.display")) is None:
        return
    with suppress(Exception):
        display.get_display_handler().traces_to_display.pop(trace_id, None)


class TakesTraces(Protocol):
    """Who has a say in how traces of the driver are exported."""

    def take_span(self, span: Span, experiment_id: str) -> bool:
        """Take a span of the driver that has ended; return whether to keep it from MLflow."""

    def take_trace(self, trace: Trace) -> bool:
        """Take a trace whose root has ended; return whether to keep it from MLflow.

        May complete its ``info``, and may take its time: nobody waits who did not ask to.
        """


class DriverTracing:
    """Lets somebody else export traces of the driver, instead of MLflow or before it.

    What is done here is done where MLflow exports: on its own threads, unless the user has turned
    asynchronous export off, and waited for by ``mlflow.flush_trace_async_logging()``.
    """

    def __init__(self, takes: TakesTraces) -> None:
        self._takes = takes
        self._patches = [
            Patch(MlflowV3SpanExporter, "_log_spans", self._log_spans),
            Patch(MlflowV3SpanExporter, "_log_trace", self._log_trace),
        ]

    def install(self) -> None:
        """Idempotent."""
        for patch in self._patches:
            patch.apply()

    def uninstall(self) -> None:
        """Idempotent."""
        for patch in self._patches:
            patch.revert()

    def _log_spans(
        self,
        original: Callable[..., None],
        exporter: Any,
        experiment_id: str,
        spans: list[Span],
        workspace: str | None = None,
    ) -> None:
        rest = [span for span in spans if not self._try(self._takes.take_span, span, experiment_id)]
        if rest:
            original(exporter, experiment_id, rest, *([workspace] if workspace else []))

    def _log_trace(
        self,
        original: Callable[..., None],
        exporter: Any,
        trace: Trace,
        prompts: Sequence[Any],
        workspace: str | None = None,
    ) -> None:
        if trace is not None and self._try(self._takes.take_trace, trace):
            # All that is left to MLflow is what does not travel with spans.
            attached = any(getattr(span, "_attachments", None) for span in trace.data.spans)
            if not attached and not prompts:
                return
        original(exporter, trace, prompts, *([workspace] if workspace else []))

    def _try(self, take: Callable[..., bool], *args: Any) -> bool:
        try:
            return take(*args)
        except Exception as error:
            _logger.warning("MLflow exports a span or trace, since we could not: %r", error)
            return False


def flush_exports() -> None:
    """Wait until MLflow has exported what has ended on the driver."""
    mlflow.flush_trace_async_logging()


def info_of_trace(
    trace_id: str, experiment_id: str, began: int, metadata: dict[str, str], tags: dict[str, str]
) -> TraceInfo:
    """Return the info of a trace that this process did not make.

    Args:
        trace_id: MLflow's id of it.
        experiment_id: Where it is kept.
        began: Nanoseconds since the epoch.
        metadata: What is fixed of it.
        tags: What may be changed.
    """
    return TraceInfo(
        trace_id=trace_id,
        trace_location=TraceLocation.from_experiment_id(experiment_id),
        request_time=began // 1_000_000,
        state=TraceState.OK,
        trace_metadata=metadata,
        tags=tags,
    )


def info_of_json(text: bytes) -> TraceInfo:
    """Return the info of a trace as :func:`json.dumps` has written it."""
    return TraceInfo.from_dict(json.loads(text))


def is_in_progress(info: TraceInfo) -> bool:
    """Whether nobody has ended a trace yet."""
    return bool(info.state == TraceState.IN_PROGRESS)


def end_info(info: TraceInfo, began: int, ended: int, *, failed: bool = False) -> None:
    """Write how long a trace took, from times in nanoseconds since the epoch."""
    info.execution_duration = max(0, ended - began) // 1_000_000
    info.state = TraceState.ERROR if failed else TraceState.OK


def with_attributes(span: Span, attributes: Mapping[str, Any]) -> Span:
    """Return a span with further attributes."""
    changed = copy.copy(span._span)
    said = {name: json.dumps(value) for name, value in attributes.items()}
    changed._attributes = {**(changed._attributes or {}), **said}
    return Span(changed)


def complete_info(trace: Trace) -> TraceInfo:
    """Return the info of a trace whose root has ended, with what MLflow adds on export."""
    add_size_stats_to_trace_metadata(trace)
    info: TraceInfo = trace.info
    return info
