"""What processes that are gone have left in their spools."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from mlflow_ctx_autolog.delivery.spool import (
    LAST_NUMBER,
    Destination,
    Record,
    SpoolFile,
    first_of,
    spool_files,
)
from mlflow_ctx_autolog.exceptions import StoreError

__all__ = ["Recovered", "Recovery", "recover"]

_logger = logging.getLogger(__name__)

Send = Callable[[Destination, Sequence[Record]], None]

# Records and bytes of payload that are sent in one request at most.
_BATCH, _BATCH_BYTES = 200, 4_000_000
# Seconds after which a file with nothing in it has no process that is about to write to it.
_TIME_TO_SET_UP = 60.0


@dataclass
class Recovered:
    """What became of one spool file.

    Args:
        stored: Records that were delivered.
        left: Records that are still in the file.
        problem: Why they are, or what is damaged; None if all is well.
        is_damaged: Whether some could not be read.
    """

    stored: int = 0
    left: int = 0
    problem: str | None = None
    is_damaged: bool = False


def recover(path: Path, send: Send) -> Recovered:
    """Deliver what is in a spool file, and remove from it what was delivered; it, when empty.

    Of a damaged file, what lies before and after the damage is delivered, and the file is
    renamed to ``.damaged``.

    Args:
        path: The file.
        send: Stores records, or raises. Storing one again must leave one.

    Raises:
        BlockingIOError: The process that writes it is alive.
        OSError: It cannot be opened.
        sqlite3.Error: It is damaged beyond reading.
    """
    age = time.time() - path.stat().st_mtime
    file = SpoolFile.open(path)
    found = Recovered()
    try:
        if age < _TIME_TO_SET_UP and not file.is_set_up():
            raise BlockingIOError(f"{path} is being made by a process that is alive")
        # Else its process was killed before it had written anything.
        if file.is_set_up():
            _deliver(file, file.destination(), send, found)
    finally:
        file.close()
    if found.is_damaged and not found.left:
        found.problem = f"{found.problem}; it is {file.set_aside()} now"
    elif not found.left:
        file.delete()
    return found


def _deliver(file: SpoolFile, destination: Destination, send: Send, found: Recovered) -> None:
    above, below = 0, LAST_NUMBER
    # From the oldest to the damage, if there is one, then from the newest back to it.
    for newest_first in (False, True):
        limit = _BATCH
        while True:
            batch, damage = _first_batch(file.records(above, below, newest_first, limit))
            if batch:
                try:
                    _send_what_is_taken(file, destination, batch, send, found)
                except Exception as error:
                    found.problem = str(error)
                    found.left = _count(file, above, below) or len(batch)
                    return
                numbers = [number for number, _ in batch]
                if newest_first:
                    below = min(numbers)
                else:
                    above = max(numbers)
            if damage is not None and limit > 1:
                # One by one, since a reader looks ahead.
                limit = 1
            elif damage is not None:
                found.is_damaged = True
                found.problem = f"it is damaged ({damage}); what could not be read is lost"
                break
            elif not batch:
                return


def _count(file: SpoolFile, above: int, below: int) -> int | None:
    try:
        return file.count(above, below)
    except sqlite3.Error:
        return None


def _send_what_is_taken(
    file: SpoolFile,
    destination: Destination,
    batch: Sequence[tuple[int, Record]],
    send: Send,
    found: Recovered,
) -> None:
    """Send a batch, where it is refused one by one, and remove from the file what is taken."""
    try:
        send(destination, [record for _, record in batch])
    except StoreError as error:
        if not error.refused:
            raise
        if len(batch) == 1:
            found.problem = str(error)
            found.left += 1
            return
        for one in batch:
            _send_what_is_taken(file, destination, [one], send, found)
    else:
        found.stored += len(batch)
        with suppress(sqlite3.Error):
            file.remove([number for number, _ in batch])


def _first_batch(
    records: Generator[tuple[int, Record], None, None],
) -> tuple[list[tuple[int, Record]], sqlite3.Error | None]:
    """Return the first records, and the damage that ended them, if one did."""
    batch: list[tuple[int, Record]] = []
    try:
        with closing(records):
            # Not all at once: what was read before the damage is kept.
            for numbered in first_of(records, _BATCH, _BATCH_BYTES):
                batch.append(numbered)
    except sqlite3.Error as error:
        return batch, error
    return batch, None


class Recovery:
    """Delivers, from a worker that has a task, what dead processes of its host have left.

    Args:
        send: See :func:`recover`.
    """

    # How long nothing is looked for, in seconds, once it was.
    _interval = 30.0

    def __init__(self, send: Send) -> None:
        self._send = send
        self._next = 0.0

    def start(self, directory: str | None) -> None:
        """Look for spools in a thread of its own, unless that was done a moment ago."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._interval
        folder = None if directory is None else Path(directory)
        with suppress(RuntimeError):
            threading.Thread(
                target=self._run, args=(folder,), name="mlflow-ctx-autolog-recovery", daemon=True
            ).start()

    def _run(self, directory: Path | None) -> None:
        for path in spool_files(directory):
            try:
                found = recover(path, self._send)
            except (OSError, sqlite3.Error):
                # Its process is alive, or it is somebody else's, or beyond reading: not for each
                # task to tell.
                continue
            if found.is_damaged:
                _logger.warning("The spool %s was left behind: %s.", path, found.problem)
            if found.stored:
                _logger.warning(
                    "%d finished spans that a process no longer alive had left in %s are stored "
                    "now.",
                    found.stored,
                    path,
                )
