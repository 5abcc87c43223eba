"""A comparison as one HTML file to look at, from its dictionary."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlflow_ctx_autolog.reporting.comparison_text import (
    HEAD,
    VERDICTS,
    by_part,
    comparison_headline,
    difference_cells,
    difference_text,
    growth_text,
    job_lines,
    news_lines,
    number_text,
)
from mlflow_ctx_autolog.reporting.html_page import card, filled, rows_table

__all__ = ["comparison_page"]

Row = Mapping[str, Any]

# The four questions, and the number that answers each.
_CARDS = {
    "How much": ("cost_per_1000_rows", "cost_per_call", "cost", "input_tokens"),
    "How good": ("odd", "errors"),
    "How fast": ("p50",),
    "Wasted": ("repeats",),
}


def comparison_page(summary: Row) -> str:
    """Return the page. Whatever came from outside is escaped.

    Args:
        summary: What ``Comparison.to_dict()`` returned.
    """
    headline = comparison_headline(summary)
    items = [difference_text(each) for each in summary["changed"]] + news_lines(summary)
    listed = "".join(f"<li>{html.escape(item)}</li>" for item in items)
    changes = f"<section><h2>What changed</h2><ul class='changes'>{listed}</ul></section>"
    tables = "\n".join(
        f"<section><h2>{html.escape(part)}</h2>{_table(rows)}</section>"
        for part, rows in by_part(summary).items()
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in summary["notes"])
    return filled(
        "comparison.html",
        title=html.escape(headline),
        headline=html.escape(headline),
        about="<br>".join(html.escape(line) for line in job_lines(summary)),
        cards="\n".join(_cards(summary)),
        changes=changes if items else "",
        tables=tables,
        notes=f"<section><h2>What limits this</h2><ul>{notes}</ul></section>" if notes else "",
    )


def _table(differences: Sequence[Row]) -> str:
    rows = [difference_cells(each) for each in differences]
    return rows_table(HEAD, rows, "differences", [each["verdict"] for each in differences])


def _cards(summary: Row) -> Iterator[str]:
    of_all = {each["metric"]: each for each in summary["differences"] if not each["function"]}
    for word, metrics in _CARDS.items():
        found = [of_all[metric] for metric in metrics if metric in of_all]
        each = next((one for one in found if one["change"] is not None), None)
        if each is None:
            yield card(word, "no change", "none before, and none after")
            continue
        before, after = (number_text(each, each[name]) for name in ("before", "after"))
        # Of what may be chance, nothing is made here.
        kind = "faint"
        if each["verdict"] == "changed":
            kind = "warn" if (each["change"] or 0) > 0 else "fine"
        below = f"{each['label']}: {before} before, {after} after; {VERDICTS[each['verdict']]}"
        yield card(word, growth_text(each), below, kind)
