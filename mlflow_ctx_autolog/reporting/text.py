"""A report for a terminal or a notebook, from its dictionary."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlflow_ctx_autolog.reporting.signals import SIGNALS

__all__ = [
    "answers_line",
    "cost_line",
    "headline",
    "html_table",
    "lines",
    "percent",
    "plain",
    "seconds",
    "table",
    "tables",
    "timing",
    "wasted_line",
]

_HEAVIEST = 5
_PROMPT = 48
_AMOUNTS = ["calls", "requests", "tokens", "cost"]
# What a terminal would obey rather than show, and what turns the direction of a line.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def plain(text: object) -> str:
    """Return a text as one line that a terminal shows and does not obey."""
    return _CONTROL.sub(" ", str(text))


def lines(summary: Mapping[str, Any]) -> list[str]:
    """Return the lines of a report, without any character that a terminal would obey.

    Args:
        summary: What ``CallReport.to_dict()`` returned.
    """
    return [plain(line) for line in _lines(summary)]


def _lines(summary: Mapping[str, Any]) -> list[str]:
    found = [headline(summary), ""]
    if not summary["calls"]:
        return found[:1] + _notes(summary)
    found += [f"  {name:<9}{text}" for name, text in _first_things(summary)]
    found += ["", *table(["", *_AMOUNTS], _usefulness(summary))]
    if summary["causes"]:
        found += ["", "Why there were repeats"]
        for cause in summary["causes"].values():
            amounts = f"{cause['tokens']:,} tokens, {cause['money']}"
            found.append(f"  {cause['requests']:,} {cause['name']}: {amounts}")
            found.append(f"      Fix: {cause['fix']}")
    found += ["", *timing(summary)]
    for title in ("functions", "models", "stages"):
        rows = [[name, *_amounts(sums), *_odd(sums)] for name, sums in summary[title].items()]
        if len(rows) > 1:
            head = [title, *_AMOUNTS, *([] if title == "stages" else ["answers with a signal"])]
            found += ["", *table(head, rows[: 2 * _HEAVIEST])]
    partitions = list(summary["partitions"].items())[:_HEAVIEST]
    if len(partitions) > 1:
        rows = [[name, *_amounts(sums)] for name, sums in partitions]
        found += ["", *table(["heaviest partitions", *_AMOUNTS], rows)]
    found += ["", "Slowest calls"]
    found += [f"  {_call(call)}" for call in summary["slowest"][:_HEAVIEST]]
    found += ["", "Dearest calls"]
    found += [f"  {_call(call)}" for call in summary["dearest"][:_HEAVIEST]]
    return found + _notes(summary)


def _notes(summary: Mapping[str, Any]) -> list[str]:
    notes = [f"  {note}" for note in summary["notes"]]
    return ["", "Notes", *notes] if notes else []


def _first_things(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return how much, how good, how fast, and what was wasted: a word and a line for each."""
    made = summary["made"]
    tokens = f"{made['input_tokens']:,} tokens in, {made['output_tokens']:,} out"
    if made["unmetered"]:
        tokens = f"at least {made['tokens']:,} tokens"
    return [
        ("Cost", f"{cost_line(made)}; {tokens}"),
        ("Answers", answers_line(summary["quality"])),
        ("Speed", _speed_line(summary)),
        ("Wasted", wasted_line(summary)),
    ]


def cost_line(sums: Mapping[str, Any]) -> str:
    """Return what was paid, and of how many calls that is not known."""
    if not sums["unknown"]:
        return str(sums["money"])
    money = "not known" if sums["cost"] is None else sums["money"]
    return f"{money} (that of {sums['unknown']:,} of {sums['calls']:,} calls is not known)"


def answers_line(quality: Mapping[str, Any]) -> str:
    """Return how many answers show a signal, and which."""
    if not quality["answered"]:
        return "none that says how good it is"
    counted = ", ".join(
        f"{number:,} {SIGNALS.get(signal, signal)}" for signal, number in quality["signals"].items()
    )
    good = quality["answered"] - quality["odd"]
    share = percent(good / quality["answered"])
    return f"{share} of {quality['answered']:,} show nothing odd{'; ' + counted if counted else ''}"


def _speed_line(summary: Mapping[str, Any]) -> str:
    latency = summary["latency"]
    if not latency:
        return "no call has ended"
    return ", ".join(f"{name} {seconds(value)}" for name, value in latency.items())


def wasted_line(summary: Mapping[str, Any]) -> str:
    """Return what repeats have cost."""
    repeated = summary["repeated"]
    if not summary["repeats"]:
        return "nothing: no request was a repeat"
    share = percent(summary["repeats"] / summary["requests"])
    tokens = f"{repeated['tokens']:,} tokens"
    money = f"{repeated['money']}, {tokens}" if repeated["cost"] is not None else tokens
    return f"{money} on {summary['repeats']:,} repeats, {share} of all requests"


def _usefulness(summary: Mapping[str, Any]) -> list[list[str]]:
    rows = [["useful", *_amounts(summary["useful"])], ["repeats", *_amounts(summary["repeated"])]]
    if reused := summary["made"]["reused"]:
        rows.append(["used again", f"{reused:,}", "0", "0", "$0"])
    return [*rows, ["all", *_amounts(summary["made"])]]


def tables(summary: Mapping[str, Any]) -> str:
    """Return the report as HTML for a notebook, with everything in it escaped.

    Args:
        summary: What ``CallReport.to_dict()`` returned.
    """
    causes = [
        [cause["name"], f"{cause['requests']:,}", *_amounts(cause)[2:], cause["fix"]]
        for cause in summary["causes"].values()
    ]
    partitions = [[name, *_amounts(sums)] for name, sums in summary["partitions"].items()]
    first = _first_things(summary) if summary["calls"] else []
    parts = [
        f"<h4>{_text(headline(summary))}</h4>",
        html_table([], [[name, text] for name, text in first]),
        html_table(["", *_AMOUNTS], _usefulness(summary)) if summary["calls"] else "",
        html_table(["Why there were repeats", "repeats", "tokens", "cost", "fix"], causes),
        *(f"<div>{_text(line)}</div>" for line in timing(summary)),
        *(_parts_table(summary, title) for title in ("functions", "models")),
        html_table(["Heaviest partitions", *_AMOUNTS], partitions[:_HEAVIEST]),
        *(f"<div><em>{_text(note)}</em></div>" for note in summary["notes"]),
    ]
    return "\n".join(part for part in parts if part)


def _parts_table(summary: Mapping[str, Any], title: str) -> str:
    rows = [[name, *_amounts(sums), *_odd(sums)] for name, sums in summary[title].items()]
    return html_table([title, *_AMOUNTS, "answers with a signal"], rows) if len(rows) > 1 else ""


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table with everything in it escaped; "" where it has no rows."""
    if not rows:
        return ""
    cells = [
        "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in [("th", head), *(("td", row) for row in rows)]
        if row
    ]
    return f"<table>{''.join(cells)}</table>"


def _text(value: object) -> str:
    return html.escape(str(value))


def headline(summary: Mapping[str, Any]) -> str:
    """Return in one sentence how many calls and requests were made, and how many were repeats."""
    calls, requests, repeats = summary["calls"], summary["requests"], summary["repeats"]
    if not calls:
        return "No model calls."
    said = f"{_number(calls, 'call')} made {_number(requests, 'request')}"
    if not repeats:
        return f"{said}, and none was a repeat."
    were = "was a repeat" if repeats == 1 else "were repeats"
    times = f"{summary['multiplier']:.2f} for each of {summary['distinct']:,} distinct"
    return f"{said}, of which {repeats:,} {were}: {times}."


def _number(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def timing(summary: Mapping[str, Any]) -> list[str]:
    """Return lines on the first token, errors, and how many calls were under way at a time."""
    found = []
    if first := summary["time_to_first_token"]:
        shown = ", ".join(f"{each} {seconds(value)}" for each, value in first.items())
        found.append(f"Time to first token: {shown}")
    if summary["errors"]:
        shown = ", ".join(f"{number:,} {kind}" for kind, number in summary["errors"].items())
        found.append(f"Errors: {shown}")
    if at_a_time := [number for _, number in summary["concurrency"]]:
        mean = sum(at_a_time) / len(at_a_time)
        found.append(f"Calls at a time: {mean:.1f} on average, {max(at_a_time):.1f} at most")
    return found


def percent(share: float) -> str:
    """Return a share as a text: ``98.2 %``, and more digits where it is small."""
    number = 100 * share
    if number in (0.0, 100.0) or 0.95 <= number < 99.95:
        return f"{number:.1f}".removesuffix(".0") + " %"
    return "> 99.9 %" if number > 50 else f"{number:.2g} %"


def seconds(value: float | None) -> str:
    """Return a duration as a text."""
    if value is None:
        return "not ended"
    if value >= 3600:
        return f"{value // 3600:.0f} h {value % 3600 / 60:.0f} min"
    if value >= 100:
        return f"{value // 60:.0f} min {value % 60:.0f} s"
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
    numbers = [f"{sums[name]:,}" for name in ("calls", "requests", "tokens")]
    return [*numbers, sums["money"]]


def _odd(sums: Mapping[str, Any]) -> list[str]:
    quality = sums.get("quality")
    if quality is None:
        return []
    if not quality["answered"]:
        return ["-"]
    return [f"{quality['odd']:,} ({percent(quality['odd'] / quality['answered'])})"]


def _call(call: Mapping[str, Any]) -> str:
    more = "+" if call["usage_unknown"] else ""
    prompt = " ".join(call["prompt"].split())
    shown = prompt if len(prompt) <= _PROMPT else f"{prompt[: _PROMPT - 3]}..."
    return (
        f"{seconds(call['seconds']):>9}  {call['tokens']:>7,.0f}{more} tokens  "
        f"{call['function']}, partition {call['partition']}  {call['span_id']}  {shown}".rstrip()
    )
