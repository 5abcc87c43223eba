"""Spans that workers cannot store themselves come home with the task."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import mlflow
import pytest
from pyspark.sql import SparkSession
from workload import SCHEMA, StoredTrace, extractor, stored_trace

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint, Request, TrackingServer

IS_PRELOADED = True


def _assert_complete(trace: StoredTrace, endpoint: OpenAIEndpoint) -> None:
    assert len(trace.calls) == len(endpoint.requests)
    assert all(trace.is_nested(call) for call in trace.calls)
    assert trace.total_tokens == endpoint.total_tokens > 0


def test_a_file_store_gets_the_whole_trace(
    spark: SparkSession,
    endpoint: OpenAIEndpoint,
    experiment_id: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With MLflow's file store, which takes no spans of other processes, nothing is missing."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(tmp_path.as_uri())
    mlflow.set_experiment("files")
    with ctx_autolog.enable(), mlflow.start_span("job") as span:
        spark.range(0, 12, 1, 3).mapInPandas(extractor(endpoint.base_url), SCHEMA).collect()
        spark.range(0, 4, 1, 2).foreachPartition(lambda rows: None)

    _assert_complete(stored_trace(span.trace_id), endpoint)
    assert len(stored_trace(span.trace_id).tasks) == 5


def test_a_server_that_takes_no_spans_gets_the_whole_trace(
    spark: SparkSession,
    endpoint: OpenAIEndpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A server on a folder of files has no OTLP endpoint: the spans come home, none is missing."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    files = (tmp_path / "files").as_uri()
    with TrackingServer(tmp_path / "server", backend_store_uri=files) as server:
        mlflow.set_tracking_uri(server.uri)
        mlflow.set_experiment("files")
        with ctx_autolog.enable(), mlflow.start_span("job") as span, mlflow.start_span("step"):
            spark.range(0, 12, 1, 3).mapInPandas(extractor(endpoint.base_url), SCHEMA).collect()
        trace = stored_trace(span.trace_id)
        assert ctx_autolog.receipt().complete

    assert len(trace.calls) == len(endpoint.requests) == 12
    assert {task.parent_id for task in trace.tasks} == {trace.children_of(trace.root)[0].span_id}
    assert trace.total_tokens == endpoint.total_tokens > 0
    assert trace.trace.info.state == "OK"
    assert "is not complete" not in caplog.text


def test_workers_need_no_path_to_the_store(
    spark: SparkSession, endpoint: OpenAIEndpoint, tmp_path: Path
) -> None:
    """With transport="driver", they are not told where it is, and the driver stores their spans."""
    with TrackingServer(tmp_path) as server:
        mlflow.set_tracking_uri(server.uri)
        mlflow.set_experiment("by-the-driver")
        with ctx_autolog.enable(transport="driver"), mlflow.start_span("job") as span:
            assert ctx_autolog.capture().tracking_uri is None
            spark.range(0, 12, 1, 3).mapInPandas(extractor(endpoint.base_url), SCHEMA).collect()
        assert ctx_autolog.flush(60)
        _assert_complete(stored_trace(span.trace_id), endpoint)


def test_what_workers_could_not_store_the_driver_stores(
    spark: SparkSession,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A server that dies during the job and returns has every span, and the driver is told."""
    with TrackingServer(tmp_path) as server:
        third_call = threading.Event()

        def answer(request: Request) -> str:
            if len(endpoint.requests) == 3:
                server.kill()
                third_call.set()
            return "as it says"

        with OpenAIEndpoint(answer) as endpoint:
            mlflow.set_tracking_uri(server.uri)
            mlflow.set_experiment("outage")
            with (
                caplog.at_level(logging.WARNING, logger="mlflow_ctx_autolog"),
                ctx_autolog.enable(flush_timeout=2),
                mlflow.start_span("job") as span,
            ):
                extract = extractor(endpoint.base_url)
                rows = spark.range(0, 12, 1, 2).mapInPandas(extract, SCHEMA).collect()
            server.start()
            assert third_call.is_set()
            assert len(rows) == 12
            assert ctx_autolog.flush(timeout=100)
            trace = stored_trace(span.trace_id)
            assert len(trace.calls) == len(endpoint.requests) == 12
            assert all(trace.is_nested(call) for call in trace.calls)
    warned = [
        record.getMessage() for record in caplog.records if "came home" in record.getMessage()
    ]
    assert len(warned) == 1
    assert server.uri in warned[0]
