"""What the receipt says of attempts that ended without a word."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import suppress

import mlflow
import pandas as pd
import pytest
from pyspark.sql import SparkSession
from workload import SCHEMA, extractor, stored_trace

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint

MASTER = "local-cluster[2,1,1024]"
# Calls that an attempt makes before it is killed.
CALLS = 5


def killed(url: str, of: str) -> object:
    """Return a function that makes calls, and whose first attempt is killed after some of them.

    Args:
        url: Where the model is.
        of: ``worker`` kills the Python worker; ``executor`` that, and the JVM that it works for.
    """

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        from pyspark import TaskContext

        for number, batch in enumerate(extractor(url)(batches), 1):
            yield batch
            if TaskContext.get().attemptNumber() == 0 and number == CALLS:
                if of == "executor":
                    daemon = os.getppid()
                    with open(f"/proc/{daemon}/stat") as file:
                        executor = int(file.read().rpartition(")")[2].split()[1])
                    os.kill(executor, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)

    return extract


@pytest.mark.parametrize("of", ["worker", "executor"])
def test_an_attempt_that_was_killed_is_not_forgotten(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str, of: str
) -> None:
    """The receipt is complete once every call that the endpoint has answered is in the store."""
    ctx_autolog.enable()
    # One row a batch, so that it is known how many calls were made.
    spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", "1")
    try:
        with mlflow.start_span("job") as span:
            function = killed(endpoint.base_url, of)
            spark.range(0, 10, 1, 1).mapInPandas(function, SCHEMA).collect()
    finally:
        spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", "3")
    mlflow.flush_trace_async_logging()

    found = ctx_autolog.receipt(span.trace_id, timeout=30)
    if found.unknown:
        # Its Python workers may live for a moment, and hold what they have.
        assert not found.complete
        assert "mlflow-ctx-autolog recover on" in str(_strictly(span.trace_id))
        _until_complete(span.trace_id)
        found = ctx_autolog.receipt(span.trace_id, timeout=30)
    trace = stored_trace(span.trace_id)
    assert found.complete
    assert found.made == found.stored == len(trace.spans)
    assert len(trace.calls) == len(endpoint.requests) == CALLS + 10
    assert trace.total_tokens == endpoint.total_tokens


def _strictly(trace_id: str) -> BaseException | None:
    ctx_autolog.enable(strict=True)
    try:
        ctx_autolog.receipt(trace_id, timeout=1)
    except ctx_autolog.IncompleteTraceError as error:
        return error
    finally:
        ctx_autolog.enable(strict=False)
    return None


def _until_complete(trace_id: str) -> None:
    for _ in range(60):
        with suppress(ctx_autolog.IncompleteTraceError):
            if ctx_autolog.receipt(trace_id, timeout=2).complete:
                return
