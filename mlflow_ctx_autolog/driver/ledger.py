"""The driver's ledger: what was made on the driver and in tasks, and what the store has of it."""

from __future__ import annotations

import atexit
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.delivery.deliveries import Deliveries
from mlflow_ctx_autolog.delivery.receipts import Counts, Loss, Receipt, TaskReceipt
from mlflow_ctx_autolog.delivery.records import Destination
from mlflow_ctx_autolog.delivery.sender import Delivery
from mlflow_ctx_autolog.driver.attempts import Attempt
from mlflow_ctx_autolog.driver.books import Book, Books, by_task, key_of
from mlflow_ctx_autolog.driver.explanations import (
    explain,
    explain_silence,
    explain_words,
    silence_of,
)
from mlflow_ctx_autolog.driver.exports import (
    DriverTracing,
    complete_info,
    filtered,
    flush_exports,
    open_spans,
)
from mlflow_ctx_autolog.driver.homecoming import Homecoming
from mlflow_ctx_autolog.driver.job_sums import sums_of
from mlflow_ctx_autolog.driver.mlflow_traces import own_words, record_no_totals, totals_of
from mlflow_ctx_autolog.driver.settling import Settlement
from mlflow_ctx_autolog.driver.totals import SparkFacts, record_sums
from mlflow_ctx_autolog.exceptions import IncompleteTraceError
from mlflow_ctx_autolog.log_ins import safe_logger
from mlflow_ctx_autolog.spans.content import ContentPolicy
from mlflow_ctx_autolog.stores.sending import send
from mlflow_ctx_autolog.stores.stored_trace import DRIVER, TRACE_KEY
from mlflow_ctx_autolog.stores.tracking_store import (
    current_tracking_uri,
    span_record,
    span_table,
    store_takes_spans,
    trace_record,
)
from mlflow_ctx_autolog.tracing import active_span_ids, active_trace, active_workspace

__all__ = ["Ledger"]

_logger = safe_logger(__name__)

T = TypeVar("T")

# Seconds after the last late task in which others may come, before the totals are written again.
_LULL = 1.0
# Tasks that are kept in the book of those that are traces of their own.
_TASKS = 10_000


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
        silent_attempts: Returns the task attempts of a trace that have not told what they made,
            as far as Spark knows of them.
        show_job: Is given a trace that has ended, and what became of its spans; that of an action
            whenever more of its tasks have told.
    """

    def __init__(
        self,
        config: Callable[[], Config],
        spark_facts: SparkFacts | None = None,
        progress: Callable[[TaskReceipt], None] = lambda _: None,
        silent_attempts: Callable[[Book], Sequence[Attempt]] = lambda _: (),
        show_job: Callable[[Book, Receipt], None] = lambda _, __: None,
    ) -> None:
        self._config = config
        self._spark_facts = spark_facts
        self._progress = progress
        self._show_job = show_job
        self.books = Books()
        self._without_trace: dict[str, TaskReceipt] = {}
        self._last_without_trace = -math.inf
        self.deliveries = Deliveries(self._new_delivery)
        self._home = Homecoming(
            self.books, self.deliveries, config, self._enter, self._settle_soon, self._warn
        )
        self._settlement = Settlement(
            self.deliveries, self._home, spark_facts, progress, self._within, silent_attempts
        )
        self._tracing = DriverTracing(self)
        self._is_closing = False
        self._is_exiting = False
        self._timer: threading.Timer | None = None
        self._watches_exit = False
        self._last_settled = -math.inf, -math.inf
        self._warned: set[str] = set()
        # For whoever diagnoses to say more.
        self.likely_causes: Callable[[Any], str] = lambda _: "ctx_autolog.doctor() tells why."
        self.receive = self._home.receive
        self.meet_workers = self._home.meet_workers
        self.acknowledgements = self._home.acknowledgements

    # What is captured.

    def open(self, *, receipts_come_home: bool, functions: int = 0) -> None:
        """Announce the trace of the active span, if there is one.

        Args:
            receipts_come_home: Whether tasks that succeed bring a receipt to :meth:`receive`.
            functions: How many functions Spark is known to have run under it.
        """
        if self._open_again(receipts_come_home, functions):
            return
        info = active_trace()
        if info is None:
            return
        with self.books.lock:
            self._is_closing = False
            self._tracing.install()
            book = self.books.of(info.trace_id)
            is_new = book is None
            if book is None:
                table = span_table()
                destination = Destination(
                    current_tracking_uri(),
                    table or str(info.experiment_id),
                    workspace=active_workspace(),
                )
                book = Book(destination, info, store_takes_spans(), table, receipts_come_home)
            self.books.keep(book)
            book.receipts_come_home &= receipts_come_home
            book.handed_over += functions
        if book.delivers:
            self._announce(book, info if is_new else None)

    def enter(self, book: Book | None) -> None:
        """Enter a trace that tasks have announced, if it is one."""
        if book is not None:
            with self.books.lock:
                self.books.keep(book)

    def _open_again(self, receipts_come_home: bool, functions: int) -> bool:
        """Enter further functions, where all of the active span is announced; else return False."""
        if (ids := active_span_ids()) is None:
            return False
        trace_id, span_id = ids
        with self.books.lock:
            book = self.books.of(trace_id)
            if self._is_closing or book is None or span_id not in book.announced:
                return False
            self.books.keep(book)
            book.receipts_come_home &= receipts_come_home
            book.handed_over += functions
        return True

    def _announce(self, book: Book, info: Any) -> None:
        delivery = self.deliveries.to(book.destination)
        spans = [span for span in open_spans(book.trace_id) if span.span_id not in book.announced]
        book.announced.update(span.span_id for span in spans)
        book.spans = len(book.announced)
        policy = ContentPolicy(self._config())
        key = key_of(book.trace_id)
        records = [span_record(filtered(span, policy), key) for span in spans]
        if info is not None:
            delivery.configure(self._config())
            record_no_totals(info)
            info.trace_metadata[TRACE_KEY] = info.trace_id
            info.trace_metadata[DRIVER] = f"{socket.gethostname()} {os.getpid()}"
            records.append(trace_record(info)._replace(owner=key))
        delivery.submit_all(records, at_once=True)

    def spent(self) -> dict[str, float]:
        """Return what the calls of the active span's trace have come to, as tasks have told."""
        info = active_trace()
        book = None if info is None else self.books.of(info.trace_id)
        tasks = [] if book is None else list(book.receipts.values())
        return {
            "calls": sum(task.calls for task in tasks),
            "cost": sum(task.spent for task in tasks),
        }

    def _enter(self, receipt: TaskReceipt) -> None:
        self._progress(receipt)
        book = self.books.of(receipt.trace_id)
        if book is None:
            if receipt.silence is not None:
                self._warn("silence", silence_of("Tasks", receipt.silence, self.likely_causes))
            self._without_trace[receipt.task_span_id] = receipt
            self._last_without_trace = time.monotonic()
            if len(self._without_trace) > _TASKS:
                del self._without_trace[next(iter(self._without_trace))]
            return
        book.receipts[receipt.task_span_id] = receipt
        self._home.collector.wake()
        if book.has_ended:
            self._warn_of_silence(book)
            if book.is_ours:
                self._settle_soon()

    # What MLflow exports on the driver.

    def take_span(self, span: Any, experiment_id: str) -> bool:
        """Store a span of the driver that has ended, if its trace is in the book."""
        book = self.books.of(span.trace_id)
        if book is None or not book.delivers or book.destination.experiment_id != experiment_id:
            return False
        self.deliveries.to(book.destination).submit_all([span_record(span, key_of(book.trace_id))])
        return True

    def take_trace(self, trace: Any) -> bool:
        """Complete a trace whose root has ended, and store it, if it is in the book."""
        book = self.books.of(trace.info.trace_id)
        if book is None:
            return False
        # By their ids, as a later record of a span takes the place of an earlier one.
        spans = {span.span_id: span for span in trace.data.spans}
        self._home.complete(book, spans)
        trace.data.spans[:] = spans.values()
        book.name = next((span.name for span in trace.data.spans if span.parent_id is None), None)
        # In a store for whole traces, those of workers are among its spans.
        own = by_task(trace.data.spans).get(None, [])
        book.info = complete_info(trace)
        book.info.trace_metadata[TRACE_KEY] = book.trace_id
        book.own_words = own_words(book.info, book.own_words)
        book.spans = len(own)
        book.usage, book.cost = totals_of(own)
        book.sums = sums_of(own)
        if not book.delivers and book.table is None:
            # Spark may have stopped reading a task before it could tell.
            self._settlement.learn_of_tasks(book, trace.data.spans)
            book.in_whole.update(spans)
        book.has_ended, book.ended = True, time.time_ns() // 1_000_000
        record_sums(book, *book.totals(), self._spark_facts)
        self._close_if_over()
        is_ours = book.delivers
        if is_ours:
            began = time.monotonic()
            self._settle_and_warn(book, self._config().flush_timeout, give_up_if_down=True)
            self._last_settled = began, time.monotonic()
        self._warn_of_silence(book)
        return is_ours

    # What the user asks.

    def receipt(self, trace_id: str | None, timeout: float) -> Receipt:
        """Return what became of the spans of a trace; by default the last one handed to Spark.

        Raises:
            KeyError: The trace was not handed to Spark.
        """
        last = self.books.last()
        is_loose = trace_id is None and (last is None or last.touched < self._last_without_trace)
        if is_loose or any(
            task.trace_id == trace_id for task in list(self._without_trace.values())
        ):
            return self._receipt_without_trace(trace_id, timeout)
        book = last if trace_id is None else self.books.of(trace_id)
        if book is None:
            raise KeyError(trace_id)
        deadline = time.monotonic() + timeout
        if not book.has_ended:
            # MLflow may have its end still to export.
            self._within(deadline, flush_exports)
        return self._settlement.settle(book, max(0.0, deadline - time.monotonic()))

    def flush(self, timeout: float, *, give_up_if_down: bool = False) -> bool:
        """Store what can be stored within the timeout; return whether nothing waits.

        Args:
            timeout: Seconds to wait at most.
            give_up_if_down: Whether to try but once where the store is known to be down.
        """
        deadline = time.monotonic() + timeout
        self._home.collect()
        flushed = self.deliveries.flush(timeout, give_up_if_down=give_up_if_down)
        is_stored = True
        for book in self.books.unsettled():
            remaining = max(0.0, deadline - time.monotonic())
            receipt = self._settle_and_warn(book, remaining, give_up_if_down=give_up_if_down)
            # What was set aside is not waited for.
            is_stored &= receipt.waiting <= receipt.set_aside
        # Settling stores in one piece what a server does not take in pieces.
        flushed = flushed or not any(each.waiting for each in self.deliveries.all())
        return flushed and is_stored

    def catch_up(self, timeout: float) -> None:
        """Store what can be stored within the timeout, also of traces whose end is on its way.

        Args:
            timeout: Seconds to wait at most; where the store is known to be down, it is tried once.
        """
        deadline = time.monotonic() + timeout
        if any(not book.has_ended for book in self.books.all()):
            # MLflow may have it still to export; from it is known, too, what is down.
            self._within(deadline, flush_exports)
        self.flush(max(0.0, deadline - time.monotonic()), give_up_if_down=True)

    def await_workers(self, timeout: float) -> None:
        """Wait until the store has what tasks have told of, before their processes may be gone.

        Args:
            timeout: Seconds to wait at most, for all traces.
        """
        deadline = time.monotonic() + timeout
        for book in self.books.all():
            told = list(book.receipts.values())
            is_waited_for = any(task.delivered < task.made for task in told)
            if book.is_complete or book.was_warned_of or not book.delivers or not is_waited_for:
                continue
            self._within(deadline, flush_exports)
            left = max(0.0, deadline - time.monotonic())
            self._settlement.settle(book, left, give_up_if_down=True)

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
        for book in self.books.unsettled():
            if book.opened < since:
                continue
            receipt = self._settlement.settle(book, max(1.0, deadline - time.monotonic()))
            if not receipt.complete:
                raise IncompleteTraceError(self.explain(receipt), receipt)

    def forget(self, trace_id: str) -> None:
        """Strike a trace off that nobody is to ask for."""
        self.books.forget(trace_id)

    def close(self) -> None:
        """Leave export to MLflow again, once the traces that are open have ended."""
        self._is_closing = True
        self._close_if_over()

    def explain(self, receipt: Receipt) -> str:
        """Return a text on a receipt that is not complete: what, why, and what to do."""
        return explain(receipt, self._config().spool_directory)

    # How a trace is settled.

    def _settle_and_warn(self, book: Book, timeout: float, *, give_up_if_down: bool) -> Receipt:
        # Once the user was told that spans are missing, nobody is kept waiting for them again.
        patient = not book.was_warned_of
        receipt = self._settlement.settle(
            book, timeout, give_up_if_down=give_up_if_down, patient=patient
        )
        # Once, where its span ends; the end of an action is known by its tasks alone.
        tasks, is_action = len(book.tasks()), book.root is not None
        if book.shown != tasks and not book.awaits_tasks if is_action else book.shown is None:
            book.shown = tasks
            self._show_job(book, receipt)
        if book.has_ended and (differences := explain_words(book)) is not None:
            self._warn("words", differences)
        if not receipt.complete:
            if not book.was_warned_of:
                book.was_warned_of = True
                _logger.warning("%s", self.explain(receipt))
        elif reason := self._home.reasons.get(str(book.destination.tracking_uri)):
            self._warn(
                f"unreachable {book.destination.tracking_uri}",
                f"Workers could not store all spans in {book.destination.tracking_uri}, so they "
                f"came home and the driver has stored them. The first reason: {reason}. "
                'Where workers never reach the store, transport="driver" spares them the attempt.',
            )
        return receipt

    def _warn_of_silence(self, book: Book) -> None:
        """Say once that functions ran with tracing on and left no spans, where nothing else does.

        That a function made no model call is no silence: its task has a span, or a receipt.
        """
        if book.was_silence_told:
            return
        if (message := explain_silence(book, self.likely_causes)) is not None:
            book.was_silence_told = True
            _logger.warning("%s", message)

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
        """Add up what tasks have told whose traces nobody can ask the store for."""
        self._home.collect()
        self.deliveries.flush(timeout)
        tasks = [
            task for task in list(self._without_trace.values()) if trace_id in (None, task.trace_id)
        ]
        keys = {key_of(task.trace_id) for task in tasks}
        here = Counts()
        for key in keys:
            found = self.deliveries.counts(key)
            here.delivered += found.delivered
            here.set_aside += found.set_aside
            here.losses.update(found.losses)
        if late := sum(key in keys for key in list(self._home.too_late.values())):
            here.losses[Loss.TOO_LATE] += late
        made = sum(task.made for task in tasks)
        # What has been acknowledged, to the workers and here. Sent twice, it is there once.
        delivered = sum(task.delivered for task in tasks) + here.delivered
        stored = min(delivered, made - here.lost - sum(task.lost for task in tasks))
        return Receipt.of(trace_id, tasks, made=made, stored=stored, here=here, first_error=None)

    def _settle_soon(self) -> None:
        with self.books.lock:
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
        self.deliveries.flush(timeout, give_up_if_down=True)
        for book in self.books.unsettled():
            self._settle_and_warn(book, timeout, give_up_if_down=True)

    def _close_if_over(self) -> None:
        if self._is_closing and all(book.has_ended for book in self.books.all()):
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
        self.catch_up(max(0.0, deadline - time.monotonic()))
        for book in self.books.all():
            # Of tasks that have finished since, nobody has told.
            if book.has_ended and book.delivers and not book.receipts_come_home:
                remaining = max(0.0, deadline - time.monotonic())
                self._settlement.settle(book, remaining, give_up_if_down=True)

    def _warn(self, subject: str, message: str) -> None:
        with self.books.lock:
            if subject in self._warned:
                return
            self._warned.add(subject)
        _logger.warning("%s", message)
