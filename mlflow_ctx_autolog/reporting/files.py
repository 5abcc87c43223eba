"""Files that hold what was asked and answered: nobody else may read them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["write_private"]


def write_private(path: str | Path, text: str) -> Path:
    """Write a file with mode 0600, whatever was there before, and return its path."""
    target = Path(path)
    if target.exists() and not target.is_file():
        # A terminal or a pipe, which is not to be replaced.
        target.write_text(text, encoding="utf-8")
        return target
    # Neither the mode of a file that is there nor where a link leads to decides on it.
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
    return target
