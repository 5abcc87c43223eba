"""MLflow's tracing in a worker process: finished spans go to whoever takes them, none to MLflow."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import mlflow
import mlflow.tracing.provider as mlflow_provider
from mlflow.entities import LiveSpan, Span, TraceInfo, TraceLocation, TraceState
from mlflow.entities.span import NoOpSpan, create_mlflow_span
from mlflow.environment_variables import MLFLOW_USE_DEFAULT_TRACER_PROVIDER
from mlflow.tracing.constant import TraceTagKey
from mlflow.tracing.trace_manager import InMemoryTraceManager
from mlflow.tracing.utils import encode_span_id, generate_mlflow_trace_id_from_otel_trace_id
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace import Span as OTelSpan
from opentelemetry.trace import get_current_span, set_span_in_context

from mlflow_ctx_autolog.context import DriverContext
from mlflow_ctx_autolog.patching import Patch
from mlflow_ctx_autolog.tracing import (
    TASK_TYPE,
    SpanEndings,
    attach_parent,
    has_failed,
    is_valid,
    open_spans,
)

__all__ = ["Branch", "WorkerTracing", "info_of_own_trace"]

OwnerT = TypeVar("OwnerT")

# A trace's session and tags can be written through attributes of its root span, which spares a
# request of their own. Older servers keep the tags as plain attributes.
_TAG_PREFIX = "mlflow.traceTag."
_TRACE_NAME_ATTRIBUTE = f"{_TAG_PREFIX}{TraceTagKey.TRACE_NAME}"
_SESSION_ATTRIBUTE, _USER_ATTRIBUTE = "session.id", "user.id"

# Spans that have ended below another, from which on those that start there are branches.
_DIVIDED_FROM = 100


@dataclass(eq=False)
class Branch:
    """One span directly below a task's, with all below it, so that they may be kept together.

    So is a span directly below one that has grown large, as a span around all calls of a partition.

    Args:
        top: The id of the uppermost span.
        above: The id of the span above that; None for a root.
        outer: The branch of that span; None where it is the task's.
        place: Where its spans go, once that is decided; for whoever takes them to say.
    """

    top: str
    above: str | None
    outer: Branch | None = None
    place: Any = None


@dataclass(eq=False)
class _OpenSpan(Generic[OwnerT]):
    """A span that has not ended: whose it is, and what it lies in.

    Args:
        owner: Whose it is.
        branch: Its branch; None for a task's span.
        above: The span above it, where that is open, too, and has the same owner.
        ended: Spans below it that have ended.
    """

    owner: OwnerT
    branch: Branch | None
    above: _OpenSpan[OwnerT] | None
    ended: int = 0

    @property
    def is_divided(self) -> bool:
        """Whether each span that starts directly below it begins a branch."""
        return self.branch is None or self.ended >= _DIVIDED_FROM

    def count_below(self) -> None:
        """Count a span below it that has ended, for those above it as well."""
        each: _OpenSpan[OwnerT] | None = self
        while each is not None:
            each.ended += 1
            each = each.above


class WorkerTracing(Generic[OwnerT]):
    """MLflow's tracing in a worker process: finished spans go to ``submit``, none to MLflow.

    Args:
        submit: Takes a finished span, its owner and its branch, None for a task's span; must return
            at once.
        owner: Tells whose a span is that starts now; None where no task is open.
        change: Changes an owner's span that is about to end. May raise nothing.
        parent: Tells what is active, as :func:`active_context` does, for threads and processes
            in which nothing is; None where no task is open.
    """

    def __init__(
        self,
        submit: Callable[[OwnerT, Span, Branch | None], None],
        owner: Callable[[], OwnerT | None],
        change: Callable[[OwnerT, LiveSpan], None],
        parent: Callable[[], Context | None] = lambda: None,
    ) -> None:
        self._processor = _WorkerSpanProcessor(submit, owner)
        self._change = change
        self._endings = SpanEndings(self._ending)
        self._parent = parent
        self._patch = Patch(mlflow_provider, "_get_span_processors", self._span_processors)
        self._parent_patch = Patch(mlflow_provider, "get_current_context", self._current_context)

    def _span_processors(
        self, original: Callable[..., list[SpanProcessor]], disabled: bool = False
    ) -> list[SpanProcessor]:
        # A factory rather than a provider: MLflow builds a new provider whenever the user's
        # function sets a tracking URI or a destination.
        return original(disabled) if disabled else [self._processor]

    def _current_context(self, original: Callable[[], Context | None]) -> Context | None:
        # All of MLflow asks here for the span that is active, with every autolog of it.
        context = original()
        if is_valid(get_current_span(context)):
            return context
        parent = self._parent()
        return context if parent is None else set_span_in_context(get_current_span(parent), context)

    def install(self) -> None:
        """Take over from MLflow's own processors. Idempotent."""
        if not self._patch.active:
            self._patch.apply()
            self._endings.install()
            self._parent_patch.apply()
            _rebuild_provider()

    def uninstall(self) -> None:
        """Give tracing in this process back to MLflow. Idempotent."""
        if self._patch.active:
            self._patch.revert()
            self._endings.uninstall()
            self._parent_patch.revert()
            self._processor.forget_traces()
            _rebuild_provider()

    def _ending(self, span: LiveSpan) -> None:
        owner = self._processor.owner_of(span)
        if owner is not None:
            self._change(owner, span)

    def start_task_span(
        self, name: str, context: DriverContext, attributes: Mapping[str, Any]
    ) -> LiveSpan:
        """Start a task's span below the driver's, and leave it active in this context."""
        recorded = dict(attributes)
        if context.traceparent is None:
            recorded[_TRACE_NAME_ATTRIBUTE] = name
            recorded[_SESSION_ATTRIBUTE] = context.session_id
            if context.user is not None:
                recorded[_USER_ATTRIBUTE] = context.user
            for tag, value in context.tags.items():
                recorded[f"{_TAG_PREFIX}{tag}"] = value
        attach_parent(context)
        span = mlflow.start_span_no_context(name, span_type=TASK_TYPE, attributes=recorded)
        if not isinstance(span, NoOpSpan):
            self._processor.is_tasks(int(span.span_id, 16))
        # Below a parent that sampling dropped, the parent stays active, so that its calls are
        # dropped with it.
        if not isinstance(span, NoOpSpan) or context.traceparent is None:
            mlflow_provider.set_span_in_context(span)
        return span

    def branch_below(self, top: str, above: str | None) -> Branch:
        """Return the branch of a span that another process has started below an open one.

        Args:
            top: The id of the span, and of its branch if it begins one.
            above: The id of the open span.
        """
        return self._processor.branch_below(top, above)

    def count_below(self, above: str | None) -> None:
        """Count a span that has ended in another process, below an open one of this."""
        self._processor.count_below(above)

    def show_open(
        self, owner: OwnerT, task_span: LiveSpan, show: Callable[[Span, Branch], None]
    ) -> None:
        """Show the spans below a task's that have not ended, as they are now, and their branches.

        One that ends meanwhile is submitted after it was shown.
        """
        self._processor.show_open(owner, task_span, show)


def info_of_own_trace(span: Span, context: DriverContext) -> TraceInfo | None:
    """Return the info of a task's own trace, with metadata, which its root span cannot carry.

    Args:
        span: The task's span, which has ended.
        context: What came from the driver.

    Returns:
        None where the driver declared none, or where the trace is the driver's.
    """
    if context.traceparent is not None or not context.metadata:
        return None
    return TraceInfo(
        trace_id=span.trace_id,
        trace_location=TraceLocation.from_experiment_id(context.experiment_id),
        request_time=span.start_time_ns // 1_000_000,
        execution_duration=(span.end_time_ns - span.start_time_ns) // 1_000_000,
        state=TraceState.ERROR if has_failed(span) else TraceState.OK,
        trace_metadata=dict(context.metadata),
    )


def _rebuild_provider() -> None:
    # A provider shared with other OpenTelemetry libraries is not ours to drop.
    if MLFLOW_USE_DEFAULT_TRACER_PROVIDER.get():
        mlflow_provider.provider.reset()


class _WorkerSpanProcessor(SpanProcessor, Generic[OwnerT]):
    """Registers spans as MLflow expects when they start, and hands them over when they end.

    Other than MLflow's processors it keeps nothing of a finished span, and it does not need the
    trace to be known beforehand: the trace's root is in another process.
    """

    def __init__(
        self,
        submit: Callable[[OwnerT, Span, Branch | None], None],
        owner: Callable[[], OwnerT | None],
    ) -> None:
        self._submit = submit
        self._owner = owner
        self._lock = threading.Lock()
        self._open: dict[int, _OpenSpan[OwnerT]] = {}
        self._otel_trace_ids: set[int] = set()
        os.register_at_fork(after_in_child=self._forget_parents_spans)

    def _forget_parents_spans(self) -> None:
        # Another thread may have held a lock, this one or MLflow's, while the process forked.
        self._lock = threading.Lock()
        if self._otel_trace_ids:
            self._open.clear()
            self._otel_trace_ids.clear()
            InMemoryTraceManager._instance = None

    def on_start(self, span: OTelSpan, parent_context: Context | None = None) -> None:  # noqa: ARG002
        owner = self._owner()
        if owner is None:
            return
        manager = InMemoryTraceManager.get_instance()
        otel_trace_id = span.context.trace_id
        trace_id = generate_mlflow_trace_id_from_otel_trace_id(otel_trace_id)
        span_id = span.context.span_id
        top, above = encode_span_id(span_id), None
        with self._lock:
            span_above = None
            if span.parent is not None:
                above = encode_span_id(span.parent.span_id)
                span_above = self._open.get(span.parent.span_id)
            if span_above is not None and span_above.owner is not owner:
                span_above = None
            branch = _branch_below(span_above, top, above)
            self._open[span_id] = _OpenSpan(owner, branch, span_above)
            with manager.get_trace(trace_id) as known:
                if known is None:
                    manager.register_trace(otel_trace_id, _placeholder(trace_id), True)
                    self._otel_trace_ids.add(otel_trace_id)
                manager.register_span(create_mlflow_span(span, trace_id))

    def _open_span(self, span_id: str | None) -> _OpenSpan[OwnerT] | None:
        return None if span_id is None else self._open.get(int(span_id, 16))

    def branch_below(self, top: str, above: str | None) -> Branch:
        with self._lock:
            return _branch_below(self._open_span(above), top, above)

    def count_below(self, above: str | None) -> None:
        with self._lock:
            if (found := self._open_span(above)) is not None:
                found.count_below()

    def is_tasks(self, span_id: int) -> None:
        with self._lock:
            if span_id in self._open:
                self._open[span_id].branch = None

    def on_end(self, span: ReadableSpan) -> None:
        if span.context is None:
            return
        with self._lock:
            ended = self._open.pop(span.context.span_id, None)
            if ended is not None and ended.above is not None:
                ended.above.count_below()
        if ended is None:
            return
        trace_id = generate_mlflow_trace_id_from_otel_trace_id(span.context.trace_id)
        with InMemoryTraceManager.get_instance().get_trace(trace_id) as trace:
            if trace is not None:
                trace.span_dict.pop(encode_span_id(span.context.span_id), None)
        self._submit(ended.owner, Span(span), ended.branch)

    def show_open(
        self, owner: OwnerT, task_span: LiveSpan, show: Callable[[Span, Branch], None]
    ) -> None:
        with self._lock:
            found = {
                encode_span_id(span_id): each.branch
                for span_id, each in self._open.items()
                if each.owner is owner and each.branch is not None
            }
            if found:
                for span in open_spans(task_span.trace_id):
                    if span.span_id in found:
                        show(span, found[span.span_id])

    def owner_of(self, span: LiveSpan) -> OwnerT | None:
        """Return whose an open span is; None if it is nobody's."""
        with self._lock:
            found = self._open.get(span._span.get_span_context().span_id)
            return None if found is None else found.owner

    def forget_traces(self) -> None:
        """Drop the placeholders of traces whose spans have all been handed over."""
        with self._lock:
            manager = InMemoryTraceManager.get_instance()
            for otel_trace_id in self._otel_trace_ids:
                manager.pop_trace(otel_trace_id)
            self._otel_trace_ids.clear()


def _branch_below(span: _OpenSpan[OwnerT] | None, top: str, above: str | None) -> Branch:
    """Return the branch of what starts directly below a span."""
    if span is None or span.branch is None:
        return Branch(top, above)
    return Branch(top, above, span.branch) if span.is_divided else span.branch


def _placeholder(trace_id: str) -> TraceInfo:
    return TraceInfo(
        trace_id=trace_id, trace_location=None, request_time=None, state=TraceState.IN_PROGRESS
    )
