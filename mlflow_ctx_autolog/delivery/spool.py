"""What waits for one destination: on the disk, and in memory what the disk has no room for."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mlflow_ctx_autolog.delivery.directory import default_directory, directory_problem
from mlflow_ctx_autolog.delivery.records import Destination, Record
from mlflow_ctx_autolog.delivery.segments import REFUSED, Segment, spool_files
from mlflow_ctx_autolog.log_ins import safe_logger, without_log_ins

__all__ = [
    "REASON",
    "Destination",
    "Record",
    "Spool",
    "default_directory",
    "directory_problem",
    "first_of",
    "put_aside",
    "spool_files",
]

_logger = safe_logger(__name__)

# The kind of a record that says why the next one was set aside.
REASON = "reason"
# Bytes of a file of a spool, which is wiped and removed as a whole once it holds nothing.
_SEGMENT_BYTES = 8_000_000
# Records that are taken off in one go: what is to be added waits meanwhile.
_AT_ONCE = 20
# Seconds after which a directory is tried again that could not be used.
_TRY_AGAIN = 10.0

# Of all spools of this process, so that no number of one can be taken for another's.
_numbers = itertools.count(1)


def first_of(
    records: Iterable[tuple[int, Record]], count: int, size: int
) -> Iterator[tuple[int, Record]]:
    """Yield the first records: at least one, if there is any.

    Args:
        records: All of them, with their numbers.
        count: Records at most.
        size: Bytes of payload at most, unless the first one is larger.
    """
    for place, numbered in enumerate(records):
        size -= len(numbered[1].payload)
        if place and (place >= count or size < 0):
            return
        yield numbered


class Spool:
    """What waits for one destination.

    Thread-safe. A file is made when the first record comes, with mode 0600, and removed when the
    spool is empty at :meth:`discard`; one that is large is followed by another. As long as this
    process lives no other one can have them; after that, :meth:`Segment.open` can.

    Args:
        destination: Where the records belong; written into the files, without its log-in.
        directory: Where the files are made; None for the default one.
        max_bytes: The files' size at most; 0 for none.
        max_bytes_in_memory: Payloads kept in memory at most, while the disk takes none.
    """

    def __init__(
        self,
        destination: Destination,
        directory: Path | None,
        max_bytes: int,
        max_bytes_in_memory: int,
    ) -> None:
        self._destination = destination
        self._directory = directory
        self._max_bytes = max_bytes
        self._max_in_memory = max_bytes_in_memory
        self._lock = threading.Lock()
        # The last one is written to.
        self._segments: list[Segment] = []
        # Of each record on the disk, oldest first: its file, and what it is known by.
        self._on_disk: dict[int, tuple[Segment, str]] = {}
        self._in_memory: dict[int, Record] = {}
        self._in_memory_bytes = 0
        self._newest: dict[str, int] = {}
        self._leased: dict[str, int] = {}
        self._aside: Path | None = None
        self._not_before = 0.0
        self._warned = False
        # Why the disk takes nothing; None where it does.
        self.disk_problem: str | None = None

    def __len__(self) -> int:
        return len(self._on_disk) + len(self._in_memory)

    @property
    def memory_problem(self) -> str:
        """Why memory takes no more."""
        return f"{self._in_memory_bytes:,} of {self._max_in_memory:,} bytes of memory are used"

    def add(self, records: Sequence[Record], patience: float = -1) -> list[Record] | None:
        """Keep records; return those that there is no room for.

        Args:
            records: What to keep.
            patience: Seconds to wait at most for others that use the spool; -1 for no limit.

        Returns:
            None where that was not enough, and nothing is kept.
        """
        if not self._lock.acquire(timeout=patience):
            return None
        try:
            return self._add(records)
        finally:
            self._lock.release()

    def _add(self, records: Sequence[Record]) -> list[Record]:
        # Of those with one key, the last.
        latest = {_name(record): record for record in records}
        numbered = [(next(_numbers), record) for record in latest.values()]
        replaced = [self._newest[name] for name in latest if name in self._newest]
        for number in replaced:
            if number in self._in_memory:
                self._drop_from_memory(number)
        if self._max_bytes and self._add_to_disk(numbered):
            self._take_off_disk(replaced)
            return []
        lost = []
        for number, record in numbered:
            size = len(record.payload)
            if self._in_memory_bytes + size > self._max_in_memory:
                lost.append(record)
            else:
                self._keep_in_memory(number, record)
        return lost

    def _keep_in_memory(self, number: int, record: Record) -> None:
        self._in_memory[number] = record
        self._in_memory_bytes += len(record.payload)
        self._newest[_name(record)] = number

    def _drop_from_memory(self, number: int) -> None:
        record = self._in_memory.pop(number)
        self._in_memory_bytes -= len(record.payload)
        self._forget_name(_name(record), number)

    def _forget_name(self, name: str, number: int) -> None:
        if self._newest.get(name) == number:
            del self._newest[name]

    def peek(self, count: int, size: int, after: int = 0) -> list[tuple[int, Record]]:
        """Return the oldest records with their numbers: at least one, if there is any.

        Args:
            count: Records at most.
            size: Bytes of payload at most, unless the first one is larger.
            after: The number of one, and of all older ones, that are not asked for.
        """
        with self._lock:
            oldest = heapq.merge(self._on_disk, self._in_memory)
            asked = (number for number in oldest if number > after)
            numbers = list(itertools.islice(asked, count))
        return list(first_of(self._read_all(numbers), count, size))

    def _read_all(self, numbers: Iterable[int]) -> Iterator[tuple[int, Record]]:
        for number in numbers:
            with self._lock:
                record = self._read(number)
            if record is not None:
                yield number, record

    def _read(self, number: int) -> Record | None:
        if number not in self._on_disk:
            return self._in_memory.get(number)
        with self._disk_errors("could not be read"):
            return self._on_disk[number][0].read(number)
        return None

    def remove_until(self, number: int) -> bool:
        """Forget the record with a number, and all older ones; return whether none was kept.

        Later states are kept of what is on its way: it might arrive after them, so that they have
        to be sent once more.
        """
        with self._lock:
            names = {each: name for each, (_, name) in self._on_disk.items()}
            names.update((each, _name(record)) for each, record in self._in_memory.items())
            old = [each for each in names if each <= number]
            gone = [each for each in old if self._leased.get(names[each], each) == each]
        self.remove(gone)
        return len(gone) == len(old)

    def lease(self, count: int, size: int) -> list[tuple[int, Record]]:
        """Return what :meth:`peek` does, to be sent from here, until :meth:`end_lease`."""
        while found := self.peek(count, size):
            # Before anybody takes a later state of one of them, and not if somebody has.
            self._leased = {_name(record): number for number, record in found}
            with self._lock:
                batch = [
                    (number, record)
                    for number, record in found
                    if number in self._on_disk or number in self._in_memory
                ]
            if batch:
                return batch
        return []

    def end_lease(self) -> None:
        """Take note that nothing is on its way."""
        self._leased = {}

    def without_later_states(
        self, records: Sequence[tuple[int, Record]]
    ) -> list[tuple[int, Record]]:
        """Leave out records of which an earlier state is on its way, which might arrive later."""
        return [each for each in records if self._leased.get(_name(each[1]), each[0]) == each[0]]

    def remove(self, numbers: Iterable[int]) -> set[int]:
        """Forget records that somebody else has now; return the numbers of those it held."""
        gone = sorted(set(numbers))
        held: set[int] = set()
        for start in range(0, len(gone), _AT_ONCE):
            part = gone[start : start + _AT_ONCE]
            with self._lock:
                for number in part:
                    if number in self._in_memory:
                        self._drop_from_memory(number)
                        held.add(number)
                held |= self._take_off_disk(part)
        return held

    def _take_off_disk(self, numbers: Iterable[int]) -> set[int]:
        gone = set()
        for number in numbers:
            if number not in self._on_disk:
                continue
            segment, name = self._on_disk.pop(number)
            self._forget_name(name, number)
            gone.add(number)
            with self._disk_errors("could not be wiped"):
                segment.remove(number)
            if not len(segment):
                with self._disk_errors("could not be removed"):
                    if segment is self._segments[-1]:
                        segment.clear()
                    else:
                        self._segments.remove(segment)
                        segment.delete()
        return gone

    def move_to_end(self, number: int, record: Record) -> bool:
        """Let the others go first; return whether the record is still there."""
        with self._lock:
            last = next(_numbers)
            # In this order, as whoever counts what waits must never miss it.
            if number in self._in_memory:
                self._in_memory[last] = record
                del self._in_memory[number]
            elif number in self._on_disk:
                segment, name = self._on_disk[number]
                segment.renumber(number, last)
                self._on_disk[last] = (segment, name)
                del self._on_disk[number]
            else:
                return False
            name = _name(record)
            if self._newest.get(name) == number:
                self._newest[name] = last
            return True

    def set_aside(self, number: int, record: Record, reason: str) -> Path | None:
        """Move a record that the store does not have to a file for those, with the reason.

        Returns:
            That file; None where there can be none, and the record is left.
        """
        with self._lock:
            if number not in self._on_disk and number not in self._in_memory:
                return None
            if not self._max_bytes:
                return None
            try:
                self._aside = put_aside(
                    self._destination, self._directory, record, reason, self._aside
                )
            except OSError as error:
                self._warn(f"could not be written: {error}")
                return None
            if number in self._in_memory:
                self._drop_from_memory(number)
            self._take_off_disk([number])
            return self._aside

    def discard(self) -> None:
        """Remove the file, if it holds nothing, unless it is being used: there is no hurry."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if not self._on_disk:
                segments, self._segments = self._segments, []
                for segment in segments:
                    with self._disk_errors("could not be removed"):
                        segment.delete()
        finally:
            self._lock.release()

    def release(self) -> int:
        """Let other processes have what is on the disk; return how many records that are."""
        with self._lock:
            released = len(self._on_disk)
            for number, (_, name) in self._on_disk.items():
                self._forget_name(name, number)
            self._on_disk.clear()
            segments, self._segments = self._segments, []
            for segment in segments:
                with self._disk_errors("could not be closed"):
                    if len(segment):
                        segment.close()
                    else:
                        segment.delete()
            return released

    def leave_to_parent(self) -> None:
        """In a forked child: hold no file of the parent's, whose lock would outlive it."""
        for segment in self._segments:
            with contextlib.suppress(OSError):
                segment.close()

    def _add_to_disk(self, numbered: list[tuple[int, Record]]) -> bool:
        if self.disk_problem is not None and time.monotonic() < self._not_before:
            return False
        try:
            segment = self._segment_for(sum(len(record.payload) for _, record in numbered))
            segment.add(numbered)
        except OSError as error:
            self.disk_problem = without_log_ins(error.strerror or str(error))
            self._warn(f"could not be written: {error}. Finished spans wait in memory instead")
            return False
        self.disk_problem = None
        for number, record in numbered:
            name = _name(record)
            self._on_disk[number] = (segment, name)
            self._newest[name] = number
        return True

    def _segment_for(self, size: int) -> Segment:
        used = sum(segment.size for segment in self._segments)
        if used + size > self._max_bytes:
            raise OSError(f"it has {used:,} of spool_max_bytes={self._max_bytes:,} bytes")
        if not self._segments or self._segments[-1].size >= _SEGMENT_BYTES:
            try:
                self._segments.append(Segment.create(self._destination, self._directory))
            except OSError:
                # To try it for each span would cost each call.
                self._not_before = time.monotonic() + _TRY_AGAIN
                raise
        return self._segments[-1]

    @contextlib.contextmanager
    def _disk_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._warn(f"{what}: {error}")

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            _logger.warning(
                "The spool of finished spans in %s %s. Set spool_directory to a disk with room "
                "that is this user's own, or spool_max_bytes=0 to do without.",
                self._directory or default_directory(),
                problem,
            )


def put_aside(
    destination: Destination,
    directory: Path | None,
    record: Record,
    reason: str,
    file: Path | None = None,
) -> Path:
    """Write a record that a store does not have to a file for those, and why it does not.

    Args:
        destination: Where it belongs.
        directory: Where the file is made; None for the default one.
        record: The record.
        reason: The store's.
        file: One that was made before, and is used again where that is possible.

    Returns:
        The file, which nobody holds.

    Raises:
        OSError: It cannot be written.
    """
    segment = None
    if file is not None:
        # Else somebody is recovering it.
        with contextlib.suppress(OSError):
            segment = Segment.open(file)
    if segment is None:
        segment = Segment.create(destination, directory, REFUSED)
    with contextlib.closing(segment):
        why = Record(REASON, record.key, without_log_ins(reason).encode())
        segment.add([(0, why), (1, record)])
    return segment.path


def _name(record: Record) -> str:
    return f"{record.kind} {record.key}"
