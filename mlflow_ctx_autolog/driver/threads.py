"""What threads and thread pools of the driver know of the span that hands them work."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mlflow_ctx_autolog import tracing
from mlflow_ctx_autolog.patching import Patch

__all__ = ["SpanThreads"]


class SpanThreads:
    """Has what another thread does belong to the span that handed it over, as in workers.

    A thread belongs to the span that was active where it was started, an item of a pool to the one
    where it was submitted, as long as that span has not ended. Nothing else travels: context
    variables of the user's are no concern of ours.
    """

    def __init__(self) -> None:
        self._starters: weakref.WeakKeyDictionary[threading.Thread, Any] = (
            weakref.WeakKeyDictionary()
        )
        self._patches = [
            Patch(threading.Thread, "start", self._start),
            Patch(ThreadPoolExecutor, "submit", self._submit),
        ]
        self._fallback = tracing.FallbackSpan(self._starter)

    def install(self) -> None:
        """Idempotent."""
        for patch in self._patches:
            patch.apply()
        self._fallback.install()

    def uninstall(self) -> None:
        """Idempotent."""
        for patch in self._patches:
            patch.revert()
        self._fallback.uninstall()

    def _start(self, original: Callable[..., Any], thread: threading.Thread) -> Any:
        if tracing.has_active_span():
            self._starters[thread] = tracing.active_context()
        return original(thread)

    def _starter(self) -> Any:
        return self._starters.get(threading.current_thread())

    def _submit(
        self,
        original: Callable[..., Any],
        pool: ThreadPoolExecutor,
        /,
        function: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        has_span = tracing.has_active_span()
        # Else an item would belong to the span that its thread was started under.
        context = tracing.active_context() if has_span else tracing.without_span()
        return original(pool, functools.partial(_run, context, function), *args, **kwargs)


def _run(context: Any, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    if tracing.has_ended(context):
        context = tracing.without_span()
    with tracing.activated(context):
        return function(*args, **kwargs)
