"""What a check of ``doctor()`` is: facts, a verdict on them, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["pass", "warn", "fail", "unknown"]
# Tasks whose model calls left no span, and functions whose tasks left none.
Silence = Literal["calls", "tasks"]
Place = Literal["driver", "workers", "both", "job"]
# What a process says of itself, see probe.facts_of_process.
Process = dict[str, Any]

# Environment variables whose values are told; no secret is among them.
VARIABLES = (
    "MLFLOW_ASYNC_TRACE_LOGGING_MAX_QUEUE_SIZE",
    "MLFLOW_TRACE_BUFFER_MAX_SIZE",
    "MLFLOW_TRACE_BUFFER_TTL_SECONDS",
    "MLFLOW_TRACE_TIMEOUT_SECONDS",
    "MLFLOW_USE_DEFAULT_TRACER_PROVIDER",
)
# Of a Databricks cluster: its access mode.
ACCESS_MODE = "spark.databricks.clusterUsageTags.dataSecurityMode"
SPARK_SETTINGS = (
    ACCESS_MODE,
    "spark.decommission.enabled",
    "spark.dynamicAllocation.enabled",
    "spark.python.daemon.module",
    "spark.python.worker.reuse",
    "spark.speculation",
    "spark.task.maxFailures",
)


@dataclass
class Facts:
    """All that the checks are given.

    Args:
        driver: What the driver's process says of itself.
        workers: What worker processes say of themselves; None where none was asked.
        workers_error: Why they did not answer.
        spark: Spark's settings, None for those not set, without those that Spark does not tell;
            None where there is no session.
        has_accumulators: Whether spans can come home with a task, as on classic Spark.
        tracking_uri: The driver's tracking URI, without log-in.
        transport: ``"direct"``, ``"driver"`` or ``"otlp"``; None where spans cannot travel.
        transport_reason: Why it is this one, or none.
        takes_spans: Whether the store takes single spans.
        propagation: The setting: ``"auto"`` or ``"broadcast"``.
        model_url_was_named: Whether the user said which model endpoint workers have to reach.
        spans_found: Ids of the spans, of those that the processes wrote, that the driver finds in
            its store; None where it could not look.
        clock_difference: Seconds by which a worker's clock is off at least, and its host.
        mlflow_wanted: What of the driver's settings has workers load MLflow.
        round_trip: Why the probe call did not arrive; None where it did.
        round_trip_skipped: Why no probe call was made; None where it was.
    """

    driver: Process
    workers: list[Process] | None = None
    workers_error: str | None = None
    spark: dict[str, str | None] | None = None
    has_accumulators: bool = True
    tracking_uri: str = ""
    transport: str | None = None
    transport_reason: str = ""
    takes_spans: bool = True
    propagation: str = "auto"
    model_url_was_named: bool = False
    spans_found: list[str] | None = None
    clock_difference: tuple[str, float] | None = None
    mlflow_wanted: Sequence[str] = ()
    round_trip: str | None = None
    round_trip_skipped: str | None = "not yet"


@dataclass(frozen=True)
class Verdict:
    """What a check has to say.

    Args:
        level: How bad it is.
        found: What was found, as half a sentence.
    """

    level: Level
    found: str


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis.

    Args:
        check: The check's name.
        title: What has to be so.
        where: ``"driver"``, ``"workers"`` or ``"job"``.
        level: ``"pass"``, ``"warn"``, ``"fail"``, or ``"unknown"`` where it could not be looked at.
        found: What was found.
        advice: What to do; empty where there is nothing to do.
    """

    check: str
    title: str
    where: str
    level: Level
    found: str
    advice: str

    def __str__(self) -> str:
        return f"{self.title}: not so, {self.found}. {self.advice}"


@dataclass(frozen=True)
class Subject:
    """What a check is called with.

    Args:
        facts: All of them.
        process: Those of the process in question.
    """

    facts: Facts
    process: Process


Judge = Callable[[Subject], "Verdict | None"]


@dataclass(frozen=True)
class Check:
    """A check.

    Args:
        name: The function's name.
        title: What has to be so, as a short statement.
        where: Whose facts it is called with: the driver's, each worker's, both, or, for what is
            asked of the job as a whole, the driver's.
        advice: What to do where it is not so.
        why: What happens then.
        judge: Returns the verdict on a process; None where the facts do not tell.
        at_enable: The least level at which ``enable()`` speaks of it; None if it does not ask.
        explains: Which silences after a job it is a likely cause of.
    """

    name: str
    title: str
    where: Place
    advice: str
    why: str
    judge: Judge
    at_enable: Level | None = None
    explains: Sequence[Silence] = ()


_checks: dict[str, list[Check]] = {}


def checks_of(module: str) -> list[Check]:
    """Return the checks that a module has, in their order."""
    return _checks[module]


def check(
    title: str,
    *,
    where: Place,
    advice: str,
    at_enable: Level | None = None,
    explains: Sequence[Silence] = (),
) -> Callable[[Judge], Judge]:
    """Register a check; see :class:`Check`."""

    def register(judge: Judge) -> Judge:
        name, why = judge.__name__, " ".join((judge.__doc__ or "").split())
        found = Check(name, title, where, advice, why, judge, at_enable, explains)
        _checks.setdefault(judge.__module__, []).append(found)
        return judge

    return register


def passed(found: str) -> Verdict:
    """All is well: this was found."""
    return Verdict("pass", found)


def warned(found: str) -> Verdict:
    """It may go well: this was found."""
    return Verdict("warn", found)


def failed(found: str) -> Verdict:
    """It will not go well: this was found."""
    return Verdict("fail", found)


UNKNOWN = Verdict("unknown", "could not be found out")


def setting(facts: Facts, name: str, default: str) -> str | None:
    """Return a setting of Spark's in lower case; None where Spark does not tell."""
    if facts.spark is None or name not in facts.spark:
        return None
    return (facts.spark[name] or default).lower()
