"""Errors of functions on workers and on the driver, as the user reads them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
from job import CLASSIC, CONNECT, Job, program
from pyspark.sql import functions as f


class TwoArgumentsError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)
        self.second = second


class WithoutTextError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def _chained(number: int) -> str:
    try:
        return {}["key"]  # type: ignore[no-any-return]
    except KeyError as error:
        raise ValueError("outer") from error


def _within(number: int) -> str:
    try:
        return str(1 // 0)
    except ZeroDivisionError:
        raise ValueError("while handling")  # noqa: B904


def _noted(number: int) -> str:
    error = ValueError("noted")
    if sys.version_info >= (3, 11):
        error.add_note("a note of the user's")
    raise error


def _raising(error: Callable[[], BaseException]) -> Callable[[int], str]:
    def failing(number: int) -> str:
        raise error()

    return failing


_ROW_BY_ROW: dict[str, Callable[[int], str]] = {
    "plain": _raising(lambda: ValueError("plain")),
    "two arguments": _raising(lambda: TwoArgumentsError("a", "b")),
    "without text": _raising(WithoutTextError),
    "chained": _chained,
    "while handling": _within,
    "noted": _noted,
    "StopIteration": _raising(lambda: StopIteration("done")),
    "keyword": lambda number, missing: "",  # type: ignore[dict-item, misc]
}


@program(fast=True)
def errors_of_functions_of_rows(job: Job) -> None:
    for name, function in _ROW_BY_ROW.items():
        column = f.udf(function, "string")
        job.error(name, lambda column=column: job.documents(2, 1).select(column("id")).collect())


@program()
def errors_after_calls(job: Job) -> None:
    ask = job.ask()

    def failing(number: int) -> str:
        ask(number)
        if number == 1:
            raise LookupError(f"of {number}")
        return ""

    def refused(number: int) -> str:
        from openai import OpenAI

        client = OpenAI(base_url=f"{job_url}/nowhere", api_key="none", max_retries=0)
        client.models.list()
        return ""

    job_url = job.url
    column = f.udf(failing, "string")
    job.error("failing", lambda: job.documents(2, 1).select(column("id")).collect())
    frame = job.documents(2, 1).select(f.udf(refused, "string")("id"))
    job.error("refused", frame.collect)


@program()
def errors_of_groups_and_batches(job: Job) -> None:
    def failing(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            yield batch
            raise ValueError("after a batch")

    def at_once(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        raise ValueError("at once")

    def past_the_end(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        yield next(batches)
        yield next(batches)

    def a_list(batches: Iterator[pd.DataFrame]) -> Any:
        return list(batches)

    def nothing(batches: Iterator[pd.DataFrame]) -> Any:
        return None

    def of_a_group(group: pd.DataFrame) -> pd.DataFrame:
        raise ValueError(f"of {len(group)}")

    def of_wrong_columns(group: pd.DataFrame) -> pd.DataFrame:
        return group.rename(columns={"id": "other"})

    for function in (failing, at_once, past_the_end, a_list, nothing):
        frame = job.documents(2, 1).mapInPandas(function, "id long")
        job.error(function.__name__, frame.collect)
    for function in (of_a_group, of_wrong_columns):
        job.error(
            function.__name__,
            lambda function=function: (
                job.documents(2, 1).groupBy("id").applyInPandas(function, "id long").collect()
            ),
        )

    def series(numbers: pd.Series) -> pd.Series:
        return numbers.map(lambda number: 1 // 0)

    series.__annotations__ = {"numbers": pd.Series, "return": pd.Series}
    column = f.pandas_udf(series, "string")
    job.error("series", lambda: job.documents(2, 1).select(column("id")).collect())

    def too_few(numbers: pd.Series) -> pd.Series:
        return numbers[:1].astype(str)

    too_few.__annotations__ = series.__annotations__
    column = f.pandas_udf(too_few, "string")
    job.error("too few", lambda: job.documents(2, 1).select(column("id")).collect())


@program()
def error_groups(job: Job) -> None:
    if sys.version_info < (3, 11):
        return

    def failing(number: int) -> str:
        raise ExceptionGroup("many", [ValueError("a"), TypeError("b")])  # noqa: F821

    column = f.udf(failing, "string")
    job.error("group", lambda: job.documents(2, 1).select(column("id")).collect())


@program()
def functions_that_end_the_worker(job: Job) -> None:
    def leaving(number: int) -> str:
        sys.exit(3)

    def interrupted(number: int) -> str:
        raise KeyboardInterrupt

    for function in (leaving, interrupted):
        column = f.udf(function, "string")
        job.error(
            function.__name__,
            lambda column=column: job.documents(2, 1).select(column("id")).collect(),
        )


@program(engines=(CLASSIC,))
def errors_of_functions_of_partitions(job: Job) -> None:
    numbers = job.spark.sparkContext.parallelize([1, 2], 1)

    def failing(rows: Any) -> Any:
        for row in rows:
            raise ValueError(f"of {row}")
            yield row

    job.error("mapPartitions", lambda: numbers.mapPartitions(failing).collect())
    job.error("map", lambda: numbers.map(lambda number: 1 // 0).collect())
    job.error("foreach", lambda: numbers.foreach(lambda number: 1 // 0))
    job.error("stop", lambda: numbers.map(_raising(lambda: StopIteration())).collect())
    job.error("barrier", lambda: numbers.barrier().mapPartitions(failing).collect())
    job.error("no function", lambda: numbers.mapPartitions(None).collect())  # type: ignore[arg-type]
    job.error("nothing given", lambda: numbers.map())  # type: ignore[call-arg]


@program(fast=True)
def functions_that_cannot_be_pickled(job: Job) -> None:
    lock = threading.Lock()

    def locked(value: Any) -> Any:
        with lock:
            return value

    def batches(values: Any) -> Any:
        return locked(values)

    documents = job.documents(2, 1)
    column = f.udf(locked, "long")
    job.error("udf", lambda: documents.select(column("id")).collect())
    job.error("udf again", lambda: documents.select(column("id")).collect())
    job.error("mapInPandas", lambda: documents.mapInPandas(batches, "id long").collect())
    job.error("register", lambda: job.spark.udf.register("locked", locked, "long"))
    job.error("register a UDF", lambda: job.spark.udf.register("locked", column))
    job.error("foreach", lambda: documents.foreach(locked))

    class Locked:
        def eval(self, number: int) -> Any:
            yield (locked(number),)

    table = f.udtf(Locked, returnType="number long")
    job.error("udtf", lambda: table(f.lit(1)).collect())
    job.error("register a UDTF", lambda: job.spark.udtf.register("locked_rows", table))
    stream = job.spark.readStream.format("rate").load()
    job.error("stream", lambda: stream.writeStream.foreach(locked).start())


@program(engines=(CLASSIC,))
def rdd_functions_that_cannot_be_pickled(job: Job) -> None:
    lock = threading.Lock()
    numbers = job.spark.sparkContext.parallelize([1, 2], 1)
    job.error("map", lambda: numbers.map(lambda number: (lock, number)).collect())
    job.error("session", lambda: numbers.map(lambda number: job.spark.range(number)).collect())


@program(engines=(CONNECT,))
def batch_functions_that_cannot_be_pickled(job: Job) -> None:
    lock = threading.Lock()
    stream = job.spark.readStream.format("rate").load()
    # Spark pickles it where it takes it, so that what takes it before stands in the traceback.
    job.error(
        "foreachBatch",
        lambda: stream.writeStream.foreachBatch(lambda *_: lock).start(),
        but_frames_of="mlflow_ctx_autolog",
    )


@program()
def wrong_uses(job: Job) -> None:
    ask = job.ask()
    documents = job.documents(2, 1)
    column = f.udf(ask, "string")
    job.error("no such column", lambda: documents.select(column("nowhere")).collect())
    job.error("a number", lambda: documents.select(column(1)).collect())
    job.error("no schema", lambda: documents.mapInPandas(lambda each: each).collect())  # type: ignore[call-arg]
    job.error("bad schema", lambda: documents.mapInPandas(lambda each: each, "id nonsense"))
    job.error("not callable", lambda: f.udf(3, "string")("id"))
    job.error("too many", lambda: documents.select(column("id", "id")).collect())
    job.error("wrong type", lambda: documents.select(f.udf(ask, "nonsense")("id")).collect())
    job.error("aggregated", lambda: documents.groupBy("id").agg(column("id")).collect())
    job.error("twice", lambda: job.spark.sql("SELECT nowhere_registered(1)").collect())
