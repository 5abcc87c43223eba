"""A history of jobs as one HTML file to look at, from its dictionary."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from mlflow_ctx_autolog.reporting.figures import figures_over_time, plotly_script
from mlflow_ctx_autolog.reporting.history_text import HEAD, history_cells, history_headline, shares
from mlflow_ctx_autolog.reporting.html_page import filled, rows_table, script_json

__all__ = ["history_page"]

# How each number over time is called, and in what it is counted.
_DRAWN = {
    "cost": ("Cost of each job", "$"),
    "tokens_per_row": ("Tokens for each row", ""),
    "p95": ("Seconds that 95 of 100 calls did not exceed", ""),
    "error_share": ("Share of calls that failed", "%"),
    "odd_share": ("Share of answers with a signal", "%"),
}


def history_page(summary: Mapping[str, Any]) -> str:
    """Return the page. Whatever came from outside is escaped.

    Args:
        summary: What ``History.to_dict()`` returned.

    Raises:
        ImportError: plotly is missing.
    """
    script = plotly_script()
    jobs = summary["jobs"]
    numbers = [shares(job) for job in jobs]
    names: dict[str, list[int]] = {}
    for place, job in enumerate(jobs):
        names.setdefault(job["name"], []).append(place)
    drawn = figures_over_time(
        {
            key: (title, unit, [number[key] for number in numbers])
            for key, (title, unit) in _DRAWN.items()
        },
        [job["started"] for job in jobs],
        names,
    )
    charts = "\n".join(
        f"<section><h2>{html.escape(figure.title)}</h2>"
        f"<div id='{figure.name}' class='figure'></div></section>"
        for figure in drawn
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in summary["notes"])
    headline = history_headline(summary)
    return filled(
        "history.html",
        title=html.escape(headline),
        headline=html.escape(headline),
        figures=charts,
        table=rows_table(HEAD, [history_cells(job) for job in reversed(jobs)]),
        notes=f"<section><h2>What limits this</h2><ul>{notes}</ul></section>" if notes else "",
        plotly=script,
        data=script_json({"figures": {each.name: each.drawing for each in drawn}}),
    )
