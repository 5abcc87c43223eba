"""The trace processors of the OpenAI Agents SDK, which MLflow's OpenAI autolog takes away."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

__all__ = ["AgentProcessors"]


class AgentProcessors:
    """Remembers those that were there before an autolog, to put them back after it."""

    def __init__(self) -> None:
        self._before: Sequence[Any] | None = None

    def remember(self) -> None:
        """Remember those that are there now. Imports the SDK, as MLflow does a moment later."""
        self._before = _processors()

    def put_back(self) -> None:
        """Put them back, beside those that were added since; not where the user has set others.

        Idempotent.
        """
        before, self._before = self._before, None
        now = _processors()
        if before is None or now is None or not any(_is_mlflows(each) for each in now):
            return
        added = [each for each in now if not _is_mlflows(each) and each not in before]
        # One of MLflow's that was there before was of an autolog that is off.
        kept = [each for each in before if not _is_mlflows(each)]
        with suppress(Exception):
            importlib.import_module("agents").set_trace_processors([*kept, *added])


def _processors() -> Sequence[Any] | None:
    """Return them; None where there is no such SDK, or one with another inside."""
    with suppress(Exception):
        provider = importlib.import_module("agents.tracing.setup").get_trace_provider()
        # Where MLflow looks for them; the SDK itself does not tell.
        return tuple(provider._multi_processor._processors)
    return None


def _is_mlflows(processor: Any) -> bool:
    return type(processor).__module__.partition(".")[0] == "mlflow"
