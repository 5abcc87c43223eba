"""What comes home to the driver with tasks, and what workers leave for it in a directory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.delivery.deliveries import Deliveries
from mlflow_ctx_autolog.delivery.handed_over import Acknowledgements
from mlflow_ctx_autolog.delivery.receipts import TaskReceipt
from mlflow_ctx_autolog.delivery.records import Destination, Record
from mlflow_ctx_autolog.delivery.recovery import recover
from mlflow_ctx_autolog.delivery.relay import Collected, announce_driver, collect
from mlflow_ctx_autolog.delivery.repeated import Repeated
from mlflow_ctx_autolog.delivery.segments import spool_files
from mlflow_ctx_autolog.driver.books import Book, Books, key_of
from mlflow_ctx_autolog.driver.exports import add_to_trace
from mlflow_ctx_autolog.driver.mlflow_traces import info_of_json, info_of_trace, own_words
from mlflow_ctx_autolog.exceptions import StoreError
from mlflow_ctx_autolog.log_ins import without_credentials
from mlflow_ctx_autolog.spans.attributes import OUTCOME, RUNNING, SPAN_TYPE
from mlflow_ctx_autolog.spans.otlp import decode
from mlflow_ctx_autolog.spans.record import SpanRecord
from mlflow_ctx_autolog.spans.values import dump
from mlflow_ctx_autolog.stores.sending import send
from mlflow_ctx_autolog.stores.stored_trace import TRACE_KEY
from mlflow_ctx_autolog.stores.tracking_store import (
    current_tracking_uri,
    span_table,
    spans_of,
    store_takes_spans,
)
from mlflow_ctx_autolog.tracing import active_workspace

__all__ = ["Arrival", "Homecoming"]

# What a task brings home: its receipt as JSON, if it is its own; tracking URI and experiment that
# the spans belong to; the records that the worker could not store itself; and by what they are
# acknowledged: the name of the worker's outbox, and a number.
Arrival = tuple[Any, ...]

# Seconds to wait before it is looked again for what is on its way.
_LOOK = 0.05


class Homecoming:
    """Enters what tasks tell, and sees to it that what they could not store is stored.

    Args:
        books: The registry of traces.
        deliveries: The ways to the stores.
        config: Returns the settings in force.
        enter: Takes the receipt of a task.
        settle_soon: Has traces that have ended settled anew.
        warn: Warns of a subject once.

    Attributes:
        collector: Looks again and again for what workers have left, while there may be some.
        acknowledgements: Which batches have arrived, for workers to be told.
        reasons: Why workers could not store spans, by the address that they were for.
        too_late: Spans that came when a store for whole traces had their trace, which is in no
            book: the trace's key by their ids.
    """

    def __init__(
        self,
        books: Books,
        deliveries: Deliveries,
        config: Callable[[], Config],
        enter: Callable[[TaskReceipt], None],
        settle_soon: Callable[[], None],
        warn: Callable[[str, str], None],
    ) -> None:
        self._books = books
        self._deliveries = deliveries
        self._config = config
        self._enter = enter
        self._settle_soon = settle_soon
        self._warn = warn
        self.reasons: dict[str, str] = {}
        self.too_late: dict[str, str] = {}
        self._driver_id: str | None = None
        self._collecting = threading.Lock()
        self.collector = Repeated(self.collect, "collector")
        self.acknowledgements = Acknowledgements()
        # The spans of whole traces that are about to be stored, by the trace's key and their ids.
        self._ending: dict[str, dict[str, Any]] = {}

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
            self.collector.wake()

    def _directory(self) -> Path | None:
        directory = self._config().spool_directory
        return None if directory is None else Path(directory)

    def collect(self) -> Collected:
        """Take what workers have left in the directory that they share with this process.

        That is what this process stores for them, and what those that were killed had not sent.
        """
        stores = {without_credentials(book.destination.tracking_uri) for book in self._books.all()}

        def is_asked(destination: Destination) -> bool:
            if destination.driver_id is not None:
                return destination.driver_id == self._driver_id
            return destination.tracking_uri in stores

        if self._driver_id is None:
            return Collected()
        with self._collecting:
            return collect(self._directory(), is_asked, self._store_collected)

    def _store_collected(self, destination: Destination, records: Sequence[Record]) -> None:
        self._store(destination, records, None)
        if not any(book.has_ended for book in self._books.all()):
            return
        spans = (_decoded(record) for record in records if record.kind == "span")
        for trace_id in {span.mlflow_trace_id for span in spans}:
            book = self._books.of(trace_id)
            if book is not None and book.has_ended and book.is_ours:
                # What it comes to is another number now.
                book.is_complete = False
                self._settle_soon()

    def sweep(self) -> bool:
        """Deliver what processes of this host that are gone have left; return whether that is all.

        Not what only other drivers can store.
        """
        has_all = True
        with self._collecting:
            for path in spool_files(self._directory()):
                try:
                    has_all &= recover(path, self._deliver).left == 0
                except BlockingIOError:
                    # Its process is alive.
                    continue
                except OSError:
                    has_all = False
        return has_all

    def _deliver(self, destination: Destination, records: Sequence[Record]) -> None:
        if destination.tracking_uri is not None:
            send(destination, records)
        elif destination.driver_id == self._driver_id:
            self._store(destination, records, None)
        else:
            raise StoreError("only the driver that they belong to can store them")

    def complete(self, book: Book, spans: dict[str, Any]) -> None:
        """Add to the spans of a trace whose root has ended what workers have left for it.

        And what tasks that Spark ends just now will leave in a moment.

        Args:
            book: The trace's.
            spans: Its spans, by their ids.
        """
        key = key_of(book.trace_id)
        self._ending[key] = spans
        deadline = time.monotonic() + self._config().flush_timeout
        try:
            # A store that takes whole traces only has no room for what comes later.
            while self.collect().held and not book.delivers and time.monotonic() < deadline:
                time.sleep(_LOOK)
        finally:
            del self._ending[key]

    def _open_action_of_receipt(self, receipt: TaskReceipt, experiment_id: str) -> None:
        """Enter the trace of an action that no span was active for, of which a task tells."""
        if (said := receipt.root) is None or self._books.of(receipt.trace_id) is not None:
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
            if record.kind != "trace" or self._books.of(record.key) is not None:
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
        book = Book(destination, info, store_takes_spans(), table)
        book.name = root.name.partition(".")[2] or root.name
        book.root, book.spans, book.has_ended = replace(root, status="OK"), 1, True
        book.own_words = own_words(info)
        with self._books.lock:
            self._books.keep(book)

    def _store(
        self, destination: Destination, records: Sequence[Record], receipt: TaskReceipt | None
    ) -> None:
        self._open_action_of_records(records)
        reason = None if receipt is None else receipt.first_error
        # Without one, the worker had no time to wait for an answer.
        if destination.tracking_uri is not None and reason is not None:
            self.reasons.setdefault(destination.tracking_uri, reason)
        by_trace: dict[str, list[Record]] = {}
        for record in self._owned(records, receipt):
            by_trace.setdefault(record.owner, []).append(record)
        late = 0
        for key, its in by_trace.items():
            late += self._store_of_trace(self._books.of(key), destination, its)
        if late:
            self._warn(
                "late",
                f"{late} spans came home after the driver's span had ended, and are lost. "
                "Run the action inside the span.",
            )

    def _store_of_trace(
        self, book: Book | None, destination: Destination, records: Sequence[Record]
    ) -> int:
        """Store records of one trace; return how many spans came too late for that."""
        workspace = active_workspace() if book is None else book.destination.workspace
        workspace = destination.workspace or workspace
        uri = current_tracking_uri() if book is None else book.destination.tracking_uri
        place: str | None = destination.experiment_id
        if store_takes_spans() if book is None else book.delivers:
            uri = destination.tracking_uri or uri
        else:
            place = span_table() if book is None else book.table
        if place is not None:
            home = Destination(uri, place, workspace=workspace)
            self._deliveries.to(home).submit_all(records)
            return 0
        late = [span for span in spans_of(records) if not self._add_to_whole(span)]
        for span in late:
            if book is not None:
                book.too_late.add(span.span_id)
            else:
                self.too_late[span.span_id] = key_of(span.trace_id)
        return len(late)

    def _owned(self, records: Sequence[Record], receipt: TaskReceipt | None) -> list[Record]:
        """Return records by the traces under which what becomes of them is counted."""
        default = "" if receipt is None else key_of(receipt.trace_id)
        owned = []
        for record in records:
            owner = default
            if record.kind == "span":
                with suppress(Exception):
                    span = _decoded(record)
                    owner = span.trace_id
                    if self._is_overtaken(span):
                        continue
            owned.append(record._replace(owner=owner))
        return owned

    def _is_overtaken(self, span: SpanRecord) -> bool:
        """Whether a task's span, as it was when it began, comes after how it ended.

        They may come by different ways, and the store would have the task run for ever.
        """
        book = self._books.of(span.mlflow_trace_id)
        # MLflow's own messages have texts without quotes.
        outcome = span.attributes.get(OUTCOME, "").strip('"')
        if book is None or not outcome:
            return False
        if outcome == RUNNING:
            return span.span_id in book.ended_tasks
        book.ended_tasks.add(span.span_id)
        return False

    def _add_to_whole(self, span: Any) -> bool:
        """Add a span to its trace, if that is yet to be stored as a whole."""
        book = self._books.of(span.trace_id)
        whole = self._ending.get(key_of(span.trace_id))
        if book is not None and book.is_ours:
            if book.root is not None and span.parent_id is None:
                # The root is written here.
                return True
            whole = book.whole
            book.written = None
        elif book is not None and span.span_id in book.in_whole:
            # What was handed over is kept by the worker, and may be brought by others again.
            return True
        if whole is None:
            return bool(add_to_trace(span))
        whole[span.span_id] = span
        return True


def _decoded(record: Record) -> SpanRecord:
    return next(decode(record.payload))
