"""The spans that are open in this process: whose they are, and what lies in what."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlflow_ctx_autolog.spans.record import SpanRecord
from mlflow_ctx_autolog.task import Task

__all__ = ["Branch", "OpenSpans"]

# Spans that have ended below another, from which on those that start there are branches.
_DIVIDED_FROM = 100

Snapshot = Callable[[], "SpanRecord | None"]


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
class _Entry:
    """A span that has not ended.

    Args:
        task: Whose it is.
        branch: Its branch; None for a task's span.
        above: The span above it, where that is open, too, and has the same task.
        snapshot: Returns it as it is now.
        ended: Spans below it that have ended.
    """

    task: Task
    branch: Branch | None
    above: _Entry | None
    snapshot: Snapshot
    ended: int = 0

    def count_below(self) -> None:
        """Count a span below it that has ended, for those above it as well."""
        each: _Entry | None = self
        while each is not None:
            each.ended += 1
            each = each.above


class OpenSpans:
    """Knows the open spans of this process, whoever made them. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, _Entry] = {}
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        # They are the parent's, of which another thread may have held the lock.
        self._lock = threading.Lock()
        self._open.clear()

    def started(
        self,
        task: Task,
        span_id: str,
        parent_id: str | None,
        snapshot: Snapshot,
        *,
        is_tasks: bool = False,
    ) -> None:
        """Enter a span that has started.

        Args:
            task: Whose it is.
            span_id: Its id.
            parent_id: That of the span above it; None for a root.
            snapshot: Returns it as it is now; None where it is not recorded.
            is_tasks: Whether it is the task's own.
        """
        with self._lock:
            above = self._open.get(parent_id or "")
            if above is not None and above.task is not task:
                above = None
            branch = None if is_tasks else _branch_below(above, span_id, parent_id)
            self._open[span_id] = _Entry(task, branch, above, snapshot)

    def ended(self, span_id: str) -> tuple[Task, Branch | None] | None:
        """Strike off a span; return its task and branch, None where it was not entered."""
        with self._lock:
            entry = self._open.pop(span_id, None)
            if entry is None:
                return None
            if entry.above is not None:
                entry.above.count_below()
            return entry.task, entry.branch

    def task_of(self, span_id: str) -> Task | None:
        """Return whose an open span is."""
        entry = self._open.get(span_id)
        return None if entry is None else entry.task

    def branch_below(self, top: str, above: str | None) -> Branch:
        """Return the branch of a span that another process has started below an open one.

        Args:
            top: The id of the span, and of its branch if it begins one.
            above: The id of the open span.
        """
        with self._lock:
            return _branch_below(self._open.get(above or ""), top, above)

    def count_below(self, above: str | None) -> None:
        """Count a span that has ended in another process, below an open one of this."""
        with self._lock:
            if (found := self._open.get(above or "")) is not None:
                found.count_below()

    def show(self, task: Task, show: Callable[[SpanRecord, Branch], None]) -> None:
        """Show the open spans below a task's, as they are now, and their branches.

        One that ends meanwhile is handed over after it was shown.
        """
        with self._lock:
            for entry in self._open.values():
                if entry.task is task and entry.branch is not None:
                    span = entry.snapshot()
                    if span is not None:
                        show(span, entry.branch)


def _branch_below(entry: _Entry | None, top: str, above: str | None) -> Branch:
    """Return the branch of what starts directly below a span."""
    if entry is None or entry.branch is None:
        return Branch(top, above)
    is_divided = entry.ended >= _DIVIDED_FROM
    return Branch(top, above, entry.branch) if is_divided else entry.branch
