"""A copy that Spark makes of a task that is slow, and what is told of it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from pyspark import cloudpickle
from pyspark.sql import SparkSession
from repeats import SCHEMA, asking, assert_sums, complete_report, first_attempt
from standalone import standalone_cluster

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint

# Workers cannot import the tests' modules.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    """Two executors on hosts of their own: Spark makes no copy of a task on the same one."""
    os.environ["PYSPARK_PYTHON"] = sys.executable
    with standalone_cluster(tmp_path_factory.mktemp("cluster")) as master:
        session = (
            SparkSession.builder.master(master)
            .config("spark.executor.memory", "512m")
            .config("spark.ui.enabled", "false")
            .config("spark.ui.showConsoleProgress", "false")
            .config("spark.speculation", "true")
            .config("spark.speculation.quantile", "0.5")
            .config("spark.python.daemon.module", "mlflow_ctx_autolog.daemon")
            .getOrCreate()
        )
        session.sparkContext.setLogLevel("OFF")
        yield session
        session.stop()


@pytest.mark.slow
def test_a_copy_of_a_slow_task(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str, spools: Path
) -> None:
    """What the copy asks again is put down to it; what its original asked was paid for, too."""

    def straggle(number: int) -> None:
        if number == 3 and first_attempt():
            time.sleep(60)

    with ctx_autolog.enable(), mlflow.start_span("job") as span:
        rows = spark.range(0, 4, 1, 2).mapInPandas(asking(endpoint.base_url, straggle), SCHEMA)
        assert rows.count() == 4
    report = complete_report(span.trace_id, endpoint, spools)

    assert {each.key: sums.calls for each, sums in report.by_cause().items()} == {
        "speculative_copy": 1
    }
    assert (report.made.calls, report.distinct) == (5, 4)
    assert_sums(report, endpoint)
