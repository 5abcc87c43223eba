"""The registry of traces that were handed to Spark, and what is known of each."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlflow_ctx_autolog.delivery.receipts import (
    ATTEMPT,
    NUMBER,
    STAGE,
    Receipt,
    TaskReceipt,
)
from mlflow_ctx_autolog.delivery.records import Destination
from mlflow_ctx_autolog.driver.attempts import Attempt
from mlflow_ctx_autolog.driver.mlflow_traces import is_task, said_fields, totals_of
from mlflow_ctx_autolog.spans.amounts import Amounts, add
from mlflow_ctx_autolog.spans.attributes import PARTITION
from mlflow_ctx_autolog.spans.call_sums import CallSums
from mlflow_ctx_autolog.spans.record import SpanRecord
from mlflow_ctx_autolog.spans.trace_update import latest

__all__ = ["Book", "Books", "Unfinished", "by_task", "key_of"]

# Traces that are kept; of older ones, what comes late is stored but not counted.
_TRACES = 100


@dataclass
class Unfinished:
    """A task attempt that the store has spans of, and that has not told what it made.

    Args:
        receipt: What its spans that are stored come to.
        host: The host that it ran on; empty where it does not say.
        is_known: Whether nothing else of it is left there.
        is_running: Whether Spark says that it has not ended.
    """

    receipt: TaskReceipt
    host: str
    is_known: bool = False
    is_running: bool = False

    @classmethod
    def of(cls, trace_id: str, task: Any, below: Sequence[Any]) -> Unfinished:
        """Return the attempt whose span is ``task``, with it and what is stored below it."""
        usage, cost = totals_of(below)
        receipt = TaskReceipt(
            trace_id,
            task.span_id,
            len(below),
            len(below),
            usage=usage,
            cost=cost,
            attempt=task.get_attribute(ATTEMPT),
            stage=task.get_attribute(STAGE),
        )
        return cls(receipt, str(task.get_attribute("host.name") or ""))


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
        found: How many spans the store has of a task attempt, by the span of each.
        unfinished: Attempts that have left spans in the store, but no receipt.
        silent: Attempts that have told nothing, by what Spark knows of them.
        too_late: Ids of spans that came when a store for whole traces had the trace.
        has_ended: Whether the root has ended.
        ended: When that was known, in milliseconds since the epoch; None before.
        was_read: How many spans the store had when they were read last, and which attempts had
            told nothing then.
        written: What :meth:`known` and the receipt were when they were written; None if they were
            not.
        priced: What it has cost, as it was written.
        previews: What was written of it for MLflow's list of traces, by the field.
        is_complete: Whether the store had all spans when it was last asked.
        ended_tasks: Span ids of tasks whose spans have come as they were when they ended.
        was_warned_of: Whether the user knows that it is not complete.
        was_silence_told: Whether the user knows that tasks left no spans of their calls.
        handed_over: Functions that were handed to Spark in it.
        settling: Held while the store is asked.
        opened: When it was handed to Spark first, on the monotonic clock.
        touched: When it was last.
        name: What its root is called; None before that is known.
        shown: How many tasks had told when the user was shown what it came to; None before.
        root: The root of an action's trace, which no span of the driver is; None where one is.
        whole: Its spans by their ids, where the store takes whole traces only and it is we who
            store it.
        in_whole: Ids of the spans with which MLflow stores it.
        own_words: What was said of it on the driver, by the names of an update.
        closed_by_tasks: Whether it is that of an action which its tasks have opened, and close, as
            on Spark Connect: the driver writes nothing of it.
        numbers: The numbers of task attempts that are known, by stage and partition, where none
            brings a receipt.
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
    found: dict[str, int] = field(default_factory=dict)
    unfinished: dict[str, Unfinished] = field(default_factory=dict)
    silent: Sequence[Attempt] = ()
    too_late: set[str] = field(default_factory=set)
    has_ended: bool = False
    ended: int | None = None
    was_read: tuple[int, frozenset[int]] | None = None
    written: tuple[tuple[tuple[Amounts, Amounts], dict[str, str]], dict[str, Any]] | None = None
    priced: Amounts = field(default_factory=dict)
    previews: dict[str, str] = field(default_factory=dict)
    is_complete: bool = False
    ended_tasks: set[str] = field(default_factory=set)
    was_warned_of: bool = False
    was_silence_told: bool = False
    handed_over: int = 0
    settling: threading.Lock = field(default_factory=threading.Lock)
    opened: float = field(default_factory=time.monotonic)
    touched: float = 0.0
    name: str | None = None
    shown: int | None = None
    root: SpanRecord | None = None
    whole: dict[str, Any] = field(default_factory=dict)
    in_whole: set[str] = field(default_factory=set)
    own_words: frozenset[str] = frozenset()
    closed_by_tasks: bool = False
    numbers: dict[tuple[int, int], set[int]] = field(default_factory=dict)

    @property
    def trace_id(self) -> str:
        return str(self.info.trace_id)

    @property
    def is_ours(self) -> bool:
        """Whether we store the trace, rather than MLflow."""
        return self.delivers or self.root is not None or bool(self.whole)

    @property
    def has_totals(self) -> bool:
        """Whether what the trace comes to, and tasks say of it, was written as it is now."""
        written = self.written
        return self.closed_by_tasks or (written is not None and written[0] == self.known())

    def has_written(self, receipt: Receipt) -> bool:
        """Whether that, and what became of its spans, was written as it is now."""
        return self.closed_by_tasks or self.written == (self.known(), receipt.summary())

    def known(self) -> tuple[tuple[Amounts, Amounts], dict[str, str]]:
        """Return what the trace comes to, and what tasks say of it."""
        return self.totals(), self.trace_update()

    @property
    def made(self) -> int:
        told = sum(
            max(receipt.made, self.found.get(span_id, 0) + receipt.lost)
            for span_id, receipt in self.receipts.items()
        )
        # The root of an action that its tasks have opened is there with the first of them.
        own = min(1, len(self.tasks())) if self.closed_by_tasks else self.spans
        return own + told + sum(each.receipt.made for each in self._unfinished())

    @property
    def unknown(self) -> dict[str, int]:
        """How many attempts have not told what they made, by the host that they ran on."""
        hosts = Counter(each.host for each in self._unfinished() if not each.is_known)
        hosts.update(each.host for each in self.silent)
        # Spark numbers the attempts of a task from 0 on, and begins another where one has failed.
        failed = sum(max(numbers) + 1 - len(numbers) for numbers in self.numbers.values())
        return dict(hosts) | ({"": hosts[""] + failed} if failed else {})

    @property
    def awaits_tasks(self) -> bool:
        """Whether attempts may be about to tell: which have not ended, as far as is known."""
        is_told = self.receipts_come_home or not self.unknown
        attempts: list[Attempt | Unfinished] = [*self.silent, *self._unfinished()]
        return any(each.is_running for each in attempts) or not is_told

    def note_silent(self, attempts: Sequence[Attempt]) -> None:
        """Take what Spark knows of attempts that have told nothing.

        Args:
            attempts: All of them, those whose spans were found since and those of which nothing
                can be left on their hosts among them.
        """
        told = {receipt.attempt for receipt in self.receipts.values()}
        running = {each.attempt for each in attempts if each.is_running}
        known = {each.attempt for each in attempts if each.is_swept}
        for each in self._unfinished():
            each.is_known = each.receipt.attempt in known
            each.is_running = each.receipt.attempt in running
        found = {each.receipt.attempt for each in self._unfinished()}
        self.silent = [
            each for each in attempts if not each.is_swept and each.attempt not in told | found
        ]

    def note_number(self, task: Any) -> None:
        """Take from the span of a task attempt which attempt of its task it was."""
        stage, partition, number = (task.get_attribute(name) for name in (STAGE, PARTITION, NUMBER))
        if None not in (stage, partition, number):
            self.numbers.setdefault((stage, partition), set()).add(number)

    def must_read(self, stored: int, attempts: Sequence[Attempt]) -> bool:
        """Whether the store's spans may tell more than is known.

        Args:
            stored: How many there are.
            attempts: Those that have told nothing, as far as Spark knows.
        """
        if self.receipts_come_home and stored == self.made and not attempts:
            return False
        is_open = any(not each.is_known for each in self._unfinished())
        return is_open or self.was_read != (stored, frozenset(each.attempt for each in attempts))

    def _unfinished(self) -> list[Unfinished]:
        return [each for span_id, each in self.unfinished.items() if span_id not in self.receipts]

    def tasks(self) -> list[TaskReceipt]:
        return [*self.receipts.values(), *(each.receipt for each in self._unfinished())]

    def updates(self) -> list[Mapping[str, str]]:
        """Return what tasks have said of the trace, that of the latest attempt last."""
        tasks = [task for task in list(self.receipts.values()) if task.trace_update]
        return [task.trace_update for task in sorted(tasks, key=lambda task: task.attempt or 0)]

    def trace_update(self) -> dict[str, str]:
        """Return what holds of it."""
        return latest(self.updates())

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
        book.touched = time.monotonic()
        self._books[key_of(book.trace_id)] = book
        self._books.move_to_end(key_of(book.trace_id))
        over = [key for key, each in self._books.items() if each.has_ended]
        for key in over[: max(0, len(self._books) - _TRACES)]:
            del self._books[key]

    def forget(self, trace_id: str) -> None:
        """Strike a trace off that nobody is to ask for."""
        self._books.pop(key_of(trace_id), None)

    def note_words(self, span: Any) -> None:
        """Note what the user has said of a trace, when its root is about to end."""
        if span.parent_id is None and (book := self.of(span.trace_id)) is not None:
            book.own_words = said_fields(book.trace_id)

    def told_stages(self, book: Book) -> tuple[dict[int, set[int]], set[int]]:
        """Return, by their stages, the attempts that have told of a trace; and stages of others."""
        told: dict[int, set[int]] = {}
        others: set[int] = set()
        for each in self.all():
            for receipt in list(each.receipts.values()):
                if receipt.stage is None or receipt.attempt is None:
                    continue
                if each is book:
                    told.setdefault(receipt.stage, set()).add(receipt.attempt)
                else:
                    others.add(receipt.stage)
        return told, others

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
