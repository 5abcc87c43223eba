"""The ways to hand a function to Spark, each as a job that makes one call for each of six rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pandas as pd
import pyspark
import pytest
from coverage_table import SPARK, case
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


def map_in_pandas(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            yield batch.assign(answer=[call(number) for number in batch["id"]])

    return list(frame.mapInPandas(extract, "id long, answer string").collect())


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


def foreach_partition(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(rows: Iterable[Any]) -> None:
        for row in rows:
            call(row.id)

    frame.foreachPartition(extract)
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


def rdd_map_partitions(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(rows: Iterable[Any]) -> Iterator[tuple[int, str]]:
        for row in rows:
            yield row.id, call(row.id)

    return list(frame.rdd.mapPartitions(extract).collect())


def rdd_foreach_partition(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(rows: Iterable[Any]) -> None:
        for row in rows:
            call(row.id)

    frame.rdd.foreachPartition(extract)
    return []


ON_FRAMES: dict[str, Job] = {
    "`DataFrame.mapInPandas`": map_in_pandas,
    "`DataFrame.mapInArrow`": map_in_arrow,
    "`DataFrame.foreach`": foreach,
    "`DataFrame.foreachPartition`": foreach_partition,
    "`groupBy().applyInPandas`": apply_in_pandas,
    "`groupBy().applyInPandas` with key": apply_in_pandas_with_key,
    "`groupBy().applyInArrow`": apply_in_arrow,
    "`cogroup().applyInPandas`": cogroup_apply_in_pandas,
    "`pandas_udf`": pandas_udf,
    "`pandas_udf` over iterators": iterator_pandas_udf,
    "`pandas_udf`, grouped aggregate": grouped_aggregate_pandas_udf,
    "`udf`": udf,
    "`udf`, Arrow-optimised": arrow_optimised_udf,
    "`arrow_udf`": arrow_udf,
}

ON_RDDS: dict[str, Job] = {
    "`RDD.map`": rdd_map,
    "`RDD.mapPartitions`": rdd_map_partitions,
    "`RDD.foreach`": rdd_foreach,
    "`RDD.foreachPartition`": rdd_foreach_partition,
}

# The release of Spark that brought it, where that is not in all that are supported.
SINCE = {"`groupBy().applyInArrow`": (4, 0), "`arrow_udf`": (4, 1)}


def is_there(way: str) -> bool:
    """Whether the installed Spark has it."""
    return tuple(map(int, pyspark.__version__.split(".")[:2])) >= SINCE.get(way, ())


def covered(column: str, ways: Iterable[str]) -> list[Any]:
    """Return cases of a test that shows that functions handed over in these ways are traced."""
    cases = []
    for way in ways:
        release = ".".join(map(str, SINCE.get(way, ())))
        note = f"from Spark {release}" if release else ""
        skip = pytest.mark.skipif(not is_there(way), reason=note) if release else None
        cases.append(case(way, SPARK, way, column, skip=skip, note=note))
    return cases
