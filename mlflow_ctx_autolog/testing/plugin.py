"""Fixtures for pytest, loaded by itself where this library is installed.

Nothing is imported or started before a test asks for it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mlflow_ctx_autolog.testing import OpenAIEndpoint, TrackingServer, TrackingStore

__all__ = [
    "ctx_autolog_empty_database",
    "ctx_autolog_endpoint",
    "ctx_autolog_server",
    "ctx_autolog_server_store",
    "ctx_autolog_store",
]


@pytest.fixture
def ctx_autolog_endpoint() -> Iterator[OpenAIEndpoint]:
    """A local endpoint that speaks the OpenAI API, for this test; workers can reach it."""
    from mlflow_ctx_autolog.testing import OpenAIEndpoint

    with OpenAIEndpoint() as endpoint:
        yield endpoint


@pytest.fixture
def ctx_autolog_store(
    ctx_autolog_empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TrackingStore]:
    """A tracking store for this test, which is MLflow's meanwhile: an SQLite file.

    Afterwards tracing is off, and the tracking URI what it was.
    """
    path = tmp_path / "mlflow.db"
    shutil.copy(ctx_autolog_empty_database, path)
    with _chosen(f"sqlite:///{path}", None, tmp_path, monkeypatch) as store:
        yield store


@pytest.fixture
def ctx_autolog_server_store(
    ctx_autolog_server: TrackingServer,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[TrackingStore]:
    """A fresh experiment on the server, for this test, which is MLflow's meanwhile.

    Afterwards tracing is off, and the tracking URI what it was.
    """
    uri = ctx_autolog_server.uri
    with _chosen(uri, request.node.nodeid, tmp_path, monkeypatch) as store:
        yield store


@pytest.fixture(scope="session")
def ctx_autolog_server() -> Iterator[TrackingServer]:
    """An MLflow tracking server in a process of its own, for the whole run of tests."""
    import mlflow

    from mlflow_ctx_autolog.testing import TrackingServer

    with TrackingServer() as server:
        yield server
        # Else MLflow's exit handler tries for minutes to reach a server that is gone.
        mlflow.set_tracking_uri(server.uri)
        mlflow.flush_trace_async_logging()


@pytest.fixture(scope="session")
def ctx_autolog_empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with MLflow's tables, which take seconds to make."""
    import mlflow

    path = tmp_path_factory.mktemp("ctx-autolog") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@contextmanager
def _chosen(
    uri: str, experiment: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TrackingStore]:
    import mlflow
    import mlflow.openai

    import mlflow_ctx_autolog as ctx_autolog
    from mlflow_ctx_autolog.testing import TrackingStore

    # Apart from what other jobs of this host have left behind.
    monkeypatch.setenv("MLFLOW_CTX_AUTOLOG_SPOOL_DIRECTORY", str(tmp_path / "spools"))
    # To tell the default, mlflow-tracing would need what it does not bring.
    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(uri)
    try:
        if experiment is None:
            chosen = mlflow.set_experiment(experiment_id="0")
        else:
            chosen = mlflow.set_experiment(experiment)
        yield TrackingStore(uri, chosen.experiment_id)
    finally:
        try:
            ctx_autolog.disable()
        finally:
            mlflow.openai.autolog(disable=True)
            mlflow.flush_trace_async_logging()
            mlflow.set_tracking_uri(before)
