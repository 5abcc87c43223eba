"""Workers that are forked from a daemon which has imported tracing before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import mlflow
import pandas as pd
from pyspark.sql import SparkSession
from workload import SCHEMA, extractor, stored_trace

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint

MASTER = "local[4]"
CONF = {
    "spark.python.daemon.module": "mlflow_ctx_autolog.daemon",
    "spark.python.worker.reuse": "false",
}


def test_calls_of_forked_workers_are_one_trace(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """Each task has a worker of its own; no two spans have the same id, and none is lost."""
    url = endpoint.base_url

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        import sys

        assert hasattr(sys.modules["__main__"], "preload"), "another daemon has forked this"
        yield from extractor(url)(batches)

    ctx_autolog.enable()
    with mlflow.start_span("job") as span:
        spark.range(0, 64, 1, 16).mapInPandas(extract, SCHEMA).collect()

    trace = stored_trace(span.trace_id)
    assert len({task.attributes["process.pid"] for task in trace.tasks}) == 16
    assert len({each.span_id for each in trace.spans}) == 64 + 16 + 1
    assert sum(trace.is_nested(call) for call in trace.calls) == len(endpoint.requests) == 64
    assert ctx_autolog.receipt().complete
