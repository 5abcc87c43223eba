"""The trace of an action that no span was active for: its root is nobody's span."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from mlflow_ctx_autolog.context import DriverContext
from mlflow_ctx_autolog.delivery.records import Record
from mlflow_ctx_autolog.spans.attributes import SPAN_TYPE
from mlflow_ctx_autolog.spans.otlp import encode
from mlflow_ctx_autolog.spans.record import SpanRecord
from mlflow_ctx_autolog.spans.trace_info import trace_document, without_totals
from mlflow_ctx_autolog.spans.values import dump
from mlflow_ctx_autolog.stores.stored_trace import TRACE_KEY
from mlflow_ctx_autolog.task import driver_span

__all__ = ["ActionTraces", "root_of"]

# Traces that a process remembers to have announced.
_REMEMBERED = 1000


def root_of(context: DriverContext, began: int) -> dict[str, Any] | None:
    """Return what the driver needs to close the trace of an action; None where there was a span.

    Args:
        context: That of a task of the action.
        began: When the task did, in nanoseconds since the epoch.
    """
    root = driver_span(context)
    if context.action is None or root is None:
        return None
    declared = {"mlflow.trace.session": context.session_id, "mlflow.trace.user": context.user}
    metadata = {name: value for name, value in declared.items() if value is not None}
    return {
        "name": context.action,
        "span_id": root.span_id,
        "began": began,
        "metadata": {**context.metadata, **metadata},
        "tags": {"mlflow.traceName": context.action, **context.tags},
    }


class ActionTraces:
    """Tells the store of traces of actions, so that no task's span is an orphan there.

    The driver closes them, since it knows of all tasks. Where nobody tells it of any, as on Spark
    Connect, each task closes its action's, and the store adds up what it has.
    """

    def __init__(self) -> None:
        self._began: dict[str, int] = {}

    def announce(self, context: DriverContext) -> list[Record]:
        """Return what the store is to know as a task begins; nothing where it was told."""
        root = driver_span(context)
        if context.action is None or root is None or root.trace_id in self._began:
            return []
        while len(self._began) >= _REMEMBERED:
            del self._began[next(iter(self._began))]
        self._began[root.trace_id] = time.time_ns()
        return self._records(context)

    def close(
        self, context: DriverContext, update: Mapping[str, str], *, failed: bool
    ) -> list[Record]:
        """Return what the store is to know as a task ends of which the driver is not told.

        Args:
            context: The task's.
            update: What the task has said of the trace.
            failed: Whether it has failed.
        """
        if context.action is None or driver_span(context) is None:
            return []
        return self._records(context, outcome="ERROR" if failed else "OK", update=update)

    def _records(
        self,
        context: DriverContext,
        outcome: str | None = None,
        update: Mapping[str, str] | None = None,
    ) -> list[Record]:
        root = driver_span(context)
        assert root is not None
        now = time.time_ns()
        began = self._began.setdefault(root.trace_id, now)
        said = root_of(context, began) or {}
        span = SpanRecord(
            root.trace_id,
            root.span_id,
            None,
            str(context.action),
            began,
            now,
            {SPAN_TYPE: dump("CHAIN")},
            status=outcome or "UNSET",
        )
        # Of what is over and of which the driver is not told, the store makes the sums.
        totals: Mapping[str, str] = {} if outcome else without_totals()
        document = trace_document(
            root.mlflow_trace_id,
            context.experiment_id,
            began=began,
            ended=now if outcome else None,
            state=outcome or "IN_PROGRESS",
            metadata={TRACE_KEY: root.mlflow_trace_id, **said["metadata"], **totals},
            tags=said["tags"],
            update=update,
        )
        return [
            Record("span", root.span_id, encode(span)),
            Record("trace", root.mlflow_trace_id, document),
        ]
