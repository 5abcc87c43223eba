"""``enable`` and ``disable``: introduces the other modules to one another."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from typing import Any

from mlflow_ctx_autolog import versions
from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.diagnosis.checks import Facts, examine, likely_causes
from mlflow_ctx_autolog.diagnosis.probe import facts_of_process
from mlflow_ctx_autolog.driver.handover import (
    describe_transport,
    driver,
    settings,
    warn,
    warn_of_old_store,
)
from mlflow_ctx_autolog.driver.openai_autolog import OpenAIAutolog
from mlflow_ctx_autolog.exceptions import DiagnosisError
from mlflow_ctx_autolog.worker import process
from mlflow_ctx_autolog.worker.spark_task import in_spark_task

__all__ = ["Handle", "disable", "enable", "switch_on"]

_logger = logging.getLogger(__name__)
_lock = threading.Lock()
driver.ledger.likely_causes = likely_causes
_openai_calls = OpenAIAutolog(
    propagates_headers=lambda: settings().propagate_headers,
    fingerprint_key=driver.fingerprint_key,
)


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
                switch_on(self._before)


def enable(config: Config | None = None, **settings: Any) -> Handle:
    """Trace the OpenAI calls of Spark workers under the driver's trace. Call it on the driver.

    From then on:

    - MLflow's OpenAI autolog is on, on the driver and, while they run a function handed to
      Spark, on the workers.
    - A function handed to Spark carries the trace context of that moment. Each attempt of a task
      that runs it is a span below the driver's active span, and each call a span below that.
    - At the end of each task, its spans are in the tracking store.

    What it finds wrong on the driver, such as tracing that is switched off, is one warning.
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
        DiagnosisError: With ``strict=True``, something on the driver is wrong.
        ImportError: With ``progress=True``, tqdm is not installed.
    """
    if in_spark_task():
        return Handle(None)
    resolved = Config.from_env(**settings) if config is None else config.updated(settings)
    versions.check()
    _check_driver(resolved)
    return switch_on(resolved)


def _check_driver(config: Config) -> None:
    """Warn of what is wrong on the driver, or raise; asks nobody, and takes milliseconds."""
    has_spool = config.spool_max_bytes > 0
    process = facts_of_process(has_spool=has_spool, spool_directory=config.spool_directory)
    findings = examine(Facts(process), at_enable=True)
    if not findings:
        return
    message = " ".join(str(finding) for finding in findings)
    if config.strict:
        raise DiagnosisError(message, findings)
    warn(f"{message} mlflow_ctx_autolog.doctor() examines the workers, too.")


def switch_on(resolved: Config) -> Handle:
    """Do what :func:`enable` does, with settings and a driver that have been checked."""
    with _lock:
        before = driver.config
        if before is None:
            driver.warned_of_network = False
            driver.enabled_at = time.monotonic()
        driver.config = resolved
        try:
            _logger.info("%s", describe_transport())
            warn_of_old_store()
            driver.check_forwarding()
            driver.progress.switch(resolved.progress)
            driver.endings.install()
            if resolved.join_trace:
                driver.joined_trace.enter()
            else:
                driver.joined_trace.leave()
            _openai_calls.install()
            driver.install()
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
    driver.progress.switch(False)
    driver.ledger.close()
    driver.joined_trace.leave()
    driver.endings.uninstall()
    driver.executed_plans.unwatch()
    driver.uninstall()
    _openai_calls.uninstall()
    process.remove()
