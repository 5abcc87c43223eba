"""Fixtures for all tests: the versions under test, and a real endpoint and store."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import mlflow
import pytest

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint, TrackingServer


def pytest_report_header() -> str:
    names = ("mlflow-ctx-autolog", "mlflow-skinny", "openai", "pyspark", "opentelemetry-sdk")
    return ", ".join(f"{name} {version(name)}" for name in names)


@pytest.fixture(scope="session")
def server() -> Iterator[TrackingServer]:
    """A real MLflow tracking server on SQLite, in a process of its own."""
    with TrackingServer() as running:
        yield running
        # Else MLflow's exit handler tries for minutes to reach a server that is gone.
        mlflow.set_tracking_uri(running.uri)
        mlflow.flush_trace_async_logging()


@pytest.fixture(autouse=True)
def spools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's processes keep what is not stored yet, apart from those of others."""
    folder = tmp_path / "spools"
    monkeypatch.setenv("MLFLOW_CTX_AUTOLOG_SPOOL_DIRECTORY", str(folder))
    return folder


@pytest.fixture
def endpoint() -> Iterator[OpenAIEndpoint]:
    """A real HTTP endpoint that speaks the OpenAI API."""
    with OpenAIEndpoint() as running:
        yield running


@pytest.fixture
def experiment_id(server: TrackingServer, request: pytest.FixtureRequest) -> Iterator[str]:
    """A fresh experiment on the server, set as the driver's; tracing is off again afterwards."""
    mlflow.set_tracking_uri(server.uri)
    experiment = mlflow.set_experiment(request.node.nodeid)
    yield experiment.experiment_id
    ctx_autolog.disable()
    mlflow.openai.autolog(disable=True)
    mlflow.flush_trace_async_logging()
