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

__all__ = ["SCHEMA", "asking", "assert_sums", "complete_report", "first_attempt"]

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
