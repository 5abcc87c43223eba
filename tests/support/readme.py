"""The README: its blocks of code, and what it says they print."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
MOST_WORDS = 900


def text() -> str:
    return README.read_text(encoding="utf-8")


def python_blocks() -> list[str]:
    """Return the blocks of Python, in order."""
    return re.findall(r"^```python\n(.*?)^```$", text(), re.MULTILINE | re.DOTALL)


def printed_lines() -> list[str]:
    """Return the lines that the README shows as printed by them."""
    blocks = re.findall(r"^```text\n(.*?)^```$", text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def program() -> str:
    """Return all of its Python as one program."""
    return "\n".join(python_blocks())
