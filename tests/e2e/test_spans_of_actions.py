"""Calls belong to the span that is active where the action runs, wherever the plan was built."""

from __future__ import annotations

import asyncio
import contextvars
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import functions
import mlflow
import pytest
from pyspark import InheritableThread
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.functions import udf
from workload import stored_trace, stored_traces

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint

IS_PRELOADED = True


@pytest.fixture
def plan(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> Callable[[], DataFrame]:
    """Builds the same plan each time, which makes four calls."""
    ask = functions.asker(endpoint.base_url)
    column = udf(lambda number: ask(number), "string")
    ctx_autolog.enable()
    return lambda: spark.range(0, 4, 1, 2).select(column("id").alias("answer"))


def calls(span: Any) -> int:
    """How many calls the trace of a span has, all of them below its tasks."""
    trace = stored_trace(span.trace_id)
    assert all(trace.is_nested(call) for call in trace.calls)
    return len(trace.calls)


def calls_without_span(experiment_id: str, *spans: Any) -> list[int]:
    """How many calls the traces have that are of none of these spans, but of an action."""
    assert ctx_autolog.flush(60)
    of_spans = {span.trace_id for span in spans}
    traces = stored_traces(experiment_id)
    return [len(each.calls) for each in traces if each.trace.info.trace_id not in of_spans]


def test_a_plan_before_the_span_and_an_action_inside(plan: Callable[[], DataFrame]) -> None:
    frame = plan()
    with mlflow.start_span("job") as span:
        frame.collect()
    assert calls(span) == 4


def test_a_plan_inside_the_span_and_an_action_after_it(
    plan: Callable[[], DataFrame], experiment_id: str
) -> None:
    """It is not that span's, but a trace of its own."""
    with mlflow.start_span("job") as span:
        frame = plan()
        frame.collect()
    frame.collect()
    with mlflow.start_span("another") as another:
        frame.collect()
    assert (calls(span), calls(another)) == (4, 4)
    assert calls_without_span(experiment_id, span, another) == [4]


def test_a_plan_cached_under_one_span_and_read_under_another(
    plan: Callable[[], DataFrame], endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """Its calls are the first action's; who builds it anew finds what is cached."""
    with mlflow.start_span("first") as first:
        plan().cache().count()
    with mlflow.start_span("second") as second:
        assert len(plan().collect()) == 4
    assert len(plan().collect()) == 4
    plan().unpersist()
    assert (calls(first), calls(second)) == (4, 0)
    assert calls_without_span(experiment_id, first, second) == []
    assert len(endpoint.requests) == 4


@pytest.mark.parametrize("kind", [threading.Thread, InheritableThread])
def test_two_threads_under_two_spans_at_once_on_one_plan(
    plan: Callable[[], DataFrame], kind: type[threading.Thread], endpoint: OpenAIEndpoint
) -> None:
    endpoint.latency = 0.05
    frame, spans, together = plan(), {}, threading.Barrier(2)

    def act(name: str) -> None:
        with mlflow.start_span(name) as spans[name]:
            together.wait()
            for _ in range(2):
                frame.collect()

    threads = [kind(target=act, args=(name,)) for name in ("one", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [calls(span) for span in spans.values()] == [8, 8]


def test_coroutines_that_take_turns_on_one_thread(plan: Callable[[], DataFrame]) -> None:
    frame, spans = plan(), {}

    async def act(name: str) -> None:
        with mlflow.start_span(name) as spans[name]:
            for _ in range(2):
                await asyncio.sleep(0)
                frame.collect()

    async def both() -> None:
        await asyncio.gather(act("one"), act("other"))

    asyncio.run(both())
    assert [calls(span) for span in spans.values()] == [8, 8]


def test_spans_within_spans(plan: Callable[[], DataFrame]) -> None:
    """An action is below the innermost, one after it below that around it."""
    frame = plan()
    with mlflow.start_span("outer") as outer:
        with mlflow.start_span("inner") as inner:
            frame.collect()
        frame.collect()
    trace = stored_trace(outer.trace_id)
    parents = Counter(task.parent_id for task in trace.tasks)
    assert parents == {inner.span_id: 2, outer.span_id: 2}
    assert len(trace.calls) == 8


def test_a_span_that_ends_while_the_action_of_another_thread_runs(
    plan: Callable[[], DataFrame], endpoint: OpenAIEndpoint
) -> None:
    """The action is that of the span that was active where it began."""
    endpoint.latency = 0.5
    frame = plan()
    with mlflow.start_span("job") as span:
        # Plain threads do not inherit the active span.
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(frame.collect,))
        thread.start()
        while not endpoint.requests:
            time.sleep(0.01)
    thread.join()
    assert ctx_autolog.flush(60)
    assert calls(span) == 4


def test_sql_and_views_belong_to_the_span_of_the_query(
    spark: SparkSession, plan: Callable[[], DataFrame], endpoint: OpenAIEndpoint
) -> None:
    ask = functions.asker(endpoint.base_url)
    with mlflow.start_span("registered") as registered:
        spark.udf.register("ask_of_actions", lambda number: ask(number))
        spark.range(2).selectExpr("ask_of_actions(id) AS a").createOrReplaceTempView("asked")
    with mlflow.start_span("text") as text:
        spark.sql("SELECT ask_of_actions(id) FROM range(3)").collect()
    with mlflow.start_span("view") as view:
        spark.table("asked").collect()
    assert [calls(span) for span in (registered, text, view)] == [0, 3, 2]


def test_a_stream_belongs_to_the_span_in_which_it_was_started(
    spark: SparkSession, plan: Callable[[], DataFrame], endpoint: OpenAIEndpoint, tmp_path: Path
) -> None:
    """Not to that in which its plan was built, nor to one that is active at a later batch."""
    ask = functions.asker(endpoint.base_url)
    source = tmp_path / "source"
    source.mkdir()
    with mlflow.start_span("built") as built:
        stream = spark.readStream.schema("id long").parquet(str(source))
        answers = stream.select(udf(lambda number: ask(number), "string")("id"))
    with mlflow.start_span("started") as started:
        query = answers.writeStream.format("memory").queryName("of_actions").start()
    with mlflow.start_span("later") as later:
        spark.range(0, 4, 1, 2).write.mode("append").parquet(str(source))
        query.processAllAvailable()
    query.stop()
    assert ctx_autolog.flush(60)
    assert [calls(span) for span in (built, started, later)] == [0, 4, 0]


def test_where_actions_cannot_say_it_the_broadcast_does(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """By ``propagation="broadcast"``: a plan is that of one span, and shared within it."""
    ask = functions.asker(endpoint.base_url)
    column = udf(lambda number: ask(number), "string")

    def plan() -> DataFrame:
        return spark.range(0, 4, 1, 2).select(column("id").alias("a"), column("id").alias("b"))

    ctx_autolog.enable(propagation="broadcast")
    spans = []
    for name in ("one", "other"):
        with mlflow.start_span(name) as span:
            frame = plan()
            assert frame.sameSemantics(plan())
            frame.collect()
        spans.append(span)
    frame.collect()
    assert [calls(span) for span in spans] == [4, 8]


@pytest.mark.parametrize(
    "text",
    [None, "damaged", "none;calls=x", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"],
)
def test_a_property_that_is_missing_or_damaged_means_no_other_span(
    plan: Callable[[], DataFrame],
    text: str | None,
    experiment_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such calls are a trace of their action."""
    from mlflow_ctx_autolog.driver.handover import driver

    monkeypatch.setattr(driver.propagator, "_text", lambda: text)
    with mlflow.start_span("job") as span:
        plan().collect()
    assert calls(span) == 0
    assert sum(calls_without_span(experiment_id, span)) == 4


def test_properties_of_others_are_left_alone(
    plan: Callable[[], DataFrame], spark: SparkSession
) -> None:
    context = spark.sparkContext
    context.setLocalProperty("of.another.library", "theirs")
    with mlflow.start_span("job") as span:
        plan().collect()
        assert context.getLocalProperty("of.another.library") == "theirs"
    ctx_autolog.disable()
    assert context.getLocalProperty("of.another.library") == "theirs"
    assert context.getLocalProperty("mlflow_ctx_autolog.action") is None
    context.setLocalProperty("of.another.library", None)  # type: ignore[arg-type]
    assert calls(span) == 4


def test_what_was_handed_over_runs_on_after_disable(
    spark: SparkSession, plan: Callable[[], DataFrame], endpoint: OpenAIEndpoint, tmp_path: Path
) -> None:
    """A plan and a registered function untraced, or as traces of their own; a stream as before."""
    ask = functions.asker(endpoint.base_url)
    source = tmp_path / "source"
    source.mkdir()
    stream = spark.readStream.schema("id long").parquet(str(source))
    with mlflow.start_span("job") as span:
        frame = plan()
        frame.collect()
        spark.udf.register("ask_later", lambda number: ask(number))
        answers = stream.select(udf(lambda number: ask(number), "string")("id"))
        query = answers.writeStream.format("memory").queryName("after_disable").start()
    ctx_autolog.disable()
    assert len(frame.collect()) == 4
    assert len(spark.sql("SELECT ask_later(id) FROM range(2)").collect()) == 2
    spark.range(0, 3, 1, 2).write.mode("append").parquet(str(source))
    query.processAllAvailable()
    query.stop()
    assert len(endpoint.requests) == 4 + 4 + 2 + 3
    assert ctx_autolog.flush(60)
    assert calls(span) == 4 + 3


_UNPINNED = """
import threading, mlflow, functions
from pyspark import cloudpickle
from pyspark.sql import SparkSession
from pyspark.sql.functions import udf
import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint

cloudpickle.register_pickle_by_value(functions)
mlflow.set_tracking_uri({uri!r})
mlflow.set_experiment(experiment_id={experiment!r})
spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
ctx_autolog.enable()
with OpenAIEndpoint() as endpoint:
    ask = functions.asker(endpoint.base_url)
    frame = spark.range(0, 2, 1, 1).select(udf(lambda number: ask(number), "string")("id"))

    def act(name):
        for _ in range(2):
            with mlflow.start_span(name):
                frame.collect()

    act("alone")
    print("alone", flush=True)
    threads = [threading.Thread(target=act, args=(name,)) for name in ("one", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("requests", len(endpoint.requests))
spark.stop()
"""


@pytest.mark.slow
def test_threads_that_spark_cannot_tell_apart_are_warned_of_once(
    endpoint: OpenAIEndpoint, experiment_id: str, tmp_path: Path
) -> None:
    script = _UNPINNED.format(uri=mlflow.get_tracking_uri(), experiment=experiment_id)
    folder = Path(functions.__file__).parent
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYSPARK_PIN_THREAD": "false", "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert "requests 12" in ran.stdout, ran.stderr
    assert ran.stderr.count("PYSPARK_PIN_THREAD is false") == 1
