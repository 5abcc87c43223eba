"""What a worker's functions say to MLflow of the trace that they run in, apart from its spans."""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from typing import Any

import mlflow.tracking.fluent as mlflow_fluent
from mlflow.entities import TraceInfo, TraceState
from mlflow.tracing.trace_manager import InMemoryTraceManager

from mlflow_ctx_autolog.spans.trace_update import latest, trace_update

__all__ = ["TraceWords", "declared_context"]

_RUN, _MODEL = "mlflow.sourceRun", "mlflow.modelId"


class TraceWords:
    """Collects it, for somebody to write who has the trace: here, there is only a placeholder."""

    def __init__(self) -> None:
        self._declared: dict[str, dict[str, str]] = {}
        self._lock = threading.Lock()

    def note(self, trace_id: str) -> None:
        """Note, as a span starts, what holds around it: MLflow asks only where a trace starts.

        That is what ``mlflow.tracing.context()`` declares, the active run and the active model.

        Args:
            trace_id: MLflow's id of the trace that the span is in.
        """
        declared = declared_context()
        tags = getattr(declared, "tags", {})
        run, model_id = _ask("_get_latest_active_run"), _ask("_get_active_model_id_global")
        metadata = {
            **({_RUN: run.info.run_id} if run else {}),
            **({_MODEL: model_id} if model_id else {}),
            **getattr(declared, "metadata", {}),
        }
        if tags or metadata:
            said = trace_update(tags, metadata)
            with self._lock:
                self._declared[trace_id] = latest([self._declared.get(trace_id, {}), said])

    def take(self, trace_id: str) -> dict[str, str]:
        """Return what was said of a trace since it was taken last; what is said outright holds."""
        with self._lock:
            declared = self._declared.pop(trace_id, {})
        with InMemoryTraceManager.get_instance().get_trace(trace_id) as trace:
            # One of this very process is MLflow's to write.
            if trace is None or not trace.is_remote_trace:
                return declared
            outright = _said_in(trace.info)
            _forget(trace.info)
            trace.prompts.clear()
        return latest([declared, outright])

    def forget_parents(self) -> None:
        """Know nothing in a forked child of what its parent has been told."""
        self._lock = threading.Lock()
        self._declared.clear()


def _said_in(info: TraceInfo) -> dict[str, str]:
    state = None if info.state == TraceState.IN_PROGRESS else TraceState(info.state).value
    return trace_update(
        info.tags,
        info.trace_metadata,
        client_request_id=info.client_request_id,
        request_preview=info.request_preview,
        response_preview=info.response_preview,
        state=state,
    )


def _forget(info: TraceInfo) -> None:
    info.tags, info.trace_metadata = {}, {}
    info.client_request_id = info.request_preview = info.response_preview = None
    info.state = TraceState.IN_PROGRESS


def declared_context() -> Any:
    """Return what ``mlflow.tracing.context()`` declares here and now; None for nothing."""
    # A function of the same name hides the module, which older releases of MLflow do not have.
    module = sys.modules.get("mlflow.tracing.context")
    variable = getattr(module, "_USER_TRACE_CONTEXT", None)
    with suppress(LookupError):
        return None if variable is None else variable.get()
    return None


def _ask(name: str) -> Any:
    # Not in all releases; and no call of the user's is to fail for it.
    with suppress(Exception):
        return getattr(mlflow_fluent, name)()
    return None
