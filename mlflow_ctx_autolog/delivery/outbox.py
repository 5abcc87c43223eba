"""What waits for one destination, for somebody else to fetch, and what has become of it."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.delivery.handed_over import HandedOver
from mlflow_ctx_autolog.delivery.intake import Intake
from mlflow_ctx_autolog.delivery.receipts import Counts, Loss
from mlflow_ctx_autolog.delivery.records import Destination, Record
from mlflow_ctx_autolog.delivery.spool import Spool
from mlflow_ctx_autolog.log_ins import safe_logger, without_credentials

__all__ = ["Outbox"]

_logger = safe_logger(__name__)


class Outbox:
    """Keeps finished spans for one destination, until somebody has fetched them.

    - :meth:`submit` never raises. It appends to the spool, so that what a killed process leaves can
      still be stored by another. Once the disk is slow, another thread does so, until it is prompt
      again. Where neither disk nor memory has room, the new span is dropped and counted as lost.
    - What was given to :meth:`hand_over` is kept until :meth:`acknowledge`. What is on the disk
      goes to whoever comes for it after :meth:`release`.
    - A forked child starts with an empty one: the parent still has what it held.

    Args:
        destination: Where all records of it go; another one needs another outbox.
        config: Sizes and times.

    Attributes:
        is_shared: Whether somebody comes for what is on the disk while this process lives.
        store_is_down: Whether the last flush was in vain, and nothing was stored since.
        is_unsupported: Whether the store has answered last that it takes no single spans.
        delivered: Records stored so far.
        lost: Records dropped so far, or refused by a store that has not said which.
        set_aside: Records that the store does not have, and that wait in a file for ``recover``.
        first_error: The first reason why the store did not take what waits, was set aside or
            lost; None where all is well.
    """

    # How long those who can wait do so, in seconds, for a disk that is slower than they are.
    _patience_for_room = 10.0
    # How long others do, for a disk or store that is known to be down.
    _patience_when_down = 1.0
    # What it is made of, for tests to make it of something quicker.
    _intake_class = Intake

    def __init__(self, destination: Destination, config: Config | None = None) -> None:
        self.destination = destination
        self.is_shared = False
        self._config = config or Config()
        self._reset()
        _outboxes.add(self)

    def _begin_anew(self) -> None:
        self._spool.leave_to_parent()
        self._reset()

    def _reset(self) -> None:
        self._spool = self._new_spool()
        self._handed_over = HandedOver()
        self._intake = self._intake_class(
            lambda records, patience: self._spool.add(records, patience),
            lambda: self._config.max_waiting_bytes,
            self._note_written,
            self._lose,
        )
        self._lock = threading.Lock()
        self._is_full = False
        self._released = time.monotonic()
        self._unbooked = 0  # Stored, and perhaps off the disk, but not counted yet.
        self._counts: dict[str, Counts] = {}
        self.store_is_down = self.is_unsupported = False
        self.delivered = 0
        self.lost = 0
        self.set_aside = 0
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
        """Records that are not stored yet, and not released."""
        return self._intake.pending + len(self._spool) + self._unbooked

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
        self._intake.put(record)

    def submit_all(self, records: Sequence[Record], *, at_once: bool = False) -> None:  # noqa: ARG002
        """Take records that nobody's call waits for: returns when there is room for them.

        Args:
            records: What to store.
            at_once: Send what waits now, rather than wait for more.
        """
        with self._lock:
            for record in records:
                self._count_made(record)
        self._intake.put_later(records, self._patience_for_room)

    def hurry(self) -> None:
        """Send what waits now, without waiting for it, where this process sends it."""

    def flush(self, timeout: float, *, give_up: bool = False) -> bool:  # noqa: ARG002
        """Return whether nothing waits any more, after ``timeout`` seconds at most.

        Args:
            timeout: Seconds to wait at most.
            give_up: Wait no longer than it makes sense where others deliver what is left.
        """
        self._intake.wait(timeout)
        return self.waiting == 0

    def take(self) -> list[Record]:
        """Give up what waits, for somebody else to deliver. A batch on its way may yet arrive.

        A later state of what is on its way is not given up: it is sent after it, from here.
        """
        if not self._intake.wait(self._patience_when_down):
            # The disk hangs.
            return []
        found = self._spool.without_later_states(self._spool.peek(len(self._spool), 1 << 62))
        self._spool.remove(number for number, _ in found)
        self._spool.discard()
        return [record for _, record in found]

    def hand_over(self, max_bytes: int) -> tuple[str, int, list[Record]]:
        """Return what waits and was not handed over yet, for Spark to take to the driver.

        It stays here, and is sent from here where that is possible, until :meth:`acknowledge`.

        Args:
            max_bytes: Payloads at most, the oldest first.

        Returns:
            By what it is acknowledged, this outbox's name and a number; and the records.
        """
        if not self._intake.wait(self._patience_when_down):
            return self._handed_over.token, 0, []
        config = self._config
        max_kept = (config.spool_max_bytes or config.max_waiting_bytes) // 4
        number, records = self._handed_over.next(self._spool, max_bytes, max_kept)
        return self._handed_over.token, number, records

    def acknowledge(self, told: Mapping[str, int]) -> None:
        """Forget what the driver has: by the names of outboxes, all up to that number."""
        number = told.get(self._handed_over.token)
        if number is not None:
            self._handed_over.acknowledge(self._spool, number)

    def release(self) -> int:
        """Leave what is on the disk to whoever comes for it; return how many records that are.

        To be called where this process cannot store them, and does not keep others waiting.
        """
        self._released = time.monotonic()
        if not self._intake.wait(self._patience_when_down):
            return 0
        return self._spool.release()

    def _note_written(self, count: int) -> None:  # noqa: ARG002
        """See to what follows from it that records are in the spool; mostly, that is nothing."""
        interval, batch = self._config.send_interval, self._config.batch_size
        is_due = len(self._spool) >= batch or time.monotonic() > self._released + 5 * interval
        if self.is_shared and is_due:
            # In a task that lasts, so that it can be seen before it ends.
            self._released = time.monotonic()
            self._spool.release()

    def _count_made(self, record: Record) -> None:
        if record.owner:
            self._counts.setdefault(record.owner, Counts()).made += 1

    def _counts_of(self, record: Record) -> Counts:
        # Of an owner that was forgotten, nobody wants to know.
        return self._counts.get(record.owner, Counts())

    def _count_lost(self, records: Sequence[Record], loss: Loss) -> None:
        self.lost += len(records)
        for record in records:
            self._counts_of(record).losses[loss] += 1

    def _lose(self, records: Sequence[Record]) -> None:
        with self._lock:
            self._count_lost(records, Loss.NO_ROOM)
            was_full, self._is_full = self._is_full, True
        if was_full:
            return
        disk = self._spool.disk_problem or "it takes too long to write"
        if self._config.spool_max_bytes == 0:
            disk = "spool_max_bytes=0 allows none"
        _logger.warning(
            "Finished spans of this process are lost until there is room for them again. Neither "
            "disk nor memory has any: of the spool, %s; %s, and %s bytes of max_waiting_bytes are "
            "on their way to the disk. %d wait for the tracking store %s, which %s. "
            "spool_max_bytes and max_waiting_bytes can be raised.",
            disk,
            self._spool.memory_problem,
            f"{self._intake.bytes:,}",
            self.waiting,
            self._store_name,
            f"does not take them: {self.first_error}" if self.first_error else "has refused none",
        )

    @property
    def _store_name(self) -> str | None:
        return without_credentials(self.destination.tracking_uri)


_outboxes: weakref.WeakSet[Outbox] = weakref.WeakSet()


def _begin_all_anew() -> None:
    for outbox in _outboxes:
        outbox._begin_anew()


os.register_at_fork(after_in_child=_begin_all_anew)
