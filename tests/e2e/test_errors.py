"""The errors of users' functions, which are to be read as without this library."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import mlflow
import pandas as pd
import pytest
from openai import OpenAI
from pyspark.sql import SparkSession
from pyspark.sql.functions import udf, udtf

import mlflow_ctx_autolog as ctx_autolog


def _in_partitions(spark: SparkSession, action: Callable[[], object]) -> None:
    def extract(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            action()
            yield batch

    spark.range(0, 2, 1, 1).mapInPandas(extract, "id long").collect()


def _in_rows(spark: SparkSession, action: Callable[[], object]) -> None:
    def extract(number: int) -> str:
        action()
        return "done"

    spark.range(0, 2, 1, 1).select(udf(extract, "string")("id")).collect()


def _in_rdd(spark: SparkSession, action: Callable[[], object]) -> None:
    def extract(row: Any) -> str:
        action()
        return "done"

    spark.range(0, 2, 1, 1).rdd.map(extract).collect()


def _in_table_function(spark: SparkSession, action: Callable[[], object]) -> None:
    class Extract:
        def eval(self, number: int) -> Iterator[tuple[int]]:
            action()
            yield (number,)

    spark.udtf.register("failing", udtf(Extract, returnType="number long"))
    spark.sql("SELECT * FROM failing(1)").collect()


WAYS = [_in_partitions, _in_rows, _in_rdd, _in_table_function]


def _message(error: BaseException) -> str:
    """Return an error's type and text, without addresses, numbers and lines of Spark's stages."""
    text = re.sub(r"0x[0-9a-f]+|(?<=line )\d+|\d+(?=\.\d)|(?<=stage )\S+|TID \d+", "N", str(error))
    return f"{type(error).__module__}.{type(error).__name__}: {text}"


def _error(way: Callable[..., None], spark: SparkSession, action: Callable[[], object]) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it is, it is the same
        way(spark, action)
    return _message(caught.value)


@pytest.mark.parametrize("way", WAYS)
def test_what_cannot_be_pickled_is_reported_by_spark(
    spark: SparkSession, experiment_id: str, way: Callable[..., None]
) -> None:
    """A lock, a client, the driver's span, the session: Spark's message is the one without us."""
    lock, client = threading.Lock(), OpenAI(base_url="http://127.0.0.1:9", api_key="not-a-key")
    with mlflow.start_span("job") as span:
        actions = {
            "lock": lambda: lock.locked(),
            "client": lambda: client.models.list(),
            "span": lambda: span.set_attribute("a", 1),
            "session": lambda: spark.range(1).count(),
        }
        untraced = {name: _error(way, spark, action) for name, action in actions.items()}
        ctx_autolog.enable()
        traced = {name: _error(way, spark, action) for name, action in actions.items()}

    assert traced == untraced
    assert "mlflow_ctx_autolog" not in str(traced)


@pytest.mark.parametrize("way", WAYS)
def test_the_traceback_of_a_worker_leads_to_the_users_line(
    spark: SparkSession, experiment_id: str, way: Callable[..., None]
) -> None:
    """What the function raises is reported with its own frames, and one of ours at most."""

    def action() -> None:
        raise KeyError("no such clause")

    ctx_autolog.enable()
    with mlflow.start_span("job"):
        text = _error(way, spark, action)

    assert "KeyError: 'no such clause'" in text
    assert "in action" in text
    # Spark repeats the text as the cause.
    reported = text[: text.index("KeyError: 'no such clause'")]
    assert len(re.findall(r"mlflow_ctx_autolog/\w+\.py", reported)) <= 1
