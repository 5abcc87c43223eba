"""The OpenAI Agents SDK's own trace processors are there again once tracing is off.

The SDK itself where it is installed, and a stand-in with the names that MLflow uses of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import mlflow
import mlflow.openai
import pytest
from mlflow.utils.autologging_utils import AUTOLOGGING_INTEGRATIONS

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.mlflow_bridge.own_autolog import OpenAIAutolog

HAS_SDK = find_spec("agents") is not None


class Provider:
    """A trace provider of the SDK's."""

    def __init__(self) -> None:
        self._multi_processor = type("Multi", (), {"_processors": ()})()

    def set_processors(self, processors: list[Any]) -> None:
        self._multi_processor._processors = tuple(processors)

    def register_processor(self, processor: Any) -> None:
        self._multi_processor._processors += (processor,)


def stand_in() -> dict[str, ModuleType]:
    """Return modules by their names, with what MLflow uses of the SDK."""
    provider = Provider()
    names = ("agents", "agents.run", "agents.tracing", "agents.tracing.setup")
    modules = {name: ModuleType(name) for name in names}

    class AgentRunner:
        async def run(self) -> None: ...
        def run_streamed(self) -> None: ...

    modules["agents.run"].AgentRunner = AgentRunner  # type: ignore[attr-defined]
    tracing = vars(modules["agents.tracing"])
    tracing.update(TracingProcessor=object, Trace=object, Span=object, SpanData=object)
    vars(modules["agents.tracing.setup"])["get_trace_provider"] = lambda: provider
    vars(modules["agents"]).update(
        add_trace_processor=provider.register_processor,
        set_trace_processors=provider.set_processors,
        tracing=modules["agents.tracing"],
    )
    return modules


Processors = Callable[[], list[Any]]


@pytest.fixture(
    params=[
        "stand-in",
        pytest.param("sdk", marks=pytest.mark.skipif(not HAS_SDK, reason="it is not installed")),
    ]
)
def processors(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Processors]:
    """Returns the processors that there are; at first, one of the user's."""
    ctx_autolog.disable()
    before = AUTOLOGGING_INTEGRATIONS.get("openai")
    AUTOLOGGING_INTEGRATIONS["openai"] = {}
    if request.param == "stand-in":
        for name in [name for name in sys.modules if name.partition(".")[0] == "agents"]:
            monkeypatch.delitem(sys.modules, name)
        for name, module in stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)
        # Which has the names of another one.
        monkeypatch.delitem(sys.modules, "mlflow.openai._agent_tracer", raising=False)
    import agents
    from agents.tracing.setup import get_trace_provider

    agents.set_trace_processors(["the user's"])
    yield lambda: list(get_trace_provider()._multi_processor._processors)
    ctx_autolog.disable()
    agents.set_trace_processors([])
    sys.modules.pop("mlflow.openai._agent_tracer", None)
    AUTOLOGGING_INTEGRATIONS["openai"] = before or {}


def kinds(found: list[Any]) -> list[str]:
    return [each if isinstance(each, str) else type(each).__name__ for each in found]


MLFLOWS = "MlflowOpenAgentTracingProcessor"


def test_they_are_there_again_after_disable(processors: Processors) -> None:
    """However often."""
    for _ in range(2):
        with ctx_autolog.enable():
            assert kinds(processors()) == [MLFLOWS]
        assert processors() == ["the user's"]


def test_what_was_added_meanwhile_stays(processors: Processors) -> None:
    """Beside those that were there before."""
    import agents

    with ctx_autolog.enable():
        agents.add_trace_processor("another")
    assert processors() == ["the user's", "another"]


def test_what_the_user_has_set_meanwhile_stays(processors: Processors) -> None:
    """In place of all others, MLflow's among them."""
    import agents

    with ctx_autolog.enable():
        agents.set_trace_processors(["the only one"])
    assert processors() == ["the only one"]


def test_an_autolog_of_the_users_own_is_left_alone(processors: Processors) -> None:
    """It is on after disable() as before it."""
    mlflow.openai.autolog()
    with ctx_autolog.enable():
        pass
    assert kinds(processors()) == [MLFLOWS]
    mlflow.openai.autolog(disable=True)
    assert processors() == []


def test_they_are_there_again_after_a_workers_tasks(processors: Processors) -> None:
    """MLflow's is there while tasks run, and the autolog is off with them."""
    autolog = OpenAIAutolog(lambda: True)
    for _ in range(2):
        autolog.install()
        autolog.turn_on()
        autolog.turn_on()
        assert kinds(processors()) == [MLFLOWS]
        assert not autolog.is_switched_off
        autolog.uninstall()
        autolog.uninstall()
        assert processors() == ["the user's"]
        assert not AUTOLOGGING_INTEGRATIONS.get("openai")


def test_what_a_function_has_switched_off_stays_off(processors: Processors) -> None:
    """In a worker, with the next task as well."""
    autolog = OpenAIAutolog(lambda: True)
    autolog.install()
    autolog.turn_on()
    mlflow.openai.autolog(disable=True)
    autolog.uninstall()
    autolog.install()
    autolog.turn_on()
    assert AUTOLOGGING_INTEGRATIONS["openai"]["disable"]
    assert MLFLOWS not in kinds(processors())
    autolog.uninstall()
