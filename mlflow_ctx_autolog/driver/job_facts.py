"""What Spark knows of the jobs of a session, and does not tell its workers."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

from mlflow_ctx_autolog.driver.spark import spark_context
from mlflow_ctx_autolog.log_ins import safe_logger

__all__ = ["job_facts"]

_logger = safe_logger(__name__)

# Milliseconds that Spark may take to tell its own listeners what has happened.
_NEWS = 2000
# Executions and jobs, of the latest ones, and tasks of a stage, that are looked at.
_EXECUTIONS, _JOBS, _TASKS = 300, 1000, 5000


def job_facts(spark: Any, functions: Collection[str], since: int) -> dict[str, Any] | None:
    """Return what Spark knows of the jobs of a session, and does not tell its workers.

    Args:
        spark: A session or context.
        functions: The names of the functions that were handed over.
        since: Milliseconds since the epoch; what began before is left out.

    Returns:
        ``plans``: for each SQL execution, how many nodes of its final plan run each function or
        scan a cached table; ``speculative``: ids of task attempts that were copies, None where
        Spark does not say; ``jobs``: the job of each stage. None on Spark Connect, and when Spark
        has stopped.
    """
    context = spark_context(spark)
    if context is None or context._jsc is None:
        return None
    core = context._jsc.sc()
    with contextlib.suppress(Exception):
        core.listenerBus().waitUntilEmpty(_NEWS)
    status = core.statusStore()
    jobs: dict[int, int] = {}
    speculative: list[int] | None = []
    for job in _latest(status.jobsList(None), _JOBS, by=lambda job: int(job.jobId())):
        submitted = job.submissionTime()
        if submitted.isDefined() and submitted.get().getTime() < since:
            break
        for stage in _items(job.stageIds()):
            jobs.setdefault(stage, int(job.jobId()))
    if context._conf.get("spark.speculation", "false") == "true":
        try:
            speculative = [each for stage in jobs for each in _speculative_attempts(status, stage)]
        except Exception as error:
            _logger.info("Spark does not say which task attempts were copies: %r", error)
            speculative = None
    session = spark if hasattr(spark, "_jsparkSession") else _session_in(context)
    plans = {} if session is None else _plans(session._jsparkSession, functions, since)
    return {"plans": plans, "speculative": speculative, "jobs": jobs}


def _session_in(context: Any) -> Any:
    from pyspark.sql import SparkSession

    session = getattr(SparkSession, "_instantiatedSession", None)
    return session if session is not None and session.sparkContext is context else None


def _speculative_attempts(status: Any, stage: int) -> Iterator[int]:
    for attempt in range(status.lastStageAttempt(stage).attemptId() + 1):
        copies = status.speculationSummary(stage, attempt)
        if copies.isDefined():
            for task in _items(status.taskList(stage, attempt, _TASKS)):
                if task.speculative():
                    yield int(task.taskId())


def _plans(session: Any, functions: Collection[str], since: int) -> dict[str, dict[str, int]]:
    status = session.sharedState().statusStore()
    plans: dict[str, dict[str, int]] = {}
    executions = status.executionsList()
    for execution in _latest(executions, _EXECUTIONS, by=lambda each: int(each.executionId())):
        if execution.submissionTime() < since:
            break
        nodes: Counter[str] = Counter()
        for node in _items(status.planGraph(execution.executionId()).allNodes()):
            if node.name() == "InMemoryTableScan":
                nodes[node.name()] += 1
            else:
                named = set(re.findall(r"\w+(?=\()", node.desc()))
                nodes.update(named.intersection(functions))
        plans[str(execution.executionId())] = dict(nodes)
    return plans


def _items(sequence: Any) -> Iterator[Any]:
    for index in range(sequence.size()):
        yield sequence.apply(index)


def _latest(sequence: Any, count: int, by: Callable[[Any], int]) -> list[Any]:
    return sorted(_items(sequence), key=by, reverse=True)[:count]
