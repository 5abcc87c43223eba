"""What the end-to-end tests run on Spark workers, and how they look at the trace afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import mlflow
import pandas as pd
from mlflow.entities import Span

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


@dataclass(frozen=True)
class StoredTrace:
    """A trace as the tracking server has it."""

    trace: Any

    @property
    def root(self) -> Span:
        (root,) = [span for span in self.spans if span.parent_id is None]
        return root

    @property
    def spans(self) -> list[Span]:
        return list(self.trace.data.spans)

    @property
    def tasks(self) -> list[Span]:
        return [span for span in self.spans if span.span_type == "TASK"]

    @property
    def calls(self) -> list[Span]:
        return [span for span in self.spans if span.span_type == "CHAT_MODEL"]

    @property
    def metadata(self) -> dict[str, str]:
        return dict(self.trace.info.trace_metadata)

    @property
    def total_tokens(self) -> int:
        usage = self.trace.info.token_usage or {}
        return int(usage.get("total_tokens", 0))

    def children_of(self, span: Span) -> list[Span]:
        return [child for child in self.spans if child.parent_id == span.span_id]

    def is_nested(self, call: Span) -> bool:
        """Whether a call is below a task that is below the driver's span."""
        by_id = {span.span_id: span for span in self.spans}
        task = by_id.get(call.parent_id or "")
        return task in self.tasks and task.parent_id == self.root.span_id


def stored_trace(trace_id: str) -> StoredTrace:
    """Read a trace back from the store."""
    mlflow.flush_trace_async_logging()
    trace = mlflow.get_trace(trace_id)
    assert trace is not None, f"{trace_id} is not in the store"
    return StoredTrace(trace)


def stored_traces(experiment_id: str) -> list[StoredTrace]:
    """Read all traces of an experiment back from the store."""
    mlflow.flush_trace_async_logging()
    found = mlflow.search_traces(locations=[experiment_id], return_type="list", max_results=500)
    return [StoredTrace(trace) for trace in found]
