"""What MLflow loads by itself: present, light, silent, and right inside a task."""

from __future__ import annotations

import configparser
import importlib.metadata
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from mlflow_ctx_autolog import DriverContext
from mlflow_ctx_autolog.plugin import DriverExperimentProvider, SparkRunContextProvider
from mlflow_ctx_autolog.spans.content import ContentPolicy
from mlflow_ctx_autolog.task import Task

pytest.importorskip("yaml", reason="mlflow-tracing comes without what loads plugins")

from mlflow.tracking.context.registry import _run_context_provider_registry
from mlflow.tracking.default_experiment import registry as experiment_registry

ROOT = Path(__file__).parents[2]


@pytest.fixture
def open_task() -> Iterator[Task]:
    context = DriverContext("771177", "http://store", application_id="app-1")
    task = Task(context, ContentPolicy(context.config))
    task.open()
    yield task
    task.close()


def run_python(directory: Path, *arguments: str) -> str:
    """Run Python outside the checkout and return what it printed."""
    completed = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    assert "Failure attempting" not in completed.stderr
    return completed.stdout


def promised_entry_points() -> dict[str, dict[str, str]]:
    parser = configparser.ConfigParser(delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(ROOT / "entry_points.txt")
    return {group: dict(parser[group]) for group in parser.sections()}


def installed_entry_points() -> list[importlib.metadata.EntryPoint]:
    return list(importlib.metadata.distribution("mlflow-ctx-autolog").entry_points)


def test_installed_entry_points_are_those_promised() -> None:
    """The installed distribution announces exactly what entry_points.txt says."""
    installed: dict[str, dict[str, str]] = {}
    for entry in installed_entry_points():
        installed.setdefault(entry.group, {})[entry.name] = entry.value

    assert installed == promised_entry_points()
    assert installed


@pytest.mark.parametrize("entry", installed_entry_points(), ids=lambda entry: entry.group)
def test_entry_point_can_be_loaded(entry: importlib.metadata.EntryPoint) -> None:
    """What an entry point names exists: something to call, or a module of fixtures."""
    found = entry.load()
    assert inspect.ismodule(found) if entry.group == "pytest11" else callable(found)


def test_mlflow_has_loaded_the_plugin() -> None:
    """MLflow finds both providers by itself, once each."""
    contexts = [type(provider) for provider in _run_context_provider_registry]
    experiments = [
        type(provider) for provider in experiment_registry._default_experiment_provider_registry
    ]

    assert contexts.count(SparkRunContextProvider) == 1
    assert experiments.count(DriverExperimentProvider) == 1


def test_plugin_is_light(tmp_path: Path) -> None:
    """Loading the plugin and asking it outside of Spark imports neither MLflow, nor others."""
    code = """
import sys
from mlflow_ctx_autolog import plugin
print(plugin.SparkRunContextProvider().in_context(), plugin.DriverExperimentProvider().in_context())
print(plugin.DriverExperimentProvider().get_experiment_id())
print(sorted({"mlflow", "openai", "pyspark", "opentelemetry"} & set(sys.modules)))
"""

    assert run_python(tmp_path, "-c", code).splitlines() == ["False False", "None", "[]"]


def test_importing_mlflow_is_hardly_slower_for_the_plugin(tmp_path: Path) -> None:
    """By 5 ms of processor time at most, and for no module of ours but the plugin itself."""
    code = """
import sys, time, typing
began = time.process_time()
from mlflow_ctx_autolog import plugin
plugin.SparkRunContextProvider().in_context(), plugin.DriverExperimentProvider().in_context()
took = time.process_time() - began
print(took, *sorted(name for name in sys.modules if name.startswith("mlflow_ctx_autolog")))
"""
    told = [run_python(tmp_path, "-c", code).split() for _ in range(5)]

    assert {tuple(names) for _, *names in told} == {
        ("mlflow_ctx_autolog", "mlflow_ctx_autolog.plugin")
    }
    assert min(float(seconds) for seconds, *_ in told) < 0.005


def test_mlflow_can_be_imported_without_a_warning(tmp_path: Path) -> None:
    """Importing MLflow loads the plugin without a warning."""
    code = """
import mlflow
from mlflow.tracking.context.registry import _run_context_provider_registry as registry
print(any(type(p).__module__ == "mlflow_ctx_autolog.plugin" for p in registry))
"""
    printed = run_python(tmp_path, "-W", "error::UserWarning", "-c", code)

    assert printed.strip() == "True"


@pytest.mark.parametrize(
    "order", ["mlflow, mlflow_ctx_autolog", "mlflow_ctx_autolog, mlflow"], ids=["after", "before"]
)
def test_library_can_be_imported_before_or_after_mlflow(tmp_path: Path, order: str) -> None:
    """The library and MLflow can be imported in either order."""
    code = f"import {order}\nprint(callable(mlflow_ctx_autolog.enable))"
    printed = run_python(tmp_path, "-W", "error::UserWarning", "-c", code)

    assert printed.strip() == "True"


def test_providers_are_silent_outside_tasks() -> None:
    """On the driver, and in a process that runs no task, the plugin changes nothing."""
    assert not SparkRunContextProvider().in_context()
    assert not DriverExperimentProvider().in_context()
    assert DriverExperimentProvider().get_experiment_id() is None


def test_experiment_inside_a_task_is_the_drivers(open_task: Task) -> None:
    """Code in a task that has set no experiment gets the driver's, until the task has ended."""
    provider = DriverExperimentProvider()
    assert provider.in_context()
    assert provider.get_experiment_id() == "771177"
    assert experiment_registry.get_experiment_id() == "771177"

    open_task.close()

    assert not provider.in_context()
    assert experiment_registry.get_experiment_id() != "771177"


def test_tags_name_the_application_and_the_process(open_task: Task) -> None:
    """A run started inside a task is tagged with the application, the host and the process."""
    tags = SparkRunContextProvider().tags()

    assert tags["spark.application.id"] == "app-1"
    assert tags["process.pid"].isdigit()
    assert tags["host.name"]
    assert all(isinstance(value, str) for value in tags.values())


def test_tags_are_such_that_mlflow_takes_them(open_task: Task) -> None:
    """MLflow accepts the tags' names."""
    for name in SparkRunContextProvider().tags():
        mlflow.utils.validation._validate_tag_name(name)
