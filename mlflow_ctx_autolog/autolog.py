"""``enable`` and ``disable``: introduces the other modules to one another."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from typing import Any

from mlflow_ctx_autolog import process, versions
from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.driver import describe_transport, driver, warn_of_old_store
from mlflow_ctx_autolog.openai_calls import OpenAICalls
from mlflow_ctx_autolog.spark import Handovers
from mlflow_ctx_autolog.spark_task import in_spark_task

__all__ = ["Handle", "disable", "enable"]

_logger = logging.getLogger(__name__)
_lock = threading.Lock()
_openai_calls = OpenAICalls(only_in_tasks=False)
_handovers = Handovers(driver.carry)


class Handle:
    """What :func:`enable` returns. As a context manager, it undoes that call on leaving."""

    def __init__(self, before: Config | None) -> None:
        self._before = before

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            # Not instead of an exception that is on its way.
            if kind is None:
                _check_if_strict()
        finally:
            if self._before is None:
                with _lock:
                    _uninstall()
            else:
                enable(self._before)


def enable(config: Config | None = None, **settings: Any) -> Handle:
    """Trace the OpenAI calls of Spark workers under the driver's trace. Call it on the driver.

    From then on:

    - MLflow's OpenAI autolog is on, on the driver and, while they run a function handed to
      Spark, on the workers.
    - A function handed to Spark carries the trace context of that moment. Each attempt of a task
      that runs it is a span below the driver's active span, and each call a span below that.
    - At the end of each task, its spans are in the tracking store.

    Calling it again changes the settings and nothing else. It may be used as a context manager
    that restores what was before. On a worker it does nothing: the context arrives there by
    itself.

    Args:
        config: All settings at once; by default, those of the environment.
        **settings: Single settings, by the names of :class:`Config`'s fields; they win.

    Raises:
        ValueError: A setting is unknown or out of range.
        TypeError: A setting is of the wrong type.
        UnsupportedVersionError: mlflow, openai or pyspark is too old or too new.
        UnsupportedStoreError: Spans of workers cannot reach the tracking store.
    """
    if in_spark_task():
        return Handle(None)
    resolved = Config.from_env(**settings) if config is None else config.updated(settings)
    versions.check()
    with _lock:
        before = driver.config
        if before is None:
            driver.warned_of_no_span = False
            driver.enabled_at = time.monotonic()
        driver.config = resolved
        try:
            _logger.info("%s", describe_transport())
            warn_of_old_store()
            _openai_calls.install()
            _handovers.install()
        except BaseException:
            driver.config = before
            if before is None:
                _uninstall()
            raise
    return Handle(before)


def disable() -> None:
    """Undo :func:`enable`, at once and without residue. Idempotent.

    Functions that Spark was given meanwhile keep their context. MLflow's own OpenAI autolog stays
    on if you turned it on yourself.

    Raises:
        IncompleteTraceError: With ``strict=True``, the store does not have all spans of a trace
            that has ended. All is undone nevertheless.
    """
    try:
        _check_if_strict()
    finally:
        with _lock:
            _uninstall()


def _check_if_strict() -> None:
    if driver.config is not None and driver.config.strict:
        driver.ledger.check(driver.config.flush_timeout, driver.enabled_at)


def _uninstall() -> None:
    driver.config = None
    driver.ledger.close()
    _handovers.uninstall()
    _openai_calls.uninstall()
    process.remove()
