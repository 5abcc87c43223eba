"""``enable`` and ``disable``: introduces the other modules to one another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from mlflow_ctx_autolog import versions
from mlflow_ctx_autolog.answers_settings import Answers
from mlflow_ctx_autolog.arguments import check_type
from mlflow_ctx_autolog.config import UNCHANGED, Config, Propagation, Transport, kinds
from mlflow_ctx_autolog.diagnosis.check import Facts
from mlflow_ctx_autolog.diagnosis.checks import examine, likely_causes
from mlflow_ctx_autolog.diagnosis.probe import facts_of_process
from mlflow_ctx_autolog.driver.answers import check_answers
from mlflow_ctx_autolog.driver.handover import driver, settings
from mlflow_ctx_autolog.driver.openai_autolog import OpenAIAutolog
from mlflow_ctx_autolog.driver.routes import describe_transport, warn, warn_of_old_store
from mlflow_ctx_autolog.exceptions import DiagnosisError, UnsupportedStoreError
from mlflow_ctx_autolog.log_ins import safe_logger
from mlflow_ctx_autolog.prices import Price
from mlflow_ctx_autolog.reporting.jobs import before_reading
from mlflow_ctx_autolog.worker import process
from mlflow_ctx_autolog.worker.spark_task import in_spark_task

__all__ = ["Handle", "disable", "enable", "switch_on"]

_logger = safe_logger(__name__)
_lock = threading.RLock()
driver.ledger.likely_causes = likely_causes
before_reading.append(lambda: driver.ledger.catch_up(settings().flush_timeout))
_openai_calls = OpenAIAutolog(
    propagates_headers=lambda: settings().propagate_headers,
    fingerprint_key=driver.fingerprint_key,
    pricing=lambda: settings().pricing,
    names_calls_by=lambda: settings().name_calls_by,
)


class Handle:
    """What :func:`enable` returns. As a context manager, it restores on leaving what was before.

    Shown, it says in a line what is on, where spans go, and why.
    """

    def __init__(self, before: Config | None, *, in_task: bool = False) -> None:
        self._before = before
        self._in_task = in_task

    def __repr__(self) -> str:
        if self._in_task:
            return "<mlflow-ctx-autolog: in a Spark task, which has its context from the driver>"
        config = driver.config
        if config is None:
            return "<mlflow-ctx-autolog: off>"
        try:
            told = describe_transport(config)
        except UnsupportedStoreError as error:
            told = str(error)
        own = config.differences(Config())
        settings = "; ".join(f"{name}={value}" for name, (value, _) in own.items())
        return f"<mlflow-ctx-autolog: on. {told}{settings and f' Settings: {settings}.'}>"

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._in_task:
            return
        try:
            # Not instead of an exception that is on its way.
            if kind is None:
                _check_if_strict()
        finally:
            if self._before is None:
                _switch_off()
            else:
                switch_on(self._before)


def enable(
    config: Config | None = None,
    *,
    reset: bool = False,
    flush_timeout: float = UNCHANGED,
    batch_size: int = UNCHANGED,
    send_interval: float = UNCHANGED,
    spool_directory: str | None = UNCHANGED,
    spool_max_bytes: int = UNCHANGED,
    max_waiting_bytes: int = UNCHANGED,
    strict: bool = UNCHANGED,
    transport: Transport = UNCHANGED,
    propagation: Propagation = UNCHANGED,
    capture_content: bool = UNCHANGED,
    max_content_chars: int | None = UNCHANGED,
    redact: Callable[[Any], Any] | None = UNCHANGED,
    propagate_headers: bool = UNCHANGED,
    join_trace: bool = UNCHANGED,
    databricks_token: Callable[[], str] | None = UNCHANGED,
    forward_env: Sequence[str] = UNCHANGED,
    max_calls: int | None = UNCHANGED,
    max_cost: float | None = UNCHANGED,
    max_repeats: int | None = UNCHANGED,
    prices: Mapping[str, Price] = UNCHANGED,
    cost_header: str | None = UNCHANGED,
    max_spans_per_trace: int | None = UNCHANGED,
    sampling: str | None = UNCHANGED,
    name_calls_by: str | None = UNCHANGED,
    progress: bool = UNCHANGED,
    quiet: bool = UNCHANGED,
    reuse_answers: Answers | str | bool | None = UNCHANGED,
    answers_key: str | None = UNCHANGED,
    max_answer_bytes: int = UNCHANGED,
) -> Handle:
    """Trace the OpenAI calls of Spark workers under the driver's trace. Call it on the driver.

    From then on:

    - MLflow's OpenAI autolog is on, on the driver and, while they run a function handed to
      Spark, on the workers.
    - Each attempt of a task that runs such a function is a span below the driver's, and each call
      a span below that.
    - At the end of each task, its spans are in the tracking store.

    What it finds wrong on the driver, such as tracing that is switched off, is one warning.
    Calling it again changes the settings that it names and nothing else, and the log says at INFO
    what they were; what a budget has counted stays counted. It may be used as a context manager
    that restores what was before. On a worker it does nothing: the context arrives there by
    itself.

    The first call begins with the defaults, which ``MLFLOW_CTX_AUTOLOG_*`` variables can set.
    Ranges and details of each setting are those of :class:`Config`.

    Args:
        config: All settings at once: it names every one of its fields.
        reset: Begin with the defaults again, rather than with the settings in force.
        flush_timeout: Seconds that the end of a task waits at most for its spans to be stored.
        batch_size: Spans sent in one request at most. 1 to 10,000.
        send_interval: Seconds that a finished span waits at most for company before it is sent
            while its task still runs.
        spool_directory: Where a process keeps, on its own disk, finished spans that are not stored
            yet; by default a private one among the host's temporary files.
        spool_max_bytes: Size at most of the file that one process keeps there; 0 for none.
        max_waiting_bytes: Finished spans that one process keeps in memory at most, where the spool
            has no room; beyond it, new ones are counted as lost.
        strict: Raise on the driver, from :func:`~mlflow_ctx_autolog.receipt`,
            :func:`~mlflow_ctx_autolog.disable` and on leaving ``with enable():``, when the store
            does not have all spans that were made, and from :func:`~mlflow_ctx_autolog.enable`,
            when something on the driver is wrong; otherwise this is one warning.
        transport: How spans reach the store: ``"direct"`` from the workers; ``"driver"``: they come
            home with the task, and the driver stores them; ``"otlp"``: from the workers to the
            endpoint that ``OTEL_EXPORTER_OTLP_ENDPOINT`` names; ``"auto"``: as MLflow on the driver
            does it, directly where the store takes spans from other processes at an address that
            they can reach, else by way of the driver.
        propagation: How tasks learn which span their calls belong to: ``"auto"``: by a local
            property of Spark's (on Spark Connect, a tag of the operation) that names the span
            active where the action runs, so that plans are the same under each span;
            ``"broadcast"``: by the broadcast that each function takes along, one for each span, for
            platforms that hide properties and tags from tasks.
        capture_content: Whether spans hold prompts, answers and other texts, or only what happened:
            model, tokens, cost, times, outcome.
        max_content_chars: Characters at most of each text in them; None for no limit.
        redact: Returns what may be sent of some content, called with each span's inputs, outputs,
            and other texts, as dictionaries, lists and texts; None withholds it.
        propagate_headers: Whether MLflow may send a ``traceparent`` header along with model calls,
            so that the endpoint can trace them as well.
        join_trace: Make the span that the variable ``TRACEPARENT`` names, as an orchestrator sets
            it for what it starts, the parent of what this process traces: of what is traced in the
            execution context in which :func:`~mlflow_ctx_autolog.enable` is called.
        databricks_token: Returns a token for the workspace whose Unity Catalog table takes the
            spans.
        forward_env: Names of environment variables of the driver that tasks get as well, with their
            values at the time a function is handed to Spark, in its broadcast.
        max_calls: Requests to models that one job, which is one trace of the driver, may make.
        max_cost: The same in US dollars, of the answers that have come.
        max_repeats: The same for requests that were made before in the same job.
        prices: US dollars for a million input and a million output tokens, by model: of those
            that MLflow does not know, or that cost you something else.
        cost_header: The response header by which a gateway says what an answer has cost, in US
            dollars, as LiteLLM's ``x-litellm-response-cost``.
        max_spans_per_trace: Spans below its tasks that the driver's trace takes, shared out among
            the hosts of Spark's executors.
        sampling: Which calls are stored, decided as they end: ``errors``, ``slow`` (the slowest of
            the job on their host so far) and a percentage of the others, joined by ``+``, as
            ``"errors+slow+5%"``.
        name_calls_by: A key of :func:`~mlflow_ctx_autolog.annotate` whose value stands behind the
            name of a call's span, as in ``Completions (doc-17)``, where MLflow lists a trace's
            spans. None for the name alone.
        progress: Whether the driver shows, while a job runs, how many calls its tasks have made,
            with what tokens, cost, errors and repeats.
        quiet: Whether the driver shows nothing when a job is over.
        reuse_answers: Where calls that Spark has made again get the answers that were paid for:
            True among the workers of each host, or in a directory that all workers see, by its
            absolute path.
        answers_key: With what these answers are encrypted on the disk.
        max_answer_bytes: Size of all answers at most, in bytes, the oldest making room.

    Raises:
        ValueError: A setting is out of range.
        TypeError: A setting is of the wrong type, or there is none of that name.
        UnsupportedVersionError: mlflow, openai or pyspark is missing, too old or too new.
        UnsupportedStoreError: Spans of workers cannot reach the tracking store.
        DiagnosisError: With ``strict=True``, something on the driver is wrong.
        ImportError: With ``answers_key``, cryptography is not installed.
    """
    given = {name: value for name, value in locals().items() if value is not UNCHANGED}
    if in_spark_task():
        return Handle(None, in_task=True)
    named = {name: given[name] for name in kinds() if name in given}
    with _lock:
        resolved = _resolved(config, reset, named)
        versions.check(needs_spark=True)
        check_answers(resolved.reuse_answers, resolved.answers_key)
        _check_driver(resolved)
        return switch_on(resolved)


def _resolved(config: Config | None, reset: bool, named: Mapping[str, Any]) -> Config:
    """Return what is to be in force, and check all of it."""
    check_type("reset", reset, bool, "True or False")
    if config is not None:
        check_type("config", config, Config, "a Config; single settings are given by keyword")
        return config.updated(named)
    if reset or driver.config is None:
        return Config.from_env(**named)
    return driver.config.updated(named)


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
            _logger.info("%s", describe_transport(settings()))
            _log_changes(before, resolved)
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


def _log_changes(before: Config | None, after: Config) -> None:
    if before is None or not (changes := before.differences(after)):
        return
    told = (f"{name} from {old} to {new}" for name, (old, new) in changes.items())
    _logger.info("Settings changed: %s.", "; ".join(told))


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
        _switch_off()


def _check_if_strict() -> None:
    if driver.config is not None and driver.config.strict:
        driver.ledger.check(driver.config.flush_timeout, driver.enabled_at)


def _switch_off() -> None:
    if driver.config is not None:
        driver.await_workers()
    with _lock:
        _uninstall()


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
