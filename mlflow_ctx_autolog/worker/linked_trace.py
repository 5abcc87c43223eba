"""A trace of its own for those calls of a task that the driver's trace has no room for."""

from __future__ import annotations

import copy
import json
import random
import time

import mlflow.entities
from mlflow.entities import LiveSpan, Span, TraceInfo, TraceLocation, TraceState
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import Link, SpanContext, TraceFlags

from mlflow_ctx_autolog.context import DriverContext
from mlflow_ctx_autolog.stores.stored_trace import JOB_TAG, LINKED_SPAN, LINKED_TRACE, TRACE_KEY
from mlflow_ctx_autolog.tracing import record_no_totals

__all__ = ["LinkedTrace", "lifted"]

_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


class LinkedTrace:
    """One trace for a task, whose root stands for the task's span in another.

    Both spans name each other in their attributes and, where MLflow knows of such, in a link. Its
    tokens and cost are in the totals of the other trace, so that sums over traces hold them once.

    Args:
        task_span: The task's span, open or ended.
        context: What came from the driver.
    """

    def __init__(self, task_span: Span, context: DriverContext) -> None:
        self._context = context
        self._name = str(task_span.name)
        self._job_trace_id = str(task_span.trace_id)
        self._task_span_id = str(task_span.span_id)
        self._root = _span_context(random.SystemRandom().getrandbits(128), _new_span_id())
        self._began = time.time_ns()
        if isinstance(task_span, LiveSpan):
            task_span.set_attributes(
                {LINKED_TRACE: self.trace_id, LINKED_SPAN: f"{self._root.span_id:016x}"}
            )
            # Not in older releases of MLflow.
            if hasattr(task_span, "add_link"):
                link = mlflow.entities.Link(self.trace_id, f"{self._root.span_id:016x}")
                task_span.add_link(link)

    @property
    def trace_id(self) -> str:
        """MLflow's id of the trace."""
        return f"tr-{self._root.trace_id:032x}"

    def moved(self, span: Span, *, is_top: bool) -> Span:
        """Return a finished span as one of this trace.

        Args:
            span: The span.
            is_top: Whether it comes directly below the root, else below the span that it was below.
        """
        inner: ReadableSpan = copy.copy(span._span)
        inner._context = _span_context(self._root.trace_id, inner.context.span_id)
        above = inner.parent
        inner._parent = (
            self._root
            if is_top or above is None
            else _span_context(self._root.trace_id, above.span_id)
        )
        request_id = {"mlflow.traceRequestId": json.dumps(self.trace_id)}
        inner._attributes = {**(inner.attributes or {}), **request_id}
        return Span(inner)

    def root(self) -> Span:
        """Return the root as if it ended now."""
        task = _span_context(int(self._job_trace_id[-32:], 16), int(self._task_span_id, 16))
        attributes = {
            "mlflow.traceRequestId": self.trace_id,
            "mlflow.spanType": "TASK",
            LINKED_TRACE: self._job_trace_id,
            LINKED_SPAN: self._task_span_id,
        }
        return Span(
            ReadableSpan(
                self._name,
                self._root,
                attributes={name: json.dumps(value) for name, value in attributes.items()},
                links=(Link(task),),
                start_time=self._began,
                end_time=time.time_ns(),
            )
        )

    def info(self, *, is_over: bool) -> TraceInfo:
        """Return what is to be known of the trace.

        Args:
            is_over: Whether its task has ended.
        """
        session, user = self._context.session_id, self._context.user
        declared = {"mlflow.trace.session": session, "mlflow.trace.user": user}
        info = TraceInfo(
            trace_id=self.trace_id,
            trace_location=TraceLocation.from_experiment_id(self._context.experiment_id),
            request_time=self._began // 1_000_000,
            execution_duration=(time.time_ns() - self._began) // 1_000_000 if is_over else None,
            state=TraceState.OK if is_over else TraceState.IN_PROGRESS,
            request_preview=f"Further calls of a task of trace {self._job_trace_id}",
            trace_metadata={
                # By which its spans are counted with those of the job.
                TRACE_KEY: self._job_trace_id,
                **{name: value for name, value in declared.items() if value is not None},
            },
            tags={
                "mlflow.traceName": self._name,
                JOB_TAG: self._job_trace_id,
                **self._context.tags,
            },
        )
        record_no_totals(info)
        return info


def lifted(span: Span, task_span: Span) -> Span:
    """Return a finished span directly below its task's, where what it was below is not stored.

    Args:
        span: The span.
        task_span: The task's.
    """
    inner: ReadableSpan = copy.copy(span._span)
    inner._parent = _span_context(inner.context.trace_id, int(task_span.span_id, 16))
    return Span(inner)


def _span_context(trace_id: int, span_id: int) -> SpanContext:
    return SpanContext(trace_id, span_id, is_remote=False, trace_flags=_SAMPLED)


def _new_span_id() -> int:
    # Not from the generator that the user may have seeded.
    return random.SystemRandom().getrandbits(64) or 1
