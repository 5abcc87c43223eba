"""A hunt: a secret in each place where a user can put one, and a search wherever we write."""

from __future__ import annotations

import io
import logging
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from pyspark import cloudpickle
from pyspark.sql import SparkSession
from workload import SCHEMA

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.driver import handover
from mlflow_ctx_autolog.testing import EndpointError, OpenAIEndpoint, Request, TrackingServer

IS_PRELOADED = True
EVENTS = tempfile.mkdtemp()
CONF = {"spark.eventLog.enabled": "true", "spark.eventLog.dir": Path(EVENTS).as_uri()}

# What the driver knows: none of it may travel, but what is named.
VARIABLES = {
    "OPENAI_API_KEY": "planted-openai",
    "MLFLOW_TRACKING_TOKEN": "planted-token",
    "DATABRICKS_TOKEN": "planted-databricks",
    "OTEL_EXPORTER_OTLP_HEADERS": "authorization=planted-otlp",
    "CTX_TEST_TOKEN": "planted-forwarded",
}


def _refuse(request: Request) -> str:
    if "fail" in request.model:
        raise EndpointError(401, "Incorrect API key provided: sk-planted-key. token=planted-error")
    return "yes"


def _asker(url: str, spools: Path) -> Callable[[Iterable[pd.DataFrame]], Any]:
    """Return a function that plants secrets in its calls, and yields its spool and its log."""

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        import logging
        import multiprocessing
        from types import MappingProxyType

        import openai
        from openai import OpenAI

        client_module = openai._base_client
        httpx = getattr(client_module, "httpx", None) or client_module.httpx2

        log = io.StringIO()
        logging.getLogger("mlflow_ctx_autolog").addHandler(logging.StreamHandler(log))
        logging.getLogger("mlflow_ctx_autolog").setLevel(logging.DEBUG)

        def ask(model: str = "gpt-test", key: str = "sk-planted-key", **more: Any) -> None:
            client = OpenAI(
                base_url=url,
                api_key=key,
                max_retries=0,
                default_headers={"X-Gateway-Key": "planted-default"},
                default_query={"code": "planted-default-query"},
            )
            # Two of them fail.
            with suppress(Exception):
                client.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": "Yes?"}], **more
                )

        for batch in batches:
            ask(extra_headers={"X-Api-Key": "planted-headers"})
            ask(extra_headers=httpx.Headers({"Authorization": "Bearer planted-httpx"}))
            ask(extra_headers=MappingProxyType({"Cookie": "planted-cookie"}))
            ask(extra_query={"api_key": "planted-query", "sig": "planted-signature"})
            ask(extra_body={"token": "planted-body", "password": "planted-password"})
            ask("fail")
            ask(key="planted-newline\n")
            child = multiprocessing.get_context("fork").Process(target=ask)
            child.start()
            child.join()
            spooled = b"".join(path.read_bytes() for path in spools.iterdir() if path.is_file())
            found = spooled + log.getvalue().encode()
            yield batch.assign(answer=found.hex())

    return extract


def test_no_secret_is_found_anywhere(
    spark: SparkSession,
    server: TrackingServer,
    spools: Path,
    experiment_id: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not in what travels, is logged, spooled, stored, shown, or kept by Spark.

    But for what is named in `forward_env`, which travels in the broadcast, and is nowhere else.
    """
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    uri = f"http://bob:planted-uri@127.0.0.1:{server.port}"
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(experiment_id=experiment_id)
    printed = io.StringIO()
    with (
        OpenAIEndpoint(answer=_refuse) as endpoint,
        caplog.at_level(logging.DEBUG, logger="mlflow_ctx_autolog"),
        redirect_stdout(printed),
        redirect_stderr(printed),
        ctx_autolog.enable(send_interval=60, forward_env=["CTX_TEST_TOKEN"], max_calls=100),
    ):
        with mlflow.start_span("job") as span:
            carrier = ctx_autolog.capture().to_json()
            closure = cloudpickle.dumps(
                handover.driver.submitted(list, spark, name="list", required=True, repeated=False)
            )
            frame = spark.range(0, 1, 1, 1).mapInPandas(_asker(endpoint.base_url, spools), SCHEMA)
            rows = frame.collect()
        mlflow.flush_trace_async_logging()
        receipt = ctx_autolog.receipt(timeout=30)
        report = ctx_autolog.report(span.trace_id)
        page = report.to_html(tmp_path / "report.html").read_text(encoding="utf-8")
        diagnosis = ctx_autolog.doctor(spark)
    assert len(endpoint.requests) == 7
    assert receipt.complete, receipt
    assert carrier.count("planted") == carrier.count("planted-forwarded") == 1

    with sqlite3.connect(server.directory / "mlflow.db") as connection:
        stored = "\n".join(connection.iterdump())
    assert span.trace_id in stored
    events = [path for path in Path(EVENTS).rglob("*") if path.is_file()]
    assert events
    held = {
        "closure": closure.decode(errors="replace"),
        "spool and log of the worker": bytes.fromhex(rows[0].answer).decode(errors="replace"),
        "log": caplog.text,
        "store": stored,
        "report": f"{report}{report._repr_html_()}{page}",
        "receipt": f"{receipt}{receipt.first_error}",
        "doctor": f"{diagnosis}{diagnosis._repr_html_()}",
        "printed": printed.getvalue(),
        "settings": repr(ctx_autolog.enable()),
        "Spark's event log": "".join(path.read_text(errors="replace") for path in events),
        "what is left on the disk": "".join(
            path.read_text(errors="replace") for path in spools.iterdir() if path.is_file()
        ),
    }
    ctx_autolog.disable()
    leaks = {
        place: sorted({text[max(0, at - 30) : at + 24] for at in _places(text)})
        for place, text in held.items()
        if "planted" in text
    }
    assert leaks == {}


def _places(text: str) -> Iterator[int]:
    at = text.find("planted")
    while at >= 0:
        yield at
        at = text.find("planted", at + 1)
