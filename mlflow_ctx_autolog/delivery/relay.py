"""How the driver gets what its workers cannot store: with their tasks, and by a directory."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import hashlib
import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlflow_ctx_autolog.delivery.directory import (
    check_is_private,
    default_directory,
    is_held,
    private_file,
)
from mlflow_ctx_autolog.delivery.records import Destination
from mlflow_ctx_autolog.delivery.recovery import Send, recover
from mlflow_ctx_autolog.delivery.segments import destination_of, spool_files

__all__ = ["Collected", "announce_driver", "collect", "driver_is_here", "relay_bytes"]


@dataclass
class Collected:
    """What was found in a directory.

    Args:
        records: Those that were taken.
        held: Files that their processes have still, since a task is running, or was a moment ago.
    """

    records: int = 0
    held: int = 0


_NAME = re.compile(r"mlflow-ctx-autolog-[0-9a-f]{32}\.driver")
# Partitions that have equal shares of what goes home with tasks; later ones have less and less.
_EQUAL, _PART = 40, 16
# What Spark allows the results of a stage where its setting is not known: its default.
_USUAL_LIMIT = 1 << 30


def relay_bytes(limit: int | None, partition: int) -> int:
    """Return how many bytes of spans may go home with a task.

    Spark aborts a job when the results of a stage come to more than its setting
    ``spark.driver.maxResultSize``, and counts these among them. A task does not know how many it
    has beside it. So each has a share that falls with its number: of 200 tasks, all together have
    a sixth of the limit, of 200,000 not two thirds.

    Args:
        limit: Bytes that the setting allows, 0 for no limit; None where it is not known.
        partition: The task's number in its stage, from 0.
    """
    allowed = _USUAL_LIMIT if limit is None else limit or 64 * _USUAL_LIMIT
    return allowed // (_PART * max(_EQUAL, partition + 1))


def _file_name(driver_id: str) -> str:
    return f"mlflow-ctx-autolog-{hashlib.blake2b(driver_id.encode(), digest_size=16).hexdigest()}"


@functools.lru_cache(maxsize=8)
def announce_driver(directory: Path | None, driver_id: str) -> None:
    """Let workers that see this directory know that their driver does, as long as it lives.

    Raises:
        OSError: There can be no file.
    """
    path, descriptor = private_file(directory, f"{_file_name(driver_id)}.driver", may_exist=True)
    file = io.FileIO(descriptor, "r+")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    _held.append(file)
    _remove_old(path.parent)
    atexit.register(functools.partial(path.unlink, missing_ok=True))


_held: list[io.FileIO] = []


def _leave_to_parent() -> None:
    # A child that outlives the driver would keep its lock.
    for file in _held:
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


def _remove_old(folder: Path) -> None:
    """Remove what drivers that were killed have left."""
    for path in folder.iterdir():
        if _NAME.fullmatch(path.name) and not is_held(path):
            with contextlib.suppress(OSError):
                path.unlink()


def driver_is_here(directory: Path | None, driver_id: str) -> bool:
    """Whether a driver that is alive sees the same directory."""
    folder = directory or default_directory()
    with contextlib.suppress(OSError):
        check_is_private(directory)
        return is_held(folder / f"{_file_name(driver_id)}.driver")
    return False


def collect(
    directory: Path | None, is_asked: Callable[[Destination], bool], send: Send
) -> Collected:
    """Take what workers have left in a directory.

    Args:
        directory: Where; None for the default one.
        is_asked: Tells whether records that belong to a destination are to be taken.
        send: Takes records, or raises.
    """
    found = Collected()
    for path in spool_files(directory):
        # Somebody else may have been faster.
        with contextlib.suppress(OSError):
            if not is_asked(destination_of(path)):
                continue
            try:
                found.records += recover(path, send).stored
            except BlockingIOError:
                found.held += 1
    return found
