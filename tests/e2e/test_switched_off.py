"""MLflow's OpenAI autolog switched off at the driver: calls of workers leave no spans either."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import mlflow
import mlflow.openai
import pytest
from mlflow.utils.autologging_utils import AUTOLOGGING_INTEGRATIONS
from pyspark import cloudpickle
from pyspark.sql import SparkSession
from workload import SCHEMA, extractor, stored_trace

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint

IS_PRELOADED = True
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(autouse=True)
def _autolog_as_before() -> Iterator[None]:
    before = AUTOLOGGING_INTEGRATIONS.get("openai")
    yield
    ctx_autolog.disable()
    AUTOLOGGING_INTEGRATIONS["openai"] = before or {}


def before_enable() -> None:
    mlflow.openai.autolog(log_traces=False)
    ctx_autolog.enable()


def after_enable() -> None:
    ctx_autolog.enable()
    mlflow.openai.autolog(disable=True)


def without_traces_after_enable() -> None:
    ctx_autolog.enable()
    mlflow.openai.autolog(log_traces=False)


@pytest.mark.usefixtures("experiment_id")
@pytest.mark.parametrize(
    "switch_off",
    [before_enable, after_enable, without_traces_after_enable],
    ids=lambda f: f.__name__,
)
def test_workers_heed_it(
    spark: SparkSession,
    endpoint: OpenAIEndpoint,
    caplog: pytest.LogCaptureFixture,
    switch_off: Callable[[], None],
) -> None:
    """From then on, also for a function that ran before; and on again, they are traced again."""
    frame = spark.range(0, 2, 1, 1)
    function = extractor(endpoint.base_url)
    with ctx_autolog.enable(), mlflow.start_span("before"):
        frame.mapInPandas(function, SCHEMA).collect()
    switch_off()
    with mlflow.start_span("job") as span:
        frame.mapInPandas(function, SCHEMA).collect()
    mlflow.openai.autolog()
    with mlflow.start_span("again") as again:
        frame.mapInPandas(function, SCHEMA).collect()
    assert ctx_autolog.flush(60)

    trace = stored_trace(span.trace_id)
    assert trace.calls == []
    assert [task.attributes["llm.calls"] for task in trace.tasks] == [2]
    assert len(stored_trace(again.trace_id).calls) == 2
    assert len(endpoint.requests) == 6
    assert "left no span" not in caplog.text


def adding(remote: list[str]) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """Return a function that adds traces of somewhere else below spans of its own."""

    def add(rows: Iterable[Any]) -> Iterator[Any]:
        import mlflow
        from mlflow.tracing.trace_manager import InMemoryTraceManager

        for row in rows:
            with mlflow.start_span("mine"):
                mlflow.add_trace(json.loads(remote[row]))
            left = list(InMemoryTraceManager.get_instance()._traces.values())
            yield row, sum(len(each.span_dict) for each in left)

    return add


def test_a_trace_that_a_task_adds(spark: SparkSession, experiment_id: str) -> None:
    """Its spans are stored, nested and counted, and the task's is all that is left in memory."""
    ids = []
    for _ in range(3):
        with mlflow.start_span("remote") as span, mlflow.start_span("step"):
            mlflow.update_current_trace(tags={"service": "search"}, metadata={"build": "7"})
        ids.append(span.trace_id)
    mlflow.flush_trace_async_logging()
    remote = [stored_trace(trace_id).trace.to_json() for trace_id in ids]
    rows = spark.sparkContext.parallelize(range(3), 1)
    with ctx_autolog.enable(), mlflow.start_span("job") as job:
        left = rows.mapPartitions(adding(remote)).collect()
    receipt = ctx_autolog.receipt(job.trace_id)
    trace = stored_trace(job.trace_id)
    assert left == [(0, 1), (1, 1), (2, 1)]
    assert sorted("/".join(trace.path_to(each)[2:]) for each in trace.spans if each.parent_id) == [
        "",
        *["mine"] * 3,
        *["mine/remote"] * 3,
        *["mine/remote/step"] * 3,
    ]
    assert receipt.complete
    assert receipt.made == receipt.stored == 11
    # As MLflow merges them where it is not in another process.
    assert trace.trace.info.tags["service"] == "search"
    assert trace.trace.info.trace_metadata["build"] == "7"
    assert "mlflow.traceInputs" not in trace.tasks[0].attributes["mlflow_ctx_autolog.trace_update"]
