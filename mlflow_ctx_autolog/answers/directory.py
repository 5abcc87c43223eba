"""The directory that answers are kept in: which one, whose, and what may lie in it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["ALWAYS", "File", "default_root", "folder_of", "forget", "is_local", "problem", "sweep"]

ALWAYS = "always"
JOB_MARK = "job"
# Only what has such a name is ours: a directory that the user names may hold more.
_FOLDER = re.compile(r"answers-(always|[0-9a-f]{32})")
_PART = re.compile(r"[0-9a-f]{2,32}")
_ENTRY = re.compile(r"\.?[0-9a-f]{32}\.\d+(\.[0-9a-f]+)?")

# Seconds after which what a writer has put aside has no writer any more.
_ASIDE = 600.0
# What is left where there was too much, so that not each new answer has to make room for itself.
_KEPT_OF_LIMIT = 0.9

# File systems whose mode bits are those of another machine, or of nobody.
_REMOTE = re.compile(
    r"(nfs|cifs|smb|fuse|9p|afs|ceph|lustre|gpfs|beegfs|gluster|virtiofs|vboxsf|prl_fs|drvfs|wekafs)"
)


class File(NamedTuple):
    """An answer's file."""

    changed: float
    size: int
    path: str


def default_root(spool_directory: Path) -> Path:
    """Return where a host keeps answers, given where it keeps spools."""
    return spool_directory / "answers"


def folder_of(root: Path, job: str) -> Path:
    """Return the folder of a job's answers: of :data:`ALWAYS`, or 32 hexadecimal digits."""
    return root / f"answers-{job}"


def is_local(path: str | os.PathLike[str]) -> bool:
    """Whether a path is on a file system of this machine, whose mode bits say who may write."""
    if not sys.platform.startswith("linux"):
        return True
    wanted = os.path.realpath(path)
    found, kind = "", ""
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                _, place, this, *_ = line.split(" ")
                place = place.replace("\\040", " ")
                inside = wanted == place or wanted.startswith(place.rstrip("/") + "/")
                # What is mounted later over the same place hides what was there.
                if inside and len(place) >= len(found):
                    found, kind = place, this
    except (OSError, ValueError):
        return True
    return _REMOTE.match(kind) is None


def problem(root: str | os.PathLike[str]) -> str | None:
    """Return why answers cannot be kept in a directory; None if they can, or it is not there."""
    path = os.fspath(root)
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{path} cannot be looked into: {error.strerror}"
    if not stat.S_ISDIR(found.st_mode):
        return f"{path} is not a directory"
    if is_local(path):
        if found.st_uid not in (os.geteuid(), 0):
            return (
                f"{path} belongs to another user (id {found.st_uid}), who could put answers into "
                "it; name a directory of your own"
            )
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return (
                f"other users may write to {path} (mode {stat.S_IMODE(found.st_mode):04o}), and "
                "could put answers into it; take that away with chmod go-w, or name a directory "
                "of your own"
            )
    if not os.access(path, os.W_OK | os.X_OK):
        return f"{path} is not writable for this user"
    return None


def make(root: Path) -> None:
    """Make a directory for answers where there is none, in one that is there.

    Raises:
        OSError: It cannot be made or used; the message says why.
    """
    if not root.is_dir():
        # Its parent is not ours to make: where a mount is missing, it would be made beside it.
        with contextlib.suppress(FileExistsError):
            root.mkdir(mode=0o700)
    if (reason := problem(root)) is not None:
        raise OSError(errno.EACCES, reason)


def _folders(root: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(root) as entries:
            yield from [each for each in entries if _FOLDER.fullmatch(each.name)]
    except OSError:
        return


def _files(folder: str) -> Iterator[File]:
    with contextlib.suppress(OSError), os.scandir(folder) as parts:
        for part in parts:
            if not _PART.fullmatch(part.name) or not part.is_dir(follow_symlinks=False):
                continue
            with contextlib.suppress(OSError), os.scandir(part.path) as entries:
                for each in entries:
                    if _ENTRY.fullmatch(each.name):
                        with contextlib.suppress(OSError):
                            facts = each.stat(follow_symlinks=False)
                            yield File(facts.st_mtime, facts.st_size, each.path)


def sweep(root: str | os.PathLike[str], max_bytes: int | None, ttl: float | None = None) -> int:
    """Remove answers whose time is over and, oldest first, what is too much.

    Args:
        root: The directory.
        max_bytes: Size of all answers at most; None for no limit.
        ttl: Seconds that those are kept of which nothing else says it.

    Returns:
        The size of those that are left, in bytes.
    """
    now = time.time()
    total = 0
    for folder in _folders(os.fspath(root)):
        ends = _end(folder, ttl)
        if ends is not None and ends < now:
            _remove(folder.path)
            continue
        is_always = folder.name.endswith(ALWAYS)
        lasts = _ttl(folder.path) or ttl
        for file in _files(folder.path):
            is_aside = os.path.basename(file.path).startswith(".")
            if (is_aside and file.changed + _ASIDE < now) or (
                is_always and lasts is not None and file.changed + lasts < now
            ):
                _unlink(file.path)
            else:
                total += file.size
    if max_bytes is not None and total > max_bytes:
        total = _make_room(os.fspath(root), total, int(max_bytes * _KEPT_OF_LIMIT))
    return total


def _make_room(root: str, total: int, wanted: int) -> int:
    files = [file for folder in _folders(root) for file in _files(folder.path)]
    for file in sorted(files):
        if total <= wanted:
            break
        _unlink(file.path)
        total -= file.size
    return total


def _end(folder: os.DirEntry[str], ttl: float | None) -> float | None:
    """Return when the time of a job's answers is over; None where each has its own."""
    if folder.name.endswith(ALWAYS):
        return None
    kept = _ttl(folder.path) or ttl
    if kept is None:
        return None
    try:
        # Its job touches it as long as it is at work.
        seen = os.stat(os.path.join(folder.path, JOB_MARK)).st_mtime
    except OSError:
        try:
            seen = folder.stat().st_mtime
        except OSError:
            return None
    return seen + kept


def _ttl(folder: str) -> float | None:
    try:
        with open(os.path.join(folder, JOB_MARK), encoding="ascii") as file:
            return float(file.read(40))
    except (OSError, ValueError):
        return None


def mark(folder: Path, ttl: float) -> None:
    """Say that the job of a folder is at work, and how long its answers are kept after that.

    Raises:
        OSError: It cannot be written.
    """
    flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW
    descriptor = os.open(folder / JOB_MARK, flags, 0o600)
    try:
        os.write(descriptor, str(ttl).encode("ascii"))
    finally:
        os.close(descriptor)


def forget(root: str | os.PathLike[str]) -> int:
    """Remove all answers in a directory, and nothing else; return how many there were."""
    return sum(_remove(folder.path) for folder in _folders(os.fspath(root)))


def _remove(folder: str) -> int:
    removed = 0
    for file in _files(folder):
        is_answer = not os.path.basename(file.path).startswith(".")
        removed += _unlink(file.path) and is_answer
    _unlink(os.path.join(folder, JOB_MARK))
    with contextlib.suppress(OSError), os.scandir(folder) as parts:
        for part in parts:
            if _PART.fullmatch(part.name):
                with contextlib.suppress(OSError):
                    os.rmdir(part.path)
    with contextlib.suppress(OSError):
        os.rmdir(folder)
    return removed


def _unlink(path: str) -> bool:
    try:
        os.unlink(path)
    except OSError:
        return False
    return True
