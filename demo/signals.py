"""What Ctrl-C and SIGTERM do."""

from __future__ import annotations

import signal
from types import FrameType


def handle() -> None:
    """Raise KeyboardInterrupt on SIGINT and SystemExit with status 143 on SIGTERM."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)


def ignore() -> None:
    """Let neither interrupt what follows."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _terminate(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
