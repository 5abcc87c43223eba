"""A history of jobs for a terminal or a notebook, from its dictionary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from mlflow_ctx_autolog.reporting.sums import dollars
from mlflow_ctx_autolog.reporting.text import html_table, percent, plain, seconds, table

__all__ = ["HEAD", "history_cells", "history_headline", "history_lines", "history_table", "spark"]

Row = Mapping[str, Any]

HEAD = [
    *("started (UTC)", "job", "took", "calls", "errors", "cost", "tokens per row", "p50", "p95"),
    "answers with a signal",
]
_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 60
_LINES = {
    "cost": "cost",
    "tokens per row": "tokens_per_row",
    "p95": "p95",
    "errors": "error_share",
    "answers with a signal": "odd_share",
}


def history_lines(summary: Row) -> list[str]:
    """Return the lines of a history, without any character that a terminal would obey.

    Args:
        summary: What ``History.to_dict()`` returned.
    """
    found = [history_headline(summary)]
    if summary["jobs"]:
        charts = [
            (name, spark([shares(job)[key] for job in summary["jobs"]]))
            for name, key in _LINES.items()
        ]
        width = max(len(name) for name, _ in charts)
        found += ["", *(f"{name:<{width}}  {chart}" for name, chart in charts if chart)]
        found += ["", *table(HEAD, [history_cells(job) for job in summary["jobs"]])]
    found += [""] * bool(summary["notes"]) + [f"  {note}" for note in summary["notes"]]
    return [plain(line) for line in found]


def history_table(summary: Row) -> str:
    """Return the history as HTML for a notebook, with everything in it escaped."""
    rows = [history_cells(job) for job in summary["jobs"]]
    notes = html_table([], [[note] for note in summary["notes"]])
    return f"<h4>{history_headline(summary)}</h4>\n{html_table(HEAD, rows)}\n{notes}"


def history_headline(summary: Row) -> str:
    """Return in one sentence how many jobs there were, and what they cost."""
    jobs = summary["jobs"]
    number = "1 job" if len(jobs) == 1 else f"{len(jobs):,} jobs"
    costs = [job["cost"] for job in jobs if job["cost"] is not None]
    least = "at least " if len(costs) < len(jobs) or any(job["unknown"] for job in jobs) else ""
    money = f", {least}{dollars(sum(costs))}" if costs else ""
    return f"{number}, {sum(job['calls'] for job in jobs):,} calls{money}."


def history_cells(job: Row) -> list[str]:
    """Return a job as a row under :data:`HEAD`."""
    more = shares(job)
    per_row = job["tokens_per_row"]
    return [
        f"{datetime.fromisoformat(job['started']):%Y-%m-%d %H:%M}",
        job["name"] if job["state"] == "OK" else f"{job['name']} ({job['state'].lower()})",
        "-" if job["seconds"] is None else seconds(job["seconds"]),
        f"{job['calls']:,}",
        "-" if more["error_share"] is None else percent(more["error_share"]),
        "-" if job["cost"] is None else dollars(job["cost"]),
        "-" if per_row is None else f"{per_row:,.0f}",
        *("-" if job[name] is None else seconds(job[name]) for name in ("p50", "p95")),
        "-" if more["odd_share"] is None else percent(more["odd_share"]),
    ]


def shares(job: Row) -> dict[str, float | None]:
    """Return the numbers of a job that are drawn over time."""
    return {
        "cost": job["cost"],
        "tokens_per_row": job["tokens_per_row"],
        "p95": job["p95"],
        "error_share": (
            job["errors"] / job["calls"] if job["errors"] is not None and job["calls"] else None
        ),
        "odd_share": job["odd"] / job["answered"] if job["answered"] else None,
    }


def spark(values: Sequence[float | None]) -> str:
    """Return a line of bars from 0 to the highest, the latest last; "" where nothing is known."""
    shown = values[-_WIDTH:]
    most = max((value for value in shown if value is not None), default=None)
    if most is None:
        return ""
    return "".join(
        " " if value is None else _BARS[round(value / most * (len(_BARS) - 1)) if most else 0]
        for value in shown
    )
