"""Jobs of more calls than one trace should hold, on real workers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import mlflow
import pandas as pd
import pytest
from pyspark import cloudpickle
from pyspark.sql import SparkSession
from workload import SCHEMA, StoredTrace, ask, extractor, stored_trace, stored_traces

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.delivery.spool import Destination
from mlflow_ctx_autolog.driver.mlflow_traces import record_no_totals
from mlflow_ctx_autolog.driver.totals import write_stored_totals
from mlflow_ctx_autolog.stores.sending import send
from mlflow_ctx_autolog.stores.tracking_store import trace_record
from mlflow_ctx_autolog.testing import OpenAIEndpoint, TrackingServer

cloudpickle.register_pickle_by_value(sys.modules[__name__])

IS_PRELOADED = True
LIMIT = 40


def run(
    spark: SparkSession, function: Callable[..., Any], rows: int = 120, **settings: Any
) -> tuple[StoredTrace, list[StoredTrace], str]:
    """Run a job in four partitions; return its trace, those linked to it, and its receipt."""
    with ctx_autolog.enable(max_spans_per_trace=LIMIT, **settings):
        with mlflow.start_span("job") as span:
            frame = spark.range(0, rows, 1, 4).mapInPandas(function, SCHEMA)
            assert len(frame.collect()) == rows
        receipt = ctx_autolog.receipt(timeout=30)
    assert receipt.complete, receipt
    job = stored_trace(span.trace_id)
    traces = stored_traces(job.trace.info.experiment_id)
    linked = [each for each in traces if each.trace.info.trace_id != span.trace_id]
    return job, linked, str(receipt)


@pytest.mark.parametrize("transport", ["direct", "driver"])
def test_the_drivers_trace_stays_small_and_nothing_is_lost(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str, transport: str
) -> None:
    """It keeps the tree of tasks and the totals; further calls are linked both ways."""
    context = {"metadata": {"mlflow.trace.session": "tonight"}, "tags": {"team": "legal"}}
    with mlflow.start_span("warm-up"):
        mlflow.update_current_trace(**context)
    job, linked, receipt = run(spark, extractor(endpoint.base_url), transport=transport)
    linked = [each for each in linked if each.root.name.startswith("extract [")]

    assert len(endpoint.requests) == 120
    # A root, four tasks, and the quota with at most a quarter more.
    assert LIMIT <= len(job.calls) <= LIMIT * 5 / 4
    assert len(job.tasks) == 4
    job.assert_nested()
    calls = [call for each in (job, *linked) for call in each.calls]
    assert len({call.span_id for call in calls}) == 120
    made = 1 + 4 + 120 + len(linked)
    assert receipt == f"{made} spans made, {made} stored"

    usage = [call.get_attribute("mlflow.chat.tokenUsage")["total_tokens"] for call in calls]
    assert job.total_tokens == sum(usage)
    # Sums over traces have each token once.
    assert {each.total_tokens for each in linked} == {0}

    assert linked
    tasks = {task.span_id: task for task in job.tasks}
    for each in linked:
        root = each.root
        task = tasks[root.get_attribute("linked.span.id")]
        assert root.get_attribute("linked.trace.id") == job.trace.info.trace_id
        assert task.get_attribute("linked.trace.id") == each.trace.info.trace_id
        assert task.get_attribute("linked.span.id") == root.span_id
        assert task.start_time_ns <= root.start_time_ns <= root.end_time_ns <= task.end_time_ns
        assert {call.parent_id for call in each.calls} == {root.span_id}
        assert each.trace.info.state == "OK"
        assert each.trace.info.tags["mlflow_ctx_autolog.job_trace"] == job.trace.info.trace_id
        if hasattr(root, "links"):
            assert [(link.trace_id, link.span_id) for link in root.links] == [
                (task.trace_id, task.span_id)
            ]
            assert [(link.trace_id, link.span_id) for link in task.links] == [
                (root.trace_id, root.span_id)
            ]


def test_a_report_sees_one_job(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """From the trace, from one that is linked to it, and from the experiment."""
    job, linked, _ = run(spark, extractor(endpoint.base_url, question=lambda n: f"{n // 2}"))

    for found in (
        ctx_autolog.report(job.trace.info.trace_id),
        ctx_autolog.report([linked[0].trace.info.trace_id, job.trace.info.trace_id]),
        ctx_autolog.report(experiment_id=experiment_id),
    ):
        assert found.trace_ids == [job.trace.info.trace_id]
        assert len(found.calls) == 120
        assert found.distinct == 60
        assert {cause.key: sums.calls for cause, sums in found.by_cause().items()} == {
            "duplicate_row": 60
        }
        assert all(each.call.attempt is not None for each in found.calls)
        assert {each.call.trace_id for each in found.calls} == {
            each.trace.info.trace_id for each in (job, *linked)
        }
        assert not [note for note in found.notes if "lacks" in note or "below" in note]


def test_errors_stay_in_the_drivers_trace(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """As far as there is room for them."""
    url = endpoint.base_url

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        from openai import NotFoundError, OpenAI

        client = OpenAI(base_url=url, api_key="not-a-key", max_retries=0)
        wrong = OpenAI(base_url=f"{url}/nowhere", api_key="not-a-key", max_retries=0)
        for batch in batches:
            for number in batch["id"]:
                if number == 119:
                    with pytest.raises(NotFoundError):
                        ask(wrong, number)
                else:
                    ask(client, number)
            yield batch.assign(answer="")

    job, linked, _ = run(spark, extract)
    failed = [call for call in job.calls if call.status.status_code.value == "ERROR"]
    assert len(failed) == 1
    assert linked


def test_spans_of_the_user_stay_with_their_calls(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """Also in threads; but a span around a whole partition does not bring all of it along."""
    url = endpoint.base_url

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        from concurrent.futures import ThreadPoolExecutor

        import mlflow
        from openai import OpenAI

        client = OpenAI(base_url=url, api_key="not-a-key", max_retries=0)

        @mlflow.trace(name="document")
        def of_document(number: int) -> str:
            return ask(client, number)

        with mlflow.start_span("partition"), ThreadPoolExecutor(4) as pool:
            numbers = [number for batch in batches for number in batch["id"]]
            answers = list(pool.map(of_document, numbers))
        yield pd.DataFrame({"id": numbers, "answer": answers})

    job, linked, _ = run(spark, extract, rows=600)
    # Of four spans around partitions, each has brought a hundred spans before it was divided.
    assert len(job.calls) < 4 * 60
    below = [span for each in (job, *linked) for span in each.spans]
    assert sum(span.name == "document" for span in below) == 600
    for each in (job, *linked):
        assert {each.path_to(call)[-2] for call in each.calls} == {"document"}
    paths = {tuple(each.path_to(call)[:-2]) for each in linked for call in each.calls}
    assert {len(path) for path in paths} <= {1, 2}
    assert all(path[0].startswith("extract [") for path in paths)
    assert {path[1:] for path in paths} <= {(), ("partition",)}
    assert () in {path[1:] for path in paths}


def test_calls_of_child_processes_are_placed_as_well(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """By the process that runs the task, with the user's spans around them."""
    url = endpoint.base_url

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        import multiprocessing

        def work(numbers: Any) -> None:
            import mlflow
            from openai import OpenAI

            client = OpenAI(base_url=url, api_key="not-a-key", max_retries=0)
            for number in numbers:
                with mlflow.start_span("document"):
                    ask(client, number)

        for batch in batches:
            child = multiprocessing.get_context("fork").Process(target=work, args=(batch["id"],))
            child.start()
            child.join()
            yield batch.assign(answer="")

    job, linked, _ = run(spark, extract)
    assert linked
    calls = 0
    for each in (job, *linked):
        calls += len(each.calls)
        assert {each.path_to(call)[-2] for call in each.calls} <= {"document"}
        assert all(each.path_to(call)[-3].startswith("extract [") for call in each.calls)
    assert calls == 120


def test_sampling_leaves_out_calls_and_counts_them(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """Tokens, cost and number of the calls are those of all that were made."""
    function = extractor(endpoint.base_url, model="gpt-4o-mini")
    job, linked, receipt = run(spark, function, sampling="10%")

    assert not linked
    assert 0 < len(job.calls) < 40
    left_out = 120 - len(job.calls)
    made = 1 + 4 + len(job.calls)
    assert receipt == f"{made} spans made, {made} stored, {left_out} left out by sampling"
    usage = job.calls[0].get_attribute("mlflow.chat.tokenUsage")
    assert job.total_tokens == 120 * usage["total_tokens"]
    assert sum(task.get_attribute("llm.calls") for task in job.tasks) == 120
    price = job.calls[0].get_attribute("mlflow.llm.cost")
    if price is not None:
        cost = sum(task.get_attribute("llm.cost.total") for task in job.tasks)
        assert cost == pytest.approx(120 * price["total_cost"])
        assert job.trace.info.cost["total_cost"] == pytest.approx(cost)
    (note,) = (
        note
        for note in ctx_autolog.report(job.trace.info.trace_id).notes
        if note.startswith("Sampling")
    )
    assert f"left {left_out} spans" in note
    assert f"counted 120 calls, {job.total_tokens:,} tokens" in note


def test_the_trace_of_an_action_stays_small(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """Where no span is active, too, what it has no room for goes to linked traces."""
    with ctx_autolog.enable(max_spans_per_trace=10):
        spark.range(0, 60, 1, 2).mapInPandas(extractor(endpoint.base_url), SCHEMA).collect()
        assert ctx_autolog.receipt(timeout=30).complete
    traces = stored_traces(experiment_id)
    (action,) = (each for each in traces if each.root.name == "extract: collect")
    further = [each for each in traces if each is not action]

    assert sum(len(each.calls) for each in traces) == 60
    # The limit, and as many as there are tasks that are the slowest so far.
    assert 10 <= len(action.calls) <= 14
    assert {each.root.get_attribute("linked.trace.id") for each in further} == {
        action.trace.info.trace_id
    }


def test_totals_can_be_added_up_without_the_driver(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str, server: TrackingServer
) -> None:
    """As recover does, from whichever of the traces it has had spans of."""
    job, linked, _ = run(spark, extractor(endpoint.base_url))
    destination = Destination(server.uri, experiment_id)
    info = mlflow.get_trace(job.trace.info.trace_id).info
    tokens = job.total_tokens
    for trace_id in (info.trace_id, linked[0].trace.info.trace_id):
        record_no_totals(info)
        send(destination, [trace_record(info)])
        assert stored_trace(info.trace_id).total_tokens == 0
        write_stored_totals(destination, trace_id)
        assert stored_trace(info.trace_id).total_tokens == tokens > 0
