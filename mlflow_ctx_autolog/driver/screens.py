"""Where the user sees a line: a terminal, or below the cell of a notebook."""

from __future__ import annotations

import sys
from typing import Any, Protocol

__all__ = ["Screen", "a_screen"]


class Screen(Protocol):
    """Where one line stands."""

    def show(self, line: str) -> None:
        """Show the line, in the place of what was shown before."""

    def close(self) -> None:
        """Leave it as it is."""


class _Terminal:
    """The last line of a terminal."""

    def show(self, line: str) -> None:
        sys.stderr.write(f"\r\x1b[2K{line}")
        sys.stderr.flush()

    def close(self) -> None:
        sys.stderr.write("\n")
        sys.stderr.flush()


class _Cell:
    """Below the cell of a notebook that is running as the line is first shown.

    An output of its own, which a saved notebook keeps as it was shown last.
    """

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, line: str) -> None:
        from IPython.display import display

        shown = {"text/plain": line}
        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)

    def close(self) -> None:
        """Stay as it is."""


def a_screen() -> Screen | None:
    """Return where to show a line; None where nobody would see it."""
    if _in_notebook():
        return _Cell()
    return _Terminal() if sys.stderr.isatty() else None


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in getattr(shell, "config", {})
