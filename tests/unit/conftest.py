"""Fixtures for unit tests: a tracking store that needs no server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.spool import Destination


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with MLflow's tables, which take seconds to make."""
    path = tmp_path_factory.mktemp("empty") / "x.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def database(empty_database: Path, tmp_path: Path) -> Iterator[Destination]:
    """An empty SQLite store and its default experiment, which are MLflow's meanwhile."""
    shutil.copy(empty_database, tmp_path / "x.db")
    uri = f"sqlite:///{tmp_path}/x.db"
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(experiment_id="0")
    yield Destination(uri, "0")
    ctx_autolog.disable()
    mlflow.openai.autolog(disable=True)
    mlflow.flush_trace_async_logging()
    mlflow.set_tracking_uri(before)
