"""Nothing lost, and said when it is: receipts, totals, spools, and processes that are killed."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from pyspark.errors import PythonException
from pyspark.sql import SparkSession
from workload import SCHEMA, StoredTrace, extractor, stored_trace

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.cli import main
from mlflow_ctx_autolog.testing import OpenAIEndpoint, Request, TrackingServer, UnreliableProxy

MASTER = "local[2,3]"
IS_PRELOADED = True


def _tokens(trace: StoredTrace) -> int:
    usages = (call.attributes["mlflow.chat.tokenUsage"] for call in trace.calls)
    return sum(usage["total_tokens"] for usage in usages)


def test_a_receipt_says_what_the_store_has(
    spark: SparkSession,
    endpoint: OpenAIEndpoint,
    experiment_id: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Driver's span, 4 tasks and 20 calls are 25 spans; the end of the driver's span says so."""
    with (
        caplog.at_level(logging.INFO, logger="mlflow_ctx_autolog"),
        ctx_autolog.enable(strict=True),
    ):
        with mlflow.start_span("job") as span:
            frame = spark.range(0, 20, 1, 4).mapInPandas(extractor(endpoint.base_url), SCHEMA)
            frame.collect()
        mlflow.flush_trace_async_logging()
        assert f"Trace {span.trace_id}: 25 spans made, 25 stored" in caplog.messages
        receipt = ctx_autolog.receipt()
        frame.collect()
        again = ctx_autolog.receipt(span.trace_id)

    assert (receipt.trace_id, receipt.tasks, receipt.made) == (span.trace_id, 4, 25)
    assert receipt.complete
    assert (receipt.stored, receipt.waiting, receipt.lost, receipt.first_error) == (25, 0, 0, None)
    # An action after the span is a trace of its own.
    assert (again.tasks, again.made, again.stored) == (4, 25, 25)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("own_usage", [0, 5])
def test_totals_are_the_sum_of_all(
    spark: SparkSession,
    endpoint: OpenAIEndpoint,
    experiment_id: str,
    own_usage: int,
) -> None:
    """Whether the driver's span has usage of its own or not."""
    ctx_autolog.enable()
    with mlflow.start_span("job") as span:
        if own_usage:
            usage = {"input_tokens": 2, "output_tokens": 3, "total_tokens": own_usage}
            span.set_attribute("mlflow.chat.tokenUsage", usage)
        frame = spark.range(0, 12, 1, 3).mapInPandas(extractor(endpoint.base_url), SCHEMA)
        frame.collect()
    mlflow.flush_trace_async_logging()

    trace = stored_trace(span.trace_id)
    of_calls = sum(
        call.attributes["mlflow.chat.tokenUsage"]["total_tokens"] for call in trace.calls
    )
    assert of_calls == endpoint.total_tokens > 0
    assert trace.total_tokens == of_calls + own_usage
    assert ctx_autolog.receipt().complete


def test_calls_of_priced_models_add_up(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """What MLflow has found the calls to cost is the cost of the trace."""
    extract = extractor(endpoint.base_url, 0, "gpt-4o-mini", lambda number: f"{number} " * 99)
    ctx_autolog.enable()
    with mlflow.start_span("job") as span:
        spark.range(0, 6, 1, 2).mapInPandas(extract, SCHEMA).collect()

    trace = stored_trace(span.trace_id)
    costs = [call.attributes["mlflow.llm.cost"]["total_cost"] for call in trace.calls]
    assert len(costs) == 6
    assert trace.trace.info.cost["total_cost"] == pytest.approx(sum(costs))


def test_attempts_that_failed_count_as_well(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """Nothing comes home from an attempt that failed or was killed; the store has its calls."""
    url = endpoint.base_url

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        from pyspark import TaskContext

        task = TaskContext.get()
        yield from extractor(url)(batches)
        if task.partitionId() == 0 and task.attemptNumber() == 0:
            raise RuntimeError("the first attempt of the first partition fails")
        if task.partitionId() == 1 and task.attemptNumber() == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    ctx_autolog.enable()
    with mlflow.start_span("job") as span:
        rows = spark.range(0, 9, 1, 3).mapInPandas(extract, SCHEMA).collect()
        # A worker that starts a task delivers what the killed one has left, if nobody else did.
        for _ in range(3):
            spark.range(0, 2, 1, 2).mapInPandas(extractor(url), SCHEMA).collect()

    receipt = ctx_autolog.receipt(timeout=60)
    trace = stored_trace(span.trace_id)
    assert len(rows) == 9
    assert len(trace.calls) == len(endpoint.requests) == 9 + 6 + 6
    assert all(trace.is_nested(call) for call in trace.calls)
    assert trace.total_tokens == endpoint.total_tokens
    outcomes = sorted(task.attributes["spark.task.outcome"] for task in trace.tasks)
    assert outcomes == ["completed"] * 9 + ["failed", "running"]
    assert receipt.complete


def test_the_trace_is_visible_while_it_runs(
    spark: SparkSession, endpoint: OpenAIEndpoint, server: TrackingServer, experiment_id: str
) -> None:
    """Another process sees the driver's span, the tasks and the calls before the job is over."""
    ctx_autolog.enable()
    with mlflow.start_span("job") as span:
        spark.range(0, 4, 1, 2).mapInPandas(extractor(endpoint.base_url), SCHEMA).collect()
        script = f"""
            import mlflow
            mlflow.set_tracking_uri({server.uri!r})
            trace = mlflow.get_trace({span.trace_id!r})
            print(trace.info.state, len(trace.data.spans))
        """
        seen = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            capture_output=True,
            text=True,
            check=True,
        )
    assert seen.stdout.split() == ["IN_PROGRESS", "7"]
    assert stored_trace(span.trace_id).trace.info.state == "OK"


def test_a_server_that_is_gone_loses_nothing(
    spark: SparkSession,
    endpoint: OpenAIEndpoint,
    server: TrackingServer,
    experiment_id: str,
    spools: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The user's job runs as ever, one warning tells of the trace, and all arrives later."""
    with UnreliableProxy(server.uri) as proxy:
        mlflow.set_tracking_uri(proxy.uri)
        with caplog.at_level(logging.WARNING, logger="mlflow_ctx_autolog"):
            ctx_autolog.enable(flush_timeout=2)
            proxy.mode = "refuse"
            with mlflow.start_span("job") as span:
                frame = spark.range(0, 20, 1, 4).mapInPandas(extractor(endpoint.base_url), SCHEMA)
                assert len(frame.collect()) == 20
            mlflow.flush_trace_async_logging()
        told = [message for message in caplog.messages if span.trace_id in message]
        assert len(told) == 1
        assert "25 spans made" in told[0]
        assert "cannot be reached" in told[0]
        assert not ctx_autolog.receipt(timeout=1).complete
        assert [path.stat().st_mode & 0o777 for path in spools.iterdir()] == [0o600] * len(
            list(spools.iterdir())
        )
        proxy.mode = "pass"
        assert ctx_autolog.flush(60)
        receipt = ctx_autolog.receipt(timeout=30)
    mlflow.set_tracking_uri(server.uri)
    trace = stored_trace(span.trace_id)
    assert receipt.complete
    assert len(trace.calls) == len(endpoint.requests) == 20
    assert trace.total_tokens == endpoint.total_tokens
    assert trace.trace.info.state == "OK"
    ctx_autolog.disable()
    assert ctx_autolog.flush()


def test_strict_raises_what_is_a_warning_otherwise(
    spark: SparkSession, endpoint: OpenAIEndpoint, server: TrackingServer, experiment_id: str
) -> None:
    """Leaving enable() raises, with the receipt; the error of a job that failed goes first."""
    extract = extractor(endpoint.base_url)

    def run(function: Any) -> None:
        with ctx_autolog.enable(strict=True, flush_timeout=2):
            proxy.mode = "refuse"
            with mlflow.start_span("job"):
                spark.range(0, 4, 1, 2).mapInPandas(function, SCHEMA).collect()

    with UnreliableProxy(server.uri) as proxy:
        mlflow.set_tracking_uri(proxy.uri)
        with pytest.raises(ctx_autolog.IncompleteTraceError, match="7 spans made") as caught:
            run(extract)
        assert caught.value.receipt.made == 7
        proxy.mode = "pass"
        with pytest.raises(PythonException):
            run(lambda batches: 1 / 0)
        proxy.mode = "pass"
        mlflow.flush_trace_async_logging()
        assert ctx_autolog.flush(60)
    mlflow.set_tracking_uri(server.uri)


def test_a_large_prompt_does_not_break_anything(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """A prompt of 5 MB is a span like any other."""
    extract = extractor(
        endpoint.base_url,
        question=lambda number: f"{number} " * (2_500_000 if number == 1 else 1),
    )
    ctx_autolog.enable()
    with mlflow.start_span("job") as span:
        spark.range(0, 3, 1, 1).mapInPandas(extract, SCHEMA).collect()

    trace = stored_trace(span.trace_id)
    lengths = sorted(len(call.inputs["messages"][0]["content"]) for call in trace.calls)
    assert lengths == [2, 2, 5_000_000]


DRIVER = """
import os, sys, time
sys.path.insert(0, {support!r})
import mlflow, mlflow_ctx_autolog as ctx_autolog, workload
from pyspark import cloudpickle
from pyspark.sql import SparkSession

cloudpickle.register_pickle_by_value(workload)
spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
mlflow.set_tracking_uri({uri!r})
mlflow.set_experiment(experiment_id={experiment_id!r})
ctx_autolog.enable()
with mlflow.start_span("job") as span:
    frame = spark.range(0, 12, 1, 3).mapInPandas(workload.extractor({url!r}), workload.SCHEMA)
    {action}
"""


def _driver(
    server: TrackingServer, url: str, experiment_id: str, action: str, uri: str = ""
) -> str:
    import workload

    return DRIVER.format(
        support=str(Path(workload.__file__).parent),
        uri=uri or server.uri,
        experiment_id=experiment_id,
        url=url,
        action=action,
    )


@pytest.mark.parametrize(
    "action",
    ["frame.collect()", pytest.param("frame.collect(); spark.stop()", marks=pytest.mark.slow)],
)
def test_a_driver_may_end_right_after_the_action(
    endpoint: OpenAIEndpoint, server: TrackingServer, experiment_id: str, action: str
) -> None:
    """Also one that stops Spark inside its span."""
    script = _driver(server, endpoint.base_url, experiment_id, action)
    subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYSPARK_PYTHON": sys.executable},
        check=True,
        timeout=120,
    )
    (found,) = mlflow.search_traces(locations=[experiment_id], return_type="list")
    trace = stored_trace(found.info.trace_id)
    assert len(trace.calls) == len(endpoint.requests) == 12
    assert trace.total_tokens == endpoint.total_tokens
    assert trace.trace.info.state == "OK"


@pytest.mark.slow
def test_a_killed_driver_leaves_its_trace_to_recover(
    server: TrackingServer,
    experiment_id: str,
    spools: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With no store in reach and the driver killed, every finished call is on the disk."""

    over = threading.Event()

    def answer(request: Request) -> str:
        if len(endpoint.requests) == 11:
            # Two partitions of three have brought their spans home, and two calls of the last
            # have ended: Spark ends its workers while the third waits.
            os.killpg(driver.pid, signal.SIGKILL)
            over.wait(60)
        return "as it says"

    with OpenAIEndpoint(answer) as endpoint, UnreliableProxy(server.uri) as proxy:
        script = _driver(server, endpoint.base_url, experiment_id, "frame.collect()", proxy.uri)
        script = script.replace("local[2]", "local[1]").replace(
            "ctx_autolog.enable()", "ctx_autolog.enable(); print(flush=True); sys.stdin.readline()"
        )
        driver = subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, "PYSPARK_PYTHON": sys.executable},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert driver.stdout is not None
        driver.stdout.readline()
        proxy.mode = "refuse"
        driver.communicate(b"\n", timeout=120)
        _end_orphans(driver.pid)
        over.set()
        assert mlflow.search_traces(locations=[experiment_id], return_type="list") == []
        assert main(["recover", str(spools), "--tracking-uri", server.uri]) == 0

    (found,) = mlflow.search_traces(locations=[experiment_id], return_type="list")
    trace = stored_trace(found.info.trace_id)
    assert len(endpoint.requests) == 11
    # The last was in flight.
    assert len(trace.calls) == 10
    assert all(trace.is_nested(call) for call in trace.calls)
    assert trace.total_tokens == _tokens(trace)
    assert " stored, 0 left" in capsys.readouterr().out
    # What hosts keep of how many spans a trace has had is no spool.
    assert {path.suffix for path in spools.iterdir()} <= {".placement", ".placement-journal"}


def _end_orphans(group: int) -> None:
    """Wait until no process of a session is left."""
    while any(
        not state.startswith("Z")
        for state in subprocess.run(
            ["ps", "-o", "stat=", "-s", str(group)], capture_output=True, text=True, check=False
        ).stdout.split()
    ):
        time.sleep(0.1)
