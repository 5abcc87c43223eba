"""What a trace comes to in all, and writing it where MLflow and a history of jobs read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlflow_ctx_autolog.delivery.receipts import TaskReceipt
from mlflow_ctx_autolog.delivery.records import Destination
from mlflow_ctx_autolog.driver.books import Book, by_task
from mlflow_ctx_autolog.driver.job_sums import job_sums
from mlflow_ctx_autolog.spans.amounts import Amounts, add
from mlflow_ctx_autolog.stores.sending import send
from mlflow_ctx_autolog.stores.stored_trace import (
    LINKED_TRACE,
    SPARK_FACTS,
    TRACE_KEY,
    split_metadata,
)
from mlflow_ctx_autolog.stores.tracking_store import read_trace, trace_record
from mlflow_ctx_autolog.tracing import record_totals, totals_of

__all__ = ["linked_spans", "record_sums", "write_stored_totals"]

# Characters that a store takes as one piece of a trace's metadata.
_LONGEST_METADATA = 8000

SparkFacts = Callable[[int], "str | None"]


def record_sums(book: Book, usage: Amounts, cost: Amounts, spark_facts: SparkFacts | None) -> None:
    """Write into what is known of a trace what it comes to, and what Spark knows of its jobs.

    Args:
        book: The trace's.
        usage: Tokens of all of it.
        cost: Cost of all of it.
        spark_facts: Returns what Spark knows since a time, in milliseconds since the epoch.
    """
    record_totals(book.info, usage, cost)
    facts = None if spark_facts is None else spark_facts(int(book.info.request_time))
    # A store may have no room for a longer one.
    if facts is not None and len(facts) <= _LONGEST_METADATA:
        book.info.trace_metadata.update(split_metadata(SPARK_FACTS, facts))
    book.info.trace_metadata.update(job_sums(book.sums, book.tasks()))


def write_stored_totals(destination: Destination, trace_id: str) -> None:
    """Add up what the store has of a trace whose driver is gone, and write its totals.

    Raises:
        StoreError: The store does not answer, or has no such trace.
    """
    usage: Amounts = {}
    cost: Amounts = {}
    info, spans = read_trace(destination, trace_id)
    job_trace_id = info.trace_metadata.get(TRACE_KEY, trace_id)
    if job_trace_id != trace_id:
        write_stored_totals(destination, job_trace_id)
        return
    by_id = {span.span_id: span for span in spans}
    for task_id, below in by_task(spans).items():
        task = None if task_id is None else by_id[task_id]
        receipt = None
        if task is not None:
            receipt = TaskReceipt.from_attributes(trace_id, task.span_id, task.attributes)
            below += linked_spans(destination, task) if receipt is None else []
        found = totals_of(below) if receipt is None else (receipt.usage, receipt.cost)
        for total, amounts in zip((usage, cost), found, strict=True):
            add(total, amounts)
    record_totals(info, usage, cost)
    send(destination, [trace_record(info)])


def linked_spans(destination: Destination, task: Any) -> list[Any]:
    """Return the spans of the trace that is linked to a task's span; none where there is none."""
    trace_id = task.get_attribute(LINKED_TRACE)
    if trace_id is None:
        return []
    return read_trace(destination, trace_id)[1]
