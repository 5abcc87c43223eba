"""What was given to Spark for the driver, and is kept until the driver says that it has it."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Mapping

from mlflow_ctx_autolog.delivery.records import Record
from mlflow_ctx_autolog.delivery.spool import Spool

__all__ = ["Acknowledgements", "HandedOver"]

# Processes whose batches the driver acknowledges at once, those that it has heard from last.
_PROCESSES = 64


class HandedOver:
    """Batches of a spool's records that Spark takes to the driver, or does not.

    It may stop reading a task whose rows it needs no more, or fail it afterwards.

    Not for several threads at once.

    Attributes:
        token: Names the spool among those of all processes.
    """

    def __init__(self) -> None:
        self.token = uuid.uuid4().hex[:12]
        self._count = 0
        # Of each batch that is not acknowledged: its last record, and its size in bytes.
        self._batches: dict[int, tuple[int, int]] = {}
        self._last = 0

    def next(self, spool: Spool, max_bytes: int, max_kept: int) -> tuple[int, list[Record]]:
        """Return the number of the next batch, and what is in it: the oldest that was in none.

        Args:
            spool: Where it is, and stays.
            max_bytes: Payloads in it at most.
            max_kept: Bytes of batches that are kept at most, apart from this one. What was given to
                Spark first goes first, as the driver has it most likely.
        """
        found = spool.peek(len(spool), max_bytes, after=self._last)
        size = sum(len(record.payload) for _, record in found)
        if not found or size > max_bytes:
            return 0, []
        kept = sum(each for _, each in self._batches.values())
        for number, (last, bytes_of_batch) in list(self._batches.items()):
            if kept <= max_kept:
                break
            if spool.remove_until(last):
                del self._batches[number]
                kept -= bytes_of_batch
        self._count += 1
        self._last = found[-1][0]
        self._batches[self._count] = self._last, size
        return self._count, [record for _, record in found]

    def acknowledge(self, spool: Spool, number: int) -> None:
        """Forget a batch, and all before it: the driver has them.

        But for what is to be sent from here after an earlier state of it.
        """
        for each in [each for each in self._batches if each <= number]:
            if spool.remove_until(self._batches[each][0]):
                del self._batches[each]


class Acknowledgements:
    """Which batches the driver has, of each spool. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrived: dict[str, set[int]] = {}
        self._until: dict[str, int] = {}

    def note(self, token: str, number: int) -> None:
        """A batch has arrived, and is on the driver's disk."""
        with self._lock:
            arrived = self._arrived.pop(token, set()) | {number}
            until = self._until.pop(token, 0)
            while until + 1 in arrived:
                until += 1
                arrived.remove(until)
            # The one that was heard from last comes last.
            self._arrived[token], self._until[token] = arrived, until
            if len(self._until) > _PROCESSES:
                oldest = next(iter(self._until))
                del self._arrived[oldest], self._until[oldest]

    def told(self) -> Mapping[str, int]:
        """Return, by the spool's token, the last batch up to which there is none missing."""
        with self._lock:
            return {token: until for token, until in self._until.items() if until}
