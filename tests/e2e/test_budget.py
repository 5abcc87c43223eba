"""Jobs that may not spend more than they are allowed, on real workers."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import mlflow
import pandas as pd
import pytest
from pyspark import cloudpickle
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession
from workload import SCHEMA, ask, extractor, stored_trace

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint, Status, TrackingServer, UnreliableProxy

cloudpickle.register_pickle_by_value(sys.modules[__name__])

MASTER = "local[2,2]"
IS_PRELOADED = True
PRICES = {"gpt-test": (1_000_000.0, 0.0)}


def collect(spark: SparkSession, function: Callable[..., Any], rows: int = 8) -> list[Any]:
    return spark.range(0, rows, 1, 4).mapInPandas(function, SCHEMA).collect()


def test_a_job_stops_before_the_next_call(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """Whatever Spark tries again: the message is at the driver, and the endpoint is not asked."""
    with ctx_autolog.enable(max_calls=5), mlflow.start_span("job") as span:
        with pytest.raises(PySparkException) as caught:
            collect(spark, extractor(endpoint.base_url))
        assert len(endpoint.requests) == 5
        with pytest.raises(PySparkException, match="max_calls=5 is reached"):
            collect(spark, extractor(endpoint.base_url))

    assert len(endpoint.requests) == 5
    assert "BudgetExceeded: A call of 'gpt-test' was not made: max_calls=5" in str(caught.value)
    assert re.search(r"gpt-test: 5 calls \(\d repeated\), \d+ tokens", str(caught.value))
    ctx_autolog.flush(30)
    report = ctx_autolog.report(span.trace_id)
    assert report.to_dict()["calls"] == 5
    calls = stored_trace(span.trace_id).calls
    refused = [call for call in calls if call.status.status_code.value == "ERROR"]
    assert len(refused) >= 2


def test_a_budget_counts_on_when_another_setting_changes(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """By a second enable(), and in a block: neither takes it back, nor begins anew."""
    with ctx_autolog.enable(max_calls=10), mlflow.start_span("job"):
        collect(spark, extractor(endpoint.base_url), rows=6)
        ctx_autolog.enable(sampling="errors+slow+5%")
        collect(spark, extractor(endpoint.base_url), rows=2)
        with (
            ctx_autolog.enable(strict=False),
            pytest.raises(PySparkException, match="max_calls=10 is reached"),
        ):
            collect(spark, extractor(endpoint.base_url))
        assert len(endpoint.requests) == 10
        ctx_autolog.enable(max_calls=12)
        collect(spark, extractor(endpoint.base_url), rows=2)
        with pytest.raises(PySparkException, match="max_calls=12 is reached"):
            collect(spark, extractor(endpoint.base_url), rows=1)
    assert len(endpoint.requests) == 12


def test_a_function_may_make_do_without(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """It is an error like any other; sync and async clients, in threads and streams."""
    url = endpoint.base_url

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        from openai import AsyncOpenAI, OpenAI

        client = OpenAI(base_url=url, api_key="not-a-key")

        async def ask_async(number: int) -> None:
            async with AsyncOpenAI(base_url=url, api_key="not-a-key") as client:
                messages: Any = [{"role": "user", "content": f"and {number}?"}]
                await client.chat.completions.create(model="gpt-test", messages=messages)

        def ask_stream(number: int) -> None:
            messages: Any = [{"role": "user", "content": f"stream {number}"}]
            stream = client.chat.completions.create(
                model="gpt-test", messages=messages, stream=True
            )
            assert list(stream)

        def attempt(call: Callable[[int], Any], number: int) -> str:
            try:
                call(number)
            except ctx_autolog.BudgetExceeded:
                return "too much"
            return "asked"

        for batch in batches:
            answers = [
                ",".join(
                    (
                        attempt(lambda number: ask(client, number), number),
                        attempt(lambda number: asyncio.run(ask_async(number)), number),
                        attempt(ask_stream, number),
                    )
                )
                for number in batch["id"]
            ]
            yield batch.assign(answer=answers)

    with ctx_autolog.enable(max_calls=10), mlflow.start_span("job"):
        rows = collect(spark, extract)

    answers = [answer for row in rows for answer in row.answer.split(",")]
    assert len(endpoint.requests) == answers.count("asked") == 10
    assert answers.count("too much") == 14


def test_repeats_and_money(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """Each has a limit of its own, for each trace anew."""
    with ctx_autolog.enable(max_repeats=2):
        with mlflow.start_span("job"):
            collect(spark, extractor(endpoint.base_url), rows=4)
            with pytest.raises(PySparkException, match="max_repeats=2 is reached"):
                collect(spark, extractor(endpoint.base_url), rows=4)
        assert len(endpoint.requests) == 4 + 2
        with mlflow.start_span("another job"):
            collect(spark, extractor(endpoint.base_url), rows=4)
    before = len(endpoint.requests)
    with (
        ctx_autolog.enable(max_cost=20, prices=PRICES),
        mlflow.start_span("dear job"),
        # A dollar for each word of a prompt, of which there are four.
        pytest.raises(PySparkException, match=r"max_cost=20 is reached"),
    ):
        collect(spark, extractor(endpoint.base_url), rows=40)
    # Two at once may both have been under way when the money ran out.
    assert len(endpoint.requests) - before in (5, 6)


def test_what_the_client_sends_again_counts(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """Each may have been paid for, and the last is not sent."""
    with UnreliableProxy(endpoint.base_url.removesuffix("/v1")) as proxy:
        proxy.mode = Status(500)
        url = f"{proxy.uri}/v1"

        def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
            from openai import OpenAI

            client = OpenAI(base_url=url, api_key="not-a-key", max_retries=5)
            for batch in batches:
                try:
                    ask(client, 0)
                except ctx_autolog.BudgetExceeded:
                    yield batch.assign(answer="too much")

        with ctx_autolog.enable(max_calls=3), mlflow.start_span("job"):
            rows = spark.range(0, 1, 1, 1).mapInPandas(extract, SCHEMA).collect()
        assert [row.answer for row in rows] == ["too much"]
        assert len(proxy.requests) == 3


def test_progress_is_shown_in_a_terminal(
    spark: SparkSession,
    endpoint: OpenAIEndpoint,
    server: TrackingServer,
    experiment_id: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Calls, tokens, errors and repeats of the tasks that have ended; elsewhere nothing."""
    with ctx_autolog.enable(progress=True), mlflow.start_span("job"):
        collect(spark, extractor(endpoint.base_url))
    assert "model calls" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with ctx_autolog.enable(progress=True), mlflow.start_span("job"):
        collect(spark, extractor(endpoint.base_url))
        collect(spark, extractor(endpoint.base_url))

    lines = re.split(r"[\r\n]+", capsys.readouterr().err.strip())
    tokens = endpoint.total_tokens * 2 // 3
    last = [line for line in lines if "model calls" in line][-1]
    assert last.endswith(f"model calls: 16 calls, {tokens:,} tokens, 0 errors, 8 repeats")
    # And what the job has come to, once its span has ended: two actions of four tasks.
    assert f"job: 16 calls, {tokens:,} tokens, 25 spans stored" in lines[-1]
