"""The ways to hand a function to Spark, each as a job that makes one call for each of six rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
from pyspark.sql import DataFrame, functions
from workload import ask

ROWS = 6
Job = Callable[[DataFrame, Callable[[int], str]], list[Any]]


def asker(url: str) -> Callable[[int], str]:
    """Return a function that makes one call, with one client for each process."""
    clients: list[Any] = []

    def call(number: int) -> str:
        from openai import OpenAI

        if not clients:
            clients.append(OpenAI(base_url=url, api_key="not-a-key", max_retries=0))
        return ask(clients[0], int(number))

    return call


def map_in_arrow(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(batches: Iterator[Any]) -> Iterator[Any]:
        import pyarrow

        for batch in batches:
            numbers = batch.column("id").to_pylist()
            answers = [call(number) for number in numbers]
            yield pyarrow.RecordBatch.from_pydict({"id": numbers, "answer": answers})

    return list(frame.mapInArrow(extract, "id long, answer string").collect())


def apply_in_pandas(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(group: pd.DataFrame) -> pd.DataFrame:
        return group.assign(answer=[call(number) for number in group["id"]])

    grouped = frame.groupBy((frame["id"] % 2).alias("parity"))
    return list(grouped.applyInPandas(extract, "id long, answer string").collect())


def apply_in_pandas_with_key(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(key: tuple[int], group: pd.DataFrame) -> pd.DataFrame:
        return group.assign(answer=[f"{key} {call(number)}" for number in group["id"]])

    grouped = frame.groupBy((frame["id"] % 2).alias("parity"))
    return list(grouped.applyInPandas(extract, "id long, answer string").collect())


def apply_in_arrow(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(table: Any) -> Any:
        import pyarrow

        numbers = table.column("id").to_pylist()
        return pyarrow.table({"id": numbers, "answer": [call(number) for number in numbers]})

    grouped = frame.groupBy((frame["id"] % 2).alias("parity"))
    return list(grouped.applyInArrow(extract, "id long, answer string").collect())


def cogroup_apply_in_pandas(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(left: pd.DataFrame, right: pd.DataFrame) -> pd.DataFrame:
        return left.assign(answer=[call(number) for number in right["id"]])

    cogrouped = frame.groupBy("id").cogroup(frame.groupBy("id"))
    return list(cogrouped.applyInPandas(extract, "id long, answer string").collect())


def pandas_udf(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    @functions.pandas_udf("string")
    def extract(numbers: pd.Series) -> pd.Series:
        return numbers.map(call)

    return list(frame.select("id", extract("id")).collect())


def iterator_pandas_udf(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        for numbers in batches:
            yield numbers.map(call)

    # As a string's annotation would not say so to Spark.
    extract.__annotations__ = {"batches": Iterator[pd.Series], "return": Iterator[pd.Series]}
    return list(frame.select("id", functions.pandas_udf(extract, "string")("id")).collect())


def grouped_aggregate_pandas_udf(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(numbers: pd.Series) -> str:
        return " ".join(sorted(call(number) for number in numbers))

    extract.__annotations__ = {"numbers": pd.Series, "return": str}
    aggregate = functions.pandas_udf(extract, "string")
    return list(frame.groupBy((frame["id"] % 2).alias("parity")).agg(aggregate("id")).collect())


def udf(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    @functions.udf("string")
    def extract(number: int) -> str:
        return call(number)

    return list(frame.select("id", extract("id")).collect())


def arrow_optimised_udf(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    @functions.udf("string", useArrow=True)
    def extract(number: int) -> str:
        return call(number)

    return list(frame.select("id", extract("id")).collect())


def arrow_udf(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(numbers: Any) -> Any:
        import pyarrow

        return pyarrow.array([call(number) for number in numbers.to_pylist()])

    import pyarrow

    extract.__annotations__ = {"numbers": pyarrow.Array, "return": pyarrow.Array}
    return list(frame.select("id", functions.arrow_udf(extract, "string")("id")).collect())


def foreach(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(row: Any) -> None:
        call(row.id)

    frame.foreach(extract)
    return []


def rdd_map(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(row: Any) -> tuple[int, str]:
        return row.id, call(row.id)

    return list(frame.rdd.map(extract).collect())


def rdd_foreach(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(row: Any) -> None:
        call(row.id)

    frame.rdd.foreach(extract)
    return []


ON_FRAMES: dict[str, Job] = {
    "DataFrame.mapInArrow": map_in_arrow,
    "DataFrame.foreach": foreach,
    "groupBy().applyInPandas": apply_in_pandas,
    "groupBy().applyInPandas with key": apply_in_pandas_with_key,
    "cogroup().applyInPandas": cogroup_apply_in_pandas,
    "pandas_udf": pandas_udf,
    "pandas_udf over iterators": iterator_pandas_udf,
    "pandas_udf, grouped aggregate": grouped_aggregate_pandas_udf,
    "udf": udf,
    "udf, Arrow-optimised": arrow_optimised_udf,
}
if hasattr(functions, "arrow_udf"):
    ON_FRAMES["arrow_udf"] = arrow_udf
if hasattr(functions, "try_parse_json"):  # From Spark 4.0, as applyInArrow.
    ON_FRAMES["groupBy().applyInArrow"] = apply_in_arrow

ON_RDDS: dict[str, Job] = {"RDD.map": rdd_map, "RDD.foreach": rdd_foreach}
