"""The end of a Spark application, before which its workers' spans are to be stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlflow_ctx_autolog.driver.instrumentor import find_class
from mlflow_ctx_autolog.patching import Redirect

__all__ = ["SparkStops"]


class SparkStops:
    """Has something done before a SparkContext is stopped, and with it the workers.

    Args:
        before: What is done. May raise nothing.
    """

    def __init__(self, before: Callable[[], object]) -> None:
        self._before = before
        self._redirect: Redirect | None = None

    def install(self) -> None:
        """Idempotent."""
        if self._redirect is None:
            owner = find_class(("pyspark.core.context", "pyspark.context"), "SparkContext", "stop")
            if owner is None:
                return
            self._redirect = Redirect(owner, "stop", self._stopping)
        self._redirect.apply()

    def uninstall(self) -> None:
        """Idempotent."""
        if self._redirect is not None:
            self._redirect.revert()

    def _stopping(self, context: Any) -> Any:
        if getattr(context, "_jsc", None) is not None:
            self._before()
        return context
