"""What processes that are gone have left in their spools."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlflow_ctx_autolog.delivery.directory import is_held
from mlflow_ctx_autolog.delivery.intake import start_thread
from mlflow_ctx_autolog.delivery.records import Destination, Record
from mlflow_ctx_autolog.delivery.segments import (
    REFUSED,
    DamagedError,
    Segment,
    destination_of,
    spool_files,
)
from mlflow_ctx_autolog.delivery.spool import REASON, first_of, put_aside
from mlflow_ctx_autolog.exceptions import StoreError, warn_once
from mlflow_ctx_autolog.log_ins import safe_logger

__all__ = ["Recovered", "Recovery", "recover"]

_logger = safe_logger(__name__)

Send = Callable[[Destination, Sequence[Record]], None]

# Records and bytes of payload that are sent in one request at most.
_BATCH, _BATCH_BYTES = 200, 4_000_000
# Seconds after which a file with nothing in it has no process that is about to write to it.
_TIME_TO_SET_UP = 60.0
# Single records that the store may fail over before it is taken to be down, where it takes none.
_FAILURES = 3


@dataclass
class Recovered:
    """What became of one spool file.

    Args:
        stored: Records that were delivered.
        left: Records that are still in the file, or set aside in another.
        problem: Why they are, or what is damaged; None if all is well.
        is_damaged: Whether some could not be read.
    """

    stored: int = 0
    left: int = 0
    problem: str | None = None
    is_damaged: bool = False


def recover(path: Path, send: Send) -> Recovered:
    """Deliver what is in a spool file, and remove from it what was delivered; it, when empty.

    What the store refuses, or fails over while it takes the others, is set aside in a file of its
    own. Of a damaged file, what lies around the damage is delivered, and the file is renamed to
    ``.damaged``.

    Args:
        path: The file.
        send: Stores records, or raises. Storing one again must leave one.

    Raises:
        BlockingIOError: The process that writes it is alive.
        DamagedError: It is damaged beyond reading, or no spool.
        OSError: It cannot be opened.
    """
    age = time.time() - path.stat().st_mtime
    segment = Segment.open(path)
    found = Recovered()
    try:
        if not segment.is_set_up():
            if age < _TIME_TO_SET_UP:
                raise BlockingIOError(f"{path} is being made by a process that is alive")
            # Its process was killed before it had written anything.
            segment.delete()
            return found
        destination = segment.destination()
        damage = segment.scan()
        readable = len(segment)
        _Pass(segment, destination, send, found).run()
        if damage:
            found.is_damaged = True
            said = f"{found.problem}; " if found.problem else ""
            found.problem = (
                f"{said}it is damaged: {readable} records could be read, and {damage:,} bytes not"
            )
        if not len(segment) and not damage:
            segment.delete()
        elif not len(segment):
            found.problem = f"{found.problem}; it is {segment.set_aside()} now"
    finally:
        segment.close()
    return found


class _Pass:
    """Delivers what one file holds."""

    def __init__(
        self, segment: Segment, destination: Destination, send: Send, found: Recovered
    ) -> None:
        self._segment = segment
        self._destination = destination
        self._send = send
        self._found = found
        self._is_of_refused = segment.path.name.endswith(REFUSED)
        self._failed: list[tuple[int, Record, str]] = []
        self._aside: Path | None = None

    def run(self) -> None:
        reasons = []
        if self._is_of_refused:
            reasons = [number for number, record in self._records() if record.kind == REASON]
        pending = [number for number in self._segment.numbers() if number not in reasons]
        while pending:
            batch = list(first_of(self._records(pending), _BATCH, _BATCH_BYTES))
            if not batch:
                break
            pending = pending[len(batch) :]
            try:
                self._send_what_is_taken(batch)
            except Exception as error:
                self._found.problem = str(StoreError(str(error)))
                break
        if self._found.stored:
            # Those that it has failed over among many that it took.
            for number, record, reason in self._failed:
                self._set_aside(number, record, reason)
        if self._failed and self._found.problem is None:
            self._found.problem = self._failed[0][2]
        left = [number for number in self._segment.numbers() if number not in reasons]
        self._found.left += len(left)
        if not left:
            for number in reasons:
                self._segment.remove(number)

    def _records(self, numbers: Sequence[int] | None = None) -> Iterator[tuple[int, Record]]:
        for number in self._segment.numbers() if numbers is None else numbers:
            yield number, self._segment.read(number)

    def _send_what_is_taken(self, batch: Sequence[tuple[int, Record]]) -> None:
        """Send a batch, where it is refused in ever smaller parts, and remove what is taken."""
        try:
            self._send(self._destination, [record for _, record in batch])
        except StoreError as error:
            if error.rejected:
                # It has the others, and is not to be sent these again.
                self._found.problem = str(error)
                self._take_off(batch, len(batch) - error.rejected)
            elif not (error.refused or error.failed):
                raise
            elif len(batch) > 1:
                half = len(batch) // 2
                self._send_what_is_taken(batch[:half])
                self._send_what_is_taken(batch[half:])
            elif error.refused:
                self._set_aside(*batch[0], str(error))
            else:
                self._failed.append((*batch[0], str(error)))
                if len(self._failed) >= _FAILURES and not self._found.stored:
                    raise
        else:
            self._take_off(batch, len(batch))

    def _take_off(self, batch: Sequence[tuple[int, Record]], stored: int) -> None:
        self._found.stored += stored
        with suppress(OSError):
            for number, _ in batch:
                self._segment.remove(number)

    def _set_aside(self, number: int, record: Record, reason: str) -> None:
        self._found.problem = reason
        if self._is_of_refused:
            return
        with suppress(OSError):
            aside = put_aside(
                self._destination, self._segment.path.parent, record, reason, self._aside
            )
            self._aside = aside
            self._segment.remove(number)
            self._found.left += 1
            self._found.problem = f"{reason}; it is in {aside} now"


class Recovery:
    """Delivers, from a worker that has a task, what dead processes of its host have left.

    Args:
        send: See :func:`recover`.
        is_left: Tells whether files of a destination are for somebody else to look into.
    """

    # How long nothing is looked for, in seconds, once it was.
    _interval = 30.0

    def __init__(
        self, send: Send, is_left: Callable[[Destination, Path | None], bool] = lambda *_: False
    ) -> None:
        self._send = send
        self._is_left = is_left
        self._next = 0.0
        self._swept = -math.inf

    def start(self, directory: str | None, *, anew: bool = False) -> None:
        """Look for spools, unless that was done a moment ago, and deliver them in a thread.

        Args:
            directory: Where; None for the default one.
            anew: Whether to do so all the same, since a process may just have been killed.
        """
        now = time.monotonic()
        if now < self._next and not anew:
            return
        self._next = now + self._interval
        folder = None if directory is None else Path(directory)
        found = spool_files(folder)
        own = [path for path in found if not self._is_for_others(path, folder)]
        has_all = len(own) == len(found)
        # Mostly there is nothing, and no need of a thread, which takes its share of memory.
        if left := [path for path in own if not is_held(path)]:
            start_thread(functools.partial(self._run, left, has_all), "recovery")
        elif has_all:
            self._swept = now

    def _is_for_others(self, path: Path, directory: Path | None) -> bool:
        # Without its lock, for which they would take its process to be alive.
        with suppress(OSError):
            return self._is_left(destination_of(path), directory)
        return False

    def has_swept_since(self, moment: float) -> bool:
        """Whether a pass that began after a moment on the monotonic clock has left nothing."""
        return self._swept >= moment

    def _run(self, paths: Sequence[Path], has_all: bool) -> None:
        began = time.monotonic()
        for path in paths:
            try:
                found = recover(path, self._send)
            except DamagedError as error:
                text = f"The spool {path} was left behind, and is left there: {error}."
                warn_once(_logger, str(path), text)
                has_all = False
                continue
            except BlockingIOError:
                # Its process is alive.
                continue
            except Exception:
                # It may be somebody else's: not for each task to tell. And none keeps the pass
                # from those that come after it.
                has_all = False
                continue
            has_all &= found.left == 0 and not found.is_damaged
            if found.is_damaged:
                _logger.warning("The spool %s was left behind: %s.", path, found.problem)
            if found.stored:
                _logger.warning(
                    "%d finished spans that a process no longer alive had left in %s are stored "
                    "now.",
                    found.stored,
                    path,
                )
        if has_all:
            self._swept = began
