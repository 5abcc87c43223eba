"""Workers without MLflow: what is in their memory, and what is stored of their calls."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlflow
import pytest
from calls import CALLS, answer, client_of, prompt_of
from mlflow.entities import Span
from pyspark import cloudpickle
from pyspark.sql import SparkSession
from workload import StoredTrace, stored_trace

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint, TrackingServer

cloudpickle.register_pickle_by_value(sys.modules[__name__])

CONF = {
    "spark.python.daemon.module": "blocking_daemon",
    "spark.executorEnv.PYTHONPATH": str(Path(__file__).parents[1] / "support"),
}

# By our doing none of them is in a worker.
UNWANTED = ("mlflow", "opentelemetry.sdk", "pandas", "pyarrow", "requests", "sqlalchemy")

PLAN = [
    (mode, call.row)
    for call in CALLS
    for mode in ("sync", "async")
    if call.needs != "responses" or find_spec("openai.resources.responses") is not None
]


def make(url: str, mode: str, row: str) -> str:
    """Make a call; return what came of it, as JSON."""
    (call,) = (each for each in CALLS if each.row == row)
    prompt = prompt_of("OpenAI", mode, row)

    async def make_async() -> Any:
        async with client_of("OpenAI", "async", url) as client:
            return await call.asynchronous(client, prompt)

    if mode == "async":
        return json.dumps(asyncio.run(make_async()))
    return json.dumps(call.sync(client_of("OpenAI", "sync", url), prompt))


def caller(url: str, unwanted: tuple[str, ...]) -> Callable[[Iterable[Any]], Iterator[str]]:
    """Return a function for a partition of calls."""

    def make_calls(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
        assert hasattr(sys.modules["__main__"], "Blocker"), "another daemon has forked this"
        for mode, row in rows:
            yield make(url, mode, row)
        yield json.dumps([name for name in unwanted if name in sys.modules])

    return make_calls


def tokens(span: Span) -> float:
    return float((span.attributes.get("mlflow.chat.tokenUsage") or {}).get("total_tokens", 0))


def calls_in(trace: StoredTrace) -> list[Span]:
    return [span for span in trace.spans if span.span_type not in ("TASK", "UNKNOWN")]


@pytest.fixture(params=[pytest.param("0", id="plain"), pytest.param("1", id="preloaded")])
def blocked(spark: SparkSession, request: pytest.FixtureRequest) -> SparkSession:
    """A Spark whose workers cannot import MLflow, with and without the preloading daemon."""
    spark.sparkContext.environment["PRELOADS"] = request.param
    return spark


@pytest.fixture(params=["server", "database", "files"])
def store(
    server: TrackingServer,
    ctx_autolog_empty_database: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> str:
    """The address of a store: a server, or a laptop's default, now and formerly."""
    database = tmp_path / "mlflow.db"
    shutil.copy(ctx_autolog_empty_database, database)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    addresses = {
        "server": server.uri,
        "database": f"sqlite:///{database}",
        "files": (tmp_path / "files").as_uri(),
    }
    return addresses[request.param]


def test_every_call_is_stored_without_mlflow(
    blocked: SparkSession, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In workers where MLflow cannot be imported all calls are stored, nested and counted."""
    mlflow.set_tracking_uri(store)
    mlflow.set_experiment("lean workers")
    with OpenAIEndpoint(answer()) as endpoint:
        job = caller(endpoint.url, UNWANTED)
        with ctx_autolog.enable(), mlflow.start_span("job") as span:
            got = blocked.sparkContext.parallelize(PLAN, 2).mapPartitions(job).collect()
            receipt = ctx_autolog.receipt()
    trace = stored_trace(span.trace_id)
    found = calls_in(trace)
    assert [each for each in got if each.startswith("[]")] == ["[]"] * 2
    assert len(found) == len(PLAN)
    assert all(trace.is_nested(each) for each in found)
    assert {len(trace.tasks), len(got) - len(PLAN)} == {2}
    receipt = ctx_autolog.receipt(span.trace_id)
    assert receipt.complete
    assert receipt.made == len(PLAN) + 3
    assert sum(map(tokens, found)) == trace.trace.info.token_usage["total_tokens"]
    assert [each for each in caplog.records if each.name.startswith("mlflow_ctx_autolog")] == []
