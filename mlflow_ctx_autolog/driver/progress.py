"""What a job's calls come to while it runs, in one line."""

from __future__ import annotations

import sys
import threading
from typing import Any

from mlflow_ctx_autolog.delivery.receipts import TaskReceipt

__all__ = ["Progress"]


class Progress:
    """Shows what the tasks have told that have ended, at most once a second.

    In a terminal or a notebook; where standard error is neither, nothing.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._lock = threading.Lock()

    def switch(self, on: bool) -> None:
        """Begin anew, or end.

        Raises:
            ImportError: tqdm is not installed.
        """
        with self._lock:
            if self._bar is not None:
                self._bar.close()
            self._bar = _new_bar() if on else None
            self._tasks: set[str] = set()
            self._requests: set[str] = set()
            self._totals = {"tokens": 0, "cost": 0.0, "errors": 0, "repeats": 0}

    def add(self, receipt: TaskReceipt) -> None:
        """Take what a task has come to. Never raises."""
        with self._lock:
            if self._bar is None or receipt.task_span_id in self._tasks:
                return
            self._tasks.add(receipt.task_span_id)
            distinct = len(self._requests)
            self._requests.update(receipt.requests)
            totals = self._totals
            totals["tokens"] += int(receipt.usage.get("total_tokens", 0))
            totals["cost"] += receipt.spent or receipt.cost.get("total_cost", 0.0)
            totals["errors"] += receipt.errors
            totals["repeats"] += len(receipt.requests) - (len(self._requests) - distinct)
            shown = {**totals, "tokens": f"{totals['tokens']:,}", "cost": f"${totals['cost']:,.4f}"}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(receipt.calls)


def _new_bar() -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            "progress=True needs tqdm: pip install 'mlflow-ctx-autolog[progress]'"
        ) from error
    # Where it shows nothing unless that is a terminal, as the library would have it in a notebook.
    disable = False if _in_notebook() else None
    return tqdm(
        desc="model calls", unit=" calls", mininterval=1.0, maxinterval=1.0, disable=disable
    )


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in getattr(shell, "config", {})
