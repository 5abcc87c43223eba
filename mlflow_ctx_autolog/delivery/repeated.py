"""Something that is done again and again in a thread of its own, as long as there is reason to."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable

from mlflow_ctx_autolog.delivery.intake import start_thread

__all__ = ["Repeated"]


class Repeated:
    """Does something every second, for a while after the last :meth:`wake`.

    Args:
        do: What is done. What it raises ends it until the next :meth:`wake`.
        role: What it is, for the name of the thread.
    """

    _interval, _lasts = 1.0, 120.0

    def __init__(self, do: Callable[[], object], role: str) -> None:
        self._do = do
        self._role = role
        self._until = 0.0
        self._begin_anew()
        _all.add(self)

    def _begin_anew(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """There is reason to do it, from now on for two minutes."""
        with self._lock:
            self._until = time.monotonic() + self._lasts
            if self._thread is None:
                self._thread = start_thread(self._run, self._role)

    def _run(self) -> None:
        try:
            while True:
                time.sleep(self._interval)
                self._do()
                with self._lock:
                    if time.monotonic() > self._until:
                        return
        finally:
            self._thread = None


_all: weakref.WeakSet[Repeated] = weakref.WeakSet()


def _begin_all_anew() -> None:
    for each in _all:
        each._begin_anew()


os.register_at_fork(after_in_child=_begin_all_anew)
