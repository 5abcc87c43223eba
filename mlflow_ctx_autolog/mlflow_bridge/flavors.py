"""MLflow's autologs: which are on at the driver, and turning them on for as long as needed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from mlflow.utils.autologging_utils import AUTOLOGGING_INTEGRATIONS, autologging_is_disabled

from mlflow_ctx_autolog.log_ins import safe_logger
from mlflow_ctx_autolog.mlflow_bridge.agent_processors import AgentProcessors

__all__ = ["FLAVORS", "Autolog", "Autologs", "autologs_in_force", "traces_no_openai"]

_logger = safe_logger(__name__)

# Those that trace, by MLflow's names; OpenAI's is always on.
FLAVORS = (
    "ag2",
    "agno",
    "anthropic",
    "autogen",
    "bedrock",
    "crewai",
    "dspy",
    "gemini",
    "groq",
    "haystack",
    "langchain",
    "litellm",
    "llama_index",
    "mistral",
    "pydantic_ai",
    "semantic_kernel",
    "smolagents",
    "strands",
)


def autologs_in_force() -> dict[str, dict[str, bool]]:
    """Return the autologs of :data:`FLAVORS` that are on in this process and trace.

    Returns:
        Their names, and of each its switches. Other settings may hold what must not travel.
    """
    return {
        name: {
            setting: value
            for setting, value in settings.items()
            if isinstance(value, bool) and setting != "disable"
        }
        for name, settings in list(AUTOLOGGING_INTEGRATIONS.items())
        if name in FLAVORS
        and not autologging_is_disabled(name)
        and settings.get("log_traces", True)
    }


def traces_no_openai() -> bool:
    """Whether the user has switched MLflow's OpenAI autolog off, or told it to make no traces."""
    # Never called, it has no settings.
    settings = AUTOLOGGING_INTEGRATIONS.get("openai") or {}
    return bool(settings.get("disable")) or settings.get("log_traces") is False


class Autolog:
    """The autolog of one flavour, turned on unless the user has done so.

    Args:
        flavor: MLflow's name of it.
        settings: What to call it with.
    """

    def __init__(self, flavor: str, settings: Mapping[str, Any] | None = None) -> None:
        self.flavor = flavor
        self._settings = dict(settings or {})
        self._entry: object = None
        self._before: Any = None
        self._agents = AgentProcessors() if flavor == "openai" else None

    @property
    def is_on(self) -> bool:
        """Whether it traces calls of this process, because of us or of the user."""
        return not autologging_is_disabled(self.flavor)

    @property
    def is_ours(self) -> bool:
        """Whether it is on because of us."""
        # Each call of autolog() makes a new entry, so a later one by the user shows here.
        entry = self._entry
        return entry is not None and AUTOLOGGING_INTEGRATIONS.get(self.flavor) is entry

    def install(self) -> None:
        """Turn it on, unless it is. Idempotent.

        Raises:
            ImportError: What it traces is not installed here.
        """
        if not self.is_on and self._agents is not None:
            self._agents.remember()
        # Who is told of what was imported for that may have turned it on.
        if not self.is_on:
            self._before = AUTOLOGGING_INTEGRATIONS.get(self.flavor)
            self._call(**self._settings)
            self._entry = AUTOLOGGING_INTEGRATIONS[self.flavor]

    def uninstall(self) -> None:
        """Turn it off, unless the user has turned it on. Idempotent."""
        if self.is_ours:
            if self._agents is not None:
                self._agents.put_back()
            self._call(disable=True)
            # Nor does it look as if the user had done so.
            AUTOLOGGING_INTEGRATIONS[self.flavor] = self._before or {}
        self._entry = None

    def _call(self, **settings: Any) -> None:
        importlib.import_module(f"mlflow.{self.flavor}").autolog(**settings)


class Autologs:
    """The driver's autologs, in a worker process while it runs tasks."""

    def __init__(self) -> None:
        self._on: dict[str, Autolog] = {}
        self._missing: set[str] = set()

    def install(self, autologs: Mapping[str, Mapping[str, bool]]) -> None:
        """Turn on those that are known here and not on yet; warn once of each that cannot be."""
        for flavor, settings in autologs.items():
            if flavor in FLAVORS and flavor not in self._on and flavor not in self._missing:
                autolog = Autolog(flavor, settings)
                try:
                    autolog.install()
                except Exception as error:
                    self._missing.add(flavor)
                    _logger.warning(
                        "MLflow's autolog for %s is on at the driver, and this worker's calls are "
                        "not traced by it, since it could not be turned on here: %s: %s. Install "
                        "on the workers what is installed on the driver.",
                        flavor,
                        type(error).__name__,
                        error,
                    )
                else:
                    self._on[flavor] = autolog

    def uninstall(self) -> None:
        """Turn off those that were turned on here."""
        on, self._on = self._on, {}
        for autolog in on.values():
            try:
                autolog.uninstall()
            except Exception as error:
                _logger.warning("MLflow's autolog for %s stays on: %r", autolog.flavor, error)
