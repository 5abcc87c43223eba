"""What the end-to-end tests run on Spark workers, and look at afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pandas as pd

from mlflow_ctx_autolog.testing import StoredTrace, stored_trace, stored_traces

__all__ = [
    "SCHEMA",
    "StoredTrace",
    "ask",
    "extractor",
    "question",
    "row_extractor",
    "stored_trace",
    "stored_traces",
]

SCHEMA = "id long, answer string"


def question(number: int) -> str:
    """Return what a model is asked about a document."""
    return f"What of document {number}?"


def ask(
    client: Any,
    number: int,
    model: str = "gpt-test",
    question: Callable[[int], str] = question,
) -> str:
    """Make one model call about a document."""
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question(number)}]
    )
    return str(reply.choices[0].message.content)


def extractor(
    url: str,
    threads: int = 0,
    model: str = "gpt-test",
    question: Callable[[int], str] = question,
) -> Callable[[Iterable[pd.DataFrame]], Any]:
    """Return a function for mapInPandas that makes one call a row, as a user would write it."""

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        from concurrent.futures import ThreadPoolExecutor

        from openai import OpenAI

        client = OpenAI(base_url=url, api_key="not-a-key", max_retries=0)

        def call(number: int) -> str:
            return ask(client, number, model, question)

        for batch in batches:
            if threads:
                with ThreadPoolExecutor(threads) as pool:
                    answers = list(pool.map(call, batch["id"]))
            else:
                answers = [call(number) for number in batch["id"]]
            yield batch.assign(answer=answers)

    return extract


def row_extractor(url: str) -> Callable[[Iterable[Any]], Iterator[str]]:
    """Return a function for an RDD's partitions, whose items are numbers or rows."""

    def extract_rows(rows: Iterable[Any]) -> Iterator[str]:
        from openai import OpenAI

        client = OpenAI(base_url=url, api_key="not-a-key", max_retries=0)
        for row in rows:
            yield ask(client, getattr(row, "id", row))

    return extract_rows
