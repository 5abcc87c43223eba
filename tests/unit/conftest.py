"""Fixtures for unit tests: a tracking store that needs no server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from recording import Keeper

from mlflow_ctx_autolog.delivery.spool import Destination
from mlflow_ctx_autolog.recorder.openai_calls import OpenAIRecorder
from mlflow_ctx_autolog.testing import TrackingStore


@pytest.fixture(scope="session")
def empty_database(ctx_autolog_empty_database: Path) -> Path:
    """An SQLite file with MLflow's tables, to be copied."""
    return ctx_autolog_empty_database


@pytest.fixture
def database(ctx_autolog_store: TrackingStore) -> Destination:
    """An empty SQLite store and its default experiment, which are MLflow's meanwhile."""
    return Destination(ctx_autolog_store.uri, ctx_autolog_store.experiment_id)


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    """Owns the calls of the OpenAI client that the test makes, and keeps their spans."""
    keeper = Keeper()
    recorder = OpenAIRecorder(lambda: keeper)
    recorder.install()
    yield keeper
    recorder.uninstall()
