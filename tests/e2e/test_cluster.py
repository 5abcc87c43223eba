"""The same on executors in processes of their own, each with its own Python workers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from pyspark.errors import PythonException
from pyspark.sql import SparkSession
from workload import SCHEMA, extractor, stored_trace, stored_traces

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint

MASTER = "local-cluster[2,1,1024]"


@pytest.mark.parametrize("threads", [0, 8])
def test_sixty_calls_in_six_partitions_are_one_trace(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str, threads: int
) -> None:
    """60 of 60 calls of two executors are in one trace, whose total is the sum over the calls."""
    ctx_autolog.enable()
    with mlflow.start_span("job") as span:
        extract = extractor(endpoint.base_url, threads)
        spark.range(0, 60, 1, 6).mapInPandas(extract, SCHEMA).collect()

    trace = stored_trace(span.trace_id)
    assert len(stored_traces(experiment_id)) == 1
    assert len(trace.tasks) == 6
    assert sum(trace.is_nested(call) for call in trace.calls) == len(endpoint.requests) == 60
    of_calls = (call.attributes["mlflow.chat.tokenUsage"]["total_tokens"] for call in trace.calls)
    assert trace.total_tokens == sum(of_calls) == endpoint.total_tokens


def test_each_attempt_of_a_task_has_its_own_span(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """What a failed attempt has paid for is stored below that attempt, beside the next one."""
    url = endpoint.base_url

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        from pyspark import TaskContext

        yield from extractor(url)(batches)
        if TaskContext.get().attemptNumber() == 0:
            raise RuntimeError("the first attempt fails")

    ctx_autolog.enable()
    with mlflow.start_span("job") as span:
        rows = spark.range(0, 4, 1, 1).mapInPandas(extract, SCHEMA).collect()

    trace = stored_trace(span.trace_id)
    attempts = {task.attributes["spark.task.attempt_number"]: task for task in trace.tasks}
    assert len(rows) == 4
    assert {number: task.status.status_code for number, task in attempts.items()} == {
        0: "ERROR",
        1: "OK",
    }
    assert [len(trace.children_of(attempts[number])) for number in (0, 1)] == [4, 4]


def test_a_worker_without_the_package_says_what_to_install(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str, tmp_path: Path
) -> None:
    """Where the workers lack the library, the job's error names it and how to install it."""
    python = _python_without_the_library(tmp_path)
    before = spark.sparkContext.pythonExec
    spark.sparkContext.pythonExec = str(python)
    try:
        ctx_autolog.enable()
        with mlflow.start_span("job"), pytest.raises(PythonException) as caught:
            spark.range(1).mapInPandas(extractor(endpoint.base_url), SCHEMA).collect()
        ctx_autolog.disable()
        assert spark.range(1).mapInPandas(extractor(endpoint.base_url), SCHEMA).count() == 1
    finally:
        spark.sparkContext.pythonExec = before

    assert "mlflow-ctx-autolog cannot be imported on the Spark worker" in str(caught.value)
    assert "pip install mlflow-ctx-autolog" in str(caught.value)


def _python_without_the_library(folder: Path) -> Path:
    """Make an interpreter that has all packages of this one but the library."""
    packages = folder / "packages"
    packages.mkdir()
    site_packages = Path(ctx_autolog.__file__).parents[1]
    for entry in site_packages.iterdir():
        if not entry.name.startswith("mlflow_ctx_autolog"):
            (packages / entry.name).symlink_to(entry)
    python = folder / "python"
    base = os.path.realpath(sys.executable)
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}:$PYTHONPATH" exec "{base}" "$@"\n')
    python.chmod(0o755)
    return python
