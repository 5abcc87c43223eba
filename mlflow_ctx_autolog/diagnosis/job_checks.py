"""The checks of what a job will meet: models, Spark's settings, and one call all the way."""

from __future__ import annotations

from mlflow_ctx_autolog.diagnosis.check import (
    Subject,
    Verdict,
    check,
    failed,
    passed,
    setting,
    warned,
)


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
        return passed("they can connect to it")
    return failed(problem) if subject.facts.model_url_was_named else warned(problem)


@check(
    "No task runs twice by speculation",
    where="job",
    advice="Set spark.speculation=false for jobs that call models.",
)
def no_speculation(subject: Subject) -> Verdict | None:
    """Spark starts a second attempt of tasks that take long, and keeps one of them.

    You pay for the calls of both, and the trace shows both.
    """
    value = setting(subject.facts, "spark.speculation", "false")
    if value is None:
        return None
    found = f"spark.speculation={value}"
    return warned(found) if value == "true" else passed(found)


@check(
    "Failed tasks are not tried many times",
    where="job",
    advice="Set spark.task.maxFailures to 4 or less for jobs that call models.",
)
def few_retries(subject: Subject) -> Verdict | None:
    """A task that fails is run again from its first row, and its calls are paid for anew."""
    value = setting(subject.facts, "spark.task.maxFailures", "4")
    if value is None or not value.isdecimal():
        return None
    found = f"spark.task.maxFailures={value}"
    return warned(found) if int(value) > 4 else passed(found)


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
    allocates = setting(subject.facts, "spark.dynamicAllocation.enabled", "false")
    decommissions = setting(subject.facts, "spark.decommission.enabled", "false")
    if allocates is None or decommissions is None:
        return None
    found = (
        f"spark.dynamicAllocation.enabled={allocates}, spark.decommission.enabled={decommissions}"
    )
    is_risky = allocates == "true" and decommissions != "true"
    return warned(found) if is_risky else passed(found)


@check(
    "Python workers are used again",
    where="job",
    advice="Leave spark.python.worker.reuse at its default, true.",
)
def workers_are_reused(subject: Subject) -> Verdict | None:
    """Otherwise each task starts a process of its own, which takes a while to be ready."""
    value = setting(subject.facts, "spark.python.worker.reuse", "true")
    if value is None:
        return None
    found = f"spark.python.worker.reuse={value}"
    return passed(found) if value == "true" else warned(found)


@check(
    "Workers load MLflow only where it is wanted",
    where="job",
    advice="Look at docs/mlflow-in-workers.md for what has a worker load it.",
)
def mlflow_is_wanted(subject: Subject) -> Verdict | None:
    """Calls are recorded and stored without it, and it costs each Python process 1.5 s and 200 MB.

    It is needed by functions that import it, by other autologs and span processors of the driver,
    for prices, and by some stores and log-ins. Nothing is wrong with that; it is said what it is.
    """
    facts = subject.facts
    wanted = list(facts.mlflow_wanted)
    had = [worker for worker in facts.workers or () if worker.get("had_mlflow")]
    told = sorted({why for worker in had if (why := worker.get("why_mlflow"))} - set(wanted))
    if wanted:
        return passed(f"they do, for {'; '.join([*wanted, *told])}")
    if facts.workers is None:
        return None
    if not had:
        return passed("they do not, but for functions that import it")
    known = "; ".join(told) or "a function, or a doctor(), that has run there"
    return passed(f"{len(had)} of {len(facts.workers)} that were asked have it, for {known}")


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
        return passed("they do")
    if subject.facts.propagation == "broadcast":
        return passed("they do not, and need not: it is in the broadcast")
    return warned("the driver said it, and the task has not seen it")


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
        return failed(subject.facts.round_trip)
    return passed("a call to a stand-in, made in a task, was read back from the store")
