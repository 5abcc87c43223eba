"""A report for a terminal or a notebook, from its dictionary."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["headline", "lines", "tables", "timing"]

_HEAVIEST = 5
_PROMPT = 48


def lines(summary: Mapping[str, Any]) -> list[str]:
    """Return the lines of a report.

    Args:
        summary: What ``CallReport.to_dict()`` returned.
    """
    found = [headline(summary), ""]
    found += table(
        ["", "calls", "tokens", "cost"],
        [[name, *_amounts(summary[name])] for name in ("useful", "repeated")],
    )
    if summary["causes"]:
        found += ["", "Why requests were made again"]
        for cause in summary["causes"].values():
            amounts = f"{cause['tokens']:,} tokens, {cause['money']}"
            found.append(f"  {cause['requests']:,} {cause['name']}: {amounts}")
            found.append(f"      Fix: {cause['fix']}")
    found += ["", *timing(summary)]
    if len(summary["functions"]) > 1 or len(summary["stages"]) > 1:
        for title in ("functions", "stages"):
            rows = [[name, *_amounts(sums)] for name, sums in summary[title].items()]
            found += ["", *table([title, "calls", "tokens", "cost"], rows[: 2 * _HEAVIEST])]
    partitions = list(summary["partitions"].items())[:_HEAVIEST]
    if partitions:
        rows = [[name, *_amounts(sums)] for name, sums in partitions]
        found += ["", *table(["heaviest partitions", "calls", "tokens", "cost"], rows)]
    if summary["slowest"]:
        found += ["", "Slowest calls"]
        found += [f"  {_call(call)}" for call in summary["slowest"][:_HEAVIEST]]
        found += ["", "Dearest calls"]
        found += [f"  {_call(call)}" for call in summary["dearest"][:_HEAVIEST]]
    if summary["notes"]:
        found += ["", "Notes", *(f"  {note}" for note in summary["notes"])]
    return found


def tables(summary: Mapping[str, Any]) -> str:
    """Return the report as HTML for a notebook, with everything in it escaped.

    Args:
        summary: What ``CallReport.to_dict()`` returned.
    """
    causes = [
        [
            cause["name"],
            f"{cause['requests']:,}",
            *_amounts(cause)[1:],
            cause["fix"],
        ]
        for cause in summary["causes"].values()
    ]
    partitions = [[name, *_amounts(sums)] for name, sums in summary["partitions"].items()]
    amounts = ["calls", "tokens", "cost"]
    parts = [
        f"<h4>{_text(headline(summary))}</h4>",
        _html(
            ["", *amounts], [[name, *_amounts(summary[name])] for name in ("useful", "repeated")]
        ),
        _html(["Why requests were made again", *amounts, "fix"], causes),
        *(f"<div>{_text(line)}</div>" for line in timing(summary)),
        _html(["Heaviest partitions", *amounts], partitions[:_HEAVIEST]),
        *(f"<div><em>{_text(note)}</em></div>" for note in summary["notes"]),
    ]
    return "\n".join(part for part in parts if part)


def _html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    cells = [
        "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in [("th", head), *(("td", row) for row in rows)]
    ]
    return f"<table>{''.join(cells)}</table>"


def _text(value: object) -> str:
    return html.escape(str(value))


def headline(summary: Mapping[str, Any]) -> str:
    """Return in one sentence how many calls were made, and how many times too many."""
    calls, distinct = summary["calls"], summary["distinct"]
    if not calls:
        return "No model calls."
    if calls == distinct:
        return f"{calls:,} calls made, and none of them twice."
    times = summary["multiplier"]
    return f"{calls:,} calls made for {distinct:,} distinct requests: {times:.2f} for each."


def timing(summary: Mapping[str, Any]) -> list[str]:
    """Return lines on latency, errors, and how many calls were under way at a time."""
    found = []
    for name, key in (("Latency", "latency"), ("Time to first token", "time_to_first_token")):
        if summary[key]:
            shown = ", ".join(f"{each} {seconds(value)}" for each, value in summary[key].items())
            found.append(f"{name}: {shown}")
    if summary["errors"]:
        shown = ", ".join(f"{number:,} {kind}" for kind, number in summary["errors"].items())
        found.append(f"Errors: {shown}")
    if at_a_time := [number for _, number in summary["concurrency"]]:
        mean = sum(at_a_time) / len(at_a_time)
        found.append(f"Calls at a time: {mean:.1f} on average, {max(at_a_time):.1f} at most")
    return found


def seconds(value: float | None) -> str:
    """Return a duration as a text."""
    if value is None:
        return "not ended"
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 1 else f"{value:.3f} s"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return lines with columns of equal width; numbers to the right."""
    cells = [list(head), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in cells
    ]


def _amounts(sums: Mapping[str, Any]) -> list[str]:
    return [f"{sums['calls']:,}", f"{sums['tokens']:,}", sums["money"]]


def _call(call: Mapping[str, Any]) -> str:
    tokens = (call["input_tokens"] or 0) + (call["output_tokens"] or 0)
    prompt = " ".join(call["prompt"].split())
    shown = prompt if len(prompt) <= _PROMPT else f"{prompt[: _PROMPT - 3]}..."
    return (
        f"{seconds(call['seconds']):>9}  {tokens:>7,.0f} tokens  {call['function']}, partition "
        f"{call['partition']}  {call['span_id']}  {shown}".rstrip()
    )
