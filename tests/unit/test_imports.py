"""Being told of imports."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from mlflow_ctx_autolog.imports import when_imported


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that has not been imported."""
    name = f"module_{uuid.uuid4().hex}"
    (tmp_path / f"{name}.py").write_text("value = 1\ndef function():\n    return value\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_a_module_is_told_of_when_it_is_imported(module: str) -> None:
    """Once for each who asked, with all that the module holds, before the import is over."""
    told: list[int] = []
    for _ in range(2):
        when_imported(module, lambda found: told.append(found.value))
    assert told == []
    importlib.import_module(module)
    assert told == [1, 1]
    importlib.reload(sys.modules[module])
    assert told == [1, 1]


def test_a_module_that_is_there_is_told_of_at_once() -> None:
    """Whoever comes late is not left waiting."""
    told: list[ModuleType] = []
    when_imported("json", told.append)
    assert told == [sys.modules["json"]]


def test_a_watched_module_is_as_any_other(module: str) -> None:
    """It has its own loader, and its source can be read."""
    when_imported(module, lambda _: None)
    found = importlib.import_module(module)
    assert type(found.__spec__.loader) is type(found.__loader__)
    assert "Loader" in type(found.__loader__).__name__
    assert type(found.__loader__).__module__.startswith(("_frozen", "importlib"))
    assert "return value" in inspect.getsource(found.function)


def test_an_error_does_not_reach_who_imports(module: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged; the module is imported."""
    when_imported(module, lambda _: 1 / 0)
    with caplog.at_level(logging.WARNING):
        assert importlib.import_module(module).value == 1
    assert "ZeroDivisionError" in caplog.text


def test_a_module_that_does_not_exist_is_not_found(module: str) -> None:
    """As it is not without anybody waiting for it."""
    when_imported(f"{module}_missing", lambda _: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{module}_missing")
