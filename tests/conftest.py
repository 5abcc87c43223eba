"""Fixtures for all tests: the versions under test, and a real endpoint and store."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from importlib.metadata import distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mlflow_ctx_autolog.driver.handover import driver
from mlflow_ctx_autolog.testing import OpenAIEndpoint, TrackingServer, TrackingStore
from mlflow_ctx_autolog.worker.process import worker_process


def pytest_report_header() -> str:
    names = ("mlflow-ctx-autolog", "mlflow-skinny", "openai", "pyspark", "opentelemetry-sdk")
    # mlflow-tracing, for one, does without the second.
    there = {found.name for found in distributions()}
    return ", ".join(f"{name} {version(name)}" for name in names if name in there)


def pytest_runtest_setup(item: pytest.Item) -> None:
    uses_sqlite = "ctx_autolog_empty_database" in getattr(item, "fixturenames", ())
    if (uses_sqlite or item.get_closest_marker("sqlite")) and find_spec("sqlalchemy") is None:
        pytest.skip("mlflow-skinny and mlflow-tracing come without stores of their own")


class PromptQueue(queue.Queue[Any]):
    """One whose readers look every moment whether they are still wanted, rather than a second."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        return super().get(block, timeout and min(timeout, 0.02))


@pytest.fixture(scope="session", autouse=True)
def exports_end_promptly() -> Iterator[None]:
    """MLflow ends its threads at each flush, and for each new tracking URI, hundreds of times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlflow.tracing.export.async_export_queue.Queue", PromptQueue)
        yield


@pytest.fixture(scope="session")
def server(ctx_autolog_server: TrackingServer) -> TrackingServer:
    """A real MLflow tracking server on SQLite, in a process of its own."""
    return ctx_autolog_server


@pytest.fixture(autouse=True)
def spools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this test's processes keep what is not stored yet, apart from those of others."""
    folder = tmp_path / "spools"
    monkeypatch.setenv("MLFLOW_CTX_AUTOLOG_SPOOL_DIRECTORY", str(folder))
    yield folder
    # What waits for a server that is gone, or would be written there at each flush, would hold up
    # whoever flushes later.
    for book in driver.ledger.books.unsettled():
        driver.ledger.forget(book.trace_id)
    for delivery in [*driver.ledger.deliveries.all(), *worker_process().deliveries.all()]:
        if delivery.waiting:
            delivery.take()


@pytest.fixture
def endpoint(ctx_autolog_endpoint: OpenAIEndpoint) -> OpenAIEndpoint:
    """A real HTTP endpoint that speaks the OpenAI API."""
    return ctx_autolog_endpoint


@pytest.fixture
def experiment_id(ctx_autolog_server_store: TrackingStore) -> str:
    """A fresh experiment on the server, set as the driver's; tracing is off again afterwards."""
    return ctx_autolog_server_store.experiment_id
