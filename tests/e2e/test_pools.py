"""Calls that a partition makes concurrently: in threads, event loops and child processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import mlflow
import model_calls
import pandas as pd
import pools
import pytest
from coverage_table import POOLS, cases
from pyspark import cloudpickle
from pyspark.sql import SparkSession
from workload import SCHEMA, stored_trace, stored_traces

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint

IS_PRELOADED = True

cloudpickle.register_pickle_by_value(pools)
ROWS = 3
COLUMN = "below the span it is made under"


@pytest.fixture(scope="module", autouse=True)
def shipped_module(spark: SparkSession) -> None:
    """Workers and their child processes can import ``model_calls``."""
    spark.sparkContext.addPyFile(str(Path(model_calls.__file__)))


def extractor(way: str, url: str) -> object:
    ask_all = pools.WAYS[way]

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        import mlflow

        for batch in batches:
            with mlflow.start_span("batch"):
                answers = ask_all(url, list(batch["id"]))
            yield batch.assign(answer=answers)

    return extract


@pytest.mark.parametrize("way", cases(POOLS, COLUMN, pools.WAYS))
def test_calls_are_below_the_span_that_they_are_made_under(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str, way: str
) -> None:
    """Each call is below the user's span around it, in the store at the end, and counted."""
    if "joblib" in way:
        pytest.importorskip("joblib")
    with ctx_autolog.enable(), mlflow.start_span("job") as span:
        frame = spark.range(0, ROWS, 1, 1).mapInPandas(extractor(way, endpoint.base_url), SCHEMA)
        rows = frame.collect()
    receipt = ctx_autolog.receipt(span.trace_id)

    assert len(rows) == len({row.answer for row in rows}) == len(endpoint.requests) == ROWS
    trace = stored_trace(span.trace_id)
    assert [trace.path_to(call)[:-1] for call in trace.calls] == [
        ["job", "extract [0]", "batch"]
    ] * ROWS
    (task,) = trace.tasks
    assert task.attributes["llm.calls"] == ROWS
    assert trace.total_tokens == endpoint.total_tokens
    assert receipt.complete
    assert receipt.made == len(trace.spans)
    assert len(stored_traces(experiment_id)) == 1


@pytest.mark.covers(POOLS, "work submitted in one batch and collected in another", COLUMN)
def test_work_that_is_collected_in_another_batch_stays_where_it_was_submitted(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """A call submitted in one batch and collected in the next is below the span it was submitted
    under, and the user's context variables do not follow it."""
    url = endpoint.base_url

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        import contextvars
        from concurrent.futures import ThreadPoolExecutor

        import mlflow
        from model_calls import ask_model

        colour = contextvars.ContextVar("colour", default="none")

        @mlflow.trace(name="read")
        def read(number: int) -> str:
            return f"{colour.get()} {ask_model(url, number)}"

        colour.set("red")
        waiting: list[pd.DataFrame] = []
        with ThreadPoolExecutor(2) as pool:
            for number, batch in enumerate(batches):
                with mlflow.start_span(f"batch-{number}"):
                    answers = [pool.submit(read, each) for each in batch["id"]]
                waiting.append(batch.assign(answer=answers))
                if number:
                    done = waiting.pop(0)
                    yield done.assign(answer=[answer.result() for answer in done["answer"]])
            for done in waiting:
                yield done.assign(answer=[answer.result() for answer in done["answer"]])

    with ctx_autolog.enable(), mlflow.start_span("job") as span:
        rows = spark.range(0, 9, 1, 1).mapInPandas(extract, SCHEMA).collect()

    trace = stored_trace(span.trace_id)
    assert len(rows) == 9
    assert {row.answer.partition(" ")[0] for row in rows} == {"none"}
    paths = sorted(trace.path_to(call)[:-1] for call in trace.calls)
    assert paths == [["job", "extract [0]", f"batch-{n // 3}", "read"] for n in range(9)]


@pytest.mark.covers(POOLS, "a pool of processes that is kept from task to task", COLUMN)
def test_a_process_pool_that_is_kept_follows_the_tasks(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """Processes that outlive a task belong to the next one, with spans of their own between."""
    url = endpoint.base_url

    def extract(rows: Iterable[int]) -> Iterator[int]:
        import multiprocessing

        from model_calls import ask_under_a_span

        # As a module's global variable in the worker.
        kept = multiprocessing.__dict__
        if "kept_pool" not in kept:
            kept["kept_pool"] = multiprocessing.get_context("fork").Pool(1)
        for row in rows:
            kept["kept_pool"].apply(ask_under_a_span, (url, row))
            yield kept["kept_pool"]._pool[0].pid

    numbers = spark.sparkContext.parallelize(range(2), 1)
    pids, paths = [], []
    ctx_autolog.enable()
    for name in ("monday", "tuesday"):
        with mlflow.start_span(name) as span:
            pids += numbers.mapPartitions(extract).collect()
        trace = stored_trace(span.trace_id)
        paths += [trace.path_to(call) for call in trace.calls]
    ctx_autolog.disable()
    # Nobody traces these.
    pids += numbers.mapPartitions(extract).collect()

    assert len(set(pids)) == 1, "the worker was not reused, so the test shows nothing"
    assert paths == [
        [name, "extract [0]", "child", "Completions"]
        for name in ("monday", "monday", "tuesday", "tuesday")
    ]
    assert len(endpoint.requests) == 6
    assert len(stored_traces(experiment_id)) == 2


@pytest.mark.covers(
    POOLS,
    "a program that the function starts, as with `subprocess`",
    COLUMN,
    limit="it is a stranger to the task. Hand it the text `ctx_autolog.capture().to_json()` of the "
    "driver, and use `attach` in it.",
)
def test_a_program_of_its_own_attaches_by_hand(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """A call of a program that the function starts is traced where it attaches, and only there."""
    url = endpoint.base_url
    program = """
import sys
import mlflow_ctx_autolog as ctx_autolog
from model_calls import ask_model
url, carrier = sys.argv[1:]
ask_model(url, 1)
with ctx_autolog.attach(carrier, "program"):
    ask_model(url, 2)
"""

    ctx_autolog.enable()
    with mlflow.start_span("job") as span:
        carrier = ctx_autolog.capture().to_json()

        def extract(rows: Iterable[int]) -> Iterator[int]:
            import os
            import subprocess
            import sys

            for row in rows:
                subprocess.run(
                    [sys.executable, "-c", program, url, carrier],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                    check=True,
                )
                yield row

        spark.sparkContext.parallelize([1], 1).mapPartitions(extract).collect()

    trace = stored_trace(span.trace_id)
    assert [trace.path_to(call)[:-1] for call in trace.calls] == [["job", "program"]]
    assert len(endpoint.requests) == 2
