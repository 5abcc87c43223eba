"""MLflow's tracer in a worker: its spans nest among ours, and are handed over when they end."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import mlflow.tracing.fluent as mlflow_fluent
import mlflow.tracing.provider as mlflow_provider
from mlflow.entities import TraceInfo, TraceState
from mlflow.entities.span import LiveSpan, create_mlflow_span
from mlflow.environment_variables import MLFLOW_USE_DEFAULT_TRACER_PROVIDER
from mlflow.tracing.trace_manager import InMemoryTraceManager
from mlflow.tracing.utils import generate_mlflow_trace_id_from_otel_trace_id
from opentelemetry import context as otel_context_api
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace import Span as OTelSpan
from opentelemetry.trace import NonRecordingSpan, get_current_span, set_span_in_context

from mlflow_ctx_autolog.mlflow_bridge.conversion import (
    context_of,
    live_span,
    otel_context,
    record_of,
)
from mlflow_ctx_autolog.mlflow_bridge.trace_words import TraceWords, declared_context
from mlflow_ctx_autolog.patching import Patch
from mlflow_ctx_autolog.spans.record import SpanContext, SpanRecord
from mlflow_ctx_autolog.task import Task, Work

__all__ = ["WorkerTracer"]


class WorkerTracer:
    """MLflow's tracing in a worker process: finished spans go to ``ended``, none to MLflow.

    Args:
        work: Tells what is being done here and now; None outside tasks.
        started: Is told of a span that has started: its task, its id, that of its parent, and what
            returns it as it is.
        ended: Takes a span that has ended.
    """

    def __init__(
        self,
        work: Callable[[], Work | None],
        started: Callable[[Task, str, str | None, Callable[[], SpanRecord | None]], None],
        ended: Callable[[SpanRecord], None],
    ) -> None:
        self._work = work
        self._words = TraceWords()
        self._processor = _Processor(work, started, ended, self._words.note)
        self._task_spans: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._patches = [
            Patch(mlflow_provider, "_get_span_processors", self._span_processors),
            Patch(mlflow_provider, "get_current_context", self._current_context),
            Patch(LiveSpan, "from_immutable_span", self._processor.copy_of),
            Patch(mlflow_fluent, "_merge_trace", self._processor.merge),
        ]
        # Where MLflow shares provider and context with other libraries, these ask here.
        self._shared_context = Patch(otel_context_api, "get_current", self._current_context)
        os.register_at_fork(after_in_child=self._forget_parents_spans)

    @property
    def is_installed(self) -> bool:
        """Whether it has taken over."""
        return self._patches[0].active

    def install(self) -> None:
        """Take over from MLflow's own processors. Idempotent."""
        if not self.is_installed:
            for patch in self._patches:
                patch.apply()
            _rebuild_provider()
            if not MLFLOW_USE_DEFAULT_TRACER_PROVIDER.get():
                self._shared_context.apply()
                # Else other libraries have no provider before MLflow makes its first span.
                mlflow_provider._get_tracer(__name__)

    def uninstall(self) -> None:
        """Give tracing in this process back to MLflow. Idempotent."""
        if self.is_installed:
            for patch in self._patches:
                patch.revert()
            self._shared_context.revert()
            self._processor.forget_traces()
            _rebuild_provider()

    def active(self) -> SpanContext | None:
        """Return the span of MLflow's that is active here; None for none."""
        unified = not MLFLOW_USE_DEFAULT_TRACER_PROVIDER.get()
        context = None if unified else mlflow_provider.get_context_api().get_current()
        found = get_current_span(context).get_span_context()
        return context_of(found) if found is not None and found.is_valid else None

    def deactivate(self) -> None:
        """Leave no span active in this execution context; in a forked child, for good."""
        mlflow_provider.get_context_api().attach(Context())

    def said_of(self, task: Task) -> SpanRecord | None:
        """Return a task's span with what the user's function has said of it; None for nothing.

        The function can no longer change it after this.
        """
        with self._lock:
            span = self._task_spans.pop(task.span_id, None)
        if span is None:
            return None
        self._processor.forget(span)
        return record_of(span._readable_span())

    def note_call(self, task: Task) -> None:
        """Note what the user's function has declared where a call of a task's starts."""
        self._words.note(task.trace_id)

    def said_of_trace(self, task: Task) -> dict[str, str]:
        """Return what was said here of a task's trace since this was asked last."""
        return self._words.take(task.trace_id)

    def _span_processors(
        self, original: Callable[..., list[SpanProcessor]], disabled: bool = False
    ) -> list[SpanProcessor]:
        # A factory rather than a provider: MLflow builds a new provider whenever the user's
        # function sets a tracking URI or a destination.
        return original(disabled) if disabled else [self._processor]

    def _current_context(self, original: Callable[[], Context | None]) -> Context | None:
        # All of MLflow asks here for the span that is active, with every autolog of it.
        context = original()
        active = get_current_span(context).get_span_context()
        if active is not None and active.is_valid:
            return context
        work = self._work()
        parent = None if work is None else work.parent_or_task
        if work is None or parent is None:
            return context
        return set_span_in_context(self._span_of(work.task, parent), context)

    def _span_of(self, task: Task, parent: SpanContext) -> Any:
        """Return a span for MLflow to see as the active one: as itself, where it is open here."""
        if (found := self._processor.open_span(parent.span_id)) is not None:
            return found
        is_tasks = task.span is not None and parent.span_id == task.span.context.span_id
        if task.span is None or not is_tasks or not parent.is_sampled:
            return NonRecordingSpan(otel_context(parent))
        with self._lock:
            if task.span_id not in self._task_spans:
                self._task_spans[task.span_id] = self._processor.adopt(task.span.snapshot())
            return self._task_spans[task.span_id]

    def _forget_parents_spans(self) -> None:
        self._lock = threading.Lock()
        self._task_spans.clear()
        self._words.forget_parents()


def _rebuild_provider() -> None:
    # A provider shared with other OpenTelemetry libraries is not ours to drop.
    if MLFLOW_USE_DEFAULT_TRACER_PROVIDER.get():
        mlflow_provider.provider.reset()


class _Processor(SpanProcessor):
    """Registers spans as MLflow expects when they start, and hands them over when they end.

    Other than MLflow's processors it keeps nothing of a finished span, and it does not need the
    trace to be known beforehand: the trace's root is in another process.
    """

    def __init__(
        self,
        work: Callable[[], Work | None],
        started: Callable[[Task, str, str | None, Callable[[], SpanRecord | None]], None],
        ended: Callable[[SpanRecord], None],
        note: Callable[[str], None],
    ) -> None:
        self._work = work
        self._started = started
        self._ended = ended
        self._note = note
        self._lock = threading.Lock()
        self._open: dict[str, Any] = {}
        self._otel_trace_ids: set[int] = set()
        # Of this thread: copies of spans that are being merged, and whether one is being made.
        self._merging = threading.local()
        os.register_at_fork(after_in_child=self._forget_parents_spans)

    def _forget_parents_spans(self) -> None:
        # Another thread may have held a lock, this one or MLflow's, while the process forked.
        self._lock = threading.Lock()
        self._open.clear()
        if self._otel_trace_ids:
            self._otel_trace_ids.clear()
            InMemoryTraceManager._instance = None

    def open_span(self, span_id: str) -> Any:
        """Return a span that has started here and not ended."""
        return self._open.get(span_id)

    def adopt(self, span: SpanRecord) -> Any:
        """Register a span of ours, so that MLflow knows it as one of its own; return it."""
        live = live_span(span)
        inner = live._span
        self._register(inner, live)
        return inner

    def on_start(self, span: OTelSpan, parent_context: Context | None = None) -> None:  # noqa: ARG002
        work = self._work()
        if work is None:
            return
        trace_id = generate_mlflow_trace_id_from_otel_trace_id(span.context.trace_id)
        self._register(span, create_mlflow_span(span, trace_id))
        if not getattr(self._merging, "is_copying", False):
            self._note(work.task.trace_id)
            self._enter(span, work.task)

    def merge(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Do what ``mlflow.add_trace()`` does, and forget the copies that it has made of spans."""
        copies = self._merging.copies = {}
        try:
            return original(*args, **kwargs)
        finally:
            self._merging.copies = None
            for span in copies.values():
                self.forget(span)

    def copy_of(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return a copy of a span that has ended elsewhere, entered by the id that it has there."""
        self._merging.is_copying = True
        try:
            copy = original(*args, **kwargs)
        finally:
            self._merging.is_copying = False
        if (work := self._work()) is not None:
            # MLflow looks for it when it copies those below.
            if (copies := getattr(self._merging, "copies", None)) is not None:
                copies[f"{copy._span.context.span_id:016x}"] = copy._span
            self._enter(copy._span, work.task)
        return copy

    def _enter(self, span: OTelSpan, task: Task) -> None:
        context = context_of(span.context)
        with self._lock:
            self._open[context.span_id] = span
        above = None if span.parent is None else f"{span.parent.span_id:016x}"

        def snapshot() -> SpanRecord | None:
            return record_of(span._readable_span()) if span.is_recording() else None

        self._started(task, context.span_id, above, snapshot)

    def _register(self, span: OTelSpan, live: Any) -> None:
        manager = InMemoryTraceManager.get_instance()
        otel_trace_id = span.context.trace_id
        trace_id = generate_mlflow_trace_id_from_otel_trace_id(otel_trace_id)
        with self._lock, manager.get_trace(trace_id) as known:
            if known is None:
                manager.register_trace(otel_trace_id, _placeholder(trace_id), True)
                self._otel_trace_ids.add(otel_trace_id)
            manager.register_span(live)

    def on_end(self, span: ReadableSpan) -> None:
        if span.context is None:
            return
        span_id = f"{span.context.span_id:016x}"
        with self._lock:
            found = self._open.pop(span_id, None)
        if found is not None:
            if span_id not in (getattr(self._merging, "copies", None) or ()):
                self.forget(span)
            self._ended(record_of(span))

    def forget(self, span: Any) -> None:
        """Have MLflow forget a span."""
        trace_id = generate_mlflow_trace_id_from_otel_trace_id(span.context.trace_id)
        with InMemoryTraceManager.get_instance().get_trace(trace_id) as trace:
            if trace is not None:
                trace.span_dict.pop(f"{span.context.span_id:016x}", None)

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


def is_switched_off() -> bool:
    """Whether the user's code has switched tracing off for what runs here."""
    if not mlflow_provider.is_tracing_enabled():
        return True
    return getattr(declared_context(), "enabled", None) is False
