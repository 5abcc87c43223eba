"""Streaming queries, which run on after the span that they were started in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import functions
import mlflow
import pytest
from coverage_table import SPARK
from pyspark.sql import SparkSession
from pyspark.sql.functions import udf
from workload import SCHEMA, extractor, stored_trace, stored_traces

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint

IS_PRELOADED = True


@pytest.mark.covers(SPARK, "stream, `foreachBatch`", "classic Spark")
@pytest.mark.covers(
    SPARK, "stream, `foreachBatch`, functions that it hands to Spark", "classic Spark"
)
def test_what_a_batch_function_does_is_below_the_span_of_the_query(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """Calls of foreachBatch's function are below the span, those of what it hands to Spark, too."""
    call = functions.asker(endpoint.base_url)

    def extract(number: int) -> str:
        return call(number)

    def keep(batch: Any, number: int) -> None:
        batch.select(udf(extract, "string")("id")).collect()
        call(100)

    ctx_autolog.enable()
    with mlflow.start_span("job") as span, functions.stream_of(spark.range(6)) as stream:
        writer = stream.writeStream.foreachBatch(keep).trigger(availableNow=True)
        writer.start().awaitTermination()

    trace = stored_trace(span.trace_id)
    assert len(endpoint.requests) == len(trace.calls) == 7
    assert sum(trace.is_nested(each) for each in trace.calls) == 6
    assert {task.attributes["spark.function.name"] for task in trace.tasks} == {"extract"}
    (on_driver,) = [each for each in trace.calls if not trace.is_nested(each)]
    assert on_driver.parent_id == trace.root.span_id


def test_a_batch_after_the_span_has_ended_belongs_to_it(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str, tmp_path: Path
) -> None:
    """Later batches are in the trace under which the query was started, tokens and all."""
    call = functions.asker(endpoint.base_url)

    def keep(batch: Any, number: int) -> None:
        batch.select(udf(lambda each: call(each), "string")("id")).collect()

    source = tmp_path / "source"
    source.mkdir()
    stream = spark.readStream.schema("id long").parquet(str(source))
    ctx_autolog.enable()
    with mlflow.start_span("job") as span:
        answers = stream.mapInPandas(extractor(endpoint.base_url), SCHEMA)
        queries = [
            answers.writeStream.format("memory").queryName("late_answers").start(),
            stream.writeStream.foreachBatch(keep).start(),
        ]
    spark.range(0, 4, 1, 2).write.mode("append").parquet(str(source))
    for query in queries:
        query.processAllAvailable()
        query.stop()
    assert ctx_autolog.flush(60)

    trace = stored_trace(span.trace_id)
    assert len(endpoint.requests) == 8
    assert [trace.is_nested(each) for each in trace.calls] == [True] * 8
    assert trace.total_tokens == endpoint.total_tokens
    assert len(stored_traces(experiment_id)) == 1
    assert ctx_autolog.receipt(span.trace_id).complete


def test_an_error_in_a_batch_function_is_the_users(spark: SparkSession, experiment_id: str) -> None:
    """The query fails with what the function raised, and disable() leaves a running one alone."""

    def keep(batch: Any, number: int) -> None:
        raise KeyError("no such clause")

    ctx_autolog.enable()
    with mlflow.start_span("job"), functions.stream_of(spark.range(2)) as stream:
        query = stream.writeStream.foreachBatch(keep).trigger(availableNow=True).start()
        with pytest.raises(Exception, match="no such clause"):
            query.awaitTermination()
