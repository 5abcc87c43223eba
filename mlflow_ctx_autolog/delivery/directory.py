"""Where on the disk a host's processes keep what is theirs."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import stat
import tempfile
from pathlib import Path

__all__ = [
    "check_is_private",
    "default_directory",
    "directory_problem",
    "is_held",
    "private_file",
]


def default_directory() -> Path:
    """Return this user's directory for spools among the host's temporary files."""
    try:
        temporary = tempfile.gettempdir()
    except OSError:
        # None can be written just now, which whoever tries is told.
        temporary = os.environ.get("TMPDIR") or "/tmp"
    return Path(temporary) / f"mlflow-ctx-autolog-{os.getuid()}"


def private_file(directory: Path | None, name: str, *, may_exist: bool = False) -> tuple[Path, int]:
    """Open a file for reading and writing that only this user may read, and make it first.

    Args:
        directory: Where; None for the default one.
        name: Its name there.
        may_exist: Whether it may be there already.

    Returns:
        Its path, and its descriptor.

    Raises:
        OSError: It cannot be made there, or the directory is somebody else's.
    """
    folder = directory or default_directory()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_is_private(directory)
    path = folder / name
    # Never through a link that somebody else has put there.
    flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags | (0 if may_exist else os.O_EXCL), 0o600)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_nlink != 1:
            raise PermissionError(f"{path} is not this user's own file")
    except BaseException:
        os.close(descriptor)
        raise
    return path, descriptor


def is_held(path: Path) -> bool:
    """Whether a process that is alive has locked a file for itself."""
    try:
        with io.FileIO(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def directory_problem(directory: Path | None) -> str | None:
    """Return why spools cannot be kept in a directory, None if they can. Leaves nothing there."""
    folder = directory or default_directory()
    try:
        with contextlib.suppress(FileNotFoundError):
            check_is_private(directory)
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"tried")
            file.flush()
            return None
    except OSError as error:
        return f"{folder}: {error.strerror or error}"


def check_is_private(directory: Path | None) -> None:
    """Raise where somebody else can put files into the default directory, or has made it.

    Raises:
        OSError: It is so. Of a directory that the user has named, nothing is asked.
    """
    if directory is not None:
        return
    folder = default_directory()
    # Not through a link: among temporary files, somebody else may have been faster.
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else")
    if stat.S_IMODE(found.st_mode) & 0o022:
        raise PermissionError(f"{folder} can be written by somebody else")
