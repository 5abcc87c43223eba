"""Which autologs travel, and how a worker turns them on and off."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from mlflow.utils.autologging_utils import AUTOLOGGING_INTEGRATIONS, autologging_integration

from mlflow_ctx_autolog.mlflow_bridge import flavors
from mlflow_ctx_autolog.mlflow_bridge.flavors import Autologs, autologs_in_force

Calls = list[tuple[bool, bool]]


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """An autolog of MLflow's that notes the switches it is called with, log_traces and disable."""
    calls: Calls = []
    monkeypatch.setattr(flavors, "FLAVORS", ("made_up", "crewai"))

    @autologging_integration("made_up")
    def _autolog(
        log_traces: bool = True, disable: bool = False, silent: bool = False, key: str = ""
    ) -> None:
        pass

    def autolog(**settings: Any) -> None:
        calls.append((settings.get("log_traces", True), settings.get("disable", False)))
        _autolog(**settings)

    module = ModuleType("mlflow.made_up")
    module.autolog = autolog  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow.made_up", module)
    yield calls
    AUTOLOGGING_INTEGRATIONS.pop("made_up")


def test_what_is_on_travels_with_its_switches(made_up: Calls) -> None:
    """Nothing else of its settings does."""
    assert "made_up" not in autologs_in_force()
    sys.modules["mlflow.made_up"].autolog(silent=True, key="secret")
    assert autologs_in_force()["made_up"] == {"log_traces": True, "silent": True}
    sys.modules["mlflow.made_up"].autolog(log_traces=False)
    assert "made_up" not in autologs_in_force()
    sys.modules["mlflow.made_up"].autolog(disable=True)
    assert "made_up" not in autologs_in_force()


def test_it_is_on_while_tasks_run(made_up: Calls) -> None:
    """It is turned on once for several tasks, off with the last, and on again with the next."""
    autologs = Autologs()
    for _ in range(2):
        autologs.install({"made_up": {"silent": True}})
        autologs.install({"made_up": {"silent": True}})
        assert autologs_in_force()["made_up"]["silent"]
        autologs.uninstall()
        assert "made_up" not in autologs_in_force()

    assert made_up == [(True, False), (True, True)] * 2


def test_what_the_user_has_turned_on_stays_on(made_up: Calls) -> None:
    """Also if it was after us."""
    autologs = Autologs()
    autologs.install({"made_up": {}})
    sys.modules["mlflow.made_up"].autolog(silent=True)
    autologs.uninstall()

    assert autologs_in_force()["made_up"]["silent"]


def test_a_library_that_is_missing_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It names the library and what to do; unknown names are none of this release's business."""

    def refuse(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(flavors.importlib, "import_module", refuse)
    autologs = Autologs()
    with caplog.at_level(logging.WARNING, logger="mlflow_ctx_autolog"):
        for _ in range(2):
            autologs.install({"crewai": {}, "os; rm": {}})
            autologs.uninstall()

    (record,) = caplog.records
    assert "autolog for crewai" in record.getMessage()
    assert "No module named 'mlflow.crewai'. Install on the workers" in record.getMessage()
