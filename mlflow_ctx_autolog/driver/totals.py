"""What a trace comes to in all, and writing it where MLflow and a history of jobs read it."""

from __future__ import annotations

import json
import math
import os
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from mlflow_ctx_autolog.delivery.receipts import Receipt, TaskReceipt
from mlflow_ctx_autolog.delivery.records import Destination
from mlflow_ctx_autolog.driver.books import Book, by_task
from mlflow_ctx_autolog.driver.job_sums import job_sums
from mlflow_ctx_autolog.driver.mlflow_traces import (
    USAGE_OF_TRACE,
    end_info,
    is_in_progress,
    own_words,
    record_totals,
    record_unknown_totals,
    record_update,
    totals_of,
    with_attributes,
)
from mlflow_ctx_autolog.driver.previews import write_previews
from mlflow_ctx_autolog.exceptions import StoreError
from mlflow_ctx_autolog.log_ins import safe_logger
from mlflow_ctx_autolog.spans.amounts import Amounts, add
from mlflow_ctx_autolog.spans.trace_update import latest
from mlflow_ctx_autolog.stores.sending import send
from mlflow_ctx_autolog.stores.stored_trace import (
    DRIVER,
    LINKED_TRACE,
    RECEIPT,
    SPARK_FACTS,
    TRACE_KEY,
    StoredTrace,
    split_metadata,
)
from mlflow_ctx_autolog.stores.tracking_store import (
    count_spans,
    read_trace,
    span_record,
    trace_record,
)

__all__ = ["correct_totals", "linked_spans", "record_sums", "write_stored_totals"]

_logger = safe_logger(__name__)

# Characters that a store takes as one piece of a trace's metadata.
_LONGEST_METADATA = 8000
# How often at most what arrives meanwhile has a trace added up once more.
_LOOKS = 5

SparkFacts = Callable[[int], "str | None"]


def record_sums(book: Book, usage: Amounts, cost: Amounts, spark_facts: SparkFacts | None) -> None:
    """Write into what is known of a trace what it comes to, and what tasks and Spark say of it.

    Args:
        book: The trace's.
        usage: Tokens of all of it.
        cost: Cost of all of it.
        spark_facts: Returns what Spark knows since a time, in milliseconds since the epoch.
    """
    record_totals(book.info, usage, cost)
    record_update(book.info, book.trace_update(), book.own_words)
    write_previews(book)
    facts = None if spark_facts is None else spark_facts(int(book.info.request_time))
    # A store may have no room for a longer one.
    if facts is not None and len(facts) <= _LONGEST_METADATA:
        book.info.trace_metadata.update(split_metadata(SPARK_FACTS, facts))
    book.info.trace_metadata.update(job_sums(book.sums, book.tasks()))


def write_stored_totals(destination: Destination, trace_id: str) -> None:
    """Add up what the store has of a trace, and write its totals, for a driver that may be gone.

    Task attempts whose process is gone from this host have told all that they will: their spans
    say so from now on. Where the driver is gone, too, the trace is over. What arrives meanwhile is
    in it, whoever else adds up: who has written looks again.

    Raises:
        StoreError: The store does not answer, or has no such trace.
    """
    counted = _counted(destination, trace_id)
    for _ in range(_LOOKS):
        _write_sums(destination, trace_id)
        before, counted = counted, _counted(destination, trace_id)
        if before == counted:
            return


def _counted(destination: Destination, trace_id: str) -> int | None:
    """Return how many spans a trace has; None where the store cannot count."""
    try:
        return count_spans(destination, trace_id)
    except StoreError as error:
        if not error.unsupported:
            raise
        return None


def correct_totals(tracking_uri: str, trace: StoredTrace, tokens: float) -> None:
    """Write anew what a trace comes to, where the store has more of it than was added up.

    What killed workers have left may be brought by any task of their host, of another application
    too, whose driver does not know the trace. Never raises.

    Args:
        tracking_uri: Where it is stored.
        trace: The trace; its spans are not looked at.
        tokens: Of its calls, as far as the store has them.
    """
    host, _, process = trace.metadata.get(DRIVER, "").partition(" ")
    is_over = trace.state != "IN_PROGRESS"
    if TRACE_KEY not in trace.metadata or (is_over and tokens <= _told_tokens(trace)):
        return
    if not is_over and not is_gone(host, process):
        return
    try:
        write_stored_totals(Destination(tracking_uri, trace.experiment_id), trace.trace_id)
    except Exception as error:
        _logger.info("What %s comes to could not be written anew: %r", trace.trace_id, error)


def _told_tokens(trace: StoredTrace) -> float:
    with suppress(TypeError, ValueError, AttributeError):
        told = json.loads(trace.metadata.get(USAGE_OF_TRACE, "{}"))
        return float(told.get("total_tokens") or 0)
    return math.inf


def _write_sums(destination: Destination, trace_id: str) -> None:
    usage: Amounts = {}
    cost: Amounts = {}
    info, spans = read_trace(destination, trace_id)
    job_trace_id = info.trace_metadata.get(TRACE_KEY, trace_id)
    if job_trace_id != trace_id:
        write_stored_totals(destination, job_trace_id)
        return
    by_id = {span.span_id: span for span in spans}
    records = []
    updates = []
    unknown: Counter[str] = Counter()
    for task_id, below in by_task(spans).items():
        task = None if task_id is None else by_id[task_id]
        receipt = None
        if task is not None:
            receipt = TaskReceipt.from_attributes(trace_id, task.span_id, task.attributes)
            below += linked_spans(destination, task) if receipt is None else []
        updates += [] if receipt is None else [receipt.trace_update]
        found = totals_of(below) if receipt is None else (receipt.usage, receipt.cost)
        if task is not None and receipt is None:
            if is_gone(task.get_attribute("host.name"), task.get_attribute("process.pid")):
                said = TaskReceipt.attributes(len(below), *found)
                records.append(span_record(with_attributes(task, said)))
            else:
                unknown[str(task.get_attribute("host.name") or "")] += 1
        for total, amounts in zip((usage, cost), found, strict=True):
            add(total, amounts)
    record_totals(info, usage, cost)
    record_update(info, latest(updates), own_words(info))
    _correct_receipt(info, len(spans), unknown)
    if is_in_progress(info) and not _is_drivers(info):
        record_unknown_totals(info, usage, cost)
        end_info(info, info.request_time * 1_000_000, _end_of(spans), failed=True)
    send(destination, [*records, trace_record(info)])


def _correct_receipt(info: Any, stored: int, unknown: Mapping[str, int]) -> None:
    """Say in what is known of a trace what the store has now, if its driver said so before."""
    if (told := Receipt.from_summary(info.trace_id, info.trace_metadata.get(RECEIPT))) is None:
        return
    made = max(told.made, stored)
    now = replace(
        told,
        made=made,
        stored=stored,
        waiting=max(0, made - stored - told.lost),
        unknown=dict(unknown),
    )
    info.trace_metadata[RECEIPT] = json.dumps(now.summary())


def is_gone(host: Any, process: Any) -> bool:
    """Whether a process was one of this host, and is no more."""
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError, TypeError, ValueError):
        pass
    return False


def _is_drivers(info: Any) -> bool:
    """Whether the driver of a trace is known to live on this host, and to end it in its time."""
    host, _, process = info.trace_metadata.get(DRIVER, "").partition(" ")
    return host == socket.gethostname() and not is_gone(host, process)


def _end_of(spans: Sequence[Any]) -> int:
    return max(int(span.end_time_ns or span.start_time_ns) for span in spans)


def linked_spans(destination: Destination, task: Any) -> list[Any]:
    """Return the spans of the trace that is linked to a task's span; none where there is none."""
    trace_id = task.get_attribute(LINKED_TRACE)
    if trace_id is None:
        return []
    return read_trace(destination, trace_id)[1]
