"""What the processes of a host share about one job: a file that each of them appends to."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from mlflow_ctx_autolog.delivery.directory import default_directory, private_file
from mlflow_ctx_autolog.exceptions import warn_once
from mlflow_ctx_autolog.log_ins import safe_logger

__all__ = ["Event", "HostAccount", "State", "open_account"]

_logger = safe_logger(__name__)

# Seconds after which nobody asks any more about a job.
_KEPT = 7 * 24 * 3600.0
# Seconds between two looks at a file that another process holds.
_LOOK = 0.0005
# Bytes of a file's first line.
_HEAD = 32

Event = list[Any]


class State(Protocol):
    """What is known of a job, as far as it was told."""

    def enter(self, event: Event) -> None:
        """Learn one more thing, in JSON's types; raise TypeError or ValueError where it is none."""

    def events(self) -> list[Event]:
        """Return what tells all of it anew, in few events."""


S = TypeVar("S", bound=State)


class HostAccount(Generic[S]):
    """What is known of a job, and a file by which its processes on this host tell each other.

    The file holds one event a line, which all processes enter in one order. What cannot be written
    is entered all the same, so that this process at least keeps to it.

    Args:
        file: The file; None for an account of this process alone.
        make: Returns what is known at first, which is nothing.
        patience: Seconds to wait at most for another process.

    Raises:
        OSError: From :meth:`changing`: another process has the file for too long.
    """

    # Bytes after which the file is written anew, in fewer lines.
    _longest = 16_000_000

    def __init__(self, file: io.FileIO | None, make: Callable[[], S], patience: float) -> None:
        self._file = file
        self._make = make
        self._patience = patience
        self._lock = threading.Lock()
        self._state = make()
        self._read_until = 0
        # The file's first line, which is another one when it was written anew.
        self._head = b""

    @contextlib.contextmanager
    def changing(self) -> Iterator[tuple[S, Callable[..., None]]]:
        """Look and tell with nobody in between; nothing is told where the block raises.

        Yields:
            What is known, and what tells the parts of one event more.
        """
        told: list[Event] = []
        with self._lock, self._held():
            yield self._state, lambda *parts: told.append(list(parts))
            for event in told:
                self._state.enter(event)
            if told:
                self._write(told)

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        if self._file is None:
            yield
            return
        deadline = time.monotonic() + self._patience
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TimeoutError("other processes of this host are at it") from None
                time.sleep(_LOOK)
        try:
            self._catch_up()
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _catch_up(self) -> None:
        """Enter what others have told meanwhile."""
        assert self._file is not None
        descriptor = self._file.fileno()
        end = os.fstat(descriptor).st_size
        head = os.pread(descriptor, _HEAD, 0)[:_HEAD]
        if head != self._head:
            self._state, self._read_until, self._head = self._make(), 0, head
        if end <= self._read_until:
            return
        text = os.pread(descriptor, end - self._read_until, self._read_until)
        self._read_until = end
        for line in text.split(b"\n"):
            # One that a full disk or a killed process has cut off is none, nor is the first.
            with contextlib.suppress(TypeError, ValueError):
                if line.startswith(b"["):
                    self._state.enter(json.loads(line))

    def _write(self, told: list[Event]) -> None:
        if self._file is None:
            return
        try:
            if self._read_until == 0 or self._read_until > self._longest:
                self._write_anew()
            else:
                # With a line's end before it, for whatever was cut off.
                lines = b"".join(b"\n" + json.dumps(event).encode() for event in told)
                os.pwrite(self._file.fileno(), lines, self._read_until)
                self._read_until += len(lines)
        except OSError as error:
            warn_once(
                _logger,
                "write",
                f"What is counted for a job on this host is known to this process alone: {error}.",
            )

    def _write_anew(self) -> None:
        assert self._file is not None
        descriptor = self._file.fileno()
        head = uuid.uuid4().hex.encode()
        lines = [head, *(json.dumps(event).encode() for event in self._state.events())]
        content = b"\n".join(lines)
        if os.pwrite(descriptor, content, 0) == len(content):
            os.ftruncate(descriptor, len(content))
            self._head, self._read_until = head, len(content)


def open_account(
    directory: str | None, job: str, kind: str, make: Callable[[], S], patience: float = 10.0
) -> HostAccount[S]:
    """Return a job's account on this host; where no file can be had, one of this process alone.

    Args:
        directory: Where spools are kept; None for the default one.
        job: Names the job: the id of its trace, or its session.
        kind: What it is an account of, in one word, as the ending of the file and for a warning.
        make: Returns what is known at first.
        patience: See :class:`HostAccount`.
    """
    folder = None if directory is None else Path(directory)
    return _account(folder, job, kind, make, patience, os.getpid())


@functools.lru_cache(maxsize=16)
def _account(
    folder: Path | None,
    job: str,
    kind: str,
    make: Callable[[], S],
    patience: float,
    _process: int,
) -> HostAccount[S]:
    """Return a job's account; a forked child has one of its own to the same file."""
    # The name of a session is the user's.
    digest = hashlib.blake2b(job.encode(), digest_size=16).hexdigest()
    try:
        path, descriptor = private_file(
            folder, f"mlflow-ctx-autolog-{digest}.{kind}", may_exist=True
        )
    except OSError as error:
        warn_once(
            _logger,
            f"account {kind}",
            f"Each worker process keeps a {kind} of its own, since one for the host cannot be kept "
            f"in {folder or default_directory()}: {error}. Set spool_directory to a disk with "
            "room.",
        )
        return HostAccount(None, make, patience)
    _remove_old(path.parent, kind)
    return HostAccount(io.FileIO(descriptor, "r+"), make, patience)


def _remove_old(folder: Path, kind: str) -> None:
    own = re.compile(rf"mlflow-ctx-autolog-[0-9a-f]{{32}}\.{kind}")
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                if own.fullmatch(path.name) and time.time() - path.lstat().st_mtime > _KEPT:
                    path.unlink()
