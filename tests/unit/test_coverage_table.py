"""The table of what is covered."""

from __future__ import annotations

import os
import subprocess
import sys

import coverage_table
import pytest
from coverage_table import PAGE, TESTS, Cell, Section, page


@pytest.fixture(autouse=True)
def sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """One section with two columns."""
    one = Section("function", ("classic", "connect"), "What holds.")
    monkeypatch.setattr(coverage_table, "SECTIONS", {"Spark": one})


def _cell(row: str, column: str, **more: str) -> Cell:
    return Cell("Spark", row, column, test="e2e/test_x.py", **more)


def test_the_page_is_up_to_date() -> None:
    """docs/coverage.md says what the tests say; if not, run make coverage-table."""
    script = "import coverage_table as table; print(table.page(table.collected()), end='')"
    made = subprocess.run(
        [sys.executable, "-c", script],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": str(TESTS / "support")},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=200,
    )
    assert made.stdout == PAGE.read_text(encoding="utf-8")


def test_a_cell_links_to_its_test() -> None:
    """Each row has its answers, with notes, and the reasons for what cannot work below."""
    text = page(
        [
            _cell("`map`", "connect", limit="there are no RDDs."),
            _cell("`map`", "classic"),
            _cell("`udf`", "classic", note="from 4.0"),
            _cell("`udf`", "connect"),
        ]
    )
    assert text.endswith(
        "What holds.\n\n"
        "| function | classic | connect |\n"
        "|---|---|---|\n"
        "| `map` | [yes](../tests/e2e/test_x.py) | [no](../tests/e2e/test_x.py) |\n"
        "| `udf` | [yes](../tests/e2e/test_x.py), from 4.0 | [yes](../tests/e2e/test_x.py) |\n"
        "\n"
        "- `map`; connect: there are no RDDs.\n"
    )


@pytest.mark.parametrize(
    ("cells", "complaint"),
    [
        ([_cell("`map`", "classic")], r"no test covers `map` .*connect"),
        ([_cell("`map`", "clasic")], "a cell of no table"),
        ([_cell("`map`", "classic"), _cell("`map`", "classic", limit="x")], "not say the same"),
    ],
)
def test_a_cell_that_no_test_speaks_for_is_refused(cells: list[Cell], complaint: str) -> None:
    """A row without a test for each column, a misspelt column, and contradictions are errors."""
    with pytest.raises(ValueError, match=complaint):
        page(cells)
