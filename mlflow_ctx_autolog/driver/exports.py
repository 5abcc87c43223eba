"""MLflow's export of the driver's traces: changing spans before it, and taking its place."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol

import mlflow
import mlflow.entities.span as mlflow_span
from mlflow.entities import LiveSpan, Span, Trace, TraceInfo
from mlflow.entities.span import NoOpSpan
from mlflow.tracing.config import get_config
from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter
from mlflow.tracing.trace_manager import InMemoryTraceManager
from mlflow.tracing.utils import (
    add_size_stats_to_trace_metadata,
)
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import (
    Link,
    Status,
)

from mlflow_ctx_autolog.log_ins import safe_logger
from mlflow_ctx_autolog.patching import Patch
from mlflow_ctx_autolog.spans.content import ContentPolicy

__all__ = [
    "DriverTracing",
    "SpanEndings",
    "TakesTraces",
    "add_to_trace",
    "complete_info",
    "do_not_display",
    "filter_open_span",
    "filtered",
    "flush_exports",
    "open_spans",
    "snapshot",
    "span_processors",
]

_logger = safe_logger(__name__)


def open_spans(trace_id: str) -> list[Span]:
    """Return the spans of a trace of this process that have not ended, as they are now."""
    with InMemoryTraceManager.get_instance().get_trace(trace_id) as trace:
        spans = [] if trace is None else list(trace.span_dict.values())
    found = (snapshot(span) for span in spans if isinstance(span, LiveSpan))
    return [span for span in found if span is not None]


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


def complete_info(trace: Trace) -> TraceInfo:
    """Return the info of a trace whose root has ended, with what MLflow adds on export."""
    add_size_stats_to_trace_metadata(trace)
    info: TraceInfo = trace.info
    return info
