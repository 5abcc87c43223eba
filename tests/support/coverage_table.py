"""The table of what is covered, docs/coverage.md, written from the tests that show it.

A test, or one case of a parametrised test, names the cell of the table that it stands for::

    @pytest.mark.covers("Clients", "`AsyncOpenAI`", "traced")
    def test_an_async_client_is_traced() -> None: ...

    @pytest.mark.parametrize("row", cases("Clients", "traced", ["`OpenAI`", "`AzureOpenAI`"]))

The mark takes the section (a title in :data:`SECTIONS`), the row and the column, in Markdown, and
by keyword

- ``note``: what follows the "yes", such as ``note="from Spark 4.0"``;
- ``limit``: why it cannot work and what to do instead, of a test that shows that it does not.

To add a row, mark its tests, at least one for each column of the section. To add a section, enter
it in :data:`SECTIONS`, too. Then run ``make coverage-table``. Where a test cannot run with the
installed packages, let a ``skipif`` mark say so: whatever is collected is in the table. Rows come
in the order in which the tests are collected.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "coverage.md"


@dataclass(frozen=True)
class Section:
    """A table of the page.

    Args:
        first: The heading of the column with the rows' names.
        columns: The headings of the others.
        text: What is said above the table.
    """

    first: str
    columns: tuple[str, ...]
    text: str


SPARK = "Ways to hand a function to Spark"
CLIENTS = "Clients"
CALLS = "Calls"
POOLS = "Concurrency inside a partition"
FLAVORS = "Other flavours"

SECTIONS = {
    SPARK: Section(
        "function",
        ("classic Spark", "Spark Connect"),
        "Each call is below the span of its task, and that below the driver's span, with Spark's "
        "facts; the spans are in the store before the driver's span ends; results are the same "
        "without `enable()`. Spark Connect from Spark 4.0.",
    ),
    CLIENTS: Section(
        "client",
        ("sync", "async"),
        "The plain call, its stream and an embedding are each one span, below that of the task, "
        "with the tokens that the server reports.",
    ),
    CALLS: Section(
        "call",
        ("sync", "async"),
        "Each call is one span, below that of the task, with the status and the tokens that the "
        "server reports, `http.request.resend_count` where the client has sent the request again, "
        "`gen_ai.response.time_to_first_chunk` where the answer is streamed, and "
        '`llm.stream.outcome` = "closed early" where it was not read to its end. What the caller '
        "gets is the same without `enable()`.",
    ),
    POOLS: Section(
        "way to make calls",
        ("below the span it is made under",),
        "Each call is below the user's span that was active where the work was handed over, "
        "and that below the task; its tokens are in the task's receipt, its span is in the "
        "store when the task ends.",
    ),
    FLAVORS: Section(
        "library",
        ("below the task",),
        "What MLflow traces on the driver, because you have turned its autolog on there before the "
        "function is handed to Spark, is traced in the workers as well.",
    ),
}

_HEAD = """# What is covered

Each cell links to a test that fails if it breaks. Written by `make coverage-table` from the tests.
"""


@dataclass(frozen=True)
class Cell:
    """What one test says of one cell."""

    section: str
    row: str
    column: str
    test: str
    note: str = ""
    limit: str = ""

    def __str__(self) -> str:
        answer = "no" if self.limit else "yes"
        note = f", {self.note}" if self.note else ""
        return f"[{answer}](../tests/{self.test}){note}"


def cases(section: str, column: str, rows: Iterable[str], **more: str) -> list[Any]:
    """Return cases for ``pytest.mark.parametrize``, one for each row of the table."""
    return [case(row, section, row, column, **more) for row in rows]


def case(value: Any, section: str, row: str, column: str, *, skip: Any = None, **more: str) -> Any:
    """Return one case, which stands for a cell; ``skip`` is a ``skipif`` mark for it."""
    marks = [pytest.mark.covers(section, row, column, **more), *([skip] if skip else [])]
    return pytest.param(value, marks=marks, id=row.replace("`", ""))


def collected() -> list[Cell]:
    """Return the cells of all tests there are, in the order of the tests."""
    collector = _Collector()
    arguments = [str(TESTS), "--collect-only", "-qq", "--rootdir", str(TESTS.parent)]
    with redirect_stdout(sys.stderr):
        if code := pytest.main(arguments, plugins=[collector]):
            raise SystemExit(f"the tests cannot be collected: {code!r}")
    return collector.cells


class _Collector:
    def __init__(self) -> None:
        self.cells: list[Cell] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            test = item.path.relative_to(TESTS).as_posix()
            for mark in item.iter_markers("covers"):
                self.cells.append(Cell(*mark.args, test=test, **mark.kwargs))


def page(cells: Iterable[Cell]) -> str:
    """Return the page.

    Raises:
        ValueError: A cell is in no section or column that there is, has no test, or has tests
            that do not say the same.
    """
    tables: dict[str, dict[str, dict[str, Cell]]] = {title: {} for title in SECTIONS}
    for cell in cells:
        if cell.section not in SECTIONS or cell.column not in SECTIONS[cell.section].columns:
            raise ValueError(f"{cell.test} covers a cell of no table: {cell!r}")
        first = tables[cell.section].setdefault(cell.row, {}).setdefault(cell.column, cell)
        if (first.note, first.limit) != (cell.note, cell.limit):
            raise ValueError(f"{first.test} and {cell.test} do not say the same of {first!r}")
    parts = (part for title in SECTIONS for part in _section(title, tables[title]))
    return "\n".join([_HEAD, *parts])


def _section(title: str, rows: dict[str, dict[str, Cell]]) -> Iterator[str]:
    section = SECTIONS[title]
    yield f"## {title}\n\n{section.text}\n"
    yield _line(section.first, *section.columns)
    yield "|" + "---|" * (1 + len(section.columns))
    for row, cells in rows.items():
        if missing := set(section.columns) - cells.keys():
            raise ValueError(f"no test covers {row} of {title!r} in {sorted(missing)}")
        yield _line(row, *(str(cells[column]) for column in section.columns))
    yield ""
    limits: dict[tuple[str, str], list[str]] = {}
    for row, cells in rows.items():
        for column, cell in cells.items():
            if cell.limit:
                limits.setdefault((column, cell.limit), []).append(row)
    for (column, limit), names in limits.items():
        yield f"- {', '.join(names)}; {column}: {limit}"
    if limits:
        yield ""


def _line(*texts: str) -> str:
    return f"| {' | '.join(texts)} |"


if __name__ == "__main__":
    # As the tests are run, with the library that is installed.
    os.chdir(TESTS)
    PAGE.write_text(page(collected()), encoding="utf-8")
