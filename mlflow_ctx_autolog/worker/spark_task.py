"""What Spark says, in a worker process, about the task that is running."""

from __future__ import annotations

import os
import re
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

from mlflow_ctx_autolog.exceptions import without_own_frames
from mlflow_ctx_autolog.patching import Patch

__all__ = [
    "ACTION_PROPERTY",
    "action_scope",
    "action_text",
    "application_id",
    "hide_own_frames",
    "in_spark_task",
    "is_batch",
    "is_reused",
    "on_task_end",
    "operation_scope",
    "row_count",
    "sees_properties",
    "skips_rest",
    "stream_query",
    "task_attributes",
]

# What the driver says of the action that a task is part of: a local property of Spark's, on Spark
# Connect the beginning of a tag of the operation.
ACTION_PROPERTY = "mlflow_ctx_autolog.action"
_JOB_GROUP = "spark.jobGroup.id"
_SQL_EXECUTION = "spark.sql.execution.id"
_ROOT_EXECUTION = "spark.sql.execution.root.id"
_CALL_SITE = "callSite.short"
_JOB_TAGS = "spark.job.tags"
_APPLICATION = "spark.app.id"
_QUERY, _BATCH = "sql.streaming.queryId", "streaming.sql.batchId"


def in_spark_task() -> bool:
    """Whether this process is running a Spark task. Imports nothing."""
    return _task_context() is not None


def action_text() -> str | None:
    """Return what the driver says of the action that the running task is part of, if it does."""
    context = _task_context()
    if context is None:
        return None
    text: str | None = context.getLocalProperty(ACTION_PROPERTY)
    if text is None:
        found = re.search(rf"_Tag_{ACTION_PROPERTY}=([^,]*)", _job_tags(context))
        text = None if found is None else found[1]
    return text


def sees_properties() -> bool:
    """Whether the running task sees local properties of Spark's, of which there are always some."""
    return bool(getattr(_task_context(), "_localProperties", True))


def action_scope(action: str | None) -> str:
    """Return what tells the running task's action from all others of the application.

    Args:
        action: What the driver says that its action is, number and name.
    """
    context = _task_context()
    if context is None:
        return f"process {os.getpid()}"
    operation = _operation(_job_tags(context))
    if operation is not None and context.getLocalProperty(_QUERY) is None:
        # The driver knows it, too. The batches of a stream are all of the one that started it.
        return operation_scope(operation)
    execution = context.getLocalProperty(_ROOT_EXECUTION) or context.getLocalProperty(
        _SQL_EXECUTION
    )
    if execution is not None:
        return f"execution {execution}"
    return f"stage {context.stageId()}" if action is None else f"action {action}"


def operation_scope(operation: str) -> str:
    """Return what tells the action that an operation of Spark Connect is from all others."""
    return f"operation {operation}"


def stream_query() -> tuple[str, str] | None:
    """Return id of the streaming query and number of the micro-batch of the task, if any."""
    context = _task_context()
    if context is None or (query := context.getLocalProperty(_QUERY)) is None:
        return None
    return query, context.getLocalProperty(_BATCH) or "?"


def _job_tags(context: Any) -> str:
    return context.getLocalProperty(_JOB_TAGS) or ""


def skips_rest(error: BaseException) -> bool:
    """Whether an exception only says that a table function wants no more rows."""
    kind = getattr(sys.modules.get("pyspark.sql.udtf"), "SkipRestOfInputTableException", None)
    return kind is not None and isinstance(error, kind)


def task_attributes() -> dict[str, Any]:
    """Return span attributes of the running task attempt.

    ``host.name`` and ``process.pid`` (OpenTelemetry's resource names) always; the rest where
    Spark says so: ``spark.stage.id``, ``spark.partition.id``, ``spark.task.attempt_number``
    (0 for the first), ``spark.task.attempt_id`` (unique in the application),
    ``spark.sql.execution.id``, that of the action as ``spark.sql.execution.root_id`` where one
    execution has started another, ``spark.call_site`` (the action's line on the driver),
    ``spark.job.group``, of a stream ``spark.streaming.batch`` (the query's id and the number of
    its micro-batch) and, on Spark Connect, ``spark.connect.operation.id``.
    """
    attributes: dict[str, Any] = {"host.name": socket.gethostname(), "process.pid": os.getpid()}
    context = _task_context()
    if context is None:
        return attributes
    operation = _operation(_job_tags(context))
    # On Spark Connect that is no line, but the beginning of the plan, literals and all.
    call_site = context.getLocalProperty(_CALL_SITE) if operation is None else None
    facts = {
        "spark.stage.id": context.stageId(),
        "spark.partition.id": context.partitionId(),
        "spark.task.attempt_number": context.attemptNumber(),
        "spark.task.attempt_id": context.taskAttemptId(),
        "spark.sql.execution.id": context.getLocalProperty(_SQL_EXECUTION),
        "spark.sql.execution.root_id": context.getLocalProperty(_ROOT_EXECUTION),
        "spark.call_site": call_site,
        "spark.job.group": context.getLocalProperty(_JOB_GROUP),
        "spark.streaming.batch": _micro_batch(context),
        "spark.connect.operation.id": operation,
    }
    attributes.update({name: value for name, value in facts.items() if value is not None})
    return attributes


def _micro_batch(context: Any) -> str | None:
    query, batch = context.getLocalProperty(_QUERY), context.getLocalProperty(_BATCH)
    return None if batch is None else f"{query}/{batch}"


def application_id() -> str | None:
    """Return Spark's id of the application whose task is running, where Spark says so."""
    context = _task_context()
    return None if context is None else context.getLocalProperty(_APPLICATION)


def _operation(job_tags: str) -> str | None:
    """Return the operation of Spark Connect among the tags of a job, if there is one."""
    found = re.search(r"SparkConnect_[^,]*_Operation_([0-9a-f-]{36})", job_tags)
    return None if found is None else found[1]


def is_reused() -> bool:
    """Whether this Python process is to run other tasks after the one that it is running."""
    # Without Spark's daemon, the worker's module is run as a script.
    return "SPARK_REUSE_WORKER" in os.environ and "pyspark.worker" in sys.modules


def is_batch(item: object) -> bool:
    """Whether an item is a batch or a column of rows, of pandas or Arrow."""
    library = type(item).__module__.partition(".")[0]
    if library == "pandas":
        return bool(getattr(item, "shape", None))
    return library == "pyarrow" and (hasattr(item, "num_rows") or hasattr(item, "null_count"))


def row_count(item: Any) -> int:
    """Return how many rows one item holds: of a batch or column its length, else one."""
    return len(item) if is_batch(item) else 1


def on_task_end(callback: Callable[[bool], None]) -> None:
    """Call back once, when Spark has taken the last row of the running task, or given it up.

    For functions that Spark calls row by row or batch by batch: nothing tells them which call is
    the last.

    Args:
        callback: Takes whether the task came to its regular end.

    Raises:
        RuntimeError: This release of Spark does not let itself be asked.
    """
    if _end_patches and _end_patches[0].active:
        return
    ends = [
        (module, name, regular)
        for module, name, regular in _ENDS
        if hasattr(sys.modules.get(module), name)
    ]
    if not any(regular for _, _, regular in ends):
        raise RuntimeError("this release of Spark does not say when a task ends")
    _end_patches[:] = [
        Patch(sys.modules[module], name, _ending(callback, regular))
        for module, name, regular in ends
    ]
    for patch in _end_patches:
        patch.apply()


# What a Python worker calls at the end of a task, before it reports to Spark or ends itself, and
# whether that is the regular end. Without its daemon, Spark runs the worker as a script; Spark 3.5
# handles exceptions in line, and only the daemon sees the worker leave.
_ENDS = (
    ("pyspark.worker", "report_times", True),
    ("__main__", "report_times", True),
    ("pyspark.worker", "handle_worker_exception", False),
    ("__main__", "handle_worker_exception", False),
    ("__main__", "compute_real_exit_code", False),
    ("pyspark.daemon", "compute_real_exit_code", False),
)
_end_patches: list[Patch] = []


def _ending(callback: Callable[[bool], None], regular: bool) -> Callable[..., Any]:
    def end(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for patch in _end_patches:
            patch.revert()
        callback(regular)
        return original(*args, **kwargs)

    return end


def hide_own_frames() -> None:
    """Have no frame of ours in the tracebacks that this worker sends to Spark, from now on.

    Idempotent. Nothing else of an error changes.
    """
    # A copy: another thread may be importing what tracing needs.
    for name, module in sys.modules.copy().items():
        if (name.startswith("pyspark.") or name == "__main__") and (
            "handle_worker_exception" in vars(module)
        ):
            _tidy(module, "handle_worker_exception")
    # Spark 3.5 formats the error where it catches it.
    worker = sys.modules.get("pyspark.worker", sys.modules.get("__main__"))
    if worker is not None and "handle_worker_exception" not in vars(worker):
        _tidy(traceback, "format_exc")
        if "try_simplify_traceback" in vars(worker):
            # That of a UDF, of which Spark leaves its own frames out.
            _tidy(worker, "try_simplify_traceback")


_tidied: dict[tuple[Any, str], Patch] = {}


def _tidy(owner: Any, name: str) -> None:
    def tidy(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        error = sys.exc_info()[1]
        if error is not None:
            without_own_frames(error)
        return original(*args, **kwargs)

    if (owner.__name__, name) not in _tidied:
        patch = _tidied[(owner.__name__, name)] = Patch(owner, name, tidy)
        patch.apply()


def _task_context() -> Any:
    pyspark = sys.modules.get("pyspark")
    context = getattr(pyspark, "TaskContext", None)
    return None if context is None else context.get()
