"""The checks of the way to the store, and of the store."""

from __future__ import annotations

from mlflow_ctx_autolog.diagnosis.check import (
    ACCESS_MODE,
    Subject,
    Verdict,
    check,
    failed,
    passed,
    setting,
    warned,
)
from mlflow_ctx_autolog.log_ins import without_credentials


@check(
    "Spans have a way to the store",
    where="job",
    advice="Use a tracking server on a SQL database that the workers can reach, with an MLflow "
    "experiment as the destination of traces.",
)
def spans_can_travel(subject: Subject) -> Verdict | None:
    """Workers send spans to the store, or home with the task where it takes none from them.

    That is so for a folder of files, a Databricks workspace, and an address with a password in it.
    Spark Connect has no way home, and a Unity Catalog location one only if MLflow knows its table.
    """
    if subject.facts.transport is None:
        return failed(subject.facts.transport_reason)
    if subject.facts.transport == "driver" and not subject.facts.has_accumulators:
        return failed(
            f"{subject.facts.transport_reason}, so that they would have to come home with the "
            "task, and Spark Connect has no way for that"
        )
    way = (
        "with the task to the driver" if subject.facts.transport == "driver" else "from the workers"
    )
    mode = setting(subject.facts, ACCESS_MODE, "")
    found = f"{way}: {subject.facts.transport_reason}{f' (access mode {mode})' if mode else ''}"
    if not subject.facts.takes_spans:
        return warned(f"{found}; they are stored only with the driver's span, when that ends")
    return passed(found)


@check(
    "The tracking store can be reached",
    where="both",
    advice="Set the tracking URI (mlflow.set_tracking_uri, or MLFLOW_TRACKING_URI) to an address "
    "that driver and workers can reach: not localhost, and open in the firewall. Where workers "
    'never reach it, transport="driver" brings spans home with the task.',
    explains=("tasks",),
)
def store_is_reachable(subject: Subject) -> Verdict | None:
    """MLflow's export logs failures at DEBUG and drops the spans.

    This library keeps them on the worker's disk instead, but nobody sees them until they are
    delivered.
    """
    return _step(subject, "reach", "it can")


@check(
    "The store accepts the process's log-in",
    where="both",
    advice="Set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
    "in the environment of driver and executors; this library sends no password along.",
    explains=("tasks",),
)
def log_in_is_accepted(subject: Subject) -> Verdict | None:
    """Workers inherit neither the environment of the driver nor what it has logged in with.

    A store that does not know them refuses their spans.
    """
    verdict = _step(subject, "login", "it does")
    if verdict is not None and verdict.level == "fail":
        missing = sorted(
            set(subject.facts.driver["credentials"]) - set(subject.process["credentials"])
        )
        set_there = ", ".join(subject.process["credentials"]) or "none"
        only_driver = f"; set on the driver only: {', '.join(missing)}" if missing else ""
        return failed(f"{verdict.found}; variables set for it: {set_there}{only_driver}")
    return verdict


@check(
    "The experiment exists",
    where="both",
    advice="Set another experiment (mlflow.set_experiment), restore this one "
    "(MlflowClient().restore_experiment), or give the log-in the right to read it.",
)
def experiment_exists(subject: Subject) -> Verdict | None:
    """An experiment that was deleted takes no traces, also from those who chose it before."""
    return _step(subject, "experiment", "it does, and is active")


@check(
    "The experiment can be written to",
    where="both",
    advice="Give the log-in the right to edit the experiment (in MLflow, EDIT), on driver and "
    "workers.",
    explains=("tasks",),
)
def experiment_is_writable(subject: Subject) -> Verdict | None:
    """A log-in that may only read sees everything and stores nothing."""
    return _step(subject, "write", "a span was stored")


def _step(subject: Subject, step: str, well: str) -> Verdict | None:
    """Return the verdict on one step of a process's way to the store."""
    if subject.facts.driver.get("no_store") is not None:
        return None
    if "store" not in subject.process:
        if subject.process is not subject.facts.driver and subject.facts.transport == "driver":
            return passed("not needed: spans come home with the task")
        return None
    steps = subject.process["store"]
    if step not in steps:
        return None
    problem = steps[step]
    if problem is None:
        return passed(well)
    return failed(f"{without_credentials(subject.facts.tracking_uri)}: {problem}")


@check(
    "Driver and workers see the same store",
    where="workers",
    advice="Use a tracking server. A file is one store only where all hosts share its disk, and "
    "localhost is another machine on each host.",
)
def store_is_the_same(subject: Subject) -> Verdict | None:
    """A path, or localhost, is something else on each host.

    Workers then store their spans well, where nobody looks.
    """
    written = subject.process.get("span_id")
    if (
        written is None
        or subject.facts.spans_found is None
        or subject.process["store"].get("write", "") is not None
    ):
        return None
    if written in subject.facts.spans_found:
        return passed("the driver has found what they have stored")
    return failed("the driver does not find what they have stored")


@check(
    "The store is not a file, or there is one host",
    where="workers",
    advice="Use a tracking server on a SQL database.",
)
def file_has_one_host(subject: Subject) -> Verdict | None:
    """SQLite is made for one host.

    On a shared disk its locks fail, and with them writes of many workers; on a disk that is not
    shared each host has a file of its own.
    """
    is_file = (
        subject.facts.tracking_uri.startswith("sqlite:") and subject.facts.transport == "direct"
    )
    if not is_file or subject.process["host"] == subject.facts.driver["host"]:
        return passed("it is not" if not is_file else "there is one host")
    return failed(
        f"{subject.facts.tracking_uri} is a file, and the driver is {subject.facts.driver['host']}"
    )


@check(
    "Clocks agree",
    where="job",
    advice="Set the clocks of all hosts by NTP (chrony, systemd-timesyncd).",
)
def clocks_agree(subject: Subject) -> Verdict | None:
    """Spans carry the time of the host that made them.

    Where clocks differ, calls seem to begin before their task or to end after their trace, and
    searches by time miss them.
    """
    if subject.facts.clock_difference is None:
        return None
    host, seconds = subject.facts.clock_difference
    if seconds >= 1:
        return warned(f"the clock of {host} is off by {seconds:.1f} s at least")
    return passed("within a second")
