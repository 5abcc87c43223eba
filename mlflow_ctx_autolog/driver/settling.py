"""Asking the store what it has of a trace, closing what is ours to close, and the receipt of it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from mlflow_ctx_autolog.delivery.deliveries import Deliveries
from mlflow_ctx_autolog.delivery.outbox import Outbox
from mlflow_ctx_autolog.delivery.receipts import Counts, Loss, Receipt, TaskReceipt
from mlflow_ctx_autolog.delivery.records import Record
from mlflow_ctx_autolog.driver.attempts import Attempt
from mlflow_ctx_autolog.driver.books import Book, Unfinished, by_task, key_of
from mlflow_ctx_autolog.driver.homecoming import Homecoming
from mlflow_ctx_autolog.driver.job_sums import sums_of
from mlflow_ctx_autolog.driver.mlflow_traces import end_info, record_unknown_totals
from mlflow_ctx_autolog.driver.totals import SparkFacts, linked_spans, record_sums
from mlflow_ctx_autolog.exceptions import StoreError
from mlflow_ctx_autolog.log_ins import safe_logger
from mlflow_ctx_autolog.spans.otlp import encode
from mlflow_ctx_autolog.spans.record import SpanRecord
from mlflow_ctx_autolog.spans.trace_update import LINKED_PROMPTS, prompts_of
from mlflow_ctx_autolog.stores.stored_trace import RECEIPT
from mlflow_ctx_autolog.stores.tracking_store import (
    count_spans,
    link_prompts,
    read_trace,
    spans_of,
    store_whole_trace,
    sum_of_costs,
    trace_record,
)

__all__ = ["Settlement"]

_logger = safe_logger(__name__)

# Seconds to wait at first, and at most, before it is looked again for what is on its way.
_LOOK, _LONGEST_LOOK = 0.05, 0.5
# Spans that are read back at most, to learn of tasks that could not bring a receipt home.
_READABLE = 20_000


@dataclass
class _Asked:
    """What the store has said of a trace so far, also where it did not say all in time.

    Args:
        stored: How many spans it has; None where it did not say.
        is_unread: Whether its spans are being read, or could not be.
        until: How long to wait for those that may be on their way, on the monotonic clock.
    """

    stored: int | None = None
    is_unread: bool = False
    until: float = 0.0


class Settlement:
    """Finds out what the store has of a trace, and writes what it comes to.

    Args:
        deliveries: The ways to the stores.
        homecoming: What workers have left.
        spark_facts: See :class:`~mlflow_ctx_autolog.driver.ledger.Ledger`.
        progress: Is shown the receipt of each task that is found.
        within: Asks the store, as :meth:`Ledger.within` does.
        silent_attempts: Returns the task attempts of a trace that have not told what they made,
            as far as Spark knows of them.
    """

    def __init__(
        self,
        deliveries: Deliveries,
        homecoming: Homecoming,
        spark_facts: SparkFacts | None,
        progress: Callable[[TaskReceipt], None],
        within: Callable[..., Any],
        silent_attempts: Callable[[Book], Sequence[Attempt]],
    ) -> None:
        self._deliveries = deliveries
        self._homecoming = homecoming
        self._spark_facts = spark_facts
        self._progress = progress
        self._within = within
        self._silent_attempts = silent_attempts

    def settle(
        self, book: Book, timeout: float, *, give_up_if_down: bool = False, patient: bool = True
    ) -> Receipt:
        """Ask the store what it has of a trace, and write what it comes to where that is new.

        Args:
            book: The trace's.
            timeout: Seconds to wait at most.
            give_up_if_down: Whether to try but once where the store is known to be down.
            patient: Whether to wait for what may be on its way.
        """
        deadline = time.monotonic() + timeout
        self._homecoming.collect()
        with _held(book.settling, timeout):
            delivery = self._deliveries.to(book.destination)
            if book.root is not None:
                self._end_action(book, delivery)
            give_up = give_up_if_down and delivery.store_is_down
            asked = _Asked()
            is_sent = delivery.flush(timeout, give_up=give_up)
            if not is_sent and book.delivers and book.has_ended and delivery.is_unsupported:
                self._take_back(book, delivery)
                is_sent = True
            if book.is_ours and not book.delivers:
                self._store_whole(book, deadline)
            # A store that takes whole traces only has nothing of one that is open.
            if is_sent and (book.delivers or book.has_ended):
                # With some time left to ask once more.
                asked.until = deadline - 0.2 * timeout if patient else 0.0
                self._within(deadline, self._ask, book, asked)
            receipt = self._account(book, asked, delivery)
            if book.delivers and book.has_ended and not book.has_written(receipt):
                self._write_totals(book, delivery, deadline, receipt, ask=asked.stored is not None)
            book.is_complete = receipt.complete
        _logger.info("Trace %s: %s", receipt.trace_id, receipt)
        return receipt

    def _account(self, book: Book, asked: _Asked, delivery: Outbox) -> Receipt:
        """Return what is known of a trace: the one place from which all that is said is read."""
        return Receipt.of(
            book.trace_id,
            book.tasks(),
            made=book.made,
            stored=asked.stored,
            here=self._here(book),
            first_error=delivery.first_error,
            unknown=book.unknown,
            is_unread=asked.is_unread and not book.receipts_come_home,
            at_most_waiting=delivery.waiting,
        )

    def _here(self, book: Book) -> Counts:
        """Return what became on the driver of a trace's own spans, and of those that came home."""
        here = self._deliveries.counts(key_of(book.trace_id))
        if book.too_late:
            here.losses[Loss.TOO_LATE] += len(book.too_late)
        return here

    def _end_action(self, book: Book, delivery: Outbox) -> None:
        """Have an action's trace end now, as far as is known."""
        assert book.root is not None
        if book.has_totals:
            return
        book.root = replace(book.root, end=time.time_ns())
        end_info(book.info, book.root.start, book.root.end or 0)
        if book.delivers:
            delivery.submit_all([_root_record(book, book.root)])

    def _take_back(self, book: Book, delivery: Outbox) -> None:
        """Keep a trace for one piece, since the server takes no single spans after all."""
        book.delivers = False
        for record in delivery.take():
            (span,) = spans_of([record]) or (None,)
            if span is not None and key_of(span.trace_id) == key_of(book.trace_id):
                book.whole[span.span_id] = span
            elif record.key != book.trace_id:
                delivery.submit_all([record])

    def _store_whole(self, book: Book, deadline: float) -> None:
        """Store a trace in one piece, unless the store has it as it is known now."""
        if book.has_totals:
            return
        known = book.known()
        record_sums(book, *known[0], self._spark_facts)
        spans = dict(book.whole)
        if book.root is not None:
            (root,) = spans_of([_root_record(book, book.root)])
            spans[root.span_id] = root
        if self._within(deadline, store_whole_trace, book.destination, book.info, spans.values()):
            book.written = known, {}

    def _ask(self, book: Book, asked: _Asked) -> None:
        """Ask the store how many spans it has; where that is another number, learn why."""
        try:
            asked.stored = self._count(book)
        except StoreError:
            if book.is_complete:
                return
            raise
        silent = self._attempts(book, asked)
        book.note_silent(silent)
        if not book.is_ours:
            return
        if asked.stored <= _READABLE and book.must_read(asked.stored, silent):
            # Which takes its time; whoever waits no longer goes without.
            asked.is_unread = True
            self._read_receipts(book)
            asked.is_unread = False
            book.was_read = asked.stored, frozenset(each.attempt for each in silent)
            book.note_silent(silent)
        here = self._here(book)

        def may_arrive() -> bool:
            # Those that the store does not have do not arrive, however long one waits.
            refused = here.set_aside + sum(task.set_aside for task in book.tasks())
            lost = here.lost + sum(task.lost for task in book.tasks())
            return int(asked.stored or 0) + refused + lost < book.made

        # What is on its way to a store that tells of all tasks, or of those that run to Spark.
        def is_awaited() -> bool:
            return may_arrive() or book.awaits_tasks

        pause = _LOOK
        looked = time.monotonic()
        while is_awaited() and (left := asked.until - time.monotonic()) > 0:
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_LOOK)
            if self._homecoming.collect().records:
                left = max(0.0, asked.until - time.monotonic())
                self._deliveries.to(book.destination).flush(left)
            if not book.delivers:
                self._store_whole(book, asked.until)
            asked.stored = self._count(book)
            if book.awaits_tasks and time.monotonic() - looked > _LONGEST_LOOK:
                # Which costs more than to count.
                looked = time.monotonic()
                book.note_silent(self._attempts(book, asked))
                if asked.stored <= _READABLE:
                    self._read_receipts(book)

    def _attempts(self, book: Book, asked: _Asked) -> list[Attempt]:
        """Return attempts that have told nothing, once what they left on this host is delivered."""
        attempts = list(self._silent_attempts(book))
        now = time.time_ns() // 1_000_000
        here = [
            each
            for each in attempts
            if each.is_here and not each.is_swept and each.ended is not None and each.ended <= now
        ]
        if not here or not self._homecoming.sweep():
            return attempts
        if book.delivers:
            asked.stored = self._count(book)
        return [replace(each, is_swept=each.is_swept or each in here) for each in attempts]

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
        self.learn_of_tasks(book, read_trace(book.destination, book.trace_id)[1])

    def learn_of_tasks(self, book: Book, spans: Sequence[Any]) -> None:
        """Enter task attempts that have told nothing else, by their spans and those below.

        Args:
            book: The trace's.
            spans: All of the trace, MLflow's.
        """
        by_id = {span.span_id: span for span in spans}
        for task_id, below in by_task(spans).items():
            if task_id is None:
                continue
            below += linked_spans(book.destination, by_id[task_id])
            if task_id in book.receipts:
                # A span that ended after its task has told.
                book.found[task_id] = len(below)
                continue
            task = by_id[task_id]
            if not book.receipts_come_home:
                book.note_number(task)
            receipt = TaskReceipt.from_attributes(book.trace_id, task_id, task.attributes)
            if receipt is not None:
                receipt = _with_sums(receipt, below)
                self._progress(receipt)
                book.receipts[task_id] = receipt
                book.found[task_id] = len(below)
            else:
                # Killed, or still running: what it has stored is all that is known.
                book.unfinished[task_id] = Unfinished.of(book.trace_id, task, below)

    def _write_totals(
        self, book: Book, delivery: Outbox, deadline: float, receipt: Receipt, *, ask: bool
    ) -> None:
        known = book.known()
        usage, cost = known[0]
        unpriced = any(task.usage and not task.cost for task in book.tasks())
        is_sampled = any(task.sampled_out for task in book.tasks())
        if ask and (unpriced or not cost) and not is_sampled:
            # Most releases of MLflow price a call where they store it, so that no task knows,
            # unless it must, since not all of its calls are stored.
            found = self._within(deadline, sum_of_costs, book.destination, book.trace_id)
            cost = dict(found or cost)
        record_sums(book, usage, cost, self._spark_facts)
        record_unknown_totals(book.info, usage, cost)
        book.info.trace_metadata[RECEIPT] = json.dumps(receipt.summary())
        delivery.submit_all([trace_record(book.info)._replace(owner=key_of(book.trace_id))])
        # Where nothing was stored a moment ago, there is no point in waiting again.
        if delivery.flush(max(0.0, deadline - time.monotonic()), give_up=not ask):
            book.written = known, receipt.summary()
            book.priced = cost
            if prompts := prompts_of(known[1].get(LINKED_PROMPTS)):
                self._within(deadline, _link_prompts, book, prompts)


def _link_prompts(book: Book, prompts: Sequence[Any]) -> None:
    # Where that cannot be, the trace's tag says it.
    with suppress(StoreError):
        link_prompts(book.destination, book.trace_id, prompts)


def _with_sums(receipt: TaskReceipt, below: Sequence[Any]) -> TaskReceipt:
    """Return the receipt that a task's span is, with what its calls in the store come to."""
    sums = sums_of(below)
    # Where some are not there, as with sampling, what the others come to is not that of the task.
    is_all = sums.calls - sums.reused >= receipt.calls
    return replace(receipt, errors=sums.errors, sums=sums.to_dict() if is_all else {})


def _root_record(book: Book, root: SpanRecord) -> Record:
    return Record("span", root.span_id, encode(root), key_of(book.trace_id))


@contextmanager
def _held(lock: threading.Lock, timeout: float) -> Iterator[None]:
    """Hold a lock, or do without where it is not to be had in time."""
    is_held = lock.acquire(timeout=timeout)
    try:
        yield
    finally:
        if is_held:
            lock.release()
