"""The registry of traces that were handed to Spark, and what is known of each."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlflow_ctx_autolog.delivery.receipts import TaskReceipt
from mlflow_ctx_autolog.delivery.records import Destination
from mlflow_ctx_autolog.spans.amounts import Amounts, add
from mlflow_ctx_autolog.spans.call_sums import CallSums
from mlflow_ctx_autolog.spans.record import SpanRecord
from mlflow_ctx_autolog.tracing import is_task

__all__ = ["Book", "Books", "by_task", "key_of"]

# Traces that are kept; of older ones, what comes late is stored but not counted.
_TRACES = 100


@dataclass
class Book:
    """What is known of one trace.

    Args:
        destination: Where it is stored.
        info: MLflow's ``TraceInfo``, of the root's end or, before it, of the announcement.
        delivers: Whether its spans and its info are stored by us, one by one as they end, rather
            than by MLflow in one piece.
        table: The Unity Catalog table of its spans, where those of workers are stored by us and
            all else by MLflow.
        receipts_come_home: Whether all tasks that succeed bring a receipt.
        spans: Spans of the driver; until the root has ended, those that were announced.
        announced: The ids of those.
        usage: Tokens of these.
        cost: Cost of these.
        sums: What else the driver's own calls come to.
        receipts: Of task attempts, by the span of each.
        unfinished: The same for attempts that have left spans in the store, but no receipt.
        has_ended: Whether the root has ended.
        written_totals: What the totals came to when they were written; None if they were not.
        is_complete: Whether the store had all spans when it was last asked.
        was_warned_of: Whether the user knows that it is not complete.
        was_silence_told: Whether the user knows that tasks left no spans of their calls.
        handed_over: Functions that were handed to Spark in it.
        settling: Held while the store is asked.
        opened: When it was handed to Spark first, on the monotonic clock.
        root: The root of an action's trace, which no span of the driver is; None where one is.
        whole: Spans of an action's trace by their ids, where the store takes whole traces only.
    """

    destination: Destination
    info: Any
    delivers: bool
    table: str | None = None
    receipts_come_home: bool = True
    spans: int = 0
    announced: set[str] = field(default_factory=set)
    usage: Amounts = field(default_factory=dict)
    cost: Amounts = field(default_factory=dict)
    sums: CallSums = field(default_factory=CallSums)
    receipts: dict[str, TaskReceipt] = field(default_factory=dict)
    unfinished: dict[str, TaskReceipt] = field(default_factory=dict)
    has_ended: bool = False
    written_totals: tuple[Amounts, Amounts] | None = None
    is_complete: bool = False
    was_warned_of: bool = False
    was_silence_told: bool = False
    handed_over: int = 0
    settling: threading.Lock = field(default_factory=threading.Lock)
    opened: float = field(default_factory=time.monotonic)
    root: SpanRecord | None = None
    whole: dict[str, Any] = field(default_factory=dict)

    @property
    def trace_id(self) -> str:
        return str(self.info.trace_id)

    @property
    def is_ours(self) -> bool:
        """Whether we store the trace, rather than MLflow."""
        return self.delivers or self.root is not None

    @property
    def has_totals(self) -> bool:
        return self.written_totals == self.totals()

    @property
    def made(self) -> int:
        return self.spans + sum(receipt.made for receipt in self.tasks())

    def tasks(self) -> list[TaskReceipt]:
        return list({**self.unfinished, **self.receipts}.values())

    def totals(self) -> tuple[Amounts, Amounts]:
        usage, cost = dict(self.usage), dict(self.cost)
        for receipt in self.tasks():
            add(usage, receipt.usage)
            add(cost, receipt.cost)
        return usage, cost


class Books:
    """One book for each trace, the one that was handed to Spark last coming last.

    Attributes:
        lock: Held while a book is opened, or added to.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._books: OrderedDict[str, Book] = OrderedDict()

    def of(self, trace_id: str) -> Book | None:
        """Return the book of a trace, by any of its ids; None where there is none."""
        return self._books.get(key_of(trace_id))

    def all(self) -> list[Book]:
        """Return all of them."""
        return list(self._books.values())

    def last(self) -> Book | None:
        """Return that of the trace that was handed to Spark last; None where none was."""
        return next(reversed(self.all()), None)

    def keep(self, book: Book) -> None:
        """Make a trace the last that was handed to Spark, and forget those of long ago."""
        self._books[key_of(book.trace_id)] = book
        self._books.move_to_end(key_of(book.trace_id))
        over = [key for key, each in self._books.items() if each.has_ended]
        for key in over[: max(0, len(self._books) - _TRACES)]:
            del self._books[key]

    def forget(self, trace_id: str) -> None:
        """Strike a trace off that nobody is to ask for."""
        self._books.pop(key_of(trace_id), None)

    def unsettled(self) -> list[Book]:
        """Return those of traces that have ended, and that the store is not known to have."""
        return [
            book
            for book in self.all()
            if book.has_ended and book.is_ours and not (book.is_complete and book.has_totals)
        ]


def key_of(trace_id: str) -> str:
    """Return what the ids of a trace have in common: workers do not know of its table."""
    return trace_id.rpartition("/")[2].removeprefix("tr-")


def by_task(spans: Sequence[Any]) -> dict[str | None, list[Any]]:
    """Return the spans by the task's span that they are or lie below; None for those of none."""
    parents = {span.span_id: span.parent_id for span in spans}
    tasks = {span.span_id for span in spans if is_task(span)}
    found: dict[str | None, list[Any]] = {}
    for span in spans:
        above = span.span_id
        while above is not None and above not in tasks:
            above = parents.get(above)
        found.setdefault(above, []).append(span)
    return found
