"""MLflow's OpenAI autolog in a worker, where calls have a recorder of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlflow.entities.span import NoOpSpan
from mlflow.utils.autologging_utils import AUTOLOGGING_INTEGRATIONS

from mlflow_ctx_autolog.imports import when_imported
from mlflow_ctx_autolog.mlflow_bridge.flavors import Autolog
from mlflow_ctx_autolog.patching import Patch

__all__ = ["OpenAIAutolog"]

_FLAVOR = "openai"
_MODULE = "mlflow.openai.autolog"


class OpenAIAutolog:
    """Has an autolog that the user's function turns on make no second span of a call.

    Args:
        is_recorded: Tells whether a call that is made here and now has a span already.
    """

    def __init__(self, is_recorded: Callable[[], bool]) -> None:
        self._is_recorded = is_recorded
        self._patches: list[Patch] = []
        self._is_installed = False
        self._is_waiting = False
        self._before: object = None
        self._autolog = Autolog(_FLAVOR, {"silent": True})

    def install(self) -> None:
        """Idempotent."""
        if not self._is_installed:
            self._is_installed = True
            # Each call of autolog() makes a new entry.
            self._before = AUTOLOGGING_INTEGRATIONS.get(_FLAVOR)
        for patch in self._patches:
            patch.apply()
        if not self._is_waiting:
            self._is_waiting = True
            when_imported(_MODULE, self._watch)

    def uninstall(self) -> None:
        """Idempotent."""
        self._is_installed = False
        self._autolog.uninstall()
        for patch in self._patches:
            patch.revert()

    @property
    def is_switched_off(self) -> bool:
        """Whether the user's function has turned it off, or told it to make no traces."""
        settings = AUTOLOGGING_INTEGRATIONS.get(_FLAVOR)
        if settings is None or settings is self._before or self._autolog.is_ours:
            return False
        return bool(settings.get("disable")) or settings.get("log_traces") is False

    def turn_on(self) -> None:
        """Turn it on until :meth:`uninstall`, for what it traces besides calls: the Agents SDK."""
        # Not where a function of the user's has turned it on or off.
        if not AUTOLOGGING_INTEGRATIONS.get(_FLAVOR):
            self._autolog.install()

    def _watch(self, module: Any) -> None:
        self._patches = [
            Patch(module, "start_span_no_context", self._start_span),
            Patch(module, "_end_span_on_success", self._end_span),
        ]
        # Older releases send none.
        if hasattr(module, "_inject_tracing_headers"):
            self._patches.append(Patch(module, "_inject_tracing_headers", self._inject_headers))
        if self._is_installed:
            for patch in self._patches:
                patch.apply()

    def _start_span(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return NoOpSpan() if self._is_recorded() else original(*args, **kwargs)

    @staticmethod
    def _end_span(original: Callable[..., Any], span: Any, *args: Any, **kwargs: Any) -> Any:
        # Which would look at each piece of a stream.
        return None if isinstance(span, NoOpSpan) else original(span, *args, **kwargs)

    @staticmethod
    def _inject_headers(original: Callable[..., Any], arguments: Any, span: Any) -> Any:
        return None if isinstance(span, NoOpSpan) else original(arguments, span)
