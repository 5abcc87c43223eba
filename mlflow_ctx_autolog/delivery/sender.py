"""From a finished span to the store: a queue on disk, batches, a sender thread of its own."""

from __future__ import annotations

import math
import os
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.delivery.records import Destination, Record
from mlflow_ctx_autolog.delivery.spool import Spool
from mlflow_ctx_autolog.exceptions import StoreError
from mlflow_ctx_autolog.log_ins import safe_logger, without_credentials

__all__ = ["Counts", "Deliveries", "Delivery"]

_logger = safe_logger(__name__)


# Bytes that any disk should take in a second.
_DISK = 50e6


@dataclass
class Counts:
    """What became of the spans of one task attempt so far."""

    made: int = 0
    delivered: int = 0
    lost: int = 0
    set_aside: int = 0

    @property
    def waiting(self) -> int:
        """Spans that are neither stored nor lost, those that were set aside among them."""
        return self.made - self.delivered - self.lost


class Delivery:
    """Stores finished spans from a thread of its own, so that no caller waits for the store.

    - :meth:`submit` never raises, and does not wait for the store. It appends to the spool, so
      that what a killed process has not sent can still be sent by another. Once the disk is slow,
      another thread does so, until it is prompt again. Where neither disk nor memory has room,
      the new span is dropped and counted as lost.
    - Another thread sends what is in the spool, in batches, oldest first. The first goes after
      ``config.send_interval``, or when ``config.batch_size`` have gathered; the longer it goes
      on, and the slower the store answers, the longer the interval and the larger the batches, so
      that many workers do not overrun the store. Tasks need not wait for that: what several have
      made goes together.
    - A batch that the store does not take is tried again, with a growing pause or the one that
      the store asks for. One that it refuses is halved, until the span in it that it refuses is
      alone: that is set aside in a file, with the reason. So is one that the store fails over
      again and again while it takes the others. One warning names the reason; another says when
      the store takes spans again.
    - Records that only the driver can store are kept until :meth:`take`.
    - A forked child starts with an empty queue: the parent still has, and sends, what it held.

    Args:
        destination: Where all records of this delivery go; another one needs another delivery,
            so that a store that is down holds up nobody else's spans.
        send: Stores records there, or raises. Storing a record again must leave one.
        config: Sizes and times.

    Attributes:
        store_is_down: Whether the last flush was in vain, and nothing was stored since.
        is_unsupported: Whether the store has answered last that it takes no single spans.
        delivered: Records stored so far.
        lost: Records dropped so far, or refused by a store that has not said which.
        set_aside: Records that the store does not have, and that wait in a file for ``recover``.
        first_error: The first reason why the store did not take what waits, was set aside or
            lost; None where all is well.
    """

    # How long a caller waits for others that are writing, in seconds, to have its span safe on the
    # disk; and for room in memory, where the disk is slow and memory full.
    _patience_with_disk = 0.001
    _patience_without_room = 1.0
    # A write that takes longer, in seconds, is one of a slow disk: callers go there no more until
    # so much time has passed.
    _slow_write = 0.02
    _time_of_slow_disk = 5.0
    # How long those who can wait do so, in seconds, for a disk that is slower than they are.
    _patience_for_room = 10.0
    # The pause after the first failed attempt, and the longest one, in seconds.
    _first_pause = 0.5
    _longest_pause = 30.0
    # The longest interval between batches, in seconds, of a long task or a slow store.
    _longest_interval = 60.0
    # The share of its time that this process may keep the store busy.
    _share_of_store = 0.1
    # How long a flush waits, in seconds, while the store is known to be down.
    _patience_when_down = 1.0
    # Bytes of payload in one request, unless one span is larger.
    _request_bytes = 4_000_000
    # How long the threads stay, in seconds, when there is nothing to do; and the empty file.
    _idle_time = 60.0
    _linger = 2.0
    # How often the store may fail over a batch before the batch is suspected rather than the store,
    # and over one record, besides once, before that is to blame.
    _failures_of_store, _failures_of_one = 3, 1

    def __init__(
        self,
        destination: Destination,
        send: Callable[[Destination, Sequence[Record]], None],
        config: Config | None = None,
    ) -> None:
        self.destination = destination
        self._config = config or Config()
        self._send = send
        self._reset()
        _deliveries.add(self)

    def _begin_anew(self) -> None:
        self._spool.leave_to_parent()
        self._reset()

    def _reset(self) -> None:
        self._spool = self._new_spool()
        self._lock = threading.Lock()
        self._came = threading.Condition(self._lock)  # What the writer waits for.
        self._written = threading.Condition(self._lock)  # What callers wait for.
        self._due = threading.Condition(self._lock)  # What the sender waits for.
        self._settled = threading.Condition(self._lock)  # What a flush waits for.
        self._incoming: deque[Record] = deque()
        self._incoming_bytes = 0
        self._being_written = 0
        self._slow_until = 0.0
        self._is_full = False
        self._writer: threading.Thread | None = None

        self._sender: threading.Thread | None = None
        self._is_idle = False
        self._oldest_since = 0.0
        self._last_sent = 0.0
        self._sending_since: float | None = None
        self._answer_seconds = 0.0
        self._batches = 0
        self._batch_limit: int | None = None
        # By key: records stored when it was suspected first, and how often it has failed alone.
        self._suspects: dict[str, tuple[int, int]] = {}
        self._flushes = 0
        self._hurries = False
        self._attempts = 0
        self._failures = 0
        self._retry_at = 0.0
        self._wants_to_be_left_alone = False
        self.store_is_down = False
        self.is_unsupported = False
        self._unbooked = 0  # Stored, and perhaps off the disk, but not counted yet.
        self._counts: dict[str, Counts] = {}
        self.delivered = 0
        self.lost = 0
        self.set_aside = 0
        self._rejected = 0  # Of those lost, the ones that had been in the spool.
        self.first_error: str | None = None

    def _new_spool(self) -> Spool:
        config = self._config
        directory = None if config.spool_directory is None else Path(config.spool_directory)
        return Spool(self.destination, directory, config.spool_max_bytes, config.max_waiting_bytes)

    def configure(self, config: Config) -> None:
        """Use other settings from now on; those of the spool, once it is empty."""
        with self._lock:
            if config != self._config:
                self._config = config
                if not self.waiting:
                    self._spool.discard()
                    self._spool = self._new_spool()

    @property
    def waiting(self) -> int:
        """Records that are not stored yet."""
        return len(self._incoming) + len(self._spool) + self._being_written + self._unbooked

    @property
    def holds_only_refused(self) -> bool:
        """Whether the store answers, and has all but what was set aside."""
        return self.set_aside > 0 and not self.waiting

    def counts(self, owner: str) -> Counts:
        """Return what became of the spans that were submitted under ``owner``."""
        with self._lock:
            return self._counts.get(owner, Counts())

    def forget(self, owner: str) -> None:
        """Stop counting for ``owner``."""
        with self._lock:
            self._counts.pop(owner, None)

    def submit(self, record: Record) -> None:
        """Take a finished span.

        Returns when it is safe on the disk, or at once where the disk takes its time.
        """
        with self._lock:
            self._count_made(record)
            # Nor is one overtaken that goes by the other thread.
            is_prompt = not self._incoming and time.monotonic() >= self._slow_until
            self._being_written += 1
        try:
            if not (is_prompt and self._write_now(record)):
                self._enter(record, self._patience_without_room)
        finally:
            with self._lock:
                self._being_written -= 1
                if self._flushes:
                    self._settled.notify_all()

    def submit_all(self, records: Sequence[Record], *, at_once: bool = False) -> None:
        """Take records that nobody's call waits for: returns when there is room for them.

        Args:
            records: What to store.
            at_once: Send what waits now, rather than wait for more.
        """
        deadline = time.monotonic() + self._patience_for_room
        with self._lock:
            self._hurries |= at_once
            for record in records:
                self._count_made(record)
        for record in records:
            self._enter(record, max(0.0, deadline - time.monotonic()))

    def _write_now(self, record: Record) -> bool:
        """Write a record to the spool in this thread; return whether others have let it."""
        began = time.monotonic()
        rejected = self._spool.add([record], self._patience_with_disk)
        if rejected is None:
            return False
        self._note_written(1, rejected, time.monotonic() - began - len(record.payload) / _DISK)
        return True

    def _note_written(self, count: int, rejected: Sequence[Record], seconds: float) -> None:
        """See to what follows from it that records are in the spool; mostly, that is nothing."""
        waiting = len(self._spool)
        is_slow = seconds > self._slow_write
        # Waking the sender for each span would cost more than storing it.
        batch = self._batch_size()
        is_full = batch <= waiting < batch + count + 16
        is_wanted = self._sender is None or self._is_idle or self._flushes or self._hurries
        if not (is_wanted or is_full or rejected or is_slow):
            return
        with self._lock:
            if rejected:
                self._lose(rejected)
            if is_slow:
                self._slow_until = time.monotonic() + self._time_of_slow_disk
            if self._sender is None and self.destination.tracking_uri is not None:
                self._sender = self._start(self._deliver, "sender")
            self._due.notify()

    def _enter(self, record: Record, patience: float) -> None:
        """Have the other thread write a record; lose it where memory has no room in time."""

        def has_room() -> bool:
            limit = self._config.max_waiting_bytes
            return not self._incoming or self._incoming_bytes + len(record.payload) <= limit

        with self._lock:
            if not self._written.wait_for(has_room, patience):
                self._lose([record])
                return
            self._incoming.append(record)
            self._incoming_bytes += len(record.payload)
            if self._writer is None:
                self._writer = self._start(self._write, "writer")
            self._came.notify()

    @property
    def _is_written(self) -> bool:
        return not self._incoming and not self._being_written

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
        with self._lock:
            self._flushes += 1
            self._settled.wait_for(lambda: self._is_written, timeout)
            self._flushes -= 1
            if self.destination.tracking_uri is None:
                return self.waiting == 0
            goal = self.delivered + self.set_aside + self._rejected + self.waiting
            attempts = self._attempts + (1 if self.store_is_down or self._failures else 2)
            if give_up and self.store_is_down:
                deadline = min(deadline, time.monotonic() + self._patience_when_down)
            if give_up and self._expected_seconds() > deadline - time.monotonic():
                deadline = time.monotonic()
                # Else one slow answer could be the last that is waited for.
                self._answer_seconds /= 2
            if not self._wants_to_be_left_alone:
                self._retry_at = 0.0
            elif give_up:
                deadline = min(deadline, time.monotonic())
            self._flushes += 1
            self._due.notify()

            def is_stored() -> bool:
                done = self.delivered + self.set_aside + self._rejected
                return self.waiting == 0 or done >= goal

            def is_over() -> bool:
                has_tried = self._failures > 0 and self._attempts >= attempts
                return is_stored() or (give_up and has_tried)

            self._settled.wait_for(is_over, max(0.0, deadline - time.monotonic()))
            self._flushes -= 1
            stored = is_stored()
            self.store_is_down = not stored
            if stored:
                # The next task starts anew.
                self._batches = 0
                self._batch_limit = None
        # Nor is a trace of this one left on the disk.
        self._spool.discard()
        return stored

    def take(self) -> list[Record]:
        """Give up what waits, for somebody else to deliver. A batch on its way may yet arrive."""
        with self._lock:
            self._flushes += 1
            is_written = self._settled.wait_for(lambda: self._is_written, self._patience_when_down)
            self._flushes -= 1
            if not is_written:
                # The disk hangs.
                return []
        found = self._spool.peek(len(self._spool), 1 << 62)
        self._spool.remove(number for number, _ in found)
        self._spool.discard()
        with self._lock:
            self._suspects.clear()
        return [record for _, record in found]

    def _count_made(self, record: Record) -> None:
        if record.owner:
            self._counts.setdefault(record.owner, Counts()).made += 1

    def _counts_of(self, record: Record) -> Counts:
        # Of an owner that was forgotten, nobody wants to know.
        return self._counts.get(record.owner, Counts())

    def _start(self, run: Callable[[], None], role: str) -> threading.Thread | None:
        thread = threading.Thread(target=run, name=f"mlflow-ctx-autolog-{role}", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            # This process is ending, or may have no more threads.
            return None
        return thread

    def _lose(self, records: Sequence[Record]) -> None:
        self.lost += len(records)
        for record in records:
            self._counts_of(record).lost += 1
        if not self._is_full:
            self._is_full = True
            disk = self._spool.disk_problem or "it takes too long to write"
            if self._config.spool_max_bytes == 0:
                disk = "spool_max_bytes=0 allows none"
            store = self.first_error
            _logger.warning(
                "Finished spans of this process are lost until there is room for them again. "
                "Neither disk nor memory has any: of the spool, %s; %s, and %s bytes of "
                "max_waiting_bytes are on their way to the disk. %d wait for the tracking store "
                "%s, which %s. spool_max_bytes and max_waiting_bytes can be raised.",
                disk,
                self._spool.memory_problem,
                f"{self._incoming_bytes:,}",
                self.waiting,
                without_credentials(self.destination.tracking_uri),
                "has not refused any" if store is None else f"does not take them: {store}",
            )

    def _write(self) -> None:
        while True:
            with self._lock:
                if not self._came.wait_for(lambda: self._incoming, self._idle_time):
                    self._writer = None
                    return
                records = list(self._incoming)
            began = time.monotonic()
            rejected = self._spool.add(records) or []
            seconds = time.monotonic() - began
            with self._lock:
                for record in records:
                    self._incoming.popleft()
                    self._incoming_bytes -= len(record.payload)
                self._written.notify_all()
                self._settled.notify_all()
            size = sum(len(record.payload) for record in records)
            self._note_written(len(records), rejected, seconds - size / _DISK)

    def _deliver(self) -> None:
        while True:
            with self._lock:
                if not self._wait_for_records():
                    self._sender = None
                    return
                while len(self._spool) and (pause := self._due_at() - time.monotonic()) > 0:
                    self._due.wait(pause)
                count = self._batch_size()
                self._hurries = False
            batch = self._spool.peek(count, self._request_bytes)
            if not len(self._spool):
                # Somebody has taken it all.
                continue
            self._sending_since = started = time.monotonic()
            try:
                if not batch:
                    raise StoreError("the spool cannot be read")
                self._send(self.destination, [record for _, record in batch])
            except Exception as error:
                self._sending_since = None
                self._failed(error, batch)
            else:
                self._sending_since = None
                self._stored(batch, time.monotonic() - started)

    def _wait_for_records(self) -> bool:
        """Wait until there is something to send; return whether there is, before it is too long."""
        self._is_idle = True
        came = self._due.wait_for(lambda: len(self._spool) > 0, self._linger)
        if not came:
            # Nobody is to find an empty file.
            self._spool.discard()
            came = self._due.wait_for(lambda: len(self._spool) > 0, self._idle_time)
        self._is_idle = False
        self._oldest_since = max(self._oldest_since, time.monotonic())
        return came

    def _expected_seconds(self) -> float:
        """Return what the store's last answer took, or what the next has taken already."""
        since = self._sending_since
        return max(self._answer_seconds, 0.0 if since is None else time.monotonic() - since)

    def _batch_size(self) -> int:
        """Return how many records go in one request: more, where the store is slow."""
        if self._batch_limit is not None:
            return self._batch_limit
        return self._config.batch_size * min(10, 1 + int(2 * self._answer_seconds))

    def _due_at(self) -> float:
        """Return when the next batch is to be sent, on the monotonic clock."""
        if self._failures or self._flushes or self._hurries:
            return self._retry_at
        # Sent less and less often by a task that lasts, and never so often as to crowd the store.
        breath = min(self._answer_seconds / self._share_of_store, self._longest_interval)
        not_before = self._last_sent + breath
        if len(self._spool) >= self._batch_size():
            return not_before
        interval = self._config.send_interval * 2.0 ** min(self._batches, 16)
        return max(not_before, self._oldest_since + min(interval, self._longest_interval))

    def _failed(self, error: Exception, batch: Sequence[tuple[int, Record]]) -> None:
        known = error if isinstance(error, StoreError) else StoreError(repr(error))
        if known.rejected:
            self._rejected_in_part(known, batch)
            return
        is_suspected = known.failed and self._failures >= self._failures_of_store
        if len(batch) > 1 and (known.refused or is_suspected):
            with self._lock:
                self._batch_limit = math.ceil(len(batch) / 2)
                for _, record in batch if is_suspected else ():
                    self._suspects.setdefault(record.key, (self.delivered, 0))
            if known.refused:
                return
        elif batch and known.refused:
            if self._put_aside(*batch[0], known):
                return
        elif batch and is_suspected and self._is_to_blame(*batch[0], known):
            return
        with self._lock:
            self._attempts += 1
            self._failures += 1
            failures = self._failures
            if is_suspected and len(self._spool) > 1:
                # To find the span that it fails over is a matter of a few attempts.
                failures = 1
            self._retry_at = time.monotonic() + self._pause(failures, known.retry_after)
            self._wants_to_be_left_alone = known.retry_after is not None
            self.is_unsupported = known.unsupported
            self.first_error = self.first_error or str(known)
            self._settled.notify_all()
        if self._failures == 1:
            _logger.warning(
                "The tracking store %s did not take %d finished spans: %s. They are kept and "
                "sent again; check that this process can reach the store and may write to "
                "experiment %s.",
                without_credentials(self.destination.tracking_uri),
                self.waiting,
                known,
                self.destination.experiment_id,
            )

    def _pause(self, failures: int, retry_after: float | None) -> float:
        # Apart from those of other processes, which have all seen the store return.
        scatter = random.uniform(0.75, 1.25)
        if retry_after is not None:
            return retry_after + scatter
        return min(self._first_pause * 2.0 ** min(failures - 1, 16), self._longest_pause) * scatter

    def _is_to_blame(self, number: int, record: Record, error: StoreError) -> bool:
        """Whether a record is what the store fails over, as it has taken others meanwhile.

        It is set aside then; else the others go first.
        """
        with self._lock:
            stored_then, failures = self._suspects.get(record.key, (self.delivered, 0))
            self._suspects[record.key] = (stored_then, failures + 1)
            is_to_blame = self.delivered > stored_then and failures >= self._failures_of_one
        if is_to_blame and self._put_aside(number, record, error):
            return True
        if len(self._spool) > 1:
            self._spool.move_to_end(number, record)
        return False

    def _put_aside(self, number: int, record: Record, error: StoreError) -> bool:
        """Take a record out of the way that the store does not have; return whether it is."""
        file = self._spool.set_aside(number, record, str(error))
        where = f"{record.kind} {record.key} is kept in {file}, for mlflow-ctx-autolog recover"
        if file is None:
            if not self._spool.remove([number]):
                # It was taken, or replaced, on its way.
                return True
            where = f"{record.kind} {record.key} is lost, since no file can be had to keep it in"
        with self._lock:
            self._attempts += 1
            self._suspects.pop(record.key, None)
            counts = self._counts_of(record)
            if file is None:
                self._rejected += 1
                self.lost += 1
                counts.lost += 1
            else:
                self.set_aside += 1
                counts.set_aside += 1
            self._failures = 0
            self._grow_batches()
            reason = f"{error}; {where}"
            self.first_error = self.first_error or reason
            self._settled.notify_all()
        _logger.warning(
            "The tracking store %s does not take one of the finished spans: %s.",
            without_credentials(self.destination.tracking_uri),
            reason,
        )
        return True

    def _rejected_in_part(self, error: StoreError, batch: Sequence[tuple[int, Record]]) -> None:
        """Enter that the store has some of a batch, and will not have the others, whichever."""
        stored = self._spool.remove(number for number, _ in batch)
        with self._lock:
            self._attempts += 1
            self._failures = 0
            there = [record for number, record in batch if number in stored]
            lost, taken = there[: error.rejected], there[error.rejected :]
            for record in lost:
                self._counts_of(record).lost += 1
            for record in taken:
                self._counts_of(record).delivered += 1
            self.lost += len(lost)
            self._rejected += len(lost)
            self.delivered += len(taken)
            self.first_error = self.first_error or str(error)
            self._settled.notify_all()
        _logger.warning(
            "The tracking store %s has refused %d of %d finished spans, without saying which; "
            "they are lost: %s.",
            without_credentials(self.destination.tracking_uri),
            len(lost),
            len(batch),
            error,
        )

    def _grow_batches(self) -> None:
        if self._batch_limit is not None:
            self._batch_limit = min(2 * self._batch_limit, self._config.batch_size)

    def _stored(self, batch: Sequence[tuple[int, Record]], seconds: float) -> None:
        self._unbooked = len(batch)
        # Without those that were replaced, or taken, while they were on their way.
        stored = self._spool.remove(number for number, _ in batch)
        with self._lock:
            self._unbooked = 0
            failures, self._failures = self._failures, 0
            self._attempts += 1
            self._batches += 1
            self._answer_seconds = seconds
            self._last_sent = self._oldest_since = time.monotonic()
            self._retry_at = 0.0
            self._wants_to_be_left_alone = self.store_is_down = self._is_full = False
            self.is_unsupported = False
            self._grow_batches()
            self.delivered += len(stored)
            for number, record in batch:
                self._suspects.pop(record.key, None)
                if number in stored:
                    self._counts_of(record).delivered += 1
            if not self.set_aside and not self.lost:
                self.first_error = None
            self._settled.notify_all()
        if failures:
            _logger.warning(
                "The tracking store %s takes spans again after %d failed attempts.",
                without_credentials(self.destination.tracking_uri),
                failures,
            )


class Deliveries:
    """A process's deliveries, one for each destination, made on first use."""

    def __init__(self, make: Callable[[Destination], Delivery]) -> None:
        self._make = make
        self._by_destination: dict[Destination, Delivery] = {}

    def to(self, destination: Destination) -> Delivery:
        """Return the delivery to a destination."""
        found = self._by_destination.get(destination)
        # setdefault, since two threads may ask for the first time at once.
        return found or self._by_destination.setdefault(destination, self._make(destination))

    def all(self) -> list[Delivery]:
        """Return those that have been made."""
        return list(self._by_destination.values())

    def flush(self, timeout: float, *, give_up_if_down: bool = False) -> bool:
        """Send all that waits; return whether it was stored within ``timeout`` seconds in all.

        Args:
            timeout: Seconds to wait at most.
            give_up_if_down: See :meth:`Delivery.flush`; for stores that are known to be down.
        """
        deadline = time.monotonic() + timeout
        flushed = []
        for each in self.all():
            # Lest one that hangs cost the others their time.
            each.hurry()
        for each in self.all():
            remaining = max(0.0, deadline - time.monotonic())
            flushed.append(each.flush(remaining, give_up=give_up_if_down and each.store_is_down))
        return all(flushed)


_deliveries: weakref.WeakSet[Delivery] = weakref.WeakSet()


def _reset_all() -> None:
    for delivery in _deliveries:
        delivery._begin_anew()


os.register_at_fork(after_in_child=_reset_all)
