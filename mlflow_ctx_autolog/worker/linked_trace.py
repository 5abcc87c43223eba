"""A trace of its own for those calls of a task that the driver's trace has no room for."""

from __future__ import annotations

import time
from dataclasses import replace

from mlflow_ctx_autolog.context import DriverContext
from mlflow_ctx_autolog.spans.attributes import SPAN_TYPE
from mlflow_ctx_autolog.spans.record import (
    MLFLOW_PREFIX,
    OpenSpan,
    SpanLink,
    SpanRecord,
    new_span_id,
    new_trace_id,
)
from mlflow_ctx_autolog.spans.trace_info import trace_document, without_totals
from mlflow_ctx_autolog.spans.values import dump
from mlflow_ctx_autolog.stores.stored_trace import JOB_TAG, LINKED_SPAN, LINKED_TRACE, TRACE_KEY

__all__ = ["LinkedTrace", "reparented"]


class LinkedTrace:
    """One trace for a task, whose root stands for the task's span in another.

    Both spans name each other in their attributes and in a link. Its tokens and cost are in the
    totals of the other trace, so that sums over traces hold them once.

    Args:
        task_span: The task's span, open or ended.
        context: What came from the driver.
    """

    def __init__(self, task_span: OpenSpan, context: DriverContext) -> None:
        self._context = context
        self._name = task_span.name
        self._job_trace_id = task_span.mlflow_trace_id
        self._task = SpanLink(task_span.context.trace_id, task_span.context.span_id)
        self._root = SpanLink(new_trace_id(), new_span_id())
        self._began = time.time_ns()
        task_span.update({LINKED_TRACE: self.trace_id, LINKED_SPAN: self._root.span_id})
        task_span.add_link(self._root)

    @property
    def trace_id(self) -> str:
        """MLflow's id of the trace."""
        return MLFLOW_PREFIX + self._root.trace_id

    def relocated(self, span: SpanRecord, *, is_top: bool) -> SpanRecord:
        """Return a finished span as one of this trace.

        Args:
            span: The span.
            is_top: Whether it comes directly below the root, else below the span that it was below.
        """
        parent_id = self._root.span_id if is_top else span.parent_id
        return replace(span, trace_id=self._root.trace_id, parent_id=parent_id)

    def root(self) -> SpanRecord:
        """Return the root as if it ended now."""
        attributes = {
            SPAN_TYPE: "TASK",
            LINKED_TRACE: self._job_trace_id,
            LINKED_SPAN: self._task.span_id,
        }
        return SpanRecord(
            *self._root,
            parent_id=None,
            name=self._name,
            start=self._began,
            end=time.time_ns(),
            attributes={name: dump(value) for name, value in attributes.items()},
            links=(self._task,),
        )

    def info(self, *, is_over: bool) -> bytes:
        """Return what is to be known of the trace, as MLflow's JSON.

        Args:
            is_over: Whether its task has ended.
        """
        session, user = self._context.session_id, self._context.user
        declared = {"mlflow.trace.session": session, "mlflow.trace.user": user}
        return trace_document(
            self.trace_id,
            self._context.experiment_id,
            began=self._began,
            ended=time.time_ns() if is_over else None,
            state="OK" if is_over else "IN_PROGRESS",
            preview=f"Further calls of a task of trace {self._job_trace_id}",
            metadata={
                # By which its spans are counted with those of the job.
                TRACE_KEY: self._job_trace_id,
                **{name: value for name, value in declared.items() if value is not None},
                **without_totals(),
            },
            tags={
                "mlflow.traceName": self._name,
                JOB_TAG: self._job_trace_id,
                **self._context.tags,
            },
        )


def reparented(span: SpanRecord, task_span: OpenSpan) -> SpanRecord:
    """Return a finished span directly below its task's, where what it was below is not stored."""
    return replace(span, parent_id=task_span.context.span_id)
