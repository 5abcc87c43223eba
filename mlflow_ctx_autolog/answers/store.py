"""Answers on the disk: found in a moment, and written from a thread of its own."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlflow_ctx_autolog.answers.directory import folder_of, is_local, make, mark, sweep
from mlflow_ctx_autolog.answers.entry import (
    Cipher,
    DamagedEntryError,
    Entry,
    NewerEntryError,
    decode,
    encode,
)
from mlflow_ctx_autolog.exceptions import warn_once
from mlflow_ctx_autolog.log_ins import safe_logger

__all__ = ["AnswerStore", "Shelf"]

_logger = safe_logger(__name__)

# Seconds between two times that old answers are looked for, by all processes of a directory.
_SWEEP_EVERY = 60.0
_SWEPT = ".swept"
# Seconds between two times that a job says it is at work.
_MARK_EVERY = 60.0
# Seconds after which the names in a directory that is slow to ask are asked for again.
_LISTED_FOR = 1.0
# How much of the limit is full, so that to make room once is enough for many an answer.
_FULL = 0.95
# Answers that wait for the disk at most, in bytes; beyond it they are not kept.
_WAITING_BYTES = 64 * 1024 * 1024

Finish = Callable[[], "Entry | None"]


@dataclass(eq=False)
class Shelf:
    """Where the answers of one partition lie, or of requests whose digests begin alike.

    Args:
        job: The folder of the job.
        part: Its folder in there.
        expires: Seconds after which an answer is too old to be given; None where its job decides.
    """

    job: Path
    part: str
    expires: float | None = None
    names: frozenset[str] | None = None
    listed: float = 0.0

    @property
    def path(self) -> str:
        return os.path.join(self.job, self.part)


class AnswerStore:
    """One directory of answers, as one process uses it. Nothing here raises but the constructor.

    Args:
        root: The directory; made where only it is missing.
        ttl: Seconds that the answers of a job are kept after it was last at work.
        max_bytes: Size of all answers at most.
        encryption: For their content; None to write them as they are.
        lists: Whether to ask which answers there are once, rather than for each; by default where
            the directory is not on a file system of this machine.

    Raises:
        OSError: The directory cannot be used; the message says why.
    """

    def __init__(
        self,
        root: Path,
        ttl: float,
        max_bytes: int,
        encryption: Cipher | None = None,
        lists: bool | None = None,
    ) -> None:
        make(root)
        self.root = root
        self._ttl = ttl
        self._max_bytes = max_bytes
        self._encryption = encryption
        self.is_remote = not is_local(root) if lists is None else lists
        self._writer: threading.Thread | None = None
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._waiting = 0
        self._swept, self._is_swept = -_SWEEP_EVERY, False
        self._total = self._written = 0
        self._marked: dict[Path, float] = {}
        self._token = f"{secrets.token_hex(4)}{os.getpid():x}"
        self._numbers = itertools.count()

    def shelf(self, job: str, part: str, expires: float | None = None) -> Shelf:
        """Return the place of answers: see :func:`folder_of`, and :class:`Shelf`."""
        shelf = Shelf(folder_of(self.root, job), part, expires)
        self._later(lambda: self._attend(shelf.job))
        return shelf

    def find(self, shelf: Shelf, name: str) -> Entry | None:
        """Return the answer of that name, if it is there and whole."""
        if self.is_remote and not self._is_listed(shelf, name):
            return None
        path = os.path.join(shelf.path, name)
        try:
            data = _read(path, shelf.expires)
            return None if data is None else decode(data, name, self._encryption)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except NewerEntryError as error:
            self._warn(
                f"an answer in {self.root} cannot be used, since {error}; install the same "
                "mlflow-ctx-autolog on driver and workers"
            )
        except DamagedEntryError as error:
            _logger.info("The answer %s is not used, since %s.", path, error)
            # Else there would be no room for a good one of that name.
            self._later(lambda: _unlink(path))
        except OSError as error:
            self._warn(f"answers in {self.root} cannot be read: {error}")
        return None

    def keep(self, shelf: Shelf, name: str, size: int, finish: Finish) -> threading.Event | None:
        """Keep an answer, unless there is one of that name. Returns at once.

        Args:
            shelf: See :meth:`shelf`.
            name: What it is found by.
            size: Bytes that it takes up in memory, about.
            finish: Returns the answer, or None if it turns out not to be one to keep.

        Returns:
            What is set when it is done, well or not; None where there is no room for it.
        """
        with self._lock:
            if size > self._max_bytes or self._waiting + size > _WAITING_BYTES:
                return None
            self._waiting += size
        done = threading.Event()

        def write() -> None:
            try:
                entry = finish()
                if entry is not None:
                    self._write(shelf, name, entry)
            finally:
                with self._lock:
                    self._waiting -= size
                done.set()

        self._later(write)
        return done

    def flush(self, timeout: float) -> bool:
        """Wait until what was to be kept is; return whether it is."""
        if self._writer is None:
            return True
        done = threading.Event()
        self._later(done.set)
        return done.wait(timeout)

    def _later(self, action: Callable[[], object]) -> None:
        self._queue.put(action)
        if self._writer is None:
            with self._lock, contextlib.suppress(RuntimeError):
                if self._writer is None:
                    self._writer = threading.Thread(
                        target=self._run, name="mlflow-ctx-autolog-answers", daemon=True
                    )
                    self._writer.start()

    def _run(self) -> None:
        while True:
            action = self._queue.get()
            try:
                action()
            except OSError as error:
                self._warn(f"answers cannot be kept in {self.root}: {error}")
            except Exception as error:
                self._warn(f"an answer cannot be kept: {error!r}")
            # Not until the next one: it holds an answer.
            del action

    def _is_listed(self, shelf: Shelf, name: str) -> bool:
        names = shelf.names
        if names is None:
            names = self._list(shelf)
        elif name not in names and time.monotonic() - shelf.listed > _LISTED_FOR:
            # For those who ask next: nobody waits to learn that others have asked the same.
            shelf.listed = time.monotonic()
            self._later(lambda: self._list(shelf))
        return name in names

    def _list(self, shelf: Shelf) -> frozenset[str]:
        try:
            names = frozenset(os.listdir(shelf.path))
        except FileNotFoundError:
            names = frozenset()
        except OSError as error:
            self._warn(f"answers in {self.root} cannot be read: {error}")
            names = frozenset()
        shelf.names, shelf.listed = names, time.monotonic()
        return names

    def _write(self, shelf: Shelf, name: str, entry: Entry) -> None:
        data = encode(entry, name, self._encryption)
        if len(data) > self._max_bytes:
            return
        self._make_room(len(data))
        aside = os.path.join(shelf.path, f".{name}.{self._token}{next(self._numbers):x}")
        try:
            try:
                _write_new(aside, data)
            except FileNotFoundError:
                if not self.root.is_dir():
                    # Whoever has taken it away will not want it back, with one answer in it.
                    raise
                _mkdir(os.fspath(shelf.job))
                _mkdir(shelf.path)
                _write_new(aside, data)
            if _publish(aside, os.path.join(shelf.path, name)):
                self._written += len(data)
        finally:
            _unlink(aside)
        self._attend(shelf.job)

    def _attend(self, job: Path) -> None:
        """Do for the directory what must be done now and then."""
        now = time.monotonic()
        if now - self._swept > _SWEEP_EVERY:
            self._swept = now
            if self._is_next_to_sweep():
                self._sweep()
        if now - self._marked.get(job, -_MARK_EVERY) >= _MARK_EVERY and job.is_dir():
            self._marked[job] = now
            mark(job, self._ttl)

    def _is_next_to_sweep(self) -> bool:
        path = self.root / _SWEPT
        try:
            if 0 <= time.time() - path.stat().st_mtime < _SWEEP_EVERY:
                return False
        except FileNotFoundError:
            pass
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        try:
            os.write(descriptor, b"1")
        finally:
            os.close(descriptor)
        return True

    def _make_room(self, size: int) -> None:
        # What others write meanwhile is not known: each may fill its share of what is left.
        share = (self._max_bytes - self._total) // (os.cpu_count() or 1)
        if not self._is_swept or self._written + size > share:
            self._sweep(size)

    def _sweep(self, size: int = 0) -> None:
        limit = max(0, int(self._max_bytes * _FULL) - size)
        self._total, self._written = sweep(self.root, limit, self._ttl), 0
        self._is_swept = True

    def _warn(self, reason: str) -> None:
        warn_once(_logger, "answers", f"Calls may be made and paid for again, since {reason}")


def _read(path: str, expires: float | None) -> bytes | None:
    """Return what a file holds; None where it is too old."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with open(descriptor, "rb", buffering=0) as file:
        if expires is not None and os.fstat(descriptor).st_mtime + expires < time.time():
            return None
        return file.readall()


def _write_new(path: str, data: bytes) -> None:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW
    with open(os.open(path, flags, 0o600), "wb", buffering=0) as file:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]


def _publish(aside: str, path: str) -> bool:
    """Give a whole file its name, unless there is one of that name; return whether it has it."""
    try:
        os.link(aside, path)
    except FileExistsError:
        return False
    except OSError:
        # Not all file systems have links. What comes between is an answer to the same request.
        if os.path.lexists(path):
            return False
        os.rename(aside, path)
    return True


def _mkdir(path: str) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
