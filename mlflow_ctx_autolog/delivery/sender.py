"""From what waits to the store: batches, and a sender thread of their own."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence

from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.delivery.intake import start_thread
from mlflow_ctx_autolog.delivery.outbox import Outbox
from mlflow_ctx_autolog.delivery.pacing import Pacing
from mlflow_ctx_autolog.delivery.receipts import Loss
from mlflow_ctx_autolog.delivery.records import Destination, Record
from mlflow_ctx_autolog.exceptions import StoreError
from mlflow_ctx_autolog.log_ins import safe_logger

__all__ = ["Delivery"]

_logger = safe_logger(__name__)


class Delivery(Outbox):
    """Stores what waits in an outbox from a thread of its own, so that no caller waits for it.

    - The first batch goes after ``config.send_interval``, or when ``config.batch_size`` have
      gathered, the oldest first; the longer it goes on, and the slower the store answers, the
      longer the interval and the larger the batches, so that many workers do not overrun the
      store. Tasks need not wait for that: what several have made goes together.
    - A batch that the store does not take is tried again, with a growing pause or the one that
      the store asks for. One that it refuses is halved, until the span in it that it refuses is
      alone: that is set aside in a file, with the reason. So is one that the store fails over
      again and again while it takes the others. One warning names the reason; another says when
      the store takes spans again.

    Args:
        destination: Where all records of this delivery go; another one needs another delivery,
            so that a store that is down holds up nobody else's spans.
        send: Stores records there, or raises. Storing a record again must leave one.
        config: Sizes and times.
    """

    # Bytes of payload in one request, unless one span is larger.
    _request_bytes = 4_000_000
    # How long the thread stays, in seconds, when there is nothing to do; and the empty file.
    _idle_time = 60.0
    _linger = 2.0
    # For tests to make it of something quicker.
    _pacing_class = Pacing

    def __init__(
        self,
        destination: Destination,
        send: Callable[[Destination, Sequence[Record]], None],
        config: Config | None = None,
    ) -> None:
        self._send = send
        super().__init__(destination, config)

    def _reset(self) -> None:
        super()._reset()
        self._pacing = self._pacing_class(self._config)
        self._due = threading.Condition(self._lock)  # What the sender waits for.
        self._settled = threading.Condition(self._lock)  # What a flush waits for.
        self._sender: threading.Thread | None = None
        self._is_idle = False
        self._flushes = 0
        self._flushed = -math.inf
        self._hurries = False
        self._attempts = 0
        self._rejected = 0  # Of those lost, the ones that had been in the spool.

    def configure(self, config: Config) -> None:
        """Use other settings from now on; those of the spool, once it is empty."""
        super().configure(config)
        self._pacing.config = config

    @property
    def holds_only_refused(self) -> bool:
        """Whether the store answers, and has all but what was set aside."""
        return self.set_aside > 0 and not self.waiting

    def submit_all(self, records: Sequence[Record], *, at_once: bool = False) -> None:
        """See :meth:`Outbox.submit_all`."""
        if at_once:
            with self._lock:
                self._hurries = True
        super().submit_all(records)

    def _note_written(self, count: int) -> None:
        """See :meth:`Outbox._note_written`."""
        waiting, batch = len(self._spool), self._pacing.batch_size()
        # Waking the sender for each span would cost more than storing it.
        is_full = batch <= waiting < batch + count + 16
        if is_full or self._sender is None or self._is_idle or self._flushes or self._hurries:
            with self._lock:
                if self._sender is None:
                    self._sender = start_thread(self._deliver, "sender")
                self._due.notify()

    def hurry(self) -> None:
        """Send what waits now, without waiting for it."""
        with self._lock:
            self._hurries = self.waiting > 0
            self._due.notify()

    def flush(self, timeout: float, *, give_up: bool = False) -> bool:
        """Send all that waits now; return whether it was stored within ``timeout`` seconds.

        What was set aside is not waited for.

        Args:
            timeout: Seconds to wait at most.
            give_up: Wait no longer than it makes sense where others deliver what is left: for
                two attempts that fail, or for one, and a second at most, of a store that is known
                to be down; not at all for one whose answers take longer than there is time. It
                must not hold up the end of every task.
        """
        deadline = time.monotonic() + timeout
        self._intake.wait(timeout)
        pacing = self._pacing
        with self._lock:
            goal = self._done + self.waiting
            attempts = self._attempts + (1 if self.store_is_down or pacing.failures else 2)
            if give_up and self.store_is_down:
                deadline = min(deadline, time.monotonic() + self._patience_when_down)
            if give_up and pacing.expected_seconds() > deadline - time.monotonic():
                deadline = time.monotonic()
                pacing.expect_less()
            if not pacing.must_wait:
                pacing.retry_at = 0.0
            elif give_up:
                deadline = min(deadline, time.monotonic())
            self._flushes += 1
            self._due.notify()

            def is_stored() -> bool:
                return self.waiting == 0 or self._done >= goal

            def is_over() -> bool:
                has_tried = pacing.failures > 0 and self._attempts >= attempts
                # What does not know single spans does not learn of them while one waits.
                return is_stored() or (has_tried and (give_up or self.is_unsupported))

            self._settled.wait_for(is_over, max(0.0, deadline - time.monotonic()))
            self._flushes -= 1
            stored = is_stored()
            self.store_is_down = not stored
            if stored:
                pacing.begin_anew()
                self._flushed = time.monotonic()
        # Nor is a trace of this one left on the disk.
        self._spool.discard()
        return stored

    @property
    def _done(self) -> int:
        return self.delivered + self.set_aside + self._rejected

    def was_flushed(self, seconds: float) -> bool:
        """Whether all that waited was stored at some moment of these last seconds."""
        is_failing = self.store_is_down or self._pacing.failures > 0
        return not is_failing and time.monotonic() - self._flushed < seconds

    def take(self) -> list[Record]:
        """See :meth:`Outbox.take`."""
        found = super().take()
        with self._lock:
            self._pacing.forget_suspects()
        return found

    def send_soon(self) -> None:
        """Send what waits within ``config.send_interval``, with what comes meanwhile.

        To be called at the end of a task, which need not wait for it: what is on the disk is safe,
        and what several short tasks have made goes together.
        """
        with self._lock:
            if self._pacing.soon():
                self._due.notify()

    def _deliver(self) -> None:
        pacing = self._pacing
        while True:
            with self._lock:
                if not self._wait_for_records():
                    self._sender = None
                    return
                while len(self._spool) and (pause := self._due_at() - time.monotonic()) > 0:
                    self._due.wait(pause)
                count = pacing.batch_size()
                self._hurries = False
            batch = self._spool.lease(count, self._request_bytes)
            if not len(self._spool):
                # Somebody has taken it all.
                continue
            started = pacing.sending()
            try:
                if not batch:
                    raise StoreError("the spool cannot be read")
                self._send(self.destination, [record for _, record in batch])
                problem = None
            except Exception as error:
                problem = error if isinstance(error, StoreError) else StoreError(repr(error))
            pacing.answered()
            self._spool.end_lease()
            if problem is not None:
                self._failed(problem, batch)
            else:
                self._stored(batch, time.monotonic() - started)

    def _due_at(self) -> float:
        hurries = self._flushes > 0 or self._hurries
        return self._pacing.due_at(len(self._spool), hurries=hurries)

    def _wait_for_records(self) -> bool:
        """Wait until there is something to send; return whether there is, before it is too long."""
        self._is_idle = True
        came = self._due.wait_for(lambda: len(self._spool) > 0, self._linger)
        if not came:
            # Nobody is to find an empty file.
            self._spool.discard()
            came = self._due.wait_for(lambda: len(self._spool) > 0, self._idle_time)
        self._is_idle = False
        self._pacing.first_came()
        return came

    def _failed(self, error: StoreError, batch: Sequence[tuple[int, Record]]) -> None:
        if error.rejected:
            self._taken_in_part(error, batch)
            return
        is_suspected = self._pacing.suspects(error)
        if len(batch) > 1 and (error.refused or is_suspected):
            with self._lock:
                keys = (record.key for _, record in batch)
                self._pacing.halve(keys, None if error.refused else self.delivered)
            if error.refused:
                return
        elif batch and error.refused:
            self._put_aside(*batch[0], error)
            return
        elif batch and is_suspected and self._is_out_of_the_way(*batch[0], error):
            return
        with self._lock:
            self._attempts += 1
            self._pacing.failed(error, alone=len(self._spool) == 1)
            is_first = self._pacing.failures == 1
            self.is_unsupported = error.unsupported
            self.first_error = self.first_error or str(error)
            self._settled.notify_all()
        if is_first:
            _logger.warning(
                "The tracking store %s did not take %d finished spans: %s. They are kept and "
                "sent again; check that this process can reach the store and may write to "
                "experiment %s.",
                self._store_name,
                self.waiting,
                error,
                self.destination.experiment_id,
            )

    def _is_out_of_the_way(self, number: int, record: Record, error: StoreError) -> bool:
        """Whether a record was set aside, since the store fails over it and takes the others.

        Else the others go first.
        """
        with self._lock:
            is_to_blame = self._pacing.is_to_blame(record.key, self.delivered)
        if is_to_blame:
            self._put_aside(number, record, error)
        elif len(self._spool) > 1:
            self._spool.move_to_end(number, record)
        return is_to_blame

    def _put_aside(self, number: int, record: Record, error: StoreError) -> None:
        """Take a record out of the way that the store does not have."""
        file = self._spool.set_aside(number, record, str(error))
        where = f"{record.kind} {record.key} is kept in {file}, for mlflow-ctx-autolog recover"
        if file is None:
            if not self._spool.remove([number]):
                # It was taken, or replaced, on its way.
                return
            where = f"{record.kind} {record.key} is lost, since no file can be had to keep it in"
        reason = f"{error}; {where}"
        with self._lock:
            self._attempts += 1
            self._pacing.out_of_the_way(record.key)
            if file is None:
                self._rejected += 1
                self._count_lost([record], Loss.REFUSED)
            else:
                self.set_aside += 1
                self._counts_of(record).set_aside += 1
            self.first_error = self.first_error or reason
            self._settled.notify_all()
        _logger.warning(
            "The tracking store %s does not take one of the finished spans: %s.",
            self._store_name,
            reason,
        )

    def _taken_in_part(self, error: StoreError, batch: Sequence[tuple[int, Record]]) -> None:
        """Enter that the store has some of a batch, and will not have the others, whichever."""
        stored = self._spool.remove(number for number, _ in batch)
        with self._lock:
            self._attempts += 1
            self._pacing.failures = 0
            there = [record for number, record in batch if number in stored]
            lost, taken = there[: error.rejected], there[error.rejected :]
            self._count_lost(lost, Loss.REFUSED_UNNAMED)
            for record in taken:
                self._counts_of(record).delivered += 1
            self._rejected += len(lost)
            self.delivered += len(taken)
            self.first_error = self.first_error or str(error)
            self._settled.notify_all()
        _logger.warning(
            "The tracking store %s has refused %d of %d finished spans, without saying which; "
            "they are lost: %s.",
            self._store_name,
            len(lost),
            len(batch),
            error,
        )

    def _stored(self, batch: Sequence[tuple[int, Record]], seconds: float) -> None:
        self._unbooked = len(batch)
        # Without those that were replaced, or taken, while they were on their way.
        stored = self._spool.remove(number for number, _ in batch)
        with self._lock:
            self._unbooked = 0
            failures = self._pacing.failures
            self._pacing.stored(seconds, (record.key for _, record in batch))
            self._attempts += 1
            self.store_is_down = self._is_full = self.is_unsupported = False
            self.delivered += len(stored)
            for number, record in batch:
                if number in stored:
                    self._counts_of(record).delivered += 1
            if not self.set_aside and not self.lost:
                self.first_error = None
            self._settled.notify_all()
        if failures:
            _logger.warning(
                "The tracking store %s takes spans again after %d failed attempts.",
                self._store_name,
                failures,
            )
