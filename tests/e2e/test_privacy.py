"""What leaves a worker: content as the settings say, and no log-ins."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from pyspark import cloudpickle
from pyspark.sql import SparkSession
from workload import SCHEMA, extractor, stored_trace

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.driver import handover as driver
from mlflow_ctx_autolog.testing import EndpointError, OpenAIEndpoint, Request, TrackingServer

IS_PRELOADED = True

SECRET = "Alice-of-Turku"


def _talkative(url: str, spools: Path) -> Callable[[Iterable[pd.DataFrame]], Any]:
    """Return a function that holds the secret in calls, spans of its own, and errors.

    It yields the raw bytes of this process's spool file, as they are after each batch.
    """

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        from openai import APIStatusError, OpenAI

        client = OpenAI(base_url=url, api_key="not-a-key", max_retries=0)
        message = {"role": "user", "content": "Where is Alice-of-Turku?"}
        for batch in batches:
            for number in batch["id"]:
                with mlflow.start_span("own") as own:
                    own.set_inputs({"number": int(number), "who": "Alice-of-Turku"})
                    own.set_attribute("note", "Alice-of-Turku")
                    question: Any = {"model": "gpt-test", "messages": [message]}
                    try:
                        client.chat.completions.create(**question)
                        list(client.chat.completions.create(**question, stream=True))
                    except APIStatusError as error:
                        own.record_exception(error)
            raw = b"".join(path.read_bytes() for path in spools.iterdir())
            yield batch.assign(answer=raw.hex())

    return extract


def _answer(request: Request) -> str:
    if "fail" in request.model:
        raise EndpointError(400, f"What of {request.prompt}?")
    return f"As for {request.prompt}: at home."


def _everything_in(server: TrackingServer) -> str:
    """Return the server's whole database as one text."""
    with sqlite3.connect(server.directory / "mlflow.db") as connection:
        return "\n".join(connection.iterdump())


def test_content_is_withheld_before_it_leaves_the_worker(
    spark: SparkSession, server: TrackingServer, experiment_id: str, spools: Path
) -> None:
    """Neither the spool on the worker's disk nor the store ever sees a text; tokens are right."""
    with OpenAIEndpoint(_answer) as endpoint:
        with (
            ctx_autolog.enable(capture_content=False, send_interval=60),
            mlflow.start_span("job") as span,
        ):
            span.set_inputs({"who": SECRET})
            extract = _talkative(endpoint.base_url, spools)
            rows = spark.range(0, 6, 1, 2).mapInPandas(extract, SCHEMA).collect()
        trace = stored_trace(span.trace_id)
        everything = _everything_in(server)
        raw = b"".join(bytes.fromhex(row.answer) for row in rows)

    assert b"gpt-test" in raw
    assert SECRET.encode() not in raw
    assert "gpt-test" in everything
    assert SECRET not in everything
    assert len(trace.calls) == len(endpoint.requests) == 12
    assert trace.total_tokens > 0
    # Numbers are none.
    assert {task.inputs["rows"] for task in trace.tasks} == {3}
    assert trace.trace.info.request_preview == "extract on 6 rows; 2 tasks; gpt-test"
    assert str(trace.trace.info.response_preview).startswith("12 calls, 0 errors, ")
    assert {call.attributes["mlflow.llm.model"] for call in trace.calls} == {"gpt-test"}
    ctx_autolog.disable()


def test_functions_of_the_driver_redact_on_the_worker(
    spark: SparkSession, experiment_id: str, spools: Path
) -> None:
    """Both ``redact`` and MLflow's own span processors travel, and a failing one withholds."""

    def redact(value: Any) -> Any:
        return re.sub("Alice-of-Turku", "[name]", repr(value))

    def processor(span: Any) -> None:
        span.set_attribute("seen.by", "processor")
        if span.inputs and span.inputs.get("number") == 1:
            raise ValueError("not this one")

    with OpenAIEndpoint(_answer) as endpoint:
        with (
            mlflow.tracing.configure(span_processors=[processor]),
            ctx_autolog.enable(redact=redact),
            mlflow.start_span("job") as span,
        ):
            extract = _talkative(endpoint.base_url, spools)
            rows = spark.range(0, 2, 1, 1).mapInPandas(extract, SCHEMA).collect()
        mlflow.tracing.configure(span_processors=[])
    trace = stored_trace(span.trace_id)

    assert not any(SECRET.encode() in bytes.fromhex(row.answer) for row in rows)
    assert not any(SECRET in repr(span.to_dict()) for span in trace.spans)
    assert all("[name]" in repr(call.inputs) for call in trace.calls)
    own = {span.inputs is None for span in trace.spans if span.name == "own"}
    assert own == {True, False}
    seen = [span for span in trace.spans if span.attributes.get("seen.by")]
    assert len(seen) >= len(trace.calls)


def test_what_cannot_redact_on_a_worker_withholds(
    spark: SparkSession,
    endpoint: OpenAIEndpoint,
    experiment_id: str,
    spools: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a worker lacks the module of a redact function, the job runs, and no content leaves."""
    (tmp_path / "only_here.py").write_text("def redact(value):\n    return value\n")
    monkeypatch.syspath_prepend(tmp_path)
    redact = __import__("only_here").redact
    with ctx_autolog.enable(redact=redact), mlflow.start_span("job") as span:
        frame = spark.range(0, 2, 1, 1).mapInPandas(extractor(endpoint.base_url), SCHEMA)
        assert len(frame.collect()) == 2
    trace = stored_trace(span.trace_id)

    assert [call.inputs for call in trace.calls] == [None, None]
    assert trace.total_tokens == endpoint.total_tokens
    assert not any("What of document" in repr(span.to_dict()) for span in trace.spans)


def test_a_function_that_cannot_travel_is_refused(spark: SparkSession, experiment_id: str) -> None:
    """On the driver, at once, rather than on each worker."""
    import threading

    lock = threading.Lock()
    with pytest.raises(ValueError, match="cannot be pickled"):
        ctx_autolog.enable(redact=lambda value: lock and value)


LOG_INS = {
    "MLFLOW_TRACKING_TOKEN": "planted-1",
    "MLFLOW_TRACKING_USERNAME": "planted-2",
    "MLFLOW_TRACKING_PASSWORD": "planted-3",
    "OPENAI_API_KEY": "planted-4",
    "DATABRICKS_TOKEN": "planted-5",
    "DATABRICKS_CLIENT_SECRET": "planted-6",
    "AWS_SECRET_ACCESS_KEY": "planted-7",
    "AZURE_OPENAI_API_KEY": "planted-8",
    "OTEL_EXPORTER_OTLP_HEADERS": "authorization=planted-9",
}


def test_no_log_in_travels_or_is_written(
    spark: SparkSession,
    server: TrackingServer,
    endpoint: OpenAIEndpoint,
    experiment_id: str,
    spools: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither carrier, closure, spool, spans nor logs hold any, nor does a worker's environment."""
    for name, value in LOG_INS.items():
        monkeypatch.setenv(name, value)
    url = endpoint.base_url

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        from openai import OpenAI

        client = OpenAI(base_url=url, api_key="planted-10", max_retries=0)
        for batch in batches:
            for _ in batch["id"]:
                client.chat.completions.create(
                    model="m",
                    messages=[{"role": "user", "content": "?"}],
                    extra_headers={"X-Gateway-Key": "planted-11"},
                )
            found = b"".join(path.read_bytes() for path in spools.iterdir())
            token = os.environ.get("MLFLOW_TRACKING_TOKEN", "none").encode()
            yield batch.assign(answer=(token + b" " + found).hex())

    with (
        caplog.at_level(logging.DEBUG, logger="mlflow_ctx_autolog"),
        ctx_autolog.enable(send_interval=60),
        mlflow.start_span("job") as span,
    ):
        context = ctx_autolog.capture()
        closure = cloudpickle.dumps(
            driver.driver.submitted(
                lambda rows: rows, spark, name="rows", required=True, repeated=False
            )
        )
        rows = spark.range(0, 2, 1, 1).mapInPandas(extract, SCHEMA).collect()
    trace = stored_trace(span.trace_id)
    on_worker = b"".join(bytes.fromhex(row.answer) for row in rows)

    assert len(trace.calls) == 2
    for held in (
        context.to_json(),
        repr(context),
        closure.decode(errors="replace"),
        caplog.text,
        repr([span.to_dict() for span in trace.spans]),
    ):
        assert "planted" not in held
    # The worker's environment is the one it was started with.
    assert on_worker.startswith(b"none ")
    assert b"planted" not in on_worker


def test_named_variables_travel(
    spark: SparkSession,
    endpoint: OpenAIEndpoint,
    experiment_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tasks have the variables that ``forward_env`` names, and workers are left without them."""
    monkeypatch.setenv("CTX_TEST_TOKEN", "s3cret")
    monkeypatch.setenv("CTX_TEST_OTHER", "unnamed")

    def look(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        found = f"{os.environ.get('CTX_TEST_TOKEN')} {os.environ.get('CTX_TEST_OTHER')}"
        for batch in batches:
            yield batch.assign(answer=found)

    frame = spark.range(0, 1, 1, 1)
    forwarded = ["CTX_TEST_TOKEN", "CTX_TEST_UNSET"]
    with ctx_autolog.enable(forward_env=forwarded), mlflow.start_span("job"):
        context = ctx_autolog.capture()
        during = frame.mapInPandas(look, SCHEMA).first()
    after = frame.mapInPandas(look, SCHEMA).first()

    assert during is not None
    assert after is not None
    assert (during.answer, after.answer) == ("s3cret None", "None None")
    assert "s3cret" not in repr(context)
