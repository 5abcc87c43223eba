"""Jobs that make calls again, and reports of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from workload import ask

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog import CallReport, cli
from mlflow_ctx_autolog.testing import OpenAIEndpoint

__all__ = ["ANYWHERE", "SCHEMA", "asking", "assert_sums", "complete_report", "first_attempt"]

SCHEMA = "id long"


def asking(url: str, before: Callable[[int], None] | None = None) -> Callable[..., Any]:
    """Return a function for mapInPandas that makes one call a row."""

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        from openai import OpenAI

        client = OpenAI(base_url=url, api_key="not-a-key", max_retries=0)
        for batch in batches:
            for number in batch["id"]:
                if before is not None:
                    before(number)
                ask(client, number)
            yield batch

    return extract


def first_attempt() -> bool:
    """Whether this is the first attempt of its task."""
    from pyspark import TaskContext

    return TaskContext.get().attemptNumber() == 0


def another_action(spark: Any, url: str) -> None:
    frame = spark.range(0, 4, 1, 2).mapInPandas(asking(url), SCHEMA)
    frame.collect()
    frame.count()


def united_with_itself(spark: Any, url: str) -> None:
    frame = spark.range(0, 4, 1, 2).mapInPandas(asking(url), SCHEMA)
    frame.union(frame).collect()


def joined_with_itself(spark: Any, url: str) -> None:
    frame = spark.range(0, 4, 1, 2).mapInPandas(asking(url), SCHEMA)
    frame.join(frame.selectExpr("id + 1 AS id"), "id").collect()


def filtered_udf(spark: Any, url: str) -> None:
    from pyspark.sql import functions

    @functions.udf("string")
    def extract(number: int) -> str:
        from openai import OpenAI

        return ask(OpenAI(base_url=url, api_key="not-a-key"), number)

    answers = spark.range(0, 4, 1, 2).withColumn("answer", extract("id"))
    answers.filter("answer != ''").select("answer").collect()


def failing_task(spark: Any, url: str) -> None:
    def fail(number: int) -> None:
        if number == 1 and first_attempt():
            raise ValueError("not in the first attempt")

    spark.range(0, 4, 1, 2).mapInPandas(asking(url, fail), SCHEMA).collect()


def duplicate_rows(spark: Any, url: str) -> None:
    numbers = spark.range(0, 4, 1, 2).selectExpr("id % 2 AS id")
    numbers.mapInPandas(asking(url), SCHEMA).collect()


def documents_twice(spark: Any, url: str) -> None:
    numbers = spark.range(0, 4, 1, 2)
    numbers.union(numbers).mapInPandas(asking(url), SCHEMA).collect()


# Each job that repeats calls on any Spark, and how many calls of four it repeats for which reason.
ANYWHERE: list[tuple[Callable[[Any, str], None], str, int]] = [
    (another_action, "another_action", 4),
    (united_with_itself, "plan_twice", 4),
    (joined_with_itself, "plan_twice", 4),
    (filtered_udf, "udf_duplicated", 4),
    (failing_task, "task_retry", 1),
    (duplicate_rows, "duplicate_row", 2),
    (documents_twice, "duplicate_row", 4),
]


def complete_report(trace_id: str, endpoint: OpenAIEndpoint, spools: Path) -> CallReport:
    """Read the trace once it has all calls: those of a killed worker are recovered."""
    mlflow.flush_trace_async_logging()
    report = ctx_autolog.report(trace_id)
    while report.made.calls < len(endpoint.requests):
        # A killed executor's Python worker may outlive it, and its spool is its own until then.
        time.sleep(0.5)
        cli.main(["recover", str(spools)])
        report = ctx_autolog.report(trace_id)
    assert report.made.calls == len(endpoint.requests)
    return report


def assert_sums(report: CallReport, endpoint: OpenAIEndpoint) -> None:
    """What was useful and what was repeated is what was made, as the endpoint has billed it."""
    assert report.useful.calls == report.distinct
    assert report.useful.tokens + report.repeated.tokens == report.made.tokens
    assert report.made.tokens == endpoint.total_tokens
    assert sum(sums.tokens for sums in report.by_cause().values()) == report.repeated.tokens
