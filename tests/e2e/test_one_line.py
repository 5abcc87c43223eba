"""One line on the driver: every worker call under the driver's trace."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from pyspark import Broadcast
from pyspark.errors import PythonException
from pyspark.sql import SparkSession
from workload import (
    SCHEMA,
    StoredTrace,
    ask,
    extractor,
    row_extractor,
    stored_trace,
    stored_traces,
)

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint, TrackingServer


def test_enable_is_all_a_user_adds(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str, tmp_path: Path
) -> None:
    """Every call of a mapInPandas job is below the driver's span, as MLflow records it."""
    contracts = spark.range(0, 20, 1, 4)

    ctx_autolog.enable()
    with mlflow.start_span("extract-entitlements") as span:
        contracts.mapInPandas(extractor(endpoint.base_url), SCHEMA).write.parquet(f"{tmp_path}/out")

    trace = stored_trace(span.trace_id)
    assert len(endpoint.requests) == 20
    assert len(trace.calls) == 20
    assert all(trace.is_nested(call) for call in trace.calls)
    assert len(stored_traces(experiment_id)) == 1
    assert trace.total_tokens == endpoint.total_tokens > 0
    for call in trace.calls:
        assert call.name == "Completions"
        assert call.status.status_code == "OK"
        assert call.inputs["model"] == "gpt-test"
        prompt = call.inputs["messages"][0]["content"]
        assert re.fullmatch(r"What of document \d+\?", prompt)
        assert prompt[:40] in call.outputs["choices"][0]["message"]["content"]
        assert call.attributes["mlflow.chat.tokenUsage"]["total_tokens"] > 0
    assert spark.read.parquet(f"{tmp_path}/out").count() == 20


def test_the_task_span_says_which_task_it_was(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """One span for each task attempt, named after the function, with Spark's facts and counts."""
    spark.sparkContext.setJobGroup("nightly", "the nightly job")
    ctx_autolog.enable()
    with mlflow.start_span("job") as span:
        spark.range(0, 8, 1, 2).mapInPandas(extractor(endpoint.base_url), SCHEMA).collect()
    spark.sparkContext.setLocalProperty("spark.jobGroup.id", None)  # type: ignore[arg-type]

    trace = stored_trace(span.trace_id)
    assert sorted(task.name for task in trace.tasks) == ["extract [0]", "extract [1]"]
    assert {task.attributes["spark.partition.id"] for task in trace.tasks} == {0, 1}
    assert len({task.attributes["spark.task.attempt_id"] for task in trace.tasks}) == 2
    for task in trace.tasks:
        facts = task.attributes
        assert facts["spark.application.id"] == spark.sparkContext.applicationId
        assert facts["spark.job.group"] == "nightly"
        assert int(facts["spark.sql.execution.id"]) >= 0
        assert facts["spark.stage.id"] >= 0
        assert facts["spark.task.attempt_number"] == 0
        assert facts["host.name"]
        assert facts["process.pid"] > 0
        assert facts["spark.rows.in"] == facts["spark.rows.out"] == facts["llm.calls"] == 4
        assert facts["spark.task.outcome"] == "completed"
        assert task.inputs == {"rows": 4}
        assert task.outputs == {"rows": 4, "calls": 4, "errors": 0}
        children = trace.children_of(task)
        assert len(children) == 4
        assert all(task.start_time_ns <= child.start_time_ns for child in children)
        assert all(child.end_time_ns <= task.end_time_ns for child in children)


def test_calls_from_threads_are_nested(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """Calls made by a thread pool inside the partition are below the task, all of them."""
    ctx_autolog.enable()
    with mlflow.start_span("job") as span:
        extract = extractor(endpoint.base_url, threads=8)
        spark.range(0, 48, 1, 3).mapInPandas(extract, SCHEMA).collect()

    trace = stored_trace(span.trace_id)
    assert sum(trace.is_nested(call) for call in trace.calls) == 48
    assert len(stored_traces(experiment_id)) == 1


def test_spans_of_the_user_nest_between_task_and_call(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """A span that the function opens itself is below the task, also across batches."""
    url = endpoint.base_url

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        import mlflow
        from openai import OpenAI

        client = OpenAI(base_url=url, api_key="not-a-key")
        with mlflow.start_span("partition"):
            for batch in batches:
                yield batch.assign(answer=[ask(client, number) for number in batch["id"]])

    ctx_autolog.enable()
    with mlflow.start_span("job") as span:
        spark.range(0, 8, 1, 1).mapInPandas(extract, SCHEMA).collect()

    trace = stored_trace(span.trace_id)
    (task,) = trace.tasks
    (partition,) = trace.children_of(task)
    assert partition.name == "partition"
    assert len(trace.children_of(partition)) == len(trace.calls) == 8


def test_partitions_of_rows_are_traced(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """foreachPartition of DataFrame and RDD, and RDD.mapPartitions, carry the context."""
    extract_rows = row_extractor(endpoint.base_url)

    def visit(rows: Iterable[Any]) -> None:
        list(extract_rows(rows))

    ctx_autolog.enable()
    with mlflow.start_span("job") as span:
        spark.range(0, 4, 1, 2).foreachPartition(visit)
        numbers = spark.sparkContext.parallelize(range(4), 2)
        numbers.foreachPartition(visit)
        answers = numbers.mapPartitions(extract_rows)
        assert answers.count() == 4

    trace = stored_trace(span.trace_id)
    assert sum(trace.is_nested(call) for call in trace.calls) == 12
    assert (
        sorted(task.attributes["spark.function.name"] for task in trace.tasks)
        == ["extract_rows"] * 2 + ["visit"] * 4
    )
    assert {task.attributes["spark.rows.in"] for task in trace.tasks} == {2}


def test_functions_pipelined_by_spark_keep_their_calls_apart(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """Two functions that Spark runs in turns in one process each have their own task span."""
    url = endpoint.base_url

    def step(name: str) -> Any:
        def run(rows: Iterable[int]) -> Iterator[int]:
            from openai import OpenAI

            client = OpenAI(base_url=url, api_key="not-a-key")
            for row in rows:
                ask(client, row)
                yield row + 100

        run.__name__ = name
        return run

    ctx_autolog.enable()
    with mlflow.start_span("job") as span:
        numbers = spark.sparkContext.parallelize(range(6), 2)
        numbers.mapPartitions(step("first")).mapPartitions(step("second")).collect()

    trace = stored_trace(span.trace_id)
    assert sorted(task.attributes["spark.function.name"] for task in trace.tasks) == [
        "first",
        "first",
        "second",
        "second",
    ]
    for task in trace.tasks:
        prompts = [call.inputs["messages"][0]["content"] for call in trace.children_of(task)]
        assert len(prompts) == 3
        assert all(
            ("document 10" in prompt) == (task.attributes["spark.function.name"] == "second")
            for prompt in prompts
        )


def test_the_second_way_in_is_traced(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """traced(f) carries the context without enable()."""
    with mlflow.start_span("job") as span:
        extract = ctx_autolog.traced(extractor(endpoint.base_url))
        spark.range(0, 4, 1, 2).mapInPandas(extract, SCHEMA).collect()

    trace = stored_trace(span.trace_id)
    assert sum(trace.is_nested(call) for call in trace.calls) == 4


def test_the_third_way_in_is_broadcast_and_attach(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """The carrier is a Spark broadcast of versioned JSON, and attach() uses it in the worker."""
    url = endpoint.base_url
    with mlflow.start_span("job") as span:
        carrier = ctx_autolog.broadcast(spark)

        def read_contracts(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
            from openai import OpenAI

            import mlflow_ctx_autolog as ctx_autolog

            with ctx_autolog.attach(carrier):
                client = OpenAI(base_url=url, api_key="not-a-key")
                for batch in batches:
                    yield batch.assign(answer=[ask(client, number) for number in batch["id"]])

        spark.range(0, 8, 1, 2).mapInPandas(read_contracts, SCHEMA).collect()

    assert isinstance(carrier, Broadcast)
    document = json.loads(carrier.value)
    assert document["version"] == 1
    assert span.trace_id.removeprefix("tr-") in document["traceparent"]
    assert document["experiment_id"] == experiment_id
    trace = stored_trace(span.trace_id)
    assert sum(trace.is_nested(call) for call in trace.calls) == 8
    assert {task.attributes["spark.function.name"] for task in trace.tasks} == {"read_contracts"}


def test_all_three_ways_at_once_double_nothing(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """With enable(), traced() and attach() together there is one task span and one span a call."""
    url = endpoint.base_url
    ctx_autolog.enable()
    with mlflow.start_span("job") as span:
        carrier = ctx_autolog.broadcast(spark)

        def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
            import mlflow_ctx_autolog as ctx_autolog

            with ctx_autolog.attach(carrier):
                yield from extractor(url)(batches)

        function = ctx_autolog.traced(extract)
        spark.range(0, 4, 1, 1).mapInPandas(function, SCHEMA).collect()

    trace = stored_trace(span.trace_id)
    assert len(trace.tasks) == 1
    assert len(trace.calls) == 4


def test_an_exception_of_the_function_reaches_spark_as_it_was(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """The task's span is an error with the exception; Spark reports the user's own exception."""
    url = endpoint.base_url

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in extractor(url)(batches):
            yield batch
            raise KeyError("no such clause")

    ctx_autolog.enable()
    with mlflow.start_span("job") as span, pytest.raises(PythonException) as caught:
        spark.range(0, 3, 1, 1).mapInPandas(extract, SCHEMA).collect()

    assert "KeyError: 'no such clause'" in str(caught.value)
    trace = stored_trace(span.trace_id)
    (task,) = trace.tasks
    assert task.status.status_code == "ERROR"
    assert task.attributes["spark.task.outcome"] == "failed"
    (event,) = task.events
    assert event.attributes["exception.type"] == "KeyError"
    assert len(trace.calls) == len(endpoint.requests) == 3


def test_a_failing_call_is_an_error_span_and_raises_as_before(
    spark: SparkSession, experiment_id: str
) -> None:
    """An API error is recorded on the call's span, and the function sees the client's exception."""
    with OpenAIEndpoint() as closed:
        url = closed.base_url

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        import openai

        client = openai.OpenAI(base_url=url, api_key="not-a-key", max_retries=0)
        for batch in batches:
            try:
                ask(client, 1)
            except openai.APIConnectionError as error:
                yield batch.assign(answer=type(error).__name__)

    ctx_autolog.enable()
    with mlflow.start_span("job") as span:
        rows = spark.range(0, 2, 1, 1).mapInPandas(extract, SCHEMA).collect()

    assert {row.answer for row in rows} == {"APIConnectionError"}
    (call,) = stored_trace(span.trace_id).calls
    assert call.status.status_code == "ERROR"


@pytest.mark.parametrize("rows", [1, 4])
def test_a_task_that_spark_closes_early_leaves_nothing_behind(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str, rows: int
) -> None:
    """With limit() every call that was made is in the store, below its task."""
    url = endpoint.base_url

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in extractor(url)(batches):
            # Larger than the pipe between worker and Spark, so that the function is suspended.
            yield batch.assign(answer="x" * 1_000_000)

    ctx_autolog.enable()
    with mlflow.start_span("job") as span:
        spark.range(0, 30, 1, 1).mapInPandas(extract, SCHEMA).limit(rows).collect()
        spark.range(0, 30, 1, 1).mapInPandas(extract, SCHEMA).show(1)

    trace = stored_trace(span.trace_id)
    assert 0 < len(endpoint.requests) < 60
    assert len(trace.calls) == len(endpoint.requests)
    assert all(trace.is_nested(call) for call in trace.calls)
    assert {task.attributes["spark.task.outcome"] for task in trace.tasks} == {"closed early"}


@pytest.mark.sqlite
def test_a_reused_worker_follows_the_driver(
    spark: SparkSession,
    endpoint: OpenAIEndpoint,
    experiment_id: str,
    tmp_path: Path,
) -> None:
    """Another trace, another experiment and another store each get their own calls."""
    ctx_autolog.enable()
    extract = extractor(endpoint.base_url)
    seen = []

    def run(experiment: str) -> tuple[str, str]:
        chosen = mlflow.set_experiment(experiment)
        with mlflow.start_span(experiment) as span:
            spark.range(0, 4, 1, 2).mapInPandas(extract, SCHEMA).collect()
        trace = stored_trace(span.trace_id)
        seen.extend(task.attributes["process.pid"] for task in trace.tasks)
        assert sum(trace.is_nested(call) for call in trace.calls) == 4
        assert trace.trace.info.experiment_id == chosen.experiment_id
        return span.trace_id, chosen.experiment_id

    first = run("reuse-1")
    second = run("reuse-1")
    third = run("reuse-2")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/other.db")
    fourth = run("reuse-3")
    assert len({first, second, third, fourth}) == 4
    assert len(set(seen)) <= 4, "the workers were not reused, so the test shows nothing"


def test_driver_threads_do_not_mix(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """Two traces at the same time from two driver threads each have just their own calls."""
    ctx_autolog.enable()
    extract = extractor(endpoint.base_url, threads=4)

    def run(first: int) -> str:
        with mlflow.start_span(f"job-{first}") as span:
            spark.range(first, first + 24, 1, 4).mapInPandas(extract, SCHEMA).collect()
        return span.trace_id

    with ThreadPoolExecutor(2) as pool:
        trace_ids = list(pool.map(run, (1000, 2000)))

    for first, trace_id in zip((1000, 2000), trace_ids, strict=True):
        trace = stored_trace(trace_id)
        prompts = {call.inputs["messages"][0]["content"] for call in trace.calls}
        assert prompts == {f"What of document {first + n}?" for n in range(24)}
        assert all(trace.is_nested(call) for call in trace.calls)


def test_without_a_span_an_action_is_a_trace(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """All tasks of an action are in one trace, named by function and action, with its sums."""
    ctx_autolog.enable()
    extract = extractor(endpoint.base_url)
    for _ in range(2):
        spark.range(0, 6, 1, 2).mapInPandas(extract, SCHEMA).collect()
        assert ctx_autolog.receipt().complete
    numbers = spark.sparkContext.parallelize(range(4), 4)
    # Two jobs of Spark's, since the first partition does not have enough.
    numbers.mapPartitions(row_extractor(endpoint.base_url)).take(2)
    receipt = ctx_autolog.receipt()

    traces = {trace.root.name: trace for trace in stored_traces(experiment_id)}
    assert sorted(trace.root.name for trace in stored_traces(experiment_id)) == [
        "extract: collect",
        "extract: collect",
        "extract_rows: take",
    ]
    for trace in traces.values():
        assert trace.trace.info.state == "OK"
        assert all(trace.is_nested(call) for call in trace.calls)
        assert {task.parent_id for task in trace.tasks} == {trace.root.span_id}
    collected, taken = traces["extract: collect"], traces["extract_rows: take"]
    assert (len(collected.tasks), len(collected.calls)) == (2, 6)
    assert len(taken.calls) >= 2
    assert receipt.trace_id == taken.trace.info.trace_id
    assert sum(trace.total_tokens for trace in stored_traces(experiment_id)) == (
        endpoint.total_tokens
    )


def test_disable_leaves_spark_and_reused_workers_alone(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """After disable() the same workers return the same rows and trace nothing."""
    extract = extractor(endpoint.base_url)
    with ctx_autolog.enable(), mlflow.start_span("job") as span:
        traced = spark.range(0, 4, 1, 2).mapInPandas(extract, SCHEMA).collect()
    with mlflow.start_span("untraced"):
        untraced = spark.range(0, 4, 1, 2).mapInPandas(extract, SCHEMA).collect()

    assert sorted(traced) == sorted(untraced)
    assert len(endpoint.requests) == 8
    calls = [call for trace in stored_traces(experiment_id) for call in trace.calls]
    assert len(calls) == 4
    assert {call.trace_id for call in calls} == {span.trace_id}


@pytest.mark.skipif(not hasattr(mlflow, "start_run"), reason="mlflow-tracing has no runs")
def test_runs_started_in_a_task_know_where_they_are(
    spark: SparkSession, server: TrackingServer, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """A run started inside a task has Spark's tags, and the driver's experiment and store."""

    def log(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        import mlflow

        for batch in batches:
            with mlflow.start_run() as run:
                yield batch.assign(answer=run.info.run_id)

    ctx_autolog.enable()
    with mlflow.start_span("job"):
        (row,) = spark.range(0, 1, 1, 1).mapInPandas(log, SCHEMA).collect()

    run = mlflow.get_run(row.answer)
    assert run.info.experiment_id == experiment_id
    assert run.data.tags["spark.application.id"] == spark.sparkContext.applicationId
    assert run.data.tags["spark.stage.id"].isdigit()
    assert run.data.tags["spark.partition.id"] == "0"
    assert run.data.tags["spark.sql.execution.id"].isdigit()


def test_a_carrier_of_a_newer_release_does_not_break_the_job(
    spark: SparkSession,
    endpoint: OpenAIEndpoint,
    experiment_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With enable() the job runs untraced; with traced() the job's error names the versions."""
    monkeypatch.setattr(ctx_autolog.DriverContext, "to_json", lambda _: '{"version": 99}')
    extract = extractor(endpoint.base_url)
    with ctx_autolog.enable(), mlflow.start_span("job") as span:
        rows = spark.range(0, 4, 1, 2).mapInPandas(extract, SCHEMA).collect()
        with pytest.raises(PythonException, match="version 99, this worker reads version 1"):
            spark.range(1).mapInPandas(ctx_autolog.traced(extract), SCHEMA).collect()

    assert len(rows) == len(endpoint.requests) == 4
    assert stored_trace(span.trace_id).calls == []


def test_setting_a_worker_up_costs_the_server_nothing(
    spark: SparkSession, endpoint: OpenAIEndpoint, tmp_path: Path
) -> None:
    """Workers send spans and nothing else; the driver announces the trace."""
    with TrackingServer(tmp_path / "server") as server:
        mlflow.set_tracking_uri(server.uri)
        mlflow.set_experiment("quiet")
        with ctx_autolog.enable(), mlflow.start_span("job") as span:
            before = len(_requests(server))
            spark.range(0, 40, 1, 4).mapInPandas(extractor(endpoint.base_url), SCHEMA).collect()
            made = _requests(server)[before:]
        assert len(stored_trace(span.trace_id).calls) == 40

    assert set(made) == {"POST /v1/traces", "POST /api/3.0/mlflow/traces"}
    assert made.count("POST /api/3.0/mlflow/traces") == 1


def _requests(server: TrackingServer) -> list[str]:
    return re.findall(r'"((?:GET|POST|PUT|PATCH|DELETE) [^ ?]+)', server.log.read_text())


def test_the_wheel_is_what_the_workers_import(spark: SparkSession) -> None:
    """Driver and workers import the installed package, not the checkout."""

    def where(_: Iterable[int]) -> Iterator[str]:
        import mlflow_ctx_autolog

        yield mlflow_ctx_autolog.__file__

    (path,) = spark.sparkContext.parallelize([1], 1).mapPartitions(where).collect()
    assert path == ctx_autolog.__file__
    assert Path(path).is_relative_to(Path(sys.prefix))


def test_nothing_is_in_the_carrier_but_what_is_needed(
    spark: SparkSession, experiment_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Secrets of the driver's environment are not in the broadcast."""
    for name in ("OPENAI_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "planted-secret")
    with mlflow.start_span("job"):
        text = ctx_autolog.broadcast(spark).value
    assert "planted-secret" not in text
    assert set(json.loads(text)) == {
        "action",
        "application_id",
        "autologs",
        "config",
        "environment",
        "experiment_id",
        "fingerprint_key",
        "has_span_processors",
        "max_result_bytes",
        "metadata",
        "process_id",
        "propagation",
        "records_no_calls",
        "redacts",
        "session_id",
        "spans_per_host",
        "speculation",
        "spent",
        "tags",
        "traceparent",
        "tracestate",
        "tracking_uri",
        "user",
        "version",
        "workspace",
    }


def test_the_articles_pattern_may_stay_in_the_function(
    spark: SparkSession, server: TrackingServer, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """A function that sets up MLflow in the worker itself is traced once, under the driver.

    Last, since what such a function sets stays set in the worker.
    """
    url, uri = endpoint.base_url, server.uri

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        import mlflow

        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment("the-articles")
        mlflow.openai.autolog()
        yield from extractor(url)(batches)

    ctx_autolog.enable()
    with mlflow.start_span("job") as span:
        spark.range(0, 6, 1, 2).mapInPandas(extract, SCHEMA).collect()

    trace = stored_trace(span.trace_id)
    assert sum(trace.is_nested(call) for call in trace.calls) == 6
    assert stored_traces(mlflow.set_experiment("the-articles").experiment_id) == []


def test_a_stored_trace_helper_can_fail() -> None:
    """The helper that all tests above trust tells a nested call from another."""

    class Span:
        def __init__(self, span_id: str, parent_id: str | None, span_type: str) -> None:
            self.span_id, self.parent_id, self.span_type = span_id, parent_id, span_type

    spans = [
        Span("root", None, "UNKNOWN"),
        Span("task", "root", "TASK"),
        Span("nested", "task", "CHAT_MODEL"),
        Span("beside", "root", "CHAT_MODEL"),
    ]
    trace = StoredTrace(type("Trace", (), {"data": type("Data", (), {"spans": spans})}))
    assert [trace.is_nested(call) for call in trace.calls] == [True, False]  # type: ignore[arg-type]
