"""Actions that stop reading their tasks before these have ended: no call is lost for it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from pyspark import cloudpickle
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.functions import pandas_udf, udf
from workload import stored_trace

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint, TrackingServer

cloudpickle.register_pickle_by_value(sys.modules[__name__])

IS_PRELOADED = True

Rows = Callable[[DataFrame], Any]

ACTIONS: dict[str, Rows] = {
    "show": lambda frame: frame.show(2),
    "limit": lambda frame: frame.limit(2).collect(),
    "take": lambda frame: frame.take(2),
    "first": lambda frame: frame.first(),
    "head": lambda frame: frame.head(1),
    "isEmpty": lambda frame: frame.isEmpty(),
    "toPandas": lambda frame: frame.limit(2).toPandas(),
}
STORES = ("server", "database", "files", "driver", "apart", "away")
APIS = ("udf", "pandas_udf", "mapInPandas", "rdd")


def asker(url: str) -> Callable[[str], str]:
    """Return a function that asks the model."""

    def ask(text: str) -> str:
        from openai import OpenAI

        client = OpenAI(base_url=url, api_key="not-a-key", max_retries=0)
        message = {"role": "user", "content": text}
        answer = client.chat.completions.create(model="gpt-4o-mini", messages=[message])  # type: ignore[list-item]
        return str(answer.choices[0].message.content)

    return ask


def asked(frame: DataFrame, api: str, ask: Callable[[str], str]) -> DataFrame:
    """Return the answers to the texts of a frame, by one of Spark's ways to run Python."""

    def ask_all(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            yield pd.DataFrame({"answer": batch["text"].map(ask)})

    @pandas_udf("string")
    def ask_each(texts: pd.Series) -> pd.Series:
        return texts.map(ask)

    if api == "mapInPandas":
        return frame.mapInPandas(ask_all, "answer string")
    if api == "rdd":
        return frame.rdd.map(lambda row: (ask(row.text),)).toDF("answer string")
    ask_one = ask_each if api == "pandas_udf" else udf(ask, "string", useArrow=False)
    return frame.select(ask_one("text").alias("answer"))


@pytest.fixture
def store(
    server: TrackingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any
) -> Iterator[dict[str, Any]]:
    """A store, and the settings by which spans get there; one that is away until it is back."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    settings: dict[str, Any] = {}
    uri = server.uri
    if request.param == "database":
        uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    elif request.param == "files":
        uri = (tmp_path / "files").as_uri()
    elif request.param in ("driver", "apart"):
        settings["transport"] = "driver"
    if request.param == "apart":
        # As on a cluster, where workers have a disk of their own.
        monkeypatch.setattr("mlflow_ctx_autolog.driver.homecoming.announce_driver", lambda *_: None)
        monkeypatch.setattr("mlflow_ctx_autolog.driver.homecoming.collect", lambda *_: Nothing())
    if request.param != "away":
        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment("early stops")
        yield {"settings": settings, "leave": lambda: None, "is_apart": request.param == "apart"}
        return
    with TrackingServer(tmp_path) as other:
        mlflow.set_tracking_uri(other.uri)
        mlflow.set_experiment("early stops")

        def leave() -> Callable[[], None]:
            other.kill()
            return other.start

        yield {"settings": {"flush_timeout": 3}, "leave": leave, "is_apart": False}


class Nothing:
    """What is collected from a directory that the driver does not see."""

    records = held = 0


CASES = [
    pytest.param(
        store,
        api,
        action,
        id=f"{store}-{api}-{action}",
        # The others vary one of the three.
        marks=[] if (api, action) == ("udf", "show") else [pytest.mark.slow],
    )
    for store in STORES
    for api in APIS
    for action in ACTIONS
]


@pytest.mark.parametrize(("store", "api", "action"), CASES, indirect=["store"])
def test_no_call_is_lost(
    spark: SparkSession,
    endpoint: OpenAIEndpoint,
    store: dict[str, Any],
    api: str,
    action: str,
) -> None:
    """Each that was made is stored below the driver's span, and tokens add up."""
    ask = asker(endpoint.base_url)
    frame = spark.range(0, 20, 1, 2).selectExpr("concat('text ', id) as text")
    with ctx_autolog.enable(**store["settings"]):
        with mlflow.start_span("job") as span:
            back = store["leave"]()
            ACTIONS[action](asked(frame, api, ask))
            if back is not None:
                back()
        made = len(endpoint.requests)
        deadline = time.monotonic() + 60
        while not is_complete(span.trace_id, made) and time.monotonic() < deadline:
            if store["is_apart"]:
                # Which its host's next tasks bring along.
                with mlflow.start_span("later"):
                    asked(frame, "udf", lambda text: text).collect()
            time.sleep(0.2)
    trace = stored_trace(span.trace_id)
    assert made > 0
    assert len(trace.calls) == made
    assert all(trace.is_nested(call) for call in trace.calls)
    ctx_autolog.receipt(span.trace_id)
    assert stored_trace(span.trace_id).total_tokens == endpoint.total_tokens


def is_complete(trace_id: str, calls: int) -> bool:
    ctx_autolog.flush(1)
    return len(stored_trace(trace_id).calls) >= calls
