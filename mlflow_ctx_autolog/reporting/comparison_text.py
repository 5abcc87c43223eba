"""A comparison for a terminal or a notebook, from its dictionary."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from mlflow_ctx_autolog.reporting.sums import dollars
from mlflow_ctx_autolog.reporting.text import html_table, percent, plain, seconds, table

__all__ = [
    "HEAD",
    "VERDICTS",
    "by_part",
    "comparison_headline",
    "comparison_lines",
    "comparison_tables",
    "difference_cells",
    "difference_text",
    "growth_text",
    "job_lines",
    "news_lines",
    "number_text",
    "one_in",
]

Row = Mapping[str, Any]

HEAD = ["", "before", "after", "change", "verdict"]
_NEWS = {"functions": "function", "models": "model", "prompts": "prompt shaped"}
_SHOWN = 10
VERDICTS = {
    "changed": "more than chance",
    "small": "too small to count",
    "chance": "may be chance",
    "too few": "too few calls",
    "not known": "not known",
    "": "",
}


def comparison_lines(summary: Row) -> list[str]:
    """Return the lines of a comparison, without any character that a terminal would obey.

    Args:
        summary: What ``Comparison.to_dict()`` returned.
    """
    found = [comparison_headline(summary), "", *job_lines(summary)]
    if summary["changed"]:
        found += ["", "What changed"]
        found += [f"  {difference_text(each)}" for each in summary["changed"]]
    found += [f"  {line}" for line in news_lines(summary)]
    for part, rows in by_part(summary).items():
        found += ["", *table([part, *HEAD[1:]], [difference_cells(each) for each in rows])]
    if summary["notes"]:
        found += ["", "Notes", *(f"  {note}" for note in summary["notes"])]
    return [plain(line) for line in found]


def comparison_tables(summary: Row) -> str:
    """Return the comparison as HTML for a notebook, with everything in it escaped.

    Args:
        summary: What ``Comparison.to_dict()`` returned.
    """
    items = [difference_text(each) for each in summary["changed"]] + news_lines(summary)
    listed = "".join(f"<li>{html.escape(item)}</li>" for item in items)
    parts = [
        f"<h4>{html.escape(comparison_headline(summary))}</h4>",
        *(f"<div>{html.escape(line)}</div>" for line in job_lines(summary)),
        f"<ul>{listed}</ul>" if listed else "",
        *(
            html_table([part, *HEAD[1:]], [difference_cells(each) for each in rows])
            for part, rows in by_part(summary).items()
        ),
        *(f"<div><em>{html.escape(note)}</em></div>" for note in summary["notes"]),
    ]
    return "\n".join(part for part in parts if part)


def comparison_headline(summary: Row) -> str:
    """Return in one sentence how much changed."""
    changed, looked_at = len(summary["changed"]), len(_tested(summary))
    if not summary["before"]["calls"] or not summary["after"]["calls"]:
        return "There is nothing to compare: one of the two has no model calls."
    news = sum(len(each) for kind in summary["news"].values() for each in kind.values())
    more = f" {news:,} functions, models or prompts are new or gone." if news else ""
    if not changed:
        return f"No more than chance: none of {looked_at:,} numbers changed enough to count.{more}"
    verb = "number changed" if changed == 1 else "numbers changed"
    return f"{changed:,} of {looked_at:,} {verb} by more than chance.{more}"


def _tested(summary: Row) -> list[Row]:
    return [each for each in summary["differences"] if each["chance"] is not None]


def job_lines(summary: Row) -> list[str]:
    """Return a line on each of the two."""
    found = []
    for name in ("before", "after"):
        job = summary[name]
        traces = ", ".join(job["trace_ids"][:2]) + (" ..." if len(job["trace_ids"]) > 2 else "")
        called = job["jobs"][0]["name"] if len(job["jobs"]) == 1 else f"{len(job['jobs'])} jobs"
        found.append(f"{name + ':':<8}{called} ({traces}): {job['calls']:,} calls, {job['money']}")
    return found


def difference_text(each: Row) -> str:
    """Return a difference as a sentence."""
    part = f" of {each['function']}, {each['model']}" if each["function"] else ""
    before, after = (number_text(each, each[name]) for name in ("before", "after"))
    return (
        f"{each['label']}{part}: {growth_text(each)}, from {before} to {after} "
        f"({one_in(each['chance'])})"
    )


def news_lines(summary: Row) -> list[str]:
    """Return a line for each function, model and prompt that is new, or gone."""
    found = []
    for kind, name in _NEWS.items():
        for word, what in (("new", "new"), ("vanished", "gone")):
            each = summary["news"][kind][word]
            for place, (item, number) in enumerate(each.items()):
                if place == _SHOWN:
                    found.append(f"{what}: {len(each) - _SHOWN:,} more")
                    break
                found.append(f"{what}: {name} {item} ({number:,} calls)")
    return found


def by_part(summary: Row) -> dict[str, list[Row]]:
    """Return the differences of all calls, and of each function and model."""
    found: dict[str, list[Row]] = {}
    for each in summary["differences"]:
        part = f"{each['function']}, {each['model']}" if each["function"] else "all calls"
        found.setdefault(part, []).append(each)
    return found


def difference_cells(each: Row) -> list[str]:
    """Return a difference as a row under :data:`HEAD`."""
    return [
        each["label"],
        number_text(each, each["before"]),
        number_text(each, each["after"]),
        growth_text(each),
        VERDICTS[each["verdict"]],
    ]


def number_text(each: Row, number: float | None) -> str:
    """Return a number of a difference as people write it."""
    if number is None:
        return "not known" if each["unit"] == "$" else "-"
    if each["unit"] == "$":
        return dollars(number)
    if each["unit"] == "s":
        return seconds(number)
    if each["unit"] == "%":
        return percent(number)
    return f"{number:,.0f}" if float(number).is_integer() or number >= 100 else f"{number:,.2f}"


def growth_text(each: Row) -> str:
    """Return a change as people write it: ``+31 %``, or points of a share."""
    change = each["change"]
    if change is None:
        return "-" if each["after"] is None or each["before"] is None else "from nothing"
    if each["kind"] == "share":
        return f"{100 * change:+.2g} points"
    return f"{100 * change:+.0f} %" if abs(change) >= 0.0995 else f"{100 * change:+.1f} %"


def one_in(chance: float | None) -> str:
    """Return how often chance alone would do so, for people."""
    if chance is None:
        return "not tested"
    if chance >= 0.01:
        return f"chance alone: {100 * chance:.0f} in 100 comparisons"
    return "chance alone: less than 1 in 100 comparisons"
