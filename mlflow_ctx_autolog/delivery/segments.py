"""A part of a spool on the disk: a file that records are appended to, and wiped out of.

A segment is a line that says where its records belong, and after it one record after the other.
What is appended survives the process at any moment, since the system has it, and what is
delivered is overwritten. A segment is locked by its process for life: one whose lock is to be had
is one whose process is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import re
import secrets
import stat
import struct
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mlflow_ctx_autolog.delivery.directory import (
    check_is_private,
    default_directory,
    private_file,
)
from mlflow_ctx_autolog.delivery.records import Destination, Record
from mlflow_ctx_autolog.log_ins import without_credentials

__all__ = ["REFUSED", "DamagedError", "Segment", "destination_of", "spool_files"]

# Of files that hold what a store will not have, each with its reason.
REFUSED = ".refused.spool"
_NAME = re.compile(r"mlflow-ctx-autolog-[0-9a-f]{32}(?:\.refused)?\.spool")
# As the release before this one named its own, which were SQLite.
_OLDER_NAME = re.compile(r"[0-9a-f]{32}\.spool")
_OLDER_MAGIC = b"SQLite format 3\0"

_MAGIC = b"mlflow-ctx-autolog spool 2\n"
# Before each record: whether it is still there, the size of what follows, and its checksum.
_FRAME = struct.Struct("<4sII")
_HERE, _GONE = b"\nrec", b"\nnil"
_AT_ONCE = 1 << 20
# Made once, since each call waits for it.
_encoded = json.JSONEncoder(separators=(",", ":")).encode
# Bytes of a line that says where the records belong, at most.
_LONGEST_HEAD = 100_000


class DamagedError(OSError):
    """A file that is no segment, or one that cannot be read any more."""


class Segment:
    """One file of a spool.

    Not for several threads at once.

    Raises:
        OSError: From any method: the disk is full, or fails.
    """

    def __init__(self, path: Path, file: io.FileIO, end: int) -> None:
        self.path = path
        self._file = file
        self._end = end
        # Of each record here, by its number: where its frame is, and the size of its body.
        self._slots: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        """How many records there are."""
        return len(self._slots)

    @property
    def size(self) -> int:
        """Bytes that the file has."""
        return self._end

    @classmethod
    def create(
        cls, destination: Destination, directory: Path | None, ending: str = ".spool"
    ) -> Segment:
        """Make a new file for records that belong to ``destination``, without its log-in."""
        # The names of a process' files are in order: a later one may replace what is in another.
        name = f"mlflow-ctx-autolog-{time.time_ns():016x}{secrets.token_hex(8)}{ending}"
        path, descriptor = private_file(directory, name)
        file = io.FileIO(descriptor, "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            public = asdict(destination)
            public["tracking_uri"] = without_credentials(destination.tracking_uri)
            segment = cls(path, file, 0)
            segment._append(_MAGIC + json.dumps(public).encode() + b"\n")
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            file.close()
            raise
        return segment

    @classmethod
    def open(cls, path: Path) -> Segment:
        """Open a file that its process has left behind.

        Raises:
            BlockingIOError: Its process is alive.
            DamagedError: It is no spool.
        """
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = io.FileIO(os.open(path, flags), "r+")
        try:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise DamagedError(f"{path} is no file")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BlockingIOError(f"{path} is in use by a process that is alive") from error
            # Else somebody who was faster has removed it.
            if os.stat(path).st_ino != found.st_ino:
                raise FileNotFoundError(f"{path} is gone")
            return cls(path, file, found.st_size)
        except BaseException:
            file.close()
            raise

    def is_set_up(self) -> bool:
        """Whether its process has come to write where its records belong."""
        return self._end > 0

    def destination(self) -> Destination:
        """Return where the records belong.

        Raises:
            DamagedError: It does not say.
        """
        return _destination(self._head()[0])

    def _head(self) -> tuple[bytes, int]:
        head = _head(self._read(0, _LONGEST_HEAD))
        return head, len(_MAGIC) + len(head) + 1

    def add(self, numbered: Sequence[tuple[int, Record]]) -> None:
        """Append records, all or none."""
        frames, slots, at = [], {}, self._end
        for number, record in numbered:
            body = _body(record)
            frames += [_FRAME.pack(_HERE, len(body), zlib.crc32(body)), body]
            slots[number] = (at, len(body))
            at += _FRAME.size + len(body)
        self._append(b"".join(frames))
        self._slots.update(slots)

    def _append(self, content: bytes) -> None:
        written = 0
        try:
            view = memoryview(content)
            while written < len(content):
                written += os.pwrite(self._file.fileno(), view[written:], self._end + written)
        except OSError:
            if written:
                # Half a record is none.
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file.fileno(), self._end)
            raise
        self._end += written

    def read(self, number: int) -> Record:
        """Return the record with a number that was added, or that :meth:`scan` has found.

        Raises:
            DamagedError: The disk gives something else.
        """
        at, size = self._slots[number]
        frame = self._read(at, _FRAME.size + size)
        try:
            _, stored, checksum = _FRAME.unpack_from(frame)
            body = frame[_FRAME.size :]
            if stored != size or zlib.crc32(body) != checksum:
                raise ValueError
            return _parsed(body)
        except (struct.error, ValueError) as error:
            raise DamagedError(f"{self.path} cannot be read any more") from error

    def scan(self) -> int:
        """Find all records that there are, and number them anew.

        Returns:
            How many bytes are neither a record nor what a killed process has left of its last one.
        """
        _, at = self._head()
        damaged, self._slots = 0, {}
        while at < self._end:
            found = self._frame_at(at)
            if found is not None:
                is_here, size = found
                if is_here:
                    self._slots[at] = (at, size)
                at += _FRAME.size + size
                continue
            follower = self._next_frame(at + 1)
            if follower is None:
                return damaged + (0 if self._is_cut_off(at) else self._end - at)
            damaged += follower - at
            at = follower
        return damaged

    def _frame_at(self, at: int) -> tuple[bool, int] | None:
        """Return whether a record is still there, and its size; None where there never was one."""
        frame = self._read(at, _FRAME.size)
        if len(frame) < _FRAME.size:
            return None
        here, size, checksum = _FRAME.unpack(frame)
        if here not in (_HERE, _GONE) or at + _FRAME.size + size > self._end:
            return None
        if here == _GONE:
            return False, size
        body = self._read(at + _FRAME.size, size)
        if zlib.crc32(body) != checksum:
            return None
        try:
            _parsed(body)
        except ValueError:
            return None
        return True, size

    def _is_cut_off(self, at: int) -> bool:
        frame = self._read(at, _FRAME.size)
        if len(frame) < _FRAME.size:
            return True
        here, size, _ = _FRAME.unpack(frame)
        return bool(here == _HERE and at + _FRAME.size + size > self._end)

    def _next_frame(self, at: int) -> int | None:
        """Return where the next record after a damage begins, if there is one."""
        while at < self._end:
            part = self._read(at, _AT_ONCE)
            places = [place for mark in (_HERE, _GONE) if (place := part.find(mark)) >= 0]
            if not places:
                # A mark may lie across two parts.
                at += max(1, len(part) - len(_HERE) + 1)
            elif self._frame_at(at + min(places)) is not None:
                return at + min(places)
            else:
                at += min(places) + 1
        return None

    def clear(self) -> None:
        """Begin anew, where all records are gone."""
        _, start = self._head()
        os.ftruncate(self._file.fileno(), start)
        self._end = start

    def numbers(self) -> list[int]:
        """Return the numbers of the records, oldest first."""
        return list(self._slots)

    def remove(self, number: int) -> None:
        """Wipe a record out; where it was the last, all."""
        at, size = self._slots.pop(number)
        # The mark first: what is wiped in part must not be taken for damage.
        os.pwrite(self._file.fileno(), _GONE, at)
        for start in range(at + _FRAME.size, at + _FRAME.size + size, _AT_ONCE):
            part = min(_AT_ONCE, at + _FRAME.size + size - start)
            os.pwrite(self._file.fileno(), bytes(part), start)

    def renumber(self, number: int, new: int) -> None:
        """Know a record by another number, as long as this process lives."""
        self._slots[new] = self._slots.pop(number)

    def _read(self, at: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), max(0, min(size, self._end - at)), at)

    def close(self) -> None:
        """Let another process have the file."""
        self._file.close()

    def set_aside(self) -> Path:
        """Rename a damaged file, so that it is not tried again and again."""
        return self.path.rename(self.path.with_suffix(".damaged"))

    def delete(self) -> None:
        """Remove the file, and close it."""
        # In this order, so that nobody can have it meanwhile.
        self.path.unlink(missing_ok=True)
        self._file.close()


def destination_of(path: Path) -> Destination:
    """Return where the records of a spool belong, whoever has it.

    Raises:
        DamagedError: It does not say, or not yet.
        OSError: It cannot be read.
    """
    with io.FileIO(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
        return _destination(_head(file.read(_LONGEST_HEAD)))


def _head(start: bytes) -> bytes:
    """Return what a file's beginning says of its records, without the mark before it."""
    if start.startswith(_OLDER_MAGIC):
        raise DamagedError(
            "it was written by an older release, as a database; recover it with that release"
        )
    first, magic, rest = start.partition(_MAGIC)
    head, newline, _ = rest.partition(b"\n")
    if first or not magic or not newline:
        raise DamagedError("it is no spool")
    return head


def _destination(head: bytes) -> Destination:
    try:
        return Destination(**json.loads(head))
    except (TypeError, ValueError) as error:
        raise DamagedError("it does not say where its spans belong") from error


def _body(record: Record) -> bytes:
    head = _encoded([record.kind, record.key, record.owner])
    return head.encode() + b"\n" + record.payload


def _parsed(body: bytes) -> Record:
    head, newline, payload = body.partition(b"\n")
    match json.loads(head):
        case [str(kind), str(key), str(owner)] if newline:
            return Record(kind, key, payload, owner)
    raise ValueError(f"{head[:100]!r} is no record's")


def spool_files(directory: Path | None = None, *, refused: bool = False) -> list[Path]:
    """Return this user's spools in a directory, the oldest first.

    Those of processes that are alive are locked.

    Nobody else's: what they say would be sent with this user's log-in to where they say. Those of
    the release before this one are among them.

    Args:
        directory: Where to look; None for the default one.
        refused: Whether to return those as well that hold what a store would not have.
    """
    folder = directory or default_directory()
    found = []
    with contextlib.suppress(OSError):
        check_is_private(directory)
        for path in folder.iterdir():
            # Another process may have removed its own meanwhile.
            with contextlib.suppress(OSError):
                if _is_spool(path.name, refused) and path.lstat().st_uid == os.getuid():
                    found.append(path)
    return sorted(found)


def _is_spool(name: str, refused: bool) -> bool:
    if name.endswith(REFUSED) and not refused:
        return False
    return bool(_NAME.fullmatch(name) or _OLDER_NAME.fullmatch(name))
