"""MLflow's OpenAI autolog, with spans that know which Spark task they belong to."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import mlflow.openai
from mlflow.entities.span import NoOpSpan
from mlflow.utils.autologging_utils import AUTOLOGGING_INTEGRATIONS, autologging_is_disabled

from mlflow_ctx_autolog.patching import Patch
from mlflow_ctx_autolog.task import current_task
from mlflow_ctx_autolog.tracing import has_active_span

__all__ = ["OpenAICalls"]

_FLAVOR = mlflow.openai.FLAVOR_NAME
# The function of the same name hides the module from an import statement.
_autolog_module = importlib.import_module("mlflow.openai.autolog")


class OpenAICalls:
    """Turns MLflow's OpenAI autolog on, and makes its spans children of the task's span.

    The parent of a call's span is the span active in this execution context; else the span of
    the Spark task that this process is running, from whichever thread the call comes; else
    there is none, as in MLflow.

    Args:
        only_in_tasks: Trace calls only while a task is open; for worker processes, which are
            used again by jobs that have nothing to do with this one.
    """

    def __init__(self, *, only_in_tasks: bool) -> None:
        self._only_in_tasks = only_in_tasks
        self._patch = Patch(_autolog_module, "start_span_no_context", self._start_span)
        self._our_autolog: object = None

    def install(self) -> None:
        """Turn autolog on, unless the user has done so. Idempotent."""
        if autologging_is_disabled(_FLAVOR):
            mlflow.openai.autolog()
            self._our_autolog = AUTOLOGGING_INTEGRATIONS[_FLAVOR]
        self._patch.apply()

    def uninstall(self) -> None:
        """Undo :meth:`install`; an autolog that the user turned on stays on. Idempotent."""
        self._patch.revert()
        if self._autolog_is_ours():
            mlflow.openai.autolog(disable=True)
        self._our_autolog = None

    def _autolog_is_ours(self) -> bool:
        # Each call of autolog() makes a new entry, so a later one by the user shows here.
        return self._our_autolog is not None and (
            AUTOLOGGING_INTEGRATIONS.get(_FLAVOR) is self._our_autolog
        )

    def _start_span(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        task = current_task()
        if task is None:
            if self._only_in_tasks and self._autolog_is_ours():
                return NoOpSpan()
            return original(*args, **kwargs)
        task.count_call()
        if not has_active_span():
            kwargs.setdefault("parent_span", task.span)
        return original(*args, **kwargs)
