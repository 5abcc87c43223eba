"""What MLflow loads by itself. Imported while MLflow is: light, and never raising."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["DriverExperimentProvider", "SparkRunContextProvider"]

# Not derived from MLflow's abstract classes: MLflow is only half imported when it imports this.
# And nothing of ours is imported before there is a task: whoever imports MLflow would wait for it.


class SparkRunContextProvider:
    """Tags a run that is started inside a Spark task with the application, stage and task."""

    def in_context(self) -> bool:
        """Whether this process is running a Spark task."""
        context = getattr(sys.modules.get("pyspark"), "TaskContext", None)
        return context is not None and context.get() is not None

    def tags(self) -> dict[str, str]:
        """Return the task's facts as tags, by the names of the task span's attributes."""
        from mlflow_ctx_autolog.worker.spark_task import task_attributes

        facts: dict[str, Any] = task_attributes()
        task = _current_task()
        if task is not None and task.context.application_id is not None:
            facts["spark.application.id"] = task.context.application_id
        return {name: str(value) for name, value in facts.items()}


class DriverExperimentProvider:
    """Gives code in a worker the experiment of the driver, where it has set none itself."""

    def in_context(self) -> bool:
        """Whether this process is running a function that carries a driver's context."""
        return _current_task() is not None

    def get_experiment_id(self) -> str | None:
        """Return the experiment of the driver's trace."""
        task = _current_task()
        # A collector has none.
        return None if task is None else task.context.experiment_id or None


def _current_task() -> Any:
    # Where that has not been imported, there is none.
    tasks = sys.modules.get("mlflow_ctx_autolog.task")
    return None if tasks is None else tasks.current_task()
