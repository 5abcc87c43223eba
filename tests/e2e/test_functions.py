"""Every way to hand a function to Spark that enable() covers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import functions
import mlflow
import pyspark
import pytest
from pyspark.errors import PythonException
from pyspark.sql import SparkSession
from pyspark.sql.functions import udf, udtf
from pyspark.sql.types import StructType
from workload import stored_trace, stored_traces

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint

JOBS = {**functions.ON_FRAMES, **functions.ON_RDDS}


@pytest.mark.parametrize("way", functions.covered("classic Spark", JOBS))
def test_calls_are_below_the_driver_and_results_unchanged(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str, way: str
) -> None:
    """Every call is below its task, one span for each attempt; rows are the same without us."""
    frame = spark.range(0, functions.ROWS, 1, 2)
    call = functions.asker(endpoint.base_url)
    with ctx_autolog.enable(), mlflow.start_span("job") as span:
        rows = JOBS[way](frame, call)
    traced = len(endpoint.requests)
    untraced = JOBS[way](frame, call)

    assert sorted(rows, key=str) == sorted(untraced, key=str)
    assert traced == functions.ROWS
    trace = stored_trace(span.trace_id)
    assert all(trace.is_nested(each) for each in trace.calls)
    assert len(trace.calls) == functions.ROWS
    # Of a data source, with the method that runs in a task.
    functions_run = {task.attributes["spark.function.name"] for task in trace.tasks}
    assert {name.partition(".")[0] for name in functions_run} == {"extract"}
    attempts = [task.attributes["spark.task.attempt_id"] for task in trace.tasks]
    assert len(attempts) == len(set(attempts))
    assert {task.attributes["spark.task.outcome"] for task in trace.tasks} == {"completed"}
    assert sum(task.attributes["spark.rows.in"] for task in trace.tasks) == functions.ROWS
    assert sum(task.attributes["llm.calls"] for task in trace.tasks) == functions.ROWS


def test_a_udf_belongs_to_the_span_it_is_used_under(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """A UDF defined once, before enable(), nests under the span active at each use of it."""
    call = functions.asker(endpoint.base_url)

    @udf("string")
    def extract(number: int) -> str:
        return call(number)

    frame = spark.range(0, 2, 1, 1)
    frame.select(extract("id")).collect()
    ctx_autolog.enable()
    trace_ids = []
    for name in ("monday", "tuesday"):
        with mlflow.start_span(name) as span:
            frame.select(extract("id")).collect()
        trace_ids.append(span.trace_id)
    ctx_autolog.disable()
    frame.select(extract("id")).collect()

    assert len(endpoint.requests) == 8
    for trace_id in trace_ids:
        trace = stored_trace(trace_id)
        assert len(trace.calls) == 2
        assert all(trace.is_nested(each) for each in trace.calls)


def test_a_registered_function_belongs_to_the_span_it_is_used_under(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """A function registered once, under no span, follows the span of each query, also by a view."""
    call = functions.asker(endpoint.base_url)
    ctx_autolog.enable()
    spark.udf.register("follow", lambda number: call(number))
    spark.udtf.register("follow_rows", functions.table_function(call))
    spark.range(0, 2, 1, 1).createOrReplaceTempView("numbers")
    spark.sql("CREATE OR REPLACE TEMP VIEW answers AS SELECT follow(id) FROM numbers")
    queries = {
        "monday": lambda: spark.sql("SELECT follow(id) FROM numbers").collect(),
        "tuesday": lambda: spark.table("answers").collect(),
        "wednesday": lambda: spark.sql("SELECT * FROM numbers, LATERAL follow_rows(id)").collect(),
        "thursday": lambda: spark.table("numbers").selectExpr("follow(id)").collect(),
    }
    trace_ids = {}
    for name, query in queries.items():
        with mlflow.start_span(name) as span:
            query()
        trace_ids[name] = span.trace_id
    ctx_autolog.disable()

    for name, trace_id in trace_ids.items():
        trace = stored_trace(trace_id)
        assert [trace.is_nested(each) for each in trace.calls] == [True, True], name


def test_functions_used_outside_of_any_span_are_no_part_of_an_old_one(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """Once a span has ended, a query that uses a registered function does not go to its trace."""
    call = functions.asker(endpoint.base_url)
    ctx_autolog.enable()
    with mlflow.start_span("job") as span:
        spark.udf.register("stale", lambda number: call(number))
    spark.range(0, 2, 1, 1).selectExpr("stale(id)").collect()

    assert stored_trace(span.trace_id).calls == []
    assert len(endpoint.requests) == 2
    assert len(stored_traces(experiment_id)) == 2


def test_two_udfs_in_one_task_keep_their_calls_apart(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """Where Spark runs two UDFs in one process row by row, each call is below its own UDF."""
    call = functions.asker(endpoint.base_url)

    def named(name: str, offset: int) -> Any:
        def extract(number: int) -> str:
            return call(number + offset)

        extract.__name__ = name
        return udf(extract, "string")

    ctx_autolog.enable()
    with mlflow.start_span("job") as span:
        columns = named("first", 0)("id"), named("second", 100)("id")
        spark.range(0, 4, 1, 1).select(*columns).collect()

    trace = stored_trace(span.trace_id)
    assert sorted(task.attributes["spark.function.name"] for task in trace.tasks) == [
        "first",
        "second",
    ]
    for task in trace.tasks:
        prompts = [each.inputs["messages"][0]["content"] for each in trace.children_of(task)]
        assert len(prompts) == 4
        assert all(
            ("document 10" in prompt) == (task.attributes["spark.function.name"] == "second")
            for prompt in prompts
        )


@pytest.mark.skipif(pyspark.__version__ < "4", reason="Tables as arguments are from Spark 4.0 on")
def test_a_table_function_may_say_its_schema_and_stop_early(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """analyze() works, and a function that skips the rest of its table goes on in one good task."""
    from pyspark.sql.udtf import AnalyzeResult, SkipRestOfInputTableException

    call = functions.asker(endpoint.base_url)

    class Extract:
        @staticmethod
        def analyze(table: Any) -> AnalyzeResult:
            assert table.isTable
            return AnalyzeResult(StructType().add("answer", "string"), withSinglePartition=True)

        def eval(self, row: Any) -> Iterator[tuple[str]]:
            if row.id == 2:
                raise SkipRestOfInputTableException("enough")
            yield (call(row.id),)

        def terminate(self) -> Iterator[tuple[str]]:
            yield (call(100),)

    table = spark.range(0, 6, 1, 1).asTable()
    with ctx_autolog.enable(), mlflow.start_span("job") as span:
        rows = udtf(Extract)(table).collect()
    assert len(endpoint.requests) == 3
    assert rows == udtf(Extract)(table).collect()
    trace = stored_trace(span.trace_id)
    (task,) = trace.tasks
    assert (task.name, task.status.status_code) == ("Extract [0]", "OK")
    assert (task.attributes["llm.calls"], task.attributes["spark.rows.in"]) == (3, 3)


def test_an_exception_in_a_udf_reaches_spark_as_it_was(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """The task's span is an error, what was paid for is stored, Spark reports the user's error."""
    call = functions.asker(endpoint.base_url)

    @udf("string")
    def extract(number: int) -> str:
        call(number)
        raise KeyError("no such clause")

    ctx_autolog.enable()
    with mlflow.start_span("job") as span, pytest.raises(PythonException) as caught:
        spark.range(0, 3, 1, 1).select(extract("id")).collect()

    assert "KeyError: 'no such clause'" in str(caught.value)
    trace = stored_trace(span.trace_id)
    (task,) = trace.tasks
    assert task.status.status_code == "ERROR"
    assert len(trace.calls) == len(endpoint.requests) == 1


def test_traced_suits_every_kind_of_function(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """traced(f) inside a UDF, and inside a partition's function, is one task span an attempt."""
    call = functions.asker(endpoint.base_url)

    def extract(number: int) -> str:
        return call(number)

    def visit(rows: Iterable[Any]) -> Iterator[str]:
        for row in rows:
            yield call(row)

    with mlflow.start_span("job") as span:
        frame = spark.range(0, 6, 1, 2)
        frame.select(udf(ctx_autolog.traced(extract), "string")("id")).collect()
        numbers = spark.sparkContext.parallelize(range(6), 2)
        assert numbers.mapPartitions(ctx_autolog.traced(visit)).count() == 6
        # Before Spark 4, an RDD raises an exception of the JVM.
        with pytest.raises(Exception, match="ZeroDivisionError"):
            numbers.mapPartitions(ctx_autolog.traced(lambda rows: (1 // 0 for _ in rows))).count()

    trace = stored_trace(span.trace_id)
    good = [task for task in trace.tasks if task.status.status_code == "OK"]
    assert sorted(task.attributes["spark.function.name"] for task in good) == [
        "extract",
        "extract",
        "visit",
        "visit",
    ]
    assert [len(trace.children_of(task)) for task in good] == [3, 3, 3, 3]
    assert {task.attributes["spark.task.outcome"] for task in trace.tasks} == {
        "completed",
        "failed",
    }


def test_enabling_on_a_worker_changes_nothing(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """A function whose module calls enable() when a worker imports it is traced once."""
    call = functions.asker(endpoint.base_url)

    def visit(rows: Iterable[int]) -> Iterator[str]:
        import mlflow_ctx_autolog

        mlflow_ctx_autolog.enable()
        for row in rows:
            yield call(row)

    ctx_autolog.enable()
    with mlflow.start_span("job") as span:
        spark.sparkContext.parallelize(range(3), 1).mapPartitions(visit).count()

    (task,) = stored_trace(span.trace_id).tasks
    assert task.attributes["llm.calls"] == 3


@pytest.mark.skipif(pyspark.__version__ < "4.1", reason="Spark runs UDFs on threads from 4.1 on")
def test_a_udf_that_spark_runs_on_threads_is_traced(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """With Spark's own concurrency for UDFs there is one task span, and all calls are below it."""
    call = functions.asker(endpoint.base_url)
    spark.conf.set("spark.sql.execution.pythonUDF.arrow.concurrency.level", "4")
    try:
        ctx_autolog.enable()
        with mlflow.start_span("job") as span:
            extract = udf(lambda number: call(number), "string", useArrow=True)
            spark.range(0, 12, 1, 1).select(extract("id")).collect()
    finally:
        spark.conf.unset("spark.sql.execution.pythonUDF.arrow.concurrency.level")

    trace = stored_trace(span.trace_id)
    assert len(trace.tasks) == 1
    assert sum(trace.is_nested(each) for each in trace.calls) == len(endpoint.requests) == 12
