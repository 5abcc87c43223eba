"""What Spark says, in a worker process, about the task that is running."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

__all__ = ["in_spark_task", "row_count", "task_attributes"]

_JOB_GROUP = "spark.jobGroup.id"
_SQL_EXECUTION = "spark.sql.execution.id"


def in_spark_task() -> bool:
    """Whether this process is running a Spark task. Imports nothing."""
    return _task_context() is not None


def task_attributes() -> dict[str, Any]:
    """Return span attributes of the running task attempt.

    ``host.name`` and ``process.pid`` (OpenTelemetry's resource names) always; the rest where
    Spark says so: ``spark.stage.id``, ``spark.partition.id``, ``spark.task.attempt_number``
    (0 for the first), ``spark.task.attempt_id`` (unique in the application),
    ``spark.sql.execution.id`` and ``spark.job.group``.
    """
    attributes: dict[str, Any] = {"host.name": socket.gethostname(), "process.pid": os.getpid()}
    context = _task_context()
    if context is None:
        return attributes
    facts = {
        "spark.stage.id": context.stageId(),
        "spark.partition.id": context.partitionId(),
        "spark.task.attempt_number": context.attemptNumber(),
        "spark.task.attempt_id": context.taskAttemptId(),
        "spark.sql.execution.id": context.getLocalProperty(_SQL_EXECUTION),
        "spark.job.group": context.getLocalProperty(_JOB_GROUP),
    }
    attributes.update({name: value for name, value in facts.items() if value is not None})
    return attributes


def row_count(item: object) -> int:
    """Return how many rows one item of a partition holds: of a batch its length, else one."""
    library = type(item).__module__.partition(".")[0]
    if library == "pandas":
        return len(item)  # type: ignore[arg-type]
    if library == "pyarrow":
        return int(item.num_rows)  # type: ignore[attr-defined]
    return 1


def _task_context() -> Any:
    pyspark = sys.modules.get("pyspark")
    context = getattr(pyspark, "TaskContext", None)
    return None if context is None else context.get()
