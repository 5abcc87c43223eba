"""What the processes of a host share about one job: a SQLite file of a few rows."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from mlflow_ctx_autolog.delivery.spool import default_directory, private_file
from mlflow_ctx_autolog.exceptions import warn_once

__all__ = ["HostAccount", "open_account"]

_logger = logging.getLogger(__name__)

# Seconds after which nobody asks any more about a job.
_KEPT = 7 * 24 * 3600.0


class HostAccount:
    """A file of a job that its processes on this host look into and change in turn.

    Args:
        path: The file; None for an account of this process alone.
        tables: Statements that make its tables, where they are not there.
        patience: Seconds to wait at most for another process.

    Raises:
        sqlite3.Error: From any method: the disk is full or the file is damaged.
    """

    def __init__(self, path: Path | None, tables: tuple[str, ...], patience: float) -> None:
        self._lock = threading.Lock()
        # To make it takes more time than to change it.
        self._connection = sqlite3.connect(
            ":memory:" if path is None else path,
            timeout=10.0,
            isolation_level=None,
            check_same_thread=False,
        )
        # Not a write-ahead log: who turns that on while another does is told at once that the
        # database is locked, and would go by an account of its own.
        self._connection.execute("PRAGMA journal_mode = PERSIST")
        # What a crash of the host forgets is what nobody is left to ask for.
        self._connection.execute("PRAGMA synchronous = OFF")
        with self.changing() as connection:
            for statement in tables:
                connection.execute(statement)
        self._connection.execute(f"PRAGMA busy_timeout = {int(patience * 1000)}")

    @contextlib.contextmanager
    def changing(self) -> Iterator[sqlite3.Connection]:
        """Look and write with nobody in between; all is taken back where the block raises."""
        with self._lock, self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            yield self._connection


def open_account(
    directory: str | None, job: str, kind: str, tables: tuple[str, ...], patience: float = 10.0
) -> HostAccount:
    """Return a job's account on this host; where no file can be had, one of this process alone.

    Args:
        directory: Where spools are kept; None for the default one.
        job: Names the job: the id of its trace, or its session; or all of them.
        kind: What it is an account of, in one word, as the ending of the file and for a warning.
        tables: See :class:`HostAccount`.
        patience: See :class:`HostAccount`.
    """
    folder = None if directory is None else Path(directory)
    try:
        return _shared_account(folder, job, kind, tables, patience, os.getpid())
    except (OSError, sqlite3.Error) as error:
        warn_once(
            _logger,
            f"account {kind}",
            f"Each worker process keeps a {kind} of its own, since one for the host cannot be kept "
            f"in {folder or default_directory()}: {error}. Set spool_directory to a disk with "
            "room.",
        )
        return _own_account(job, kind, tables, os.getpid())


@functools.lru_cache(maxsize=8)
def _shared_account(
    folder: Path | None,
    job: str,
    kind: str,
    tables: tuple[str, ...],
    patience: float,
    _process: int,
) -> HostAccount:
    """Return a job's account; a forked child has one of its own to the same file."""
    # The name of a session is the user's.
    name = f"{hashlib.blake2b(job.encode(), digest_size=16).hexdigest()}.{kind}"
    path = private_file(folder, name, may_exist=True)
    _remove_old(path.parent, kind)
    return HostAccount(path, tables, patience)


@functools.lru_cache(maxsize=8)
def _own_account(_job: str, _kind: str, tables: tuple[str, ...], _process: int) -> HostAccount:
    return HostAccount(None, tables, 0.0)


def _remove_old(folder: Path, kind: str) -> None:
    for path in folder.glob(f"*.{kind}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _KEPT:
                path.unlink()
