"""What can be read on the driver of the actions that a program has run, and of its session."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from job import normal

__all__ = ["ActionFacts", "session_facts"]


class ActionFacts:
    """What Spark has on record of the jobs and queries of a session, from its making on.

    Args:
        spark: A session; of one on Spark Connect, whose server is asked for nothing here, only what
            the client itself knows.
    """

    def __init__(self, spark: Any) -> None:
        self._spark = spark
        self._jobs = {job.jobId() for job in self._all_jobs()}
        self._executions = {each.executionId() for each in self._all_executions()}

    def since_then(self) -> dict[str, Any]:
        """Return the facts, in order."""
        jobs = [job for job in self._all_jobs() if job.jobId() not in self._jobs]
        executions = [
            each for each in self._all_executions() if each.executionId() not in self._executions
        ]
        return {
            "jobs": [_job(job) for job in sorted(jobs, key=lambda job: job.jobId())],
            "queries": [
                normal(each.description())
                for each in sorted(executions, key=lambda each: each.executionId())
            ],
            "settings": sorted(_settings(self._spark)),
            "tags": self._tags(),
        }

    def _tags(self) -> list[str]:
        # Of classic Spark, 3.5 has none.
        with contextlib.suppress(AttributeError, RuntimeError):
            return sorted(self._spark.getTags())
        return []

    def _all_jobs(self) -> list[Any]:
        core = _core(self._spark)
        if core is None:
            return []
        core.listenerBus().waitUntilEmpty(10_000)
        return _items(core.statusStore().jobsList(None))

    def _all_executions(self) -> list[Any]:
        if _core(self._spark) is None:
            return []
        return _items(self._spark._jsparkSession.sharedState().statusStore().executionsList())


def _core(spark: Any) -> Any:
    return spark.sparkContext._jsc.sc() if hasattr(spark, "_jsparkSession") else None


def _items(sequence: Any) -> list[Any]:
    return [sequence.apply(index) for index in range(sequence.size())]


def _job(job: Any) -> list[Any]:
    def text(option: Any) -> str | None:
        return normal(option.get()) if option.isDefined() else None

    stages = job.stageIds().size(), job.numCompletedStages(), job.numSkippedStages()
    tasks = job.numTasks(), job.numFailedTasks()
    tags: list[str] = []
    # Spark 3.5 has none on record.
    with contextlib.suppress(Exception):
        tags = [str(tag) for tag in _items(job.jobTags().toSeq())]
    return [
        normal(job.name()), text(job.description()), text(job.jobGroup()), stages, tasks,
        [normal(tag) for tag in sorted(tags) if "-execution-root-id-" not in tag],
    ]  # fmt: skip


def _settings(spark: Any) -> list[str]:
    # Of the session, or of the server; what differs between two runs of the same.
    changing = (
        "spark.app.",
        "spark.driver.port",
        "spark.local",
        "spark.repl",
        "spark.sql.warehouse",
    )
    # Spark 3.5 does not have it.
    found = getattr(spark.conf, "getAll", {})
    found = dict(found() if callable(found) else found)
    if hasattr(spark, "_jsparkSession"):
        found.update(spark.sparkContext.getConf().getAll())
    return [
        f"{name}={normal(value)}" for name, value in found.items() if not name.startswith(changing)
    ]


def session_facts(spark: Any) -> dict[str, int]:
    """Return how much of what stays until the end there is of each kind; nothing on Connect."""
    if not hasattr(spark, "_jsparkSession"):
        return {}
    from pyspark import accumulators

    # PySpark writes one file for each broadcast.
    files = [name for _, _, names in os.walk(spark.sparkContext._temp_dir) for name in names]
    return {"files": len(files), "accumulators": len(accumulators._accumulatorRegistry)}
