"""The checks of a process: what is installed, whether it traces, what it keeps on its disk."""

from __future__ import annotations

from mlflow_ctx_autolog.diagnosis.check import (
    Subject,
    Verdict,
    check,
    failed,
    passed,
    warned,
)
from mlflow_ctx_autolog.versions import SUPPORTED


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
    return passed("it has") if problem is None else failed(f"no tracking store: {problem}")


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
        return failed(f"no worker answered{forked}: {subject.facts.workers_error}")
    if subject.facts.workers is None:
        return Verdict("unknown", "there is no Spark session to ask them by")
    hosts = sorted({str(worker["host"]) for worker in subject.facts.workers})
    return passed(f"{len(subject.facts.workers)} processes answered, on {', '.join(hosts)}")


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
        return failed(f"{subject.process['executable']} says {library['error']}")
    return passed(f"mlflow-ctx-autolog {library['version']}")


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
        return failed(f"mlflow-ctx-autolog {theirs} there, {ours} on the driver")
    is_complete = all("version" in package for package in subject.process["packages"].values())
    if "library_error" in subject.process and is_complete:
        return failed(f"it does not work there: {subject.process['library_error']}")
    return passed(ours)


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
            return failed(f"{supported.package}: {package['error']}")
        if version not in supported:
            return failed(
                f"{supported.package} {version}, not from {supported.oldest} up to "
                f"{supported.below}"
            )
        found.append(f"{supported.package} {version}")
    return passed(", ".join(found))


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
    return warned("; ".join(differing)) if differing else passed("they are")


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
    return passed(well) if problem is None else failed(f"{badly}: {problem}")


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
        return passed("all are recorded")
    found = f"MLFLOW_TRACE_SAMPLING_RATIO is {ratio:g}"
    return failed(found) if ratio == 0 else warned(found)


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
        return warned(f"{names} traces them, too")
    others = ", ".join(subject.process["layers"])
    return passed(f"nobody does; {others} wraps them" if others else "nobody does")


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
    return warned(f"set low: {', '.join(found)}") if found else passed("nothing is set low")


# MLflow's own, below which it forgets sooner; None where it forgets nothing by default.
_DEFAULTS = {
    "MLFLOW_ASYNC_TRACE_LOGGING_MAX_QUEUE_SIZE": 1000,
    "MLFLOW_TRACE_BUFFER_MAX_SIZE": 1000,
    "MLFLOW_TRACE_BUFFER_TTL_SECONDS": 3600,
    "MLFLOW_TRACE_TIMEOUT_SECONDS": None,
}
