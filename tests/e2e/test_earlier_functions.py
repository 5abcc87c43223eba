"""Functions that Spark was given before enable(): traced where they can be reached, else named."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pyspark
import pytest
from pyspark.sql import SparkSession
from pyspark.sql.functions import udf
from workload import SCHEMA, ask, extractor, stored_trace

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint, TrackingServer


@pytest.fixture
def said(spark: SparkSession, experiment_id: str) -> Iterator[Callable[[], list[str]]]:
    """Return what this library has warned of since the last time, on the driver."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def take() -> list[str]:
            found = [str(each.message) for each in caught if issubclass(each.category, UserWarning)]
            caught.clear()
            return [text for text in found if "before tracing" in text]

        yield take
    ctx_autolog.disable()


def asker(url: str) -> Callable[[Any], str]:
    """Return a function of one value that makes a call."""

    def once(value: Any) -> str:
        from openai import OpenAI

        return ask(OpenAI(base_url=url, api_key="unused"), f"What of {value}?")

    return once


def test_a_frame_that_was_built_before_is_named_once(
    spark: SparkSession, endpoint: OpenAIEndpoint, said: Callable[[], list[str]]
) -> None:
    """Spark has its function, pickled. Built once more, it is traced."""
    rows = spark.range(0, 4, 1, 2)
    frame = rows.mapInPandas(extractor(endpoint.base_url), SCHEMA)
    # A column that looks like a call, as those of aggregates do.
    counted = rows.groupBy("id").agg({"id": "sum"}).filter("`sum(id)` >= 0")

    ctx_autolog.enable()
    with mlflow.start_span("job"):
        counted.collect()
        assert not said()
        frame.count()
        (text,) = said()
        frame.write.format("noop").mode("append").save()
        frame.collect()
        assert not said()
    assert text.startswith("extract was handed to Spark before tracing was turned on")
    assert "ctx_autolog.enable() first" in text

    asked = len(endpoint.requests)
    with mlflow.start_span("again") as span:
        rows.mapInPandas(extractor(endpoint.base_url), SCHEMA).collect()
    assert not said()
    assert len(stored_trace(span.trace_id).calls) == len(endpoint.requests) - asked == 4


def test_what_was_built_while_tracing_was_off_is_named(
    spark: SparkSession, endpoint: OpenAIEndpoint, said: Callable[[], list[str]]
) -> None:
    """What was built while it was on is traced, however often it was turned off since."""
    ctx_autolog.enable()
    traced = spark.range(2).mapInPandas(extractor(endpoint.base_url), SCHEMA)
    ctx_autolog.disable()
    untraced = spark.range(2).withColumn("answer", udf(asker(endpoint.base_url))("id"))
    ctx_autolog.enable()
    with mlflow.start_span("job") as span:
        traced.collect()
        assert not said()
        untraced.collect()
        assert [text.partition(" ")[0] for text in said()] == ["once"]
    assert len(stored_trace(span.trace_id).calls) == 2


def test_a_table_that_was_cached_before_is_not_named(
    spark: SparkSession, endpoint: OpenAIEndpoint, said: Callable[[], list[str]]
) -> None:
    """Its function does not run again."""
    frame = spark.range(2).mapInPandas(extractor(endpoint.base_url), SCHEMA).cache()
    try:
        frame.count()
        ctx_autolog.enable()
        with mlflow.start_span("job"):
            assert frame.filter("id >= 0").count() == 2
    finally:
        frame.unpersist()
    assert len(endpoint.requests) == 2
    assert not said()


def test_a_function_that_was_registered_before_is_named(
    spark: SparkSession, endpoint: OpenAIEndpoint, said: Callable[[], list[str]]
) -> None:
    """By the name that it has in SQL. Registered once more, it is traced."""
    spark.udf.register("ask_early", asker(endpoint.base_url))
    ctx_autolog.enable()
    with mlflow.start_span("job"):
        spark.sql("SELECT ask_early(id) FROM range(2)").collect()
        (text,) = said()
    assert text.startswith("ask_early was handed")

    spark.udf.register("ask_late", asker(endpoint.base_url))
    with mlflow.start_span("job") as span:
        spark.sql("SELECT ask_late(id) FROM range(2)").collect()
    assert not said()
    assert len(stored_trace(span.trace_id).calls) == 2


def test_a_udf_that_was_made_before_is_traced(
    spark: SparkSession, endpoint: OpenAIEndpoint, said: Callable[[], list[str]]
) -> None:
    """Also one that Spark has used before."""
    question = udf(asker(endpoint.base_url))
    spark.range(1).select(question("id")).collect()
    ctx_autolog.enable()
    with mlflow.start_span("job") as span:
        spark.range(2).select(question("id")).collect()
    assert not said()
    assert len(stored_trace(span.trace_id).calls) == 2


def test_an_rdd_that_was_built_before_is_traced(
    spark: SparkSession, endpoint: OpenAIEndpoint, said: Callable[[], list[str]]
) -> None:
    """It holds its function until Spark is first asked for something of it."""
    context = spark.sparkContext
    answers = context.parallelize(range(4), 2).map(asker(endpoint.base_url)).filter(bool)
    computed = context.parallelize(range(2), 2).map(asker(endpoint.base_url))
    computed.collect()
    ctx_autolog.enable()
    with mlflow.start_span("job") as span:
        assert len(answers.collect()) == 4
        assert answers.map(len).count() == 4
        # One of them before, the other one since.
        assert answers.map(asker(endpoint.base_url)).count() == 4
        assert not said()
        computed.collect()
        assert [text.partition(" ")[0] for text in said()] == ["once"]
    trace = stored_trace(span.trace_id)
    # Those of what Spark had before are not in it.
    assert len(trace.calls) == len(endpoint.requests) - 2 * 2 == 16
    assert all(trace.is_nested(call) for call in trace.calls)


_ON_CONNECT = """
import json, sys, warnings
import mlflow, workload
from pyspark import cloudpickle
from pyspark.sql import SparkSession
import mlflow_ctx_autolog as ctx_autolog

cloudpickle.register_pickle_by_value(workload)
uri, experiment_id, url = sys.argv[1:]
mlflow.set_tracking_uri(uri)
mlflow.set_experiment(experiment_id=experiment_id)
spark = SparkSession.builder.remote("local[2]").getOrCreate()

def once(value):
    from openai import OpenAI
    return workload.ask(OpenAI(base_url=url, api_key="unused"), f"What of {value}?")

spark.udf.register("ask_early", once)
frame = spark.range(0, 2, 1, 2).mapInPandas(workload.extractor(url), workload.SCHEMA)
frame.count()
ctx_autolog.enable()
spark.udf.register("ask_late", once)
said, traces = {}, {}

def run(name, job):
    with warnings.catch_warnings(record=True) as caught, mlflow.start_span(name) as span:
        warnings.simplefilter("always")
        job()
        told = [str(each.message) for each in caught]
        said[name] = [text for text in told if "before tracing" in text]
        traces[name] = span.trace_id

run("frame", frame.collect)
run("late", lambda: spark.sql("SELECT ask_late(id), abs(id) FROM range(2)").collect())
run("early", lambda: spark.sql("SELECT ask_early(id) FROM range(2)").collect())
run("early again", lambda: spark.range(2).selectExpr("ask_early(id)").collect())
ctx_autolog.flush()
print(json.dumps([said, traces]))
"""


@pytest.mark.skipif(
    pyspark.__version__ < "4", reason="Spark 3.5 fetches its Connect server from the network"
)
def test_on_spark_connect(
    server: TrackingServer, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """A frame is pickled as it is run; what was registered before is named."""
    arguments = [server.uri, experiment_id, endpoint.base_url]
    done = subprocess.run(
        [sys.executable, "-c", _ON_CONNECT, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1] / "support",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said, traces = json.loads(done.stdout.splitlines()[-1])
    assert len(stored_trace(traces["frame"]).calls) == 2
    assert len(stored_trace(traces["late"]).calls) == 2
    assert (said["frame"], said["late"], said["early again"]) == ([], [], [])
    (text,) = said["early"]
    assert text.startswith("ask_early was handed")
