"""The driver's book: what was made, what the store has, and what a trace comes to in all."""

from __future__ import annotations

import atexit
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.delivery.deliveries import Deliveries
from mlflow_ctx_autolog.delivery.handed_over import Acknowledgements
from mlflow_ctx_autolog.delivery.outbox import Outbox
from mlflow_ctx_autolog.delivery.receipts import Receipt, TaskReceipt
from mlflow_ctx_autolog.delivery.relay import Collected, announce_driver, collect
from mlflow_ctx_autolog.delivery.repeated import Repeated
from mlflow_ctx_autolog.delivery.sender import Delivery
from mlflow_ctx_autolog.delivery.spool import Destination, Record, default_directory
from mlflow_ctx_autolog.driver.job_sums import job_sums, sums_of
from mlflow_ctx_autolog.exceptions import IncompleteTraceError, StoreError
from mlflow_ctx_autolog.log_ins import without_credentials
from mlflow_ctx_autolog.spans.amounts import Amounts, add
from mlflow_ctx_autolog.spans.attributes import SPAN_TYPE
from mlflow_ctx_autolog.spans.call_sums import CallSums
from mlflow_ctx_autolog.spans.content import ContentPolicy
from mlflow_ctx_autolog.spans.otlp import decode, encode
from mlflow_ctx_autolog.spans.record import SpanRecord
from mlflow_ctx_autolog.spans.values import dump
from mlflow_ctx_autolog.stores.sending import send
from mlflow_ctx_autolog.stores.stored_trace import (
    LINKED_TRACE,
    SPARK_FACTS,
    TRACE_KEY,
    split_metadata,
)
from mlflow_ctx_autolog.stores.tracking_store import (
    count_spans,
    current_tracking_uri,
    read_trace,
    span_record,
    span_table,
    spans_of,
    store_takes_spans,
    store_whole_trace,
    sum_of_costs,
    trace_record,
)
from mlflow_ctx_autolog.tracing import (
    DriverTracing,
    active_span_ids,
    active_trace,
    active_workspace,
    add_to_trace,
    complete_info,
    end_info,
    filtered,
    flush_exports,
    info_of_json,
    info_of_trace,
    is_task,
    open_spans,
    record_no_totals,
    record_totals,
    totals_of,
)

__all__ = ["Arrival", "Ledger", "write_stored_totals"]

_logger = logging.getLogger(__name__)

T = TypeVar("T")

# What a task brings home: its receipt as JSON, if it is its own; tracking URI and experiment that
# the spans belong to; the records that the worker could not store itself; and by what they are
# acknowledged: the name of the worker's outbox, and a number.
Arrival = tuple[Any, ...]

# Seconds to wait at first before it is looked again for what is on its way.
_LOOK = 0.05
# Seconds after the last late task in which others may come, before the totals are written again.
_LULL = 1.0
# Traces that are kept in the book; of older ones, what comes late is stored but not counted.
_TRACES = 100
# Spans that are read back at most, to learn of tasks that could not bring a receipt home.
_READABLE = 20_000
# Tasks that are kept in the book of those that are traces of their own.
_TASKS = 10_000
# Characters that a store takes as one piece of a trace's metadata.
_LONGEST_METADATA = 8000


@dataclass
class _Book:
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


class Ledger:
    """Keeps one book for each trace that was handed to Spark.

    A trace is announced when its context is captured, so that it can be seen while it runs, and
    so that storing a span costs no more in a large trace than in a small one. From then on its
    spans on the driver go the same way as those of workers. When its root ends, its totals are
    written and the store is asked what it has; likewise when tasks finish later.

    Args:
        config: Returns the settings in force.
        spark_facts: Returns what Spark knows of its jobs since a time, in milliseconds since the
            epoch, as a text to keep with the trace; None where it does not say.
        progress: Is shown the receipt of each task that has ended.
    """

    def __init__(
        self,
        config: Callable[[], Config],
        spark_facts: Callable[[int], str | None] | None = None,
        progress: Callable[[TaskReceipt], None] = lambda _: None,
    ) -> None:
        self._config = config
        self._spark_facts = spark_facts
        self._progress = progress
        self._lock = threading.Lock()
        # The trace that was handed to Spark last comes last.
        self._books: OrderedDict[str, _Book] = OrderedDict()
        self._without_trace: dict[str, TaskReceipt] = {}
        self._deliveries = Deliveries(self._new_delivery)
        self._tracing = DriverTracing(self)
        self._is_closing = False
        self._is_exiting = False
        self._timer: threading.Timer | None = None
        self._watches_exit = False
        self._last_settled = -math.inf, -math.inf
        self._warned: set[str] = set()
        # Why workers could not store spans, by the address that they were for.
        self._came_home: dict[str, str] = {}
        self._driver_id: str | None = None
        self._collecting = threading.Lock()
        self._collector = Repeated(self._collect, "collector")
        self.acknowledgements = Acknowledgements()
        # The spans of whole traces that are about to be stored, by the trace's key and their ids.
        self._ending: dict[str, dict[str, Any]] = {}
        # For whoever diagnoses to say more.
        self.likely_causes: Callable[[Any], str] = lambda _: "ctx_autolog.doctor() tells why."

    # What is captured, and what comes home.

    def open(self, *, receipts_come_home: bool, functions: int = 0) -> None:
        """Announce the trace of the active span, if there is one.

        Args:
            receipts_come_home: Whether tasks that succeed bring a receipt to :meth:`receive`.
            functions: How many functions are handed to Spark with it.
        """
        if self._open_again(receipts_come_home, functions):
            return
        info = active_trace()
        if info is None:
            return
        with self._lock:
            self._is_closing = False
            self._tracing.install()
            book = self._book_of(info.trace_id)
            is_new = book is None
            if book is None:
                table = span_table()
                destination = Destination(
                    current_tracking_uri(),
                    table or str(info.experiment_id),
                    workspace=active_workspace(),
                )
                book = _Book(destination, info, store_takes_spans(), table, receipts_come_home)
            self._keep(book)
            book.receipts_come_home &= receipts_come_home
            book.handed_over += functions
        if book.delivers:
            self._announce(book, info if is_new else None)

    def _open_again(self, receipts_come_home: bool, functions: int) -> bool:
        """Enter further functions, where all of the active span is announced; else return False."""
        if (ids := active_span_ids()) is None:
            return False
        trace_id, span_id = ids
        with self._lock:
            book = self._book_of(trace_id)
            if self._is_closing or book is None or span_id not in book.announced:
                return False
            self._keep(book)
            book.receipts_come_home &= receipts_come_home
            book.handed_over += functions
        return True

    def _keep(self, book: _Book) -> None:
        """Make a trace the last that was handed to Spark, and forget those of long ago."""
        self._books[_key(book.trace_id)] = book
        self._books.move_to_end(_key(book.trace_id))
        over = [trace_id for trace_id, each in self._books.items() if each.has_ended]
        for trace_id in over[: max(0, len(self._books) - _TRACES)]:
            del self._books[trace_id]

    def _open_action_of_receipt(self, receipt: TaskReceipt, experiment_id: str) -> None:
        """Enter the trace of an action that no span was active for, of which a task tells."""
        if (said := receipt.root) is None or self._book_of(receipt.trace_id) is not None:
            return
        root = SpanRecord(
            receipt.trace_id.removeprefix("tr-"),
            str(said["span_id"]),
            None,
            str(said["name"]),
            int(said["began"]),
            time.time_ns(),
            {SPAN_TYPE: dump("CHAIN")},
        )
        metadata = {**said["metadata"], TRACE_KEY: receipt.trace_id}
        info = info_of_trace(
            receipt.trace_id, experiment_id, root.start, metadata, dict(said["tags"])
        )
        self._open_action(root, info)

    def _open_action_of_records(self, records: Sequence[Record]) -> None:
        """The same where Spark has stopped reading a task before it could tell."""
        for record in records:
            if record.kind != "trace" or self._book_of(record.key) is not None:
                continue
            info = info_of_json(record.payload)
            if info.trace_metadata.get(TRACE_KEY) != record.key:
                # That of a task, whose root stands for a span elsewhere.
                continue
            for root in (_decoded(each) for each in records if each.kind == "span"):
                if root.parent_id is None and root.mlflow_trace_id == record.key:
                    self._open_action(root, info)

    def _open_action(self, root: SpanRecord, info: Any) -> None:
        table = span_table()
        destination = Destination(
            current_tracking_uri(),
            table or str(info.experiment_id),
            workspace=active_workspace(),
        )
        book = _Book(destination, info, store_takes_spans(), table)
        book.root, book.spans, book.has_ended = replace(root, status="OK"), 1, True
        with self._lock:
            self._keep(book)

    def _book_of(self, trace_id: str) -> _Book | None:
        return self._books.get(_key(trace_id))

    def _announce(self, book: _Book, info: Any) -> None:
        delivery = self._deliveries.to(book.destination)
        spans = [span for span in open_spans(book.trace_id) if span.span_id not in book.announced]
        book.announced.update(span.span_id for span in spans)
        book.spans = len(book.announced)
        policy = ContentPolicy(self._config())
        records = [span_record(filtered(span, policy)) for span in spans]
        if info is not None:
            delivery.configure(self._config())
            record_no_totals(info)
            info.trace_metadata[TRACE_KEY] = info.trace_id
            records.append(trace_record(info))
        delivery.submit_all(records, at_once=True)

    def spent(self) -> dict[str, float]:
        """Return what the calls of the active span's trace have come to, as tasks have told."""
        info = active_trace()
        book = None if info is None else self._book_of(info.trace_id)
        tasks = [] if book is None else list(book.receipts.values())
        return {
            "calls": sum(task.calls for task in tasks),
            "cost": sum(task.spent for task in tasks),
        }

    def receive(self, arrivals: Sequence[Arrival]) -> None:
        """Take what tasks bring home. Never raises: Spark calls this."""
        for arrival in arrivals:
            try:
                self._receive(arrival)
            except Exception as error:
                self._warn("broken", f"What a task brought home could not be read: {error!r}")

    def _receive(self, arrival: Arrival) -> None:
        # Workers of an earlier release name no outbox.
        receipt, tracking_uri, experiment_id, fields, *outbox = arrival
        records = [Record(*each) for each in fields]
        came = None if receipt is None else TaskReceipt.from_json(receipt)
        if came is not None:
            self._open_action_of_receipt(came, experiment_id)
        if records:
            self._store(Destination(tracking_uri, experiment_id), records, came)
            for token, number in outbox:
                self.acknowledgements.note(token, number)
        if came is not None:
            self._enter(came)

    def meet_workers(self, driver_id: str, *, stores_for_them: bool) -> None:
        """Let workers of this host leave in a directory what they have no time or way to store.

        Args:
            driver_id: By which they know this process.
            stores_for_them: Whether it is this process that stores their spans.
        """
        self._driver_id = driver_id
        if stores_for_them:
            # Else they hand over with their tasks as much as Spark lets them.
            with suppress(OSError):
                announce_driver(self._directory(), driver_id)
            self._collector.wake()

    def _directory(self) -> Path | None:
        directory = self._config().spool_directory
        return None if directory is None else Path(directory)

    def _collect(self) -> Collected:
        """Take what workers have left in the directory that they share with this process.

        That is what this process stores for them, and what those that were killed had not sent.
        """
        books = list(self._books.values())
        stores = {without_credentials(book.destination.tracking_uri) for book in books}

        def is_asked(destination: Destination) -> bool:
            if destination.driver_id is not None:
                return destination.driver_id == self._driver_id
            return destination.tracking_uri in stores

        if self._driver_id is None:
            return Collected()
        with self._collecting:
            return collect(self._directory(), is_asked, self._store_collected)

    def _collect_all(self, book: _Book) -> None:
        """Collect what there is, and what tasks that Spark ends just now will leave in a moment."""
        deadline = time.monotonic() + self._config().flush_timeout
        # A store that takes whole traces only has no room for what comes later.
        while self._collect().held and not book.delivers and time.monotonic() < deadline:
            time.sleep(_LOOK)

    def _store_collected(self, destination: Destination, records: Sequence[Record]) -> None:
        self._store(destination, records, None)
        if not any(book.has_ended for book in list(self._books.values())):
            return
        spans = (_decoded(record) for record in records if record.kind == "span")
        for trace_id in {span.mlflow_trace_id for span in spans}:
            if (book := self._book_of(trace_id)) is not None and book.has_ended and book.is_ours:
                # What it comes to is another number now.
                book.is_complete = False
                self._settle_soon()

    def _enter(self, receipt: TaskReceipt) -> None:
        self._progress(receipt)
        book = self._book_of(receipt.trace_id)
        if book is None:
            if receipt.silence is not None:
                self._warn("silence", self._silence("Tasks", receipt.silence))
            self._without_trace[receipt.task_span_id] = receipt
            if len(self._without_trace) > _TASKS:
                del self._without_trace[next(iter(self._without_trace))]
            return
        book.receipts[receipt.task_span_id] = receipt
        self._collector.wake()
        if book.has_ended:
            self._warn_of_silence(book)
            if book.is_ours:
                self._settle_soon()

    def _store(
        self, destination: Destination, records: Sequence[Record], receipt: TaskReceipt | None
    ) -> None:
        self._open_action_of_records(records)
        book = None if receipt is None else self._book_of(receipt.trace_id)
        workspace = active_workspace() if book is None else book.destination.workspace
        workspace = destination.workspace or workspace
        reason = None if receipt is None else receipt.first_error
        # Without one, the worker had no time to wait for an answer.
        if destination.tracking_uri is not None and reason is not None:
            self._came_home.setdefault(destination.tracking_uri, reason)
        if store_takes_spans() if book is None else book.delivers:
            own = current_tracking_uri() if book is None else book.destination.tracking_uri
            uri = destination.tracking_uri or own
            home = Destination(uri, destination.experiment_id, workspace=workspace)
            self._deliveries.to(home).submit_all(records)
            return
        table = span_table() if book is None else book.table
        if table is not None:
            uri = current_tracking_uri() if book is None else book.destination.tracking_uri
            home = Destination(uri, table, workspace=workspace)
            self._deliveries.to(home).submit_all(records)
            return
        late = [span for span in spans_of(records) if not self._add_to_whole(span)]
        if late:
            self._warn(
                "late",
                f"{len(late)} spans came home after the driver's span had ended, and are lost. "
                "Run the action inside the span.",
            )

    def _add_to_whole(self, span: Any) -> bool:
        """Add a span to its trace, if that is yet to be stored as a whole."""
        book = self._book_of(span.trace_id)
        whole = self._ending.get(_key(span.trace_id))
        if book is not None and book.root is not None:
            if span.parent_id is None:
                # The root is written here.
                return True
            whole = book.whole
            book.written_totals = None
        if whole is None:
            return bool(add_to_trace(span))
        whole[span.span_id] = span
        return True

    # What MLflow exports on the driver.

    def take_span(self, span: Any, experiment_id: str) -> bool:
        """Store a span of the driver that has ended, if its trace is in the book."""
        book = self._book_of(span.trace_id)
        if book is None or not book.delivers or book.destination.experiment_id != experiment_id:
            return False
        self._deliveries.to(book.destination).submit_all([span_record(span)])
        return True

    def take_trace(self, trace: Any) -> bool:
        """Complete a trace whose root has ended, and store it, if it is in the book."""
        book = self._book_of(trace.info.trace_id)
        if book is None:
            return False
        # By their ids, as a later record of a span takes the place of an earlier one.
        spans = {span.span_id: span for span in trace.data.spans}
        self._ending[_key(book.trace_id)] = spans
        self._collect_all(book)
        del self._ending[_key(book.trace_id)]
        trace.data.spans[:] = spans.values()
        if book.delivers:
            self._take_back_if_unsupported(book, trace)
        # In a store for whole traces, those of workers are among its spans.
        own = _by_task(trace.data.spans).get(None, [])
        book.info = complete_info(trace)
        book.info.trace_metadata[TRACE_KEY] = book.trace_id
        book.spans = len(own)
        book.usage, book.cost = totals_of(own)
        book.sums = sums_of(own)
        if not book.delivers and book.table is None:
            # Spark may have stopped reading a task before it could tell.
            self._learn_of_tasks(book, trace.data.spans)
        book.has_ended = True
        record_totals(book.info, *book.totals())
        self._record_facts(book)
        book.info.trace_metadata.update(job_sums(book.sums, book.tasks()))
        self._close_if_over()
        if book.delivers:
            began = time.monotonic()
            self._settle_and_warn(book, self._config().flush_timeout, give_up_if_down=True)
            self._last_settled = began, time.monotonic()
        self._warn_of_silence(book)
        return book.delivers

    def _take_back_if_unsupported(self, book: _Book, trace: Any) -> None:
        """Where the server takes no single spans after all, have MLflow store the whole trace."""
        delivery = self._deliveries.to(book.destination)
        if not delivery.waiting or delivery.flush(self._config().flush_timeout, give_up=True):
            return
        if not delivery.is_unsupported:
            return
        book.delivers = False
        known = {span.span_id for span in trace.data.spans}
        for record in delivery.take():
            if record.kind == "span" and record.key in known:
                continue
            (span,) = spans_of([record]) or (None,)
            if span is not None and span.trace_id == book.trace_id:
                trace.data.spans.append(span)
            elif record.key != book.trace_id:
                delivery.submit_all([record])

    # What the user asks.

    def receipt(self, trace_id: str | None, timeout: float) -> Receipt:
        """Return what became of the spans of a trace; by default the last one handed to Spark.

        Raises:
            KeyError: The trace was not handed to Spark.
        """
        if (trace_id is None and not self._books) or any(
            task.trace_id == trace_id for task in list(self._without_trace.values())
        ):
            return self._receipt_without_trace(trace_id, timeout)
        book = self._book_of(trace_id or next(reversed(self._books)))
        if book is None:
            raise KeyError(trace_id)
        deadline = time.monotonic() + timeout
        if not book.has_ended:
            # MLflow may have its end still to export.
            self._within(deadline, flush_exports)
        return self._settle(book, max(0.0, deadline - time.monotonic()))

    def flush(self, timeout: float, *, give_up_if_down: bool = False) -> bool:
        """Store what can be stored within the timeout; return whether nothing waits.

        Args:
            timeout: Seconds to wait at most.
            give_up_if_down: Whether to try but once where the store is known to be down.
        """
        deadline = time.monotonic() + timeout
        self._collect()
        flushed = self._deliveries.flush(timeout, give_up_if_down=give_up_if_down)
        for book in self._unsettled():
            remaining = max(0.0, deadline - time.monotonic())
            self._settle_and_warn(book, remaining, give_up_if_down=give_up_if_down)
        return flushed

    def await_workers(self, timeout: float) -> None:
        """Wait until the store has what tasks have told of, before their processes may be gone.

        Args:
            timeout: Seconds to wait at most, for all traces.
        """
        deadline = time.monotonic() + timeout
        for book in list(self._books.values()):
            told = list(book.receipts.values())
            is_waited_for = any(task.delivered < task.made for task in told)
            if book.is_complete or book.was_warned_of or not book.delivers or not is_waited_for:
                continue
            self._within(deadline, flush_exports)
            self._settle(book, max(0.0, deadline - time.monotonic()), give_up_if_down=True)

    def check(self, timeout: float, since: float) -> None:
        """Raise for the first trace that has ended and is not complete in the store.

        Args:
            timeout: Seconds to wait at most.
            since: A time on the monotonic clock; traces that were handed to Spark before it are
                left alone.

        Raises:
            IncompleteTraceError: There is one.
        """
        deadline = time.monotonic() + timeout
        self._within(deadline, flush_exports)
        for book in self._unsettled():
            if book.opened < since:
                continue
            receipt = self._settle(book, max(1.0, deadline - time.monotonic()))
            if not receipt.complete:
                raise IncompleteTraceError(self.explain(receipt), receipt)

    def forget(self, trace_id: str) -> None:
        """Strike a trace off that nobody is to ask for."""
        self._books.pop(_key(trace_id), None)

    def close(self) -> None:
        """Leave export to MLflow again, once the traces that are open have ended."""
        self._is_closing = True
        self._close_if_over()

    def explain(self, receipt: Receipt) -> str:
        """Return a text on a receipt that is not complete: what, why, and what to do."""
        reason = receipt.first_error or (
            "the store does not answer"
            if receipt.stored is None
            else "none was refused; a worker that is killed takes with it what it holds"
        )
        directory = self._config().spool_directory or default_directory()
        return (
            f"Trace {receipt.trace_id} is not complete in the tracking store: {receipt}. The "
            f"first reason: {reason}. What waits is sent again as long as this process lives; "
            f"after that, mlflow-ctx-autolog recover {directory} sends what is left on a host."
        )

    # How a trace is settled.

    def _unsettled(self) -> list[_Book]:
        return [
            book
            for book in list(self._books.values())
            if book.has_ended and book.is_ours and not (book.is_complete and book.has_totals)
        ]

    def _settle_and_warn(self, book: _Book, timeout: float, *, give_up_if_down: bool) -> None:
        # Once the user was told that spans are missing, nobody is kept waiting for them again.
        patient = not book.was_warned_of
        receipt = self._settle(book, timeout, give_up_if_down=give_up_if_down, patient=patient)
        if not receipt.complete:
            if not book.was_warned_of:
                book.was_warned_of = True
                _logger.warning("%s", self.explain(receipt))
        elif (reason := self._came_home.get(str(book.destination.tracking_uri))) is not None:
            self._warn(
                f"unreachable {book.destination.tracking_uri}",
                f"Workers could not store all spans in {book.destination.tracking_uri}, so they "
                f"came home and the driver has stored them. The first reason: {reason}. "
                'Where workers never reach the store, transport="driver" spares them the attempt.',
            )

    def _warn_of_silence(self, book: _Book) -> None:
        """Say once that functions ran with tracing on and left no spans, where nothing else does.

        That a function made no model call is no silence: its task has a span, or a receipt.
        """
        if book.was_silence_told:
            return
        tasks = book.tasks()
        reasons = [task.silence for task in tasks if task.silence is not None]
        if reasons:
            subject = f"{len(reasons)} of {len(tasks)} tasks of trace {book.trace_id}"
            message = self._silence(subject, reasons[0])
        elif book.handed_over and not tasks and not book.receipts_come_home and book.is_complete:
            message = (
                f"{book.handed_over} functions were handed to Spark in trace {book.trace_id}, and "
                "there is not a span of their tasks. If they have run by now, something has kept "
                f"all spans from the store. {self.likely_causes('tasks')}"
            )
        else:
            return
        book.was_silence_told = True
        _logger.warning("%s", message)

    def _silence(self, subject: str, reason: str) -> str:
        said = f"{subject} ran on workers, and their model calls left no span: {reason}."
        return f"{said} {self.likely_causes('calls')}"

    def _settle(
        self, book: _Book, timeout: float, *, give_up_if_down: bool = False, patient: bool = True
    ) -> Receipt:
        deadline = time.monotonic() + timeout
        self._collect()
        with _held(book.settling, timeout):
            if book.root is not None:
                self._close_action(book, deadline)
            delivery = self._deliveries.to(book.destination)
            give_up = give_up_if_down and delivery.store_is_down
            answered = delivery.flush(timeout, give_up=give_up)
            stored = None
            # A store that takes whole traces only has nothing of one that is open.
            if answered and (book.delivers or book.has_ended):
                # Those that the store does not have do not arrive, however long one waits.
                refused = delivery.set_aside + sum(task.set_aside for task in book.tasks())
                # With some time left to ask once more.
                until = deadline - 0.2 * timeout if patient else 0.0
                stored = self._within(deadline, self._ask, book, refused, until)
            if book.delivers and book.has_ended and not book.has_totals:
                self._write_totals(book, delivery, deadline, ask=stored is not None)
            tasks = book.tasks()
            lost = sum(task.lost for task in tasks)
            missing = max(0, book.made - (stored or 0) - lost)
            # Those of other traces, and what is no span, went the same way.
            lost_here = min(delivery.lost, missing)
            waiting = missing - lost_here
            if stored is None:
                waiting = min(waiting, delivery.waiting)
            receipt = Receipt.of(
                book.trace_id,
                tasks,
                made=book.made,
                stored=stored,
                waiting=waiting,
                lost=lost + lost_here,
                first_error=delivery.first_error,
                set_aside=delivery.set_aside,
            )
            book.is_complete = receipt.complete
        _logger.info("Trace %s: %s", receipt.trace_id, receipt)
        return receipt

    def _close_action(self, book: _Book, deadline: float) -> None:
        """Write the end of an action's trace as it is known now."""
        assert book.root is not None
        if book.has_totals:
            return
        book.root = replace(book.root, end=time.time_ns())
        end_info(book.info, book.root.start, book.root.end or 0)
        record = Record("span", book.root.span_id, encode(book.root))
        if book.delivers:
            self._deliveries.to(book.destination).submit_all([record])
            return
        totals = book.totals()
        record_totals(book.info, *totals)
        self._record_facts(book)
        book.info.trace_metadata.update(job_sums(book.sums, book.tasks()))
        spans = [*spans_of([record]), *book.whole.values()]
        if self._within(deadline, store_whole_trace, book.destination, book.info, spans):
            book.written_totals = totals

    def _ask(self, book: _Book, refused: int, until: float) -> int | None:
        """Ask the store how many spans it has; where that is another number, learn why.

        Args:
            book: The trace's.
            refused: Spans that are not on their way.
            until: How long to wait for those that may be, on the monotonic clock.

        Returns:
            The number; None where the store cannot be asked again.
        """
        try:
            stored = self._count(book)
        except StoreError:
            if book.is_complete:
                return None
            raise
        if not book.delivers or (book.receipts_come_home and stored == book.made):
            return stored
        if stored <= _READABLE:
            self._read_receipts(book)

        def may_arrive() -> bool:
            return stored + refused + sum(task.lost for task in book.tasks()) < book.made

        pause = _LOOK
        while may_arrive() and (remaining := until - time.monotonic()) > 0:
            time.sleep(min(pause, remaining))
            pause = min(2 * pause, 0.5)
            if self._collect().records:
                self._deliveries.to(book.destination).flush(max(0.0, until - time.monotonic()))
            stored = self._count(book)
        return stored

    def _count(self, book: _Book) -> int:
        if book.delivers:
            try:
                return count_spans(book.destination, book.trace_id)
            except StoreError as error:
                if not error.unsupported:
                    raise
        return len(read_trace(book.destination, book.trace_id)[1])

    def _read_receipts(self, book: _Book) -> None:
        """Learn of tasks that brought no receipt: attempts that failed, all on Spark Connect."""
        self._learn_of_tasks(book, read_trace(book.destination, book.trace_id)[1])

    def _learn_of_tasks(self, book: _Book, spans: Sequence[Any]) -> None:
        by_id = {span.span_id: span for span in spans}
        for task_id, below in _by_task(spans).items():
            if task_id is None or task_id in book.receipts:
                continue
            task = by_id[task_id]
            receipt = TaskReceipt.from_attributes(book.trace_id, task_id, task.attributes)
            if receipt is not None:
                self._progress(receipt)
                book.receipts[task_id] = receipt
            else:
                # Killed, or still running: what it has stored is all that is known.
                below += _linked_spans(book.destination, task)
                usage, cost = totals_of(below)
                book.unfinished[task_id] = TaskReceipt(
                    book.trace_id, task_id, len(below), len(below), usage=usage, cost=cost
                )

    def _write_totals(self, book: _Book, delivery: Outbox, deadline: float, *, ask: bool) -> None:
        totals = book.totals()
        usage, cost = totals
        unpriced = any(task.usage and not task.cost for task in book.tasks())
        is_sampled = any(task.sampled_out for task in book.tasks())
        if ask and (unpriced or not cost) and not is_sampled:
            # Most releases of MLflow price a call where they store it, so that no task knows,
            # unless it must, since not all of its calls are stored.
            found = self._within(deadline, sum_of_costs, book.destination, book.trace_id)
            cost = dict(found or cost)
        record_totals(book.info, usage, cost)
        self._record_facts(book)
        book.info.trace_metadata.update(job_sums(book.sums, book.tasks()))
        delivery.submit_all([trace_record(book.info)])
        # Where nothing was stored a moment ago, there is no point in waiting again.
        if delivery.flush(max(0.0, deadline - time.monotonic()), give_up=not ask):
            book.written_totals = totals

    def _record_facts(self, book: _Book) -> None:
        if self._spark_facts is None:
            return
        facts = self._spark_facts(int(book.info.request_time))
        # A store may have no room for a longer one.
        if facts is not None and len(facts) <= _LONGEST_METADATA:
            book.info.trace_metadata.update(split_metadata(SPARK_FACTS, facts))

    def _within(self, deadline: float, ask: Callable[..., T], *args: Any) -> T | None:
        """Return the store's answer; None where there is none by the deadline.

        But for the exit of the process, there is a second at least.
        """
        answers: list[T] = []

        def run() -> None:
            try:
                answers.append(ask(*args))
            except Exception as error:
                self._warn("ask", f"The tracking store could not be asked what it has: {error}")

        # The store may take half a minute to answer, and MLflow's own export minutes.
        thread = threading.Thread(target=run, name="mlflow-ctx-autolog-ledger", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            # At the exit of the process, there are no more threads.
            run()
        else:
            thread.join(max(0.0 if self._is_exiting else _LULL, deadline - time.monotonic()))
        return answers[0] if answers else None

    def _receipt_without_trace(self, trace_id: str | None, timeout: float) -> Receipt:
        self._collect()
        self._deliveries.flush(timeout)
        tasks = [
            task for task in list(self._without_trace.values()) if trace_id in (None, task.trace_id)
        ]
        made = sum(task.made for task in tasks)
        lost = sum(task.lost for task in tasks)
        waiting = sum(delivery.waiting for delivery in self._deliveries.all())
        # Else what is no span would be counted as one.
        waiting = min(waiting, max(0, made - lost))
        stored = made - waiting - lost
        return Receipt.of(
            trace_id, tasks, made=made, stored=stored, waiting=waiting, lost=lost, first_error=None
        )

    def _settle_soon(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            timeout = self._config().flush_timeout
            self._timer = threading.Timer(_LULL, self._settle_all, (timeout,))
            self._timer.daemon = True
            # At the exit of the process there are no more threads, and all is settled anyway.
            with suppress(RuntimeError):
                self._timer.start()

    def _settle_all(self, timeout: float) -> None:
        """Settle what has finished late. Nobody waits for it, so that each trace has its time."""
        self._deliveries.flush(timeout, give_up_if_down=True)
        for book in self._unsettled():
            self._settle_and_warn(book, timeout, give_up_if_down=True)

    def _close_if_over(self) -> None:
        if self._is_closing and all(book.has_ended for book in list(self._books.values())):
            self._tracing.uninstall()

    def _new_delivery(self, destination: Destination) -> Delivery:
        if not self._watches_exit:
            self._watches_exit = True
            atexit.register(self._at_exit)
        return Delivery(destination, send, self._config())

    def _at_exit(self) -> None:
        self._is_exiting = True
        deadline = time.monotonic() + self._config().flush_timeout
        began, ended = self._last_settled
        if time.monotonic() - ended < _LULL:
            # For the end of a trace, which MLflow's own exit handler has waited for.
            deadline -= ended - began
        # MLflow may have the end of a trace still to export, from which it is known what is down.
        self._within(deadline, flush_exports)
        self.flush(max(0.0, deadline - time.monotonic()), give_up_if_down=True)
        for book in list(self._books.values()):
            # Of tasks that have finished since, nobody has told.
            if book.has_ended and book.delivers and not book.receipts_come_home:
                remaining = max(0.0, deadline - time.monotonic())
                self._settle(book, remaining, give_up_if_down=True)

    def _warn(self, subject: str, message: str) -> None:
        with self._lock:
            if subject in self._warned:
                return
            self._warned.add(subject)
        _logger.warning("%s", message)


@contextmanager
def _held(lock: threading.Lock, timeout: float) -> Iterator[None]:
    """Hold a lock, or do without where it is not to be had in time."""
    is_held = lock.acquire(timeout=timeout)
    try:
        yield
    finally:
        if is_held:
            lock.release()


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
    for task_id, below in _by_task(spans).items():
        task = None if task_id is None else by_id[task_id]
        receipt = None
        if task is not None:
            receipt = TaskReceipt.from_attributes(trace_id, task.span_id, task.attributes)
            below += _linked_spans(destination, task) if receipt is None else []
        found = totals_of(below) if receipt is None else (receipt.usage, receipt.cost)
        for total, amounts in zip((usage, cost), found, strict=True):
            add(total, amounts)
    record_totals(info, usage, cost)
    send(destination, [trace_record(info)])


def _linked_spans(destination: Destination, task: Any) -> list[Any]:
    """Return the spans of the trace that is linked to a task's span; none where there is none."""
    trace_id = task.get_attribute(LINKED_TRACE)
    if trace_id is None:
        return []
    return read_trace(destination, trace_id)[1]


def _decoded(record: Record) -> SpanRecord:
    return next(decode(record.payload))


def _key(trace_id: str) -> str:
    """Return what the ids of a trace have in common: workers do not know of its table."""
    return trace_id.rpartition("/")[2].removeprefix("tr-")


def _by_task(spans: Sequence[Any]) -> dict[str | None, list[Any]]:
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
