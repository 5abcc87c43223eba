"""What a job's calls come to while it runs, in one line."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from mlflow_ctx_autolog.delivery.receipts import TaskReceipt
from mlflow_ctx_autolog.driver.job_lines import amounts, counted
from mlflow_ctx_autolog.driver.screens import Screen, a_screen
from mlflow_ctx_autolog.log_ins import safe_logger

__all__ = ["Progress"]

_logger = safe_logger(__name__)

# Seconds between two looks of a line, and jobs whose numbers are kept.
_INTERVAL = 1.0
_JOBS = 100


class _Job:
    """The numbers of one job, and the line that shows them."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._tasks: set[str] = set()
        self._requests: set[str] = set()
        self._calls = self._tokens = self._errors = self._repeats = self._unseen = 0
        self._cost, self._untold, self._unpriced = 0.0, 0, 0
        self._shown = -_INTERVAL
        self._line: str | None = None

    def add(self, receipt: TaskReceipt, cost: float, unpriced: int) -> None:
        """Take what a task has come to, once.

        Args:
            receipt: What it has told.
            cost: US dollars, as far as they are known.
            unpriced: Of how many of its calls no price is known.
        """
        if receipt.task_span_id in self._tasks:
            return
        self._tasks.add(receipt.task_span_id)
        distinct = len(self._requests)
        self._requests.update(receipt.requests)
        self._calls += receipt.calls
        self._tokens += int(receipt.usage.get("total_tokens", 0))
        self._cost += cost
        self._unpriced += unpriced
        self._untold += receipt.sums.get("unknown", 0)
        self._errors += receipt.errors
        self._repeats += len(receipt.requests) - (len(self._requests) - distinct)
        self._repeats += receipt.repeats
        self._unseen += receipt.requests_untold

    def draw(self, *, at_once: bool = False) -> float:
        """Show it, unless it was shown just now; return seconds until it may be, 0 where it is."""
        remaining = self._shown + _INTERVAL - time.monotonic()
        if remaining > 0 and not at_once:
            return remaining
        if (line := str(self)) != self._line:
            self._screen.show(line)
        self._shown, self._line = time.monotonic(), line
        return 0.0

    def close(self) -> None:
        """Show it for the last time."""
        self.draw(at_once=True)
        self._screen.close()

    def __str__(self) -> str:
        parts = [
            counted(self._calls, "call"),
            *amounts(self._tokens, self._cost, self._untold, self._unpriced),
            counted(self._errors, "error"),
            f"{'at least ' if self._unseen else ''}{counted(self._repeats, 'repeat')}",
        ]
        return f"model calls: {', '.join(parts)}"


class Progress:
    """Shows what the tasks of a job have told that have ended, at most once a second.

    In a terminal or a notebook; where standard error is neither, nothing, and nothing is kept. The
    numbers are those of one job, which is one trace.

    Args:
        cost_of: Returns what the calls of a task have cost in US dollars, as far as that is known,
            and of how many of them no price is known.
    """

    def __init__(self, cost_of: Callable[[TaskReceipt], tuple[float, int]]) -> None:
        self._cost_of = cost_of
        self._is_on = False
        self._jobs: OrderedDict[str, _Job] = OrderedDict()
        self._open: str | None = None
        self._ignored: set[str] = set()
        self._finished: set[str] = set()
        self._timer: threading.Timer | None = None
        self._lock = threading.RLock()

    def switch(self, on: bool) -> None:
        """Begin, go on, or end."""
        with self._lock:
            self._is_on = on
            if not on:
                self._close()
                self._jobs.clear()

    def ignore(self, trace_id: str) -> None:
        """Leave out a trace that is no job of the user's."""
        with self._lock:
            self._ignored.add(trace_id)

    def ignores(self, trace_id: str) -> bool:
        """Whether a trace is no job of the user's."""
        return trace_id in self._ignored

    def add(self, receipt: TaskReceipt) -> None:
        """Take what a task has come to. Never raises."""
        try:
            with self._lock:
                self._add(receipt)
        except Exception as error:
            _logger.debug("Progress could not be shown: %r", error)

    def finish(self, trace_id: str) -> None:
        """Show a job's line for the last time, before something else is shown of it."""
        with self._lock:
            self._finished.add(trace_id)
            if self._open == trace_id:
                self._close()

    def _add(self, receipt: TaskReceipt) -> None:
        # What comes late would stand below another cell.
        if not self._is_on or receipt.trace_id in self._ignored | self._finished:
            return
        job = self._jobs.get(receipt.trace_id)
        if job is None:
            if (screen := a_screen()) is None:
                return
            job = self._jobs[receipt.trace_id] = _Job(screen)
            while len(self._jobs) > _JOBS:
                self._jobs.popitem(last=False)
        if self._open != receipt.trace_id:
            self._close()
            self._open = receipt.trace_id
        job.add(receipt, *self._cost_of(receipt))
        self._draw()

    def _draw(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            job = None if self._open is None else self._jobs.get(self._open)
            if job is not None and (remaining := job.draw()):
                self._timer = threading.Timer(remaining, self._draw)
                self._timer.daemon = True
                self._timer.start()

    def _close(self) -> None:
        job = None if self._open is None else self._jobs.get(self._open)
        self._open = None
        if job is not None:
            job.close()
