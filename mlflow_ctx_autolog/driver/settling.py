"""Asking the store what it has of a trace, closing what is ours to close, and the receipt of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from mlflow_ctx_autolog.delivery.deliveries import Deliveries
from mlflow_ctx_autolog.delivery.receipts import Receipt, TaskReceipt
from mlflow_ctx_autolog.delivery.records import Record
from mlflow_ctx_autolog.delivery.sender import Delivery
from mlflow_ctx_autolog.driver.books import Book, by_task
from mlflow_ctx_autolog.driver.homecoming import Homecoming
from mlflow_ctx_autolog.driver.totals import SparkFacts, linked_spans, record_sums
from mlflow_ctx_autolog.exceptions import StoreError
from mlflow_ctx_autolog.spans.otlp import encode
from mlflow_ctx_autolog.stores.tracking_store import (
    count_spans,
    read_trace,
    spans_of,
    store_whole_trace,
    sum_of_costs,
    trace_record,
)
from mlflow_ctx_autolog.tracing import end_info, totals_of

__all__ = ["Settlement"]

_logger = logging.getLogger(__name__)

T = TypeVar("T")

# Spans that are read back at most, to learn of tasks that could not bring a receipt home.
_READABLE = 20_000


class Settlement:
    """Finds out what the store has of a trace, and writes what it comes to.

    Args:
        deliveries: The ways to the stores.
        homecoming: What workers have left.
        spark_facts: See :class:`~mlflow_ctx_autolog.driver.ledger.Ledger`.
        progress: Is shown the receipt of each task that is found.
        within: Asks the store, as :meth:`Ledger.within` does.
    """

    def __init__(
        self,
        deliveries: Deliveries,
        homecoming: Homecoming,
        spark_facts: SparkFacts | None,
        progress: Callable[[TaskReceipt], None],
        within: Callable[..., Any],
    ) -> None:
        self._deliveries = deliveries
        self._homecoming = homecoming
        self._spark_facts = spark_facts
        self._progress = progress
        self._within = within

    def settle(
        self, book: Book, timeout: float, *, give_up_if_down: bool = False, patient: bool = True
    ) -> Receipt:
        deadline = time.monotonic() + timeout
        self._homecoming.collect()
        with _held(book.settling, timeout):
            if book.root is not None:
                self._close_action(book, deadline)
            delivery = self._deliveries.to(book.destination)
            give_up = give_up_if_down and delivery.store_is_down
            answered = delivery.flush(timeout, give_up=give_up)
            stored = None
            if answered:
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

    def _close_action(self, book: Book, deadline: float) -> None:
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
        record_sums(book, *totals, self._spark_facts)
        spans = [*spans_of([record]), *book.whole.values()]
        if self._within(deadline, store_whole_trace, book.destination, book.info, spans):
            book.written_totals = totals

    def _ask(self, book: Book, refused: int, until: float) -> int | None:
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

        while book.has_ended and may_arrive() and (remaining := until - time.monotonic()) > 0:
            time.sleep(min(0.5, remaining))
            stored = self._count(book)
        return stored

    def _count(self, book: Book) -> int:
        if book.delivers:
            try:
                return count_spans(book.destination, book.trace_id)
            except StoreError as error:
                if not error.unsupported:
                    raise
        return len(read_trace(book.destination, book.trace_id)[1])

    def _read_receipts(self, book: Book) -> None:
        """Learn of tasks that brought no receipt: attempts that failed, all on Spark Connect."""
        _, spans = read_trace(book.destination, book.trace_id)
        by_id = {span.span_id: span for span in spans}
        for task_id, below in by_task(spans).items():
            if task_id is None or task_id in book.receipts:
                continue
            task = by_id[task_id]
            receipt = TaskReceipt.from_attributes(book.trace_id, task_id, task.attributes)
            if receipt is not None:
                self._progress(receipt)
                book.receipts[task_id] = receipt
            else:
                # Killed, or still running: what it has stored is all that is known.
                below += linked_spans(book.destination, task)
                usage, cost = totals_of(below)
                book.unfinished[task_id] = TaskReceipt(
                    book.trace_id, task_id, len(below), len(below), usage=usage, cost=cost
                )

    def _write_totals(self, book: Book, delivery: Delivery, deadline: float, *, ask: bool) -> None:
        totals = book.totals()
        usage, cost = totals
        unpriced = any(task.usage and not task.cost for task in book.tasks())
        is_sampled = any(task.sampled_out for task in book.tasks())
        if ask and (unpriced or not cost) and not is_sampled:
            # Most releases of MLflow price a call where they store it, so that no task knows,
            # unless it must, since not all of its calls are stored.
            found = self._within(deadline, sum_of_costs, book.destination, book.trace_id)
            cost = dict(found or cost)
        record_sums(book, usage, cost, self._spark_facts)
        delivery.submit_all([trace_record(book.info)])
        # Where nothing was stored a moment ago, there is no point in waiting again.
        if delivery.flush(max(0.0, deadline - time.monotonic()), give_up=not ask):
            book.written_totals = totals


@contextmanager
def _held(lock: threading.Lock, timeout: float) -> Iterator[None]:
    """Hold a lock, or do without where it is not to be had in time."""
    is_held = lock.acquire(timeout=timeout)
    try:
        yield
    finally:
        if is_held:
            lock.release()
