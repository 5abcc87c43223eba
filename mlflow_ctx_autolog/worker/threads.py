"""What the threads and thread pools of a task know of it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mlflow_ctx_autolog.patching import Patch
from mlflow_ctx_autolog.recorder.annotations import note_annotations, with_annotations
from mlflow_ctx_autolog.task import Work, note_starter

__all__ = ["ThreadHandovers"]


class ThreadHandovers:
    """Has work that is handed to another thread belong to what hands it over.

    A thread belongs to the work that starts it, an item of a pool to the work that submits it.
    The keys of :func:`~mlflow_ctx_autolog.annotate` go along, and nothing else: the user's own
    context variables are no concern of ours. Of the thread only that is noted, so that it looks and
    runs as ever.

    Args:
        work: Returns the work that is being done here and now; None outside tasks.
    """

    def __init__(self, work: Callable[[], Work | None]) -> None:
        self._work = work
        self._patches = [
            Patch(threading.Thread, "start", self._start),
            Patch(ThreadPoolExecutor, "submit", self._submit),
        ]

    def install(self) -> None:
        """Idempotent."""
        for patch in self._patches:
            patch.apply()

    def uninstall(self) -> None:
        """Idempotent."""
        for patch in self._patches:
            patch.revert()

    def _start(self, original: Callable[..., Any], thread: threading.Thread) -> Any:
        if (work := self._work()) is not None:
            note_starter(thread, work)
            note_annotations(thread)
        return original(thread)

    def _submit(
        self,
        original: Callable[..., Any],
        pool: ThreadPoolExecutor,
        /,
        function: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if (work := self._work()) is not None:
            function = functools.partial(work.run, with_annotations(function))
        return original(pool, function, *args, **kwargs)
