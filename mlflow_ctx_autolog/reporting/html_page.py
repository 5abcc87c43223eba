"""A report as one HTML file to look at, from its dictionary and its calls."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib.resources import files
from typing import Any

from mlflow_ctx_autolog.reporting.comparison_text import (
    comparison_headline,
    difference_text,
    news_lines,
)
from mlflow_ctx_autolog.reporting.figures import figures, plotly_script
from mlflow_ctx_autolog.reporting.signals import SIGNALS
from mlflow_ctx_autolog.reporting.sums import at_least
from mlflow_ctx_autolog.reporting.text import headline, percent, seconds

__all__ = ["card", "filled", "page", "rows_table", "script_json"]

Row = Mapping[str, Any]

# Calls in the table at most: an equal part each of the dearest, the slowest, those that failed,
# were repeats, or whose answer shows a signal. Sums have the others.
_LISTED = 1_000
_NOTED = 20


def page(
    summary: Row,
    calls: Sequence[Row],
    tasks: Sequence[Row],
    uri: str | None,
    comparison: Row | None = None,
) -> str:
    """Return the page. Whatever came from outside is escaped.

    Args:
        summary: What ``CallReport.to_dict()`` returned.
        calls: A row for each call.
        tasks: A row for each task attempt.
        uri: The address of MLflow's UI, for links; None where there is none.
        comparison: What ``Comparison.to_dict()`` returned of a job before; None without one.

    Raises:
        ImportError: plotly is missing.
    """
    script = plotly_script()
    matter = _that_matter(calls)
    drawn = figures(summary, calls, tasks, matter) if calls else []
    listed = ""
    if len(matter) < len(calls):
        listed = (
            f"<p class='note'>The {len(matter):,} of {len(calls):,} calls that matter: the "
            "dearest, the slowest, and those that failed, were repeats or whose answer shows a "
            "signal. to_pandas() has all.</p>"
        )
    charts = "\n".join(
        f"<section><h2>{_text(figure.title)}</h2>"
        f"<div id='{figure.name}' class='figure'></div></section>"
        for figure in drawn
    )
    return filled(
        "report.html",
        title=_text(f"{_title(summary)}: {headline(summary)}"),
        name=_text(_title(summary)),
        about=_about(summary, uri),
        headline=_text(headline(summary)),
        cards="\n".join(_cards(summary)) if calls else "",
        changes=_changes(comparison),
        causes=_causes(summary),
        parts=_parts(summary),
        figures=charts,
        note=listed,
        notes=_notes(summary),
        plotly=script,
        data=script_json(
            {
                "figures": {figure.name: figure.drawing for figure in drawn},
                "calls": [_cells(call) for call in matter],
                "causes": {key: cause["name"] for key, cause in summary["causes"].items()},
                "signals": SIGNALS,
                "uri": uri,
            }
        ),
    )


def filled(page_name: str, **parts: str) -> str:
    """Return a page of this directory with its parts filled in, where it says ``{{part}}``."""
    folder = files("mlflow_ctx_autolog.reporting") / "pages"
    shared = {"style": "style.css", "draw": "draw.js"}
    given = {
        **{name: (folder / file).read_text(encoding="utf-8") for name, file in shared.items()},
        **parts,
    }
    # Once through the page itself: what is filled in may say {{part}}, too.
    pieces = re.split(r"\{\{(\w+)\}\}", (folder / page_name).read_text(encoding="utf-8"))
    return "".join(given[piece] if place % 2 else piece for place, piece in enumerate(pieces))


def card(word: str, number: str, below: str, kind: str = "") -> str:
    """Return one of the large numbers of a page."""
    return (
        f"<div class='card {kind}'><div class='word'>{_text(word)}</div><div class='number'>"
        f"{_text(number)}</div><div class='below'>{_text(below)}</div></div>"
    )


def rows_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    kind: str = "rows",
    kinds: Sequence[str] = (),
) -> str:
    """Return a table with everything in it escaped; of kind "rows", it is a list on a phone.

    Args:
        head: The names of the columns.
        rows: What they hold.
        kind: The table's class.
        kinds: The class of each row; none where there are none.
    """
    if not rows:
        return ""
    heads = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr class='{of_row}'>"
        + "".join(
            f"<td data-head='{_text(name)}'>{_text(cell)}</td>"
            for name, cell in zip(head, row, strict=True)
        )
        + "</tr>"
        for row, of_row in zip(rows, kinds or [""] * len(rows), strict=True)
    )
    return f"<table class='{kind}'><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: object) -> str:
    return html.escape(str(value))


def _title(summary: Row) -> str:
    jobs = summary["jobs"]
    return str(jobs[0]["name"]) if len(jobs) == 1 else f"{len(jobs):,} jobs"


def _about(summary: Row, uri: str | None) -> str:
    started = [job["started"] for job in summary["jobs"] if job["started"] is not None]
    parts = []
    if started:
        parts.append(f"{_moment(min(started)):%a %d %b %Y, %H:%M} UTC")
    lasted = [job["seconds"] for job in summary["jobs"] if job["seconds"] is not None]
    if lasted:
        parts.append(f"took {seconds(sum(lasted))}")
    models = list(summary["models"])
    parts.append(", ".join(models[:3]) + (f" and {len(models) - 3} more" if models[3:] else ""))
    links = []
    for job in summary["jobs"][:3]:
        trace_id = _text(job["trace_id"])
        if uri is None:
            links.append(f"<span class='id'>{trace_id}</span>")
        else:
            address = f"{uri}/#/experiments/{job['experiment_id']}/traces?selectedEvaluationId="
            links.append(f"<a class='id' href='{_text(address)}{trace_id}'>{trace_id}</a>")
    if len(summary["jobs"]) > 3:
        links.append(f"and {len(summary['jobs']) - 3:,} more")
    return " &middot; ".join([*(_text(part) for part in parts if part), *links])


def _cards(summary: Row) -> Iterator[str]:
    made, quality, repeated = summary["made"], summary["quality"], summary["repeated"]
    tokens = f"{_short(made['input_tokens'])} tokens in, {_short(made['output_tokens'])} out"
    if made["unmetered"]:
        tokens = f"at least {_short(made['tokens'])} tokens"
    unknown = f"; not known of {made['unknown']:,}" if made["unknown"] else ""
    money = "not known" if made["cost"] is None else made["money"]
    yield card("How much", money, f"{made['calls']:,} calls, {tokens}{unknown}")
    if quality["answered"]:
        good = percent((quality["answered"] - quality["odd"]) / quality["answered"])
        found = [f"{number:,} {SIGNALS[name]}" for name, number in quality["signals"].items()]
        errors = [f"{made['errors']:,} errors"] if made["errors"] else []
        below = ", ".join([*errors, *found[:4]]) or "nothing odd, and no errors"
        yield card("How good", good, f"of answers show nothing odd: {below}")
    else:
        below = f"{made['errors']:,} errors; no answer says how good it is"
        yield card("How good", "not known", below)
    latency, first = summary["latency"], summary["time_to_first_token"]
    if latency:
        more = f"p95 {seconds(latency['p95'])}, p99 {seconds(latency['p99'])}"
        token = f"; first token {seconds(first['p50'])}" if first else ""
        yield card("How fast", seconds(latency["p50"]), f"the middle call; {more}{token}")
    else:
        yield card("How fast", "not known", "no call has ended")
    share = percent(summary["repeats"] / summary["requests"]) if summary["requests"] else "0 %"
    if not summary["repeats"]:
        yield card("Wasted", "$0", "no request was a repeat", "fine")
    else:
        money = repeated["money"] if repeated["cost"] is not None else share
        below = f"on {summary['repeats']:,} repeats, {share} of all requests"
        yield card("Wasted", money, below, "warn")


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 10 * size or (number >= size and size > 1e3):
            return f"{number / size:.1f}{letter}"
    return f"{number:,.0f}"


def _changes(comparison: Row | None) -> str:
    if comparison is None:
        return ""
    items = [difference_text(each) for each in comparison["changed"]] + news_lines(comparison)
    listed = "".join(f"<li>{_text(item)}</li>" for item in items[:_NOTED])
    return (
        f"<section><h2>What changed</h2><p>{_text(comparison_headline(comparison))}</p>"
        f"<ul class='changes'>{listed}</ul></section>"
    )


def _causes(summary: Row) -> str:
    rows = [
        [
            cause["name"],
            f"{cause['requests']:,}",
            f"{cause['tokens']:,}",
            cause["money"],
            cause["fix"],
        ]
        for cause in summary["causes"].values()
    ]
    if not rows:
        return ""
    table = rows_table(["repeats", "requests", "tokens", "cost", "what to do"], rows, "rows causes")
    return f"<section><h2>Why there were repeats, and what to do</h2>{table}</section>"


def _parts(summary: Row) -> str:
    head = ["calls", "repeats", "errors", "tokens", "cost", "answers with a signal"]
    found = []
    for title, name in (("By model", "models"), ("By function", "functions")):
        rows = [
            [
                each,
                f"{sums['calls']:,}",
                f"{sums['repeats']:,}",
                f"{sums['errors']:,}",
                f"{sums['tokens']:,}",
                sums["money"],
                _signals(sums["quality"]),
            ]
            for each, sums in summary[name].items()
        ]
        table = rows_table([name.removesuffix("s"), *head], rows)
        # One function of one model is told once.
        if rows and (len(rows) > 1 or name == "models"):
            found.append(f"<section><h2>{title}</h2>{table}</section>")
    return "\n".join(found)


def _signals(quality: Row) -> str:
    if not quality["answered"]:
        return "-"
    if not quality["odd"]:
        return "none"
    found = [
        f"{SIGNALS[name]} {percent(quality['shares'][name])}" for name in list(quality["signals"])
    ]
    return ", ".join(found)


def _notes(summary: Row) -> str:
    notes = summary["notes"]
    if not notes:
        return ""
    more = [f"and {len(notes) - _NOTED:,} more; to_dict() has all"] if notes[_NOTED:] else []
    listed = "".join(f"<li>{_text(note)}</li>" for note in [*notes[:_NOTED], *more])
    return f"<section><h2>What limits this</h2><ul>{listed}</ul></section>"


def script_json(value: Any) -> str:
    """Return JSON that ends no script element, whatever it holds."""
    text = json.dumps(value, separators=(",", ":"), default=str)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _that_matter(calls: Sequence[Row]) -> Sequence[Row]:
    """Return the calls that matter, in the order of their time."""
    if len(calls) <= _LISTED:
        return calls
    dearest = sorted(calls, key=lambda call: (-(call["cost"] or 0), -(call["input_tokens"] or 0)))
    slowest = sorted(calls, key=lambda call: -(call["seconds"] or 0))
    groups = [
        dearest,
        slowest,
        [call for call in dearest if call["error"]],
        [call for call in dearest if call["cause"] or call["resends"]],
        [call for call in slowest if call["signals"]],
    ]
    kept: dict[int, Row] = {}
    place = 0
    while len(kept) < _LISTED:
        # A call of each group in turn, so that none crowds the others out.
        for group in groups:
            if place < len(group) and len(kept) < _LISTED:
                kept[id(group[place])] = group[place]
        place += 1
    return sorted(kept.values(), key=lambda call: call["started"])


def _cells(call: Row) -> list[Any]:
    keys = " ".join(
        f"{name.removeprefix('annotation.')}={value}"
        for name, value in call.items()
        if name.startswith("annotation.")
    )
    place = "driver" if call["task"] is None else f"{call['stage']} / {call['partition']}"
    attempt = f", attempt {call['attempt']}" if call["attempt"] else ""
    return [
        f"{_moment(call['started']):%H:%M:%S.%f}"[:-3],
        call["function"],
        call["model"] or "",
        place + attempt,
        None if call["seconds"] is None else round(call["seconds"], 3),
        int(call["tokens"]),
        call["cost"],
        "" if call["cost"] is None else at_least(call["cost"], call["usage_unknown"]),
        call["cause"] or ("client_retry" if call["resends"] else ""),
        call["signals"],
        call["error"] or "",
        keys,
        call["prompt"],
        call["answer"],
        call["trace_id"],
        call["span_id"],
        call["experiment_id"],
    ]


def _moment(nanoseconds: int) -> datetime:
    return datetime.fromtimestamp(nanoseconds / 1e9, tz=timezone.utc)
