"""The checks of ``doctor()``: each takes facts and says what they mean.

A new check is one function here, under ``@check``; its docstring and its advice are what the page
"No traces?" says of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlflow_ctx_autolog.log_ins import without_credentials
from mlflow_ctx_autolog.versions import SUPPORTED

__all__ = [
    "CHECKS",
    "SPARK_SETTINGS",
    "VARIABLES",
    "Check",
    "Facts",
    "Finding",
    "Level",
    "examine",
    "likely_causes",
]

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
_ACCESS_MODE = "spark.databricks.clusterUsageTags.dataSecurityMode"
SPARK_SETTINGS = (
    _ACCESS_MODE,
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


CHECKS: list[Check] = []


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
        CHECKS.append(Check(name, title, where, advice, why, judge, at_enable, explains))
        return judge

    return register


def examine(facts: Facts, *, at_enable: bool = False) -> list[Finding]:
    """Put facts to the checks, in their order.

    Args:
        facts: The facts.
        at_enable: Only what ``enable()`` asks the driver, and what it has to say.
    """
    findings = []
    for each in CHECKS:
        if at_enable:
            if each.at_enable is not None:
                finding = _finding(each, "driver", facts, [facts.driver])
                if _BADNESS[finding.level] >= _BADNESS[each.at_enable]:
                    findings.append(finding)
            continue
        if each.where in ("driver", "both"):
            findings.append(_finding(each, "driver", facts, [facts.driver]))
        if each.where in ("workers", "both") and facts.workers is not None:
            findings.append(_finding(each, "workers", facts, facts.workers))
        if each.where == "job":
            findings.append(_finding(each, "job", facts, [facts.driver]))
    return findings


def likely_causes(silence: Silence) -> str:
    """Return a text that names the checks which most likely explain a silence."""
    titles = "; ".join(each.title for each in CHECKS if silence in each.explains)
    return f"Most likely, one of these is not so: {titles}. ctx_autolog.doctor() checks them."


_BADNESS: dict[Level, int] = {"unknown": 0, "pass": 1, "warn": 2, "fail": 3}


def _finding(each: Check, where: str, facts: Facts, processes: Sequence[Process]) -> Finding:
    """Return the worst verdict of some processes, and the hosts that it is of."""
    hosts: dict[Verdict, set[str]] = {}
    for process in processes:
        verdict = each.judge(Subject(facts, process)) or _UNKNOWN
        hosts.setdefault(verdict, set()).add(str(process.get("host")))
    worst = max(hosts, key=lambda verdict: _BADNESS[verdict.level], default=_UNKNOWN)
    found = worst.found
    if where == "workers" and worst.level in ("warn", "fail"):
        found = f"{', '.join(sorted(hosts[worst]))}: {found}"
    advice = each.advice if worst.level in ("warn", "fail") else ""
    return Finding(each.name, each.title, where, worst.level, found, advice)


def _passed(found: str) -> Verdict:
    return Verdict("pass", found)


def _warned(found: str) -> Verdict:
    return Verdict("warn", found)


def _failed(found: str) -> Verdict:
    return Verdict("fail", found)


_UNKNOWN = Verdict("unknown", "could not be found out")


# The checks.


@check(
    "MLflow has a tracking store",
    where="driver",
    advice="For a store on this machine install the whole of MLflow, pip install mlflow (or "
    "'mlflow-ctx-autolog[local]'); else name a server: mlflow.set_tracking_uri, or "
    "MLFLOW_TRACKING_URI.",
    at_enable="fail",
    explains=("calls", "tasks"),
)
def there_is_a_store(subject: Subject) -> Verdict | None:
    """MLflow's default is a database file, and mlflow-skinny has no such store, nor any other.

    Spans are then made and stored nowhere, on the driver neither.
    """
    if "no_store" not in subject.process:
        return None
    problem = subject.process["no_store"]
    return _passed("it has") if problem is None else _failed(f"no tracking store: {problem}")


@check(
    "Workers run Python functions",
    where="job",
    advice="Read what Spark says. Most often the workers have another Python than the driver: set "
    "PYSPARK_PYTHON to the same one on all nodes. Where it is the daemon that does not start, the "
    "module that spark.python.daemon.module names is not installed there.",
)
def workers_answer(subject: Subject) -> Verdict | None:
    """Without it, no job with Python functions runs at all, whether traced or not."""
    if subject.facts.workers_error is not None:
        daemon = (subject.facts.spark or {}).get("spark.python.daemon.module")
        forked = f" (spark.python.daemon.module={daemon})" if daemon else ""
        return _failed(f"no worker answered{forked}: {subject.facts.workers_error}")
    if subject.facts.workers is None:
        return Verdict("unknown", "there is no Spark session to ask them by")
    hosts = sorted({str(worker["host"]) for worker in subject.facts.workers})
    return _passed(f"{len(subject.facts.workers)} processes answered, on {', '.join(hosts)}")


@check(
    "The library can be imported",
    where="both",
    advice="Install mlflow-ctx-autolog on every node of the cluster, into the Python that runs the "
    "workers: pip install mlflow-ctx-autolog, or the cluster's list of libraries.",
    explains=("tasks",),
)
def library_is_installed(subject: Subject) -> Verdict | None:
    """Spark does not take a package along to the workers.

    Without this one, a traced job fails there with an ImportError.
    """
    library = subject.process["packages"]["mlflow_ctx_autolog"]
    if "error" in library:
        return _failed(f"{subject.process['executable']} says {library['error']}")
    return _passed(f"mlflow-ctx-autolog {library['version']}")


@check(
    "All nodes have the same version of the library",
    where="workers",
    advice="Install the version of the driver on every node of the cluster.",
    explains=("calls", "tasks"),
)
def library_is_the_same(subject: Subject) -> Verdict | None:
    """What travels from the driver to the workers has a version.

    A worker that does not know it runs your function untraced, and says so in its own log only.
    """
    theirs = subject.process["packages"]["mlflow_ctx_autolog"].get("version")
    ours = subject.facts.driver["packages"]["mlflow_ctx_autolog"].get("version")
    if theirs is None or ours is None:
        return None
    if theirs != ours:
        return _failed(f"mlflow-ctx-autolog {theirs} there, {ours} on the driver")
    is_complete = all("version" in package for package in subject.process["packages"].values())
    if "library_error" in subject.process and is_complete:
        return _failed(f"it does not work there: {subject.process['library_error']}")
    return _passed(ours)


@check(
    "Versions are supported",
    where="both",
    advice="Install a supported release; mlflow-ctx-autolog versions shows which those are.",
)
def versions_are_supported(subject: Subject) -> Verdict | None:
    """The library changes single functions of MLflow, the OpenAI client and PySpark.

    It knows those of certain releases. With another one, enable() raises on the driver, and calls
    of a worker go untraced.
    """
    found = []
    for supported in SUPPORTED:
        package = subject.process["packages"][supported.package]
        version = package.get("version")
        if version is None and not supported.required:
            continue
        if version is None:
            return _failed(f"{supported.package}: {package['error']}")
        if version not in supported:
            return _failed(
                f"{supported.package} {version}, not from {supported.oldest} up to "
                f"{supported.below}"
            )
        found.append(f"{supported.package} {version}")
    return _passed(", ".join(found))


@check(
    "Versions are the same on driver and workers",
    where="workers",
    advice="Install the driver's release on every node of the cluster.",
)
def versions_are_the_same(subject: Subject) -> Verdict | None:
    """Two releases can record the same call in different ways, or one of them not at all."""
    differing = []
    for supported in SUPPORTED:
        theirs = subject.process["packages"][supported.package].get("version")
        ours = subject.facts.driver["packages"][supported.package].get("version")
        if theirs is None or ours is None or theirs not in supported:
            continue
        if theirs != ours:
            differing.append(f"{supported.package} {theirs} there, {ours} on the driver")
    return _warned("; ".join(differing)) if differing else _passed("they are")


@check(
    "Tracing is on",
    where="both",
    advice="Call mlflow.tracing.enable(), take mlflow.tracing.disable() out of your code, and "
    "unset OTEL_SDK_DISABLED where this process runs.",
    at_enable="fail",
    explains=("calls", "tasks"),
)
def tracing_is_on(subject: Subject) -> Verdict | None:
    """Where MLflow's tracing is switched off, calls work and leave no span.

    There is no error.
    """
    return _fact(subject, "tracing", well="it is", badly="it is off")


def _fact(subject: Subject, name: str, *, well: str, badly: str) -> Verdict | None:
    """Return the verdict on a fact that is what is wrong with something, None if nothing is."""
    if name not in subject.process:
        return None
    problem = subject.process[name]
    return _passed(well) if problem is None else _failed(f"{badly}: {problem}")


@check(
    "No trace is dropped by sampling",
    where="both",
    advice="Unset MLFLOW_TRACE_SAMPLING_RATIO, or set it to 1, where this process runs.",
    at_enable="fail",
    explains=("calls", "tasks"),
)
def all_is_sampled(subject: Subject) -> Verdict | None:
    """By MLFLOW_TRACE_SAMPLING_RATIO, MLflow drops a share of the traces, with all their calls.

    The driver decides for its trace; a worker for tasks that have none above them.
    """
    ratio = subject.process.get("sampling_ratio")
    if ratio is None:
        return None
    if ratio == 1:
        return _passed("all are recorded")
    found = f"MLFLOW_TRACE_SAMPLING_RATIO is {ratio:g}"
    return _failed(found) if ratio == 0 else _warned(found)


# By the first part of their modules' names.
_TRACERS = {
    "openinference": "OpenInference",
    "opentelemetry": "an OpenTelemetry instrumentation (OpenLLMetry)",
    "traceloop": "OpenLLMetry",
    "langfuse": "Langfuse",
    "ddtrace": "ddtrace",
    "logfire": "Logfire",
    "langsmith": "LangSmith",
    "sentry_sdk": "Sentry",
}


@check(
    "Nobody else traces the OpenAI client's calls",
    where="both",
    advice="Keep one of the two: do not instrument the OpenAI client with the other library in "
    "this process, or do without mlflow_ctx_autolog.enable().",
    at_enable="warn",
)
def nobody_else_traces(subject: Subject) -> Verdict | None:
    """Two libraries that both wrap the client record every call twice, and its tokens too.

    Where both share OpenTelemetry's provider, MLflow shows both.
    """
    if "layers" not in subject.process:
        return None
    tracers = {layer.partition(".")[0] for layer in subject.process["layers"]} & _TRACERS.keys()
    if tracers:
        names = " and ".join(sorted(_TRACERS[tracer] for tracer in tracers))
        return _warned(f"{names} traces them, too")
    others = ", ".join(subject.process["layers"])
    return _passed(f"nobody does; {others} wraps them" if others else "nobody does")


@check(
    "The spool can be written",
    where="both",
    advice="Set spool_directory to a directory on a local disk that the workers' user may write "
    "to, or spool_max_bytes=0 to do without a spool.",
    at_enable="fail",
)
def spool_is_writable(subject: Subject) -> Verdict | None:
    """Finished spans wait on the process's own disk until they are stored.

    Where they cannot, they wait in memory, and are lost with a worker that is killed.
    """
    return _fact(subject, "spool", well="it can", badly="it cannot")


@check(
    "MLflow keeps a trace for as long as the job lasts",
    where="driver",
    advice="Unset the variable, or set it to more than a job lasts and a trace has spans, on the "
    "driver, before MLflow is imported.",
)
def nothing_is_forgotten(subject: Subject) -> Verdict | None:
    """MLflow drops spans silently where one of four variables is set too low.

    It forgets a trace that is open for longer than MLFLOW_TRACE_BUFFER_TTL_SECONDS, or one too many
    for MLFLOW_TRACE_BUFFER_MAX_SIZE; ends one after MLFLOW_TRACE_TIMEOUT_SECONDS; and drops what
    does not fit into MLFLOW_ASYNC_TRACE_LOGGING_MAX_QUEUE_SIZE.
    """
    found = []
    for name, default in _DEFAULTS.items():
        text = subject.process["variables"].get(name)
        if text is None:
            continue
        if not text.isdecimal() or default is None or int(text) < default:
            found.append(f"{name}={text}")
    return _warned(f"set low: {', '.join(found)}") if found else _passed("nothing is set low")


# MLflow's own, below which it forgets sooner; None where it forgets nothing by default.
_DEFAULTS = {
    "MLFLOW_ASYNC_TRACE_LOGGING_MAX_QUEUE_SIZE": 1000,
    "MLFLOW_TRACE_BUFFER_MAX_SIZE": 1000,
    "MLFLOW_TRACE_BUFFER_TTL_SECONDS": 3600,
    "MLFLOW_TRACE_TIMEOUT_SECONDS": None,
}


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
        return _failed(subject.facts.transport_reason)
    if subject.facts.transport == "driver" and not subject.facts.has_accumulators:
        return _failed(
            f"{subject.facts.transport_reason}, so that they would have to come home with the "
            "task, and Spark Connect has no way for that"
        )
    way = (
        "with the task to the driver" if subject.facts.transport == "driver" else "from the workers"
    )
    mode = _setting(subject.facts, _ACCESS_MODE, "")
    found = f"{way}: {subject.facts.transport_reason}{f' (access mode {mode})' if mode else ''}"
    if not subject.facts.takes_spans:
        return _warned(f"{found}; they are stored only with the driver's span, when that ends")
    return _passed(found)


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
        return _failed(f"{verdict.found}; variables set for it: {set_there}{only_driver}")
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
            return _passed("not needed: spans come home with the task")
        return None
    steps = subject.process["store"]
    if step not in steps:
        return None
    problem = steps[step]
    if problem is None:
        return _passed(well)
    return _failed(f"{without_credentials(subject.facts.tracking_uri)}: {problem}")


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
        return _passed("the driver has found what they have stored")
    return _failed("the driver does not find what they have stored")


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
        return _passed("it is not" if not is_file else "there is one host")
    return _failed(
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
        return _warned(f"the clock of {host} is off by {seconds:.1f} s at least")
    return _passed("within a second")


@check(
    "Workers can reach the model endpoint",
    where="workers",
    advice="Open the way out (firewall, proxy variables, DNS) on the workers, or name the endpoint "
    "that your functions use: doctor(spark, model_url=...).",
)
def model_is_reachable(subject: Subject) -> Verdict | None:
    """A call that cannot reach the model fails or hangs in your own function.

    Only a connection is made here; no token is spent.
    """
    if "model" not in subject.process:
        return None
    problem = subject.process["model"]
    if problem is None:
        return _passed("they can connect to it")
    return _failed(problem) if subject.facts.model_url_was_named else _warned(problem)


@check(
    "No task runs twice by speculation",
    where="job",
    advice="Set spark.speculation=false for jobs that call models.",
)
def no_speculation(subject: Subject) -> Verdict | None:
    """Spark starts a second attempt of tasks that take long, and keeps one of them.

    You pay for the calls of both, and the trace shows both.
    """
    value = _setting(subject.facts, "spark.speculation", "false")
    if value is None:
        return None
    found = f"spark.speculation={value}"
    return _warned(found) if value == "true" else _passed(found)


@check(
    "Failed tasks are not tried many times",
    where="job",
    advice="Set spark.task.maxFailures to 4 or less for jobs that call models.",
)
def few_retries(subject: Subject) -> Verdict | None:
    """A task that fails is run again from its first row, and its calls are paid for anew."""
    value = _setting(subject.facts, "spark.task.maxFailures", "4")
    if value is None or not value.isdecimal():
        return None
    found = f"spark.task.maxFailures={value}"
    return _warned(found) if int(value) > 4 else _passed(found)


@check(
    "Executors are not taken away in the middle of a task",
    where="job",
    advice="Set spark.decommission.enabled=true where spark.dynamicAllocation.enabled=true.",
)
def executors_say_goodbye(subject: Subject) -> Verdict | None:
    """An executor that is given up takes with it results that are needed again.

    Its tasks are then run again, and so are their calls. With decommissioning, Spark moves the
    results first.
    """
    allocates = _setting(subject.facts, "spark.dynamicAllocation.enabled", "false")
    decommissions = _setting(subject.facts, "spark.decommission.enabled", "false")
    if allocates is None or decommissions is None:
        return None
    found = (
        f"spark.dynamicAllocation.enabled={allocates}, spark.decommission.enabled={decommissions}"
    )
    is_risky = allocates == "true" and decommissions != "true"
    return _warned(found) if is_risky else _passed(found)


@check(
    "Python workers are used again",
    where="job",
    advice="Leave spark.python.worker.reuse at its default, true.",
)
def workers_are_reused(subject: Subject) -> Verdict | None:
    """Otherwise each task starts a process of its own, which takes seconds to import MLflow."""
    value = _setting(subject.facts, "spark.python.worker.reuse", "true")
    if value is None:
        return None
    found = f"spark.python.worker.reuse={value}"
    return _passed(found) if value == "true" else _warned(found)


def _setting(facts: Facts, name: str, default: str) -> str | None:
    """Return a setting of Spark's in lower case; None where Spark does not tell."""
    if facts.spark is None or name not in facts.spark:
        return None
    return (facts.spark[name] or default).lower()


@check(
    "Tasks see which span their action is of",
    where="workers",
    advice='Say enable(propagation="broadcast"), or MLFLOW_CTX_AUTOLOG_PROPAGATION=broadcast. This '
    "process does so from now on, for what it hands to Spark after doctor().",
)
def tasks_see_their_span(subject: Subject) -> Verdict | None:
    """The driver says it in a local property, on Spark Connect in a tag, and calls belong there.

    Some platforms hide these from tasks. Calls are then in traces of their actions, until the span
    travels in the broadcast, where plans are shared within one span only.
    """
    if "sees_action" not in subject.process:
        return None
    if subject.process["sees_action"]:
        return _passed("they do")
    if subject.facts.propagation == "broadcast":
        return _passed("they do not, and need not: it is in the broadcast")
    return _warned("the driver said it, and the task has not seen it")


@check(
    "A call on a worker arrives under the driver's trace",
    where="job",
    advice="Run your job with logging.getLogger('mlflow_ctx_autolog') at INFO, look at "
    "ctx_autolog.receipt() after it, and at the workers' logs (stderr of the executors).",
)
def round_trip(subject: Subject) -> Verdict | None:
    """The proof: a call to a stand-in, made in a real task, is looked for in the store.

    It is made where no other check has failed.
    """
    if subject.facts.round_trip_skipped is not None:
        return Verdict("unknown", f"not tried, since {subject.facts.round_trip_skipped}")
    if subject.facts.round_trip is not None:
        return _failed(subject.facts.round_trip)
    return _passed("a call to a stand-in, made in a task, was read back from the store")
