"""From a finished span to the store: a queue on disk, batches, a sender thread of its own."""

from __future__ import annotations

import logging
import math
import os
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.delivery.spool import Destination, Record, Spool
from mlflow_ctx_autolog.exceptions import StoreError

__all__ = ["Counts", "Deliveries", "Delivery"]

_logger = logging.getLogger(__name__)


@dataclass
class Counts:
    """What became of the spans of one task attempt so far."""

    made: int = 0
    delivered: int = 0
    lost: int = 0

    @property
    def waiting(self) -> int:
        """Spans that are neither stored nor lost."""
        return self.made - self.delivered - self.lost


class Delivery:
    """Stores finished spans from threads of its own, so that no caller waits for the store.

    - :meth:`submit` never raises, and waits neither for the store nor for a slow disk. Where
      neither disk nor memory has room, the new span is dropped and counted as lost.
    - One thread writes what comes into the spool, another sends it from there, so that what a
      killed process has not sent can still be sent by another.
    - Spans are sent in batches, oldest first. The first goes after ``config.send_interval``, or
      when ``config.batch_size`` have gathered; the longer a task lasts, and the slower the store
      answers, the longer the interval and the larger the batches, so that many workers do not
      overrun the store.
    - A batch that the store does not take is tried again, with a growing pause or the one that
      the store asks for. One that it refuses is halved, until the span in it that it refuses is
      alone, and the others go first. One warning names the reason; another says when the store
      takes spans again.
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
        lost: Records dropped so far.
        first_error: The first reason why the store did not take what waits or was lost; None
            where all is well.
    """

    # How long a caller lets the writer take, in seconds, to have a span safe on the disk.
    _patience_with_disk = 0.001
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
    # How long the threads stay, in seconds, when there is nothing to do.
    _idle_time = 60.0

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

    def _reset(self) -> None:
        self._spool = self._new_spool()
        self._lock = threading.Lock()
        self._came = threading.Condition(self._lock)  # What the writer waits for.
        self._written = threading.Condition(self._lock)  # What callers wait for.
        self._due = threading.Condition(self._lock)  # What the sender waits for.
        self._settled = threading.Condition(self._lock)  # What a flush waits for.
        self._incoming: deque[Record] = deque()
        self._incoming_bytes = 0
        self._submitted_count = 0
        self._written_count = 0
        self._disk_is_prompt = True
        self._is_full = False
        self._writer: threading.Thread | None = None

        self._sender: threading.Thread | None = None
        self._oldest_since = 0.0
        self._last_sent = 0.0
        self._sending_since: float | None = None
        self._answer_seconds = 0.0
        self._batches = 0
        self._batch_limit: int | None = None
        self._refused: set[str] = set()
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
        return len(self._incoming) + len(self._spool) + self._unbooked

    @property
    def holds_only_refused(self) -> bool:
        """Whether the store answers, and will have none of what waits."""
        return bool(self._refused) and len(self._refused) >= len(self._spool)

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
            if self._has_room(record):
                number = self._enter(record)
                if self._disk_is_prompt:
                    self._disk_is_prompt = self._written.wait_for(
                        lambda: self._written_count >= number, self._patience_with_disk
                    )
            else:
                self._count_made(record)
                self._lose([record])

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
                has_room = partial(self._has_room, record)
                if self._written.wait_for(has_room, max(0.0, deadline - time.monotonic())):
                    self._enter(record)
                else:
                    self._count_made(record)
                    self._lose([record])

    def _has_room(self, record: Record) -> bool:
        limit = self._config.max_waiting_bytes
        return not self._incoming or self._incoming_bytes + len(record.payload) <= limit

    def _enter(self, record: Record) -> int:
        self._incoming.append(record)
        self._incoming_bytes += len(record.payload)
        self._submitted_count += 1
        self._count_made(record)
        if self._writer is None:
            self._writer = self._start(self._write, "writer")
        self._came.notify()
        return self._submitted_count

    def hurry(self) -> None:
        """Send what waits now, without waiting for it."""
        with self._lock:
            self._hurries = self.waiting > 0
            self._due.notify()

    def flush(self, timeout: float, *, give_up: bool = False) -> bool:
        """Send all that waits now; return whether it was stored within ``timeout`` seconds.

        What the store has refused once more, by itself, is not waited for.

        Args:
            timeout: Seconds to wait at most.
            give_up: Wait no longer than it makes sense where others deliver what is left: for
                two attempts that fail, or for one, and a second at most, of a store that is known
                to be down; not at all for one whose answers take longer than there is time. It
                must not hold up the end of every task.
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            self._settled.wait_for(lambda: not self._incoming, timeout)
            if self.destination.tracking_uri is None:
                return self.waiting == 0
            goal = self.delivered + self.waiting
            attempted = self._attempts
            attempts = attempted + (1 if self.store_is_down or self._failures else 2)
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
                return self.waiting == 0 or (self.delivered >= goal and not self._refused)

            def is_over() -> bool:
                has_tried = self._failures > 0 and self._attempts >= attempts
                is_refused = self.holds_only_refused and self._attempts > attempted
                return is_stored() or is_refused or (give_up and has_tried)

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
            if not self._settled.wait_for(lambda: not self._incoming, self._patience_when_down):
                # The disk hangs.
                return []
        found = self._spool.peek(len(self._spool), 1 << 62)
        self._spool.remove(number for number, _ in found)
        self._spool.discard()
        with self._lock:
            self._refused.clear()
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
            _logger.warning(
                "%d finished spans wait for the tracking store %s, and neither the spool nor "
                "memory has room for more; further spans of this process are lost until the "
                "store takes some. An earlier warning says why it does not; spool_max_bytes and "
                "max_waiting_bytes can be raised.",
                self.waiting,
                self.destination.tracking_uri,
            )

    def _write(self) -> None:
        while True:
            with self._lock:
                if not self._came.wait_for(lambda: self._incoming, self._idle_time):
                    self._writer = None
                    return
                records = list(self._incoming)
            rejected = self._spool.add(records)
            with self._lock:
                for record in records:
                    self._incoming.popleft()
                    self._incoming_bytes -= len(record.payload)
                if rejected:
                    self._lose(rejected)
                was_empty = len(self._spool) <= len(records)
                if was_empty:
                    self._oldest_since = time.monotonic()
                self._written_count += len(records)
                self._disk_is_prompt = True
                self._written.notify_all()
                self._settled.notify_all()
                if self._sender is None and self.destination.tracking_uri is not None:
                    self._sender = self._start(self._deliver, "sender")
                # Waking the sender for each span would cost more than storing it.
                is_wanted = was_empty or self._flushes or self._hurries
                if is_wanted or len(self._spool) >= self._batch_size():
                    self._due.notify()
            # Now, since nobody waits for the writer: it is a matter of milliseconds.
            self._spool.write_back()

    def _deliver(self) -> None:
        while True:
            with self._lock:
                if not self._due.wait_for(lambda: len(self._spool) > 0, self._idle_time):
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
        # Apart from those of other processes, which have all seen the store return.
        scatter = random.uniform(0.75, 1.25)
        refused = isinstance(error, StoreError) and error.refused
        retry_after = error.retry_after if isinstance(error, StoreError) else None
        # Else it was taken, or replaced, on its way.
        is_there = refused and len(batch) == 1 and self._spool.move_to_end(*batch[0])
        with self._lock:
            if refused and len(batch) > 1:
                self._batch_limit = math.ceil(len(batch) / 2)
                return
            if is_there and batch[0][1].key not in self._refused:
                self._refused.add(batch[0][1].key)
                if not self.holds_only_refused:
                    # The others first.
                    return
            self._attempts += 1
            self._failures += 1
            pause = self._first_pause * 2.0 ** min(self._failures - 1, 16)
            if retry_after is None:
                pause = min(pause, self._longest_pause) * scatter
            else:
                pause = retry_after + scatter
            self._wants_to_be_left_alone = retry_after is not None
            self._retry_at = time.monotonic() + pause
            self.is_unsupported = isinstance(error, StoreError) and error.unsupported
            reason = str(error) if isinstance(error, StoreError) else repr(error)
            self.first_error = self.first_error or reason
            self._settled.notify_all()
        if self._failures == 1:
            _logger.warning(
                "The tracking store %s did not take %d finished spans: %s. They are kept and "
                "sent again; check that this process can reach the store and may write to "
                "experiment %s.",
                self.destination.tracking_uri,
                self.waiting,
                reason,
                self.destination.experiment_id,
            )

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
            if self._batch_limit is not None:
                self._batch_limit = min(2 * self._batch_limit, self._config.batch_size)
            self.delivered += len(stored)
            for number, record in batch:
                self._refused.discard(record.key)
                if number in stored:
                    self._counts_of(record).delivered += 1
            if not self._refused and not self.lost:
                self.first_error = None
            self._settled.notify_all()
        if failures:
            _logger.warning(
                "The tracking store %s takes spans again after %d failed attempts.",
                self.destination.tracking_uri,
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
        delivery._reset()


os.register_at_fork(after_in_child=_reset_all)
