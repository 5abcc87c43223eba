"""A queue on disk of what the store has not taken yet: one SQLite file for each sender."""

from __future__ import annotations

import contextlib
import ctypes
import heapq
import itertools
import logging
import os
import sqlite3
import stat
import tempfile
import threading
import uuid
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

__all__ = [
    "LAST_NUMBER",
    "Destination",
    "Record",
    "Spool",
    "SpoolFile",
    "default_directory",
    "directory_problem",
    "first_of",
    "private_file",
    "spool_files",
    "without_credentials",
]

_logger = logging.getLogger(__name__)

_SUFFIX = ".spool"
_PAGE = 4096
# Records that are read, or taken off, in one go: what is to be added waits meanwhile.
_AT_ONCE = 20
# Records that came or went before the log is written back, so that SQLite, which does it as a
# record is added, does not come to do it at its thousandth page.
_CHANGES_IN_LOG = 100
LAST_NUMBER = (1 << 63) - 1


@dataclass(frozen=True)
class Destination:
    """Where a span is stored: a tracking store and an experiment in it.

    Args:
        tracking_uri: The store; None where only the driver can store it.
        experiment_id: The experiment; of spans that go to a Unity Catalog table, that table.
        driver_id: Names that driver's process.
        workspace: The workspace of the server that the experiment is in; None for the default one.
    """

    tracking_uri: str | None
    experiment_id: str
    driver_id: str | None = None
    workspace: str | None = None


class Record(NamedTuple):
    """One thing to be told to the store.

    Args:
        kind: ``"span"``, whose payload is an OTLP message with that one span; or ``"trace"``,
            whose payload is the JSON of MLflow's ``TraceInfo``.
        key: The span's or trace's id. A later record takes the place of an earlier one that is
            still waiting.
        payload: See ``kind``.
        owner: The task's span that it is counted under; empty for one that is not counted.
    """

    kind: str
    key: str
    payload: bytes
    owner: str = ""


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


def default_directory() -> Path:
    """Return this user's directory for spools among the host's temporary files."""
    return Path(tempfile.gettempdir()) / f"mlflow-ctx-autolog-{os.getuid()}"


def private_file(directory: Path | None, name: str, *, may_exist: bool = False) -> Path:
    """Make a file that only this user may read; return its path.

    Raises:
        OSError: It cannot be made there, or the directory is somebody else's.
    """
    folder = directory or default_directory()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if directory is None:
        _check_is_private(folder)
    path = folder / name
    # Never through a link that somebody else has put there.
    flags = os.O_CREAT | os.O_WRONLY | (os.O_NOFOLLOW if may_exist else os.O_EXCL)
    os.close(os.open(path, flags, 0o600))
    return path


def directory_problem(directory: Path | None) -> str | None:
    """Return why spools cannot be kept in a directory, None if they can. Leaves nothing there."""
    folder = directory or default_directory()
    try:
        if directory is None and folder.exists():
            _check_is_private(folder)
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{folder}: {error.strerror or error}"


class Spool:
    """What waits for one destination: on disk, and in memory what the disk has no room for.

    Thread-safe. The file is made when the first record comes, with mode 0600, and removed when
    the spool is empty at :meth:`discard`. As long as this process lives no other one can open
    it; after that, :meth:`SpoolFile.open` can.

    Args:
        destination: Where the records belong; written into the file, without user and password.
        directory: Where the file is made; None for the default one.
        max_bytes: The file's size at most; 0 for no file.
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
        self._file: SpoolFile | None = None
        self._on_disk: set[int] = set()
        self._in_memory: dict[int, Record] = {}
        self._in_memory_bytes = 0
        self._changes = 0
        self._warned = False

    def __len__(self) -> int:
        return len(self._on_disk) + len(self._in_memory)

    def add(self, records: Sequence[Record]) -> list[Record]:
        """Keep records; return those that there is no room for."""
        # Of those with one key, the last.
        latest = {(record.kind, record.key): record for record in records}
        numbered = [(next(_numbers), record) for record in latest.values()]
        with self._lock:
            for number, record in list(self._in_memory.items()):
                if (record.kind, record.key) in latest:
                    self._drop_from_memory(number)
            if self._max_bytes and self._add_to_disk(numbered):
                return []
            lost = []
            for number, record in numbered:
                size = len(record.payload)
                if self._in_memory_bytes + size > self._max_in_memory:
                    lost.append(record)
                else:
                    self._in_memory[number] = record
                    self._in_memory_bytes += size
            return lost

    def _drop_from_memory(self, number: int) -> None:
        self._in_memory_bytes -= len(self._in_memory.pop(number).payload)

    def peek(self, count: int, size: int) -> list[tuple[int, Record]]:
        """Return the oldest records with their numbers: at least one, if there is any.

        Args:
            count: Records at most.
            size: Bytes of payload at most, unless the first one is larger.
        """
        with self._lock:
            in_memory = sorted(self._in_memory.items())
        oldest_first = heapq.merge(self._read_disk(), in_memory)
        return list(first_of(oldest_first, count, size))

    def remove(self, numbers: Iterable[int]) -> set[int]:
        """Forget records that somebody else has now; return the numbers of those it held."""
        gone = sorted(set(numbers))
        held: set[int] = set()
        for start in range(0, len(gone), _AT_ONCE):
            with self._lock:
                held |= self._remove(set(gone[start : start + _AT_ONCE]))
        return held

    def _remove(self, gone: set[int]) -> set[int]:
        on_disk, in_memory = gone & self._on_disk, gone & self._in_memory.keys()
        if self._file is not None and on_disk:
            self._changes += len(on_disk)
            with self._disk_errors("could not be taken off"):
                self._file.remove(sorted(on_disk))
            self._on_disk -= on_disk
        for number in in_memory:
            self._drop_from_memory(number)
        return on_disk | in_memory

    def write_back(self) -> None:
        """Bring the file's log into the file, if it has grown; takes some milliseconds."""
        with self._lock:
            if self._file is not None and self._changes >= _CHANGES_IN_LOG:
                self._changes = 0
                with self._disk_errors("could not be written"):
                    self._file.write_back()

    def move_to_end(self, number: int, record: Record) -> bool:
        """Let the others go first; return whether the record is still there."""
        with self._lock:
            last = next(_numbers)
            # In this order, as whoever counts what waits must never miss it.
            if number in self._in_memory:
                self._in_memory[last] = record
                del self._in_memory[number]
                return True
            if self._file is None or number not in self._on_disk:
                return False
            try:
                self._file.renumber(number, last)
                self._on_disk.add(last)
            except sqlite3.Error:
                # A full disk does not even reorder: there it stays behind, unheeded.
                self._in_memory[last] = record
                self._in_memory_bytes += len(record.payload)
            self._on_disk.remove(number)
            return True

    def discard(self) -> None:
        """Remove the file, if it holds nothing, unless it is being used: there is no hurry."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self._file is not None and not self._on_disk:
                file, self._file = self._file, None
                with self._disk_errors("could not be removed"):
                    file.close()
                    file.delete()
        finally:
            self._lock.release()

    def _read_disk(self) -> Iterator[tuple[int, Record]]:
        above = 0
        while part := self._read_part(above):
            yield from part
            above = part[-1][0]

    def _read_part(self, above: int) -> list[tuple[int, Record]]:
        part: list[tuple[int, Record]] = []
        with self._lock, self._disk_errors("could not be read"):
            if self._file is not None and self._on_disk:
                # Closed before another thread has the file: it could not write the log back.
                with contextlib.closing(self._file.records(above)) as records:
                    # A disk without room does not even forget.
                    held = (item for item in records if item[0] in self._on_disk)
                    part.extend(itertools.islice(held, _AT_ONCE))
        return part

    def _add_to_disk(self, numbered: list[tuple[int, Record]]) -> bool:
        try:
            if self._file is None:
                self._file = SpoolFile.create(self._destination, self._directory, self._max_bytes)
            replaced = self._file.add(numbered)
        except (sqlite3.Error, OSError) as error:
            self._warn(f"could not be written: {error}. Finished spans wait in memory instead")
            return False
        self._changes += len(numbered)
        self._on_disk.difference_update(replaced)
        self._on_disk.update(number for number, _ in numbered)
        return True

    @contextlib.contextmanager
    def _disk_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            self._warn(f"{what}: {error}")

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            where = self._directory or default_directory()
            _logger.warning(
                "The spool of finished spans in %s %s. Set spool_directory to a disk with room "
                "that is this user's own, or spool_max_bytes=0 to do without.",
                where,
                problem,
            )


class SpoolFile:
    """The file itself: SQLite with a write-ahead log, locked as long as its process lives.

    Raises:
        sqlite3.Error: From any method: the file is damaged, full, or another process has it.
        OSError: From :meth:`create` and :meth:`open`.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        _open_files.append(self)

    @classmethod
    def create(cls, destination: Destination, directory: Path | None, max_bytes: int) -> SpoolFile:
        """Make a new file for records that belong to ``destination``."""
        path = private_file(directory, f"{uuid.uuid4().hex}{_SUFFIX}")
        try:
            connection = _connect(path)
            # Somebody who looks for what is left behind may have it for a moment.
            connection.execute("PRAGMA busy_timeout = 1000")
            connection.execute(f"PRAGMA page_size = {_PAGE}")
            connection.execute(f"PRAGMA max_page_count = {max(8, max_bytes // _PAGE)}")
            connection.execute("PRAGMA journal_mode = WAL")
            # A crash of this process loses nothing; the last moments before one of the host may go.
            connection.execute("PRAGMA synchronous = NORMAL")
            # Prompts do not stay on the disk when they have been delivered.
            connection.execute("PRAGMA secure_delete = ON")
            with connection:
                connection.execute("BEGIN")
                connection.execute(
                    "CREATE TABLE destination "
                    "(tracking_uri TEXT, experiment_id TEXT, driver_id TEXT, workspace TEXT)"
                )
                public = replace(
                    destination, tracking_uri=without_credentials(destination.tracking_uri)
                )
                connection.execute("INSERT INTO destination VALUES (?, ?, ?, ?)", astuple(public))
                connection.execute(
                    "CREATE TABLE record (number INTEGER PRIMARY KEY, kind TEXT, key TEXT, "
                    "payload BLOB, owner TEXT, UNIQUE (kind, key))"
                )
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return cls(path, connection)

    @classmethod
    def open(cls, path: Path) -> SpoolFile:
        """Open a file that its process has left behind.

        Raises:
            BlockingIOError: Its process is alive.
        """
        connection = _connect(path)
        try:
            connection.execute("BEGIN EXCLUSIVE")
            connection.execute("COMMIT")
        except sqlite3.OperationalError as error:
            connection.close()
            if "locked" in str(error):
                raise BlockingIOError(f"{path} is in use by a process that is alive") from error
            raise
        except sqlite3.Error:
            connection.close()
            raise
        return cls(path, connection)

    def is_set_up(self) -> bool:
        """Whether its process has come to write anything."""
        query = "SELECT 1 FROM sqlite_master WHERE name = 'record'"
        return self._connection.execute(query).fetchone() is not None

    def destination(self) -> Destination:
        """Return where the records belong."""
        row = self._connection.execute("SELECT * FROM destination").fetchone()
        if row is None:
            raise sqlite3.DatabaseError("it does not say where its spans belong")
        return Destination(*row)

    def add(self, numbered: Sequence[tuple[int, Record]]) -> list[int]:
        """Keep records, all or none; return the numbers of those that they take the place of."""
        with self._connection:
            self._connection.execute("BEGIN")
            replaced = [
                number
                for _, record in numbered
                for (number,) in self._connection.execute(
                    "SELECT number FROM record WHERE kind = ? AND key = ?",
                    (record.kind, record.key),
                )
            ]
            self._connection.executemany(
                "INSERT OR REPLACE INTO record VALUES (?, ?, ?, ?, ?)",
                ((number, *record) for number, record in numbered),
            )
        return replaced

    def records(
        self, above: int = 0, below: int = LAST_NUMBER, newest_first: bool = False, limit: int = -1
    ) -> Generator[tuple[int, Record], None, None]:
        """Yield records with their numbers, of those between two numbers; -1 for all of them."""
        order = "DESC" if newest_first else "ASC"
        cursor = self._connection.execute(
            "SELECT number, kind, key, payload, owner FROM record "
            f"WHERE number > ? AND number < ? ORDER BY number {order} LIMIT ?",
            (above, below, limit),
        )
        try:
            for number, *fields in cursor:
                yield number, Record(*fields)
        finally:
            cursor.close()

    def count(self, above: int, below: int) -> int:
        """Return how many records there are between two numbers."""
        query = "SELECT count(*) FROM record WHERE number > ? AND number < ?"
        return int(self._connection.execute(query, (above, below)).fetchone()[0])

    def remove(self, numbers: Sequence[int]) -> None:
        """Forget records."""
        with self._connection:
            self._connection.execute("BEGIN")
            self._connection.executemany(
                "DELETE FROM record WHERE number = ?", ((number,) for number in numbers)
            )

    def write_back(self) -> None:
        """Bring the log into the file, which SQLite does by itself when the log is much longer."""
        self._connection.execute("PRAGMA wal_checkpoint").fetchall()

    def renumber(self, number: int, new: int) -> None:
        """Give a record another number."""
        self._connection.execute("UPDATE record SET number = ? WHERE number = ?", (new, number))

    def close(self) -> None:
        """Let another process have the file."""
        self._connection.close()
        with contextlib.suppress(ValueError):
            _open_files.remove(self)

    def set_aside(self) -> Path:
        """Rename a damaged file, once closed, so that it is not tried again and again."""
        return self.path.rename(self.path.with_suffix(".damaged"))

    def delete(self) -> None:
        """Remove the file, once closed."""
        for path in (self.path, Path(f"{self.path}-wal"), Path(f"{self.path}-shm")):
            path.unlink(missing_ok=True)


_open_files: list[SpoolFile] = []


def _keep_open_files() -> None:
    # A child that closed its parent's database, even as garbage, would take its log away.
    for file in _open_files:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(file._connection))


os.register_at_fork(after_in_child=_keep_open_files)


def spool_files(directory: Path | None = None) -> list[Path]:
    """Return this user's spools in a directory; those of processes that are alive are locked.

    Nobody else's: what they say would be sent with this user's log-in to where they say.
    """
    folder = directory or default_directory()
    found = []
    with contextlib.suppress(OSError):
        if directory is None:
            _check_is_private(folder)
        for path in folder.iterdir():
            # Another process may have removed its own meanwhile.
            with contextlib.suppress(OSError):
                if path.suffix == _SUFFIX and path.lstat().st_uid == os.getuid():
                    found.append(path)
    return sorted(found)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        timeout=0,
        isolation_level=None,
        check_same_thread=False,
    )
    # Without shared memory, and so that nobody opens the file as long as this process lives.
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    return connection


def _check_is_private(folder: Path) -> None:
    # Among temporary files, somebody else may have been faster.
    found = folder.stat()
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise PermissionError(f"{folder} belongs to, or can be written by, somebody else")


def without_credentials(uri: str | None) -> str | None:
    """Return a URI without user name and password, in its query neither."""
    if uri is None:
        return None
    parts = urlsplit(uri)
    if "@" in parts.netloc:
        parts = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    if "user" in parts.query.lower() or "password" in parts.query.lower():
        parts = parts._replace(query="")
    return uri if parts == urlsplit(uri) else urlunsplit(parts)
