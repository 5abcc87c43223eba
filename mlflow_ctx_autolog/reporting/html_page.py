"""A report as one HTML file to look at, from its dictionary and its calls."""

from __future__ import annotations

import html
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from mlflow_ctx_autolog.reporting.text import headline, seconds, tables

__all__ = ["page"]

Row = Mapping[str, Any]

# For those who do not see all colours, too (Okabe and Ito), legible on light and dark.
_COLOURS = {
    "": "#0072B2",
    "another_action": "#D55E00",
    "plan_twice": "#E69F00",
    "udf_duplicated": "#B8860B",
    "lost_cache": "#8C564B",
    "task_retry": "#CC79A7",
    "stage_retry": "#9467BD",
    "speculative_copy": "#009E73",
    "duplicate_row": "#56B4E9",
    "client_retry": "#7F7F7F",
    "unknown": "#999999",
}
# Calls in the table at most: the repeats, the failed and the slowest before others. It keeps the
# file small enough for any browser.
_LISTED = 4_000
_PARTITIONS = 30
# Calls that are drawn with a text of their own when the mouse is over them.
_LABELLED = 5_000


def page(summary: Row, calls: Sequence[Row], tasks: Sequence[Row], uri: str | None) -> str:
    """Return the page. Whatever came from outside is escaped.

    Args:
        summary: What ``CallReport.to_dict()`` returned.
        calls: A row for each call.
        tasks: A row for each task attempt.
        uri: The address of MLflow's UI, for links; None where there is none.

    Raises:
        ImportError: plotly is missing.
    """
    try:
        import plotly.graph_objects as graphs
        import plotly.offline as offline
    except ImportError as error:
        raise ImportError(
            f"The HTML report is drawn with plotly, which cannot be imported ({error}); "
            "pip install 'mlflow-ctx-autolog[report]'. print(report) and to_dict() do without."
        ) from error
    names = {key: cause["name"] for key, cause in summary["causes"].items()}
    figures = [
        ("Tasks and calls over time", "timeline", _timeline(graphs, calls, tasks, names)),
        ("Calls at a time", "concurrency", _concurrency(graphs, summary)),
        ("Paid for", "causes", _by_cause(graphs, summary)),
        ("Heaviest partitions", "partitions", _heaviest(graphs, calls, names)),
    ]
    parts = [
        f"<section><h2>{title}</h2><div id='{name}' class='figure'></div></section>"
        for title, name, figure in figures
        if figure is not None
    ]
    drawn = {name: json.loads(figure.to_json()) for _, name, figure in figures if figure}
    listed = _listed(calls)
    note = ""
    if len(listed) < len(calls):
        note = (
            f"<p>The table has {len(listed):,} of {len(calls):,} calls: those that were repeats or "
            "failed, and the slowest. to_pandas() has all.</p>"
        )
    return _PAGE.format(
        title=html.escape(headline(summary)),
        traces=html.escape(", ".join(summary["trace_ids"][:3])),
        summary=tables(summary),
        figures="\n".join(parts),
        note=note,
        plotly=offline.get_plotlyjs(),
        data=_script_json(
            {
                "figures": drawn,
                "calls": [_cells(call) for call in listed],
                "names": names,
                "uri": uri,
            }
        ),
    )


def _script_json(value: Any) -> str:
    """Return JSON that ends no script element, whatever it holds."""
    text = json.dumps(value, separators=(",", ":"), default=str)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _listed(calls: Sequence[Row]) -> Sequence[Row]:
    if len(calls) <= _LISTED:
        return calls

    def rank(call: Row) -> tuple[bool, bool, float]:
        return call["cause"] is None, call["error"] is None, -(call["seconds"] or 0)

    return sorted(sorted(calls, key=rank)[:_LISTED], key=lambda call: call["started"])


def _cells(call: Row) -> list[Any]:
    keys = " ".join(
        f"{name.removeprefix('annotation.')}={value}"
        for name, value in call.items()
        if name.startswith("annotation.")
    )
    return [
        _moment(call["started"]).strftime("%H:%M:%S.%f")[:-3],
        call["function"],
        call["stage"],
        call["partition"],
        call["attempt"],
        None if call["seconds"] is None else round(call["seconds"], 3),
        (call["input_tokens"] or 0) + (call["output_tokens"] or 0),
        call["cost"],
        call["cause"] or "",
        call["error"] or "",
        keys,
        call["prompt"],
        call["trace_id"],
        call["span_id"],
        call["experiment_id"],
    ]


def _moment(nanoseconds: int) -> datetime:
    return datetime.fromtimestamp(nanoseconds / 1e9, tz=timezone.utc)


def _timeline(graphs: Any, calls: Sequence[Row], tasks: Sequence[Row], names: Any) -> Any:
    """Draw each worker as a lane, its tasks as bars and its calls as lines on them."""
    if not calls:
        return None
    start = min(row["started"] for row in [*calls, *tasks])
    by_id = {task["span_id"]: task for task in tasks}
    lanes = _lanes(tasks)
    figure = graphs.Figure()
    figure.add_trace(
        graphs.Bar(
            name="task attempt",
            orientation="h",
            base=[_offset(task["started"], start) for task in tasks],
            x=[max(0.001, _offset(task["ended"], task["started"])) for task in tasks],
            y=[lanes[task["span_id"]] for task in tasks],
            width=0.8,
            marker={"color": "rgba(128,128,128,.25)", "line": {"width": 1, "color": "#888"}},
            text=[_task(task) for task in tasks],
            textposition="none",
            hovertemplate="%{text}<extra></extra>",
        )
    )
    groups: defaultdict[str, list[Row]] = defaultdict(list)
    for call in calls:
        groups[call["cause"] or ""].append(call)
    driver_lane = -1
    for key in sorted(groups):
        xs: list[float | None] = []
        ys: list[float | None] = []
        texts: list[str] = []
        for call in groups[key]:
            lane = lanes[call["task"]] if call["task"] in by_id else driver_lane
            began = _offset(call["started"], start)
            over = began if call["seconds"] is None else began + call["seconds"]
            xs += [round(began, 3), round(over, 3), None]
            ys += [lane, lane, None]
            if len(calls) <= _LABELLED:
                texts += [_label(call), _label(call), ""]
        figure.add_trace(
            graphs.Scattergl(
                name="useful" if not key else names.get(key, key),
                x=xs,
                y=ys,
                mode="lines",
                line={"color": _COLOURS.get(key, "#999999"), "width": 6},
                text=texts or None,
                hovertemplate="%{text}<extra></extra>" if texts else "%{x} s<extra></extra>",
            )
        )
    labels = _lane_labels(tasks, lanes)
    if any(call["task"] not in by_id for call in calls):
        labels[driver_lane] = "driver"
    figure.update_layout(
        height=min(900, 190 + 26 * len(labels)),
        xaxis={"title": {"text": "seconds since the first task"}},
        yaxis={
            "tickvals": list(labels),
            "ticktext": list(labels.values()),
            "autorange": "reversed",
        },
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )
    return figure


def _lanes(tasks: Sequence[Row]) -> dict[str, int]:
    """Return a lane for each task: that of its worker, or one beside it while that is taken."""
    ends: dict[tuple[Any, Any, int], int] = {}
    places: dict[str, tuple[Any, Any, int]] = {}
    for task in sorted(tasks, key=lambda each: each["started"]):
        number = 0
        while ends.get((task["host"], task["process"], number), 0) > task["started"]:
            number += 1
        place = (task["host"], task["process"], number)
        ends[place] = max(task["ended"], ends.get(place, 0))
        places[task["span_id"]] = place
    order = {place: lane for lane, place in enumerate(sorted(set(places.values()), key=str))}
    return {span_id: order[place] for span_id, place in places.items()}


def _lane_labels(tasks: Sequence[Row], lanes: Mapping[str, int]) -> dict[int, str]:
    return {lanes[task["span_id"]]: f"{task['host']} {task['process']}" for task in tasks}


def _offset(moment: int, start: int) -> float:
    return round((moment - start) / 1e9, 3)


def _task(task: Row) -> str:
    return html.escape(
        f"{task['function']}: stage {task['stage']}, partition {task['partition']}, attempt "
        f"{task['attempt']}, {task['outcome']}"
    )


def _label(call: Row) -> str:
    took, prompt = seconds(call["seconds"]), call["prompt"][:60]
    return html.escape(f"{took}, stage {call['stage']}, partition {call['partition']}: {prompt}")


def _concurrency(graphs: Any, summary: Row) -> Any:
    moments = summary["concurrency"]
    if not moments:
        return None
    figure = graphs.Figure(
        graphs.Scatter(
            x=[round(moment, 3) for moment, _ in moments],
            y=[round(number, 2) for _, number in moments],
            line={"shape": "hv", "color": _COLOURS[""]},
            fill="tozeroy",
        )
    )
    figure.update_layout(height=220, xaxis={"title": {"text": "seconds since the first call"}})
    return figure


def _by_cause(graphs: Any, summary: Row) -> Any:
    rows = [("useful", "", summary["useful"])]
    rows += [(cause["name"], key, cause) for key, cause in summary["causes"].items()]
    unit = "cost" if summary["made"]["cost"] else "tokens"
    figure = graphs.Figure(
        graphs.Bar(
            orientation="h",
            y=[_wrapped(name) for name, _, _ in rows],
            x=[sums[unit] or 0 for _, _, sums in rows],
            marker={"color": [_COLOURS.get(key, "#999999") for _, key, _ in rows]},
            text=[f"{sums['requests']:,} requests, {sums['money']}" for *_, sums in rows],
            textposition="auto",
        )
    )
    title = "US dollars" if unit == "cost" else "tokens"
    figure.update_layout(
        height=140 + 44 * len(rows),
        xaxis={"title": {"text": title}},
        yaxis={"autorange": "reversed", "automargin": True},
    )
    return figure


def _wrapped(name: str) -> str:
    return html.escape(name).replace(": ", ":<br>")


def _heaviest(graphs: Any, calls: Sequence[Row], names: Any) -> Any:
    """Draw the tokens of the heaviest partitions, by cause."""
    totals: defaultdict[str, int] = defaultdict(int)
    parts: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    for call in calls:
        if call["task"] is not None:
            place = f"stage {call['stage']} partition {call['partition']}"
            tokens = (call["input_tokens"] or 0) + (call["output_tokens"] or 0)
            totals[place] += tokens
            parts[call["cause"] or ""][place] += tokens
    if not totals:
        return None
    heaviest = sorted(totals, key=lambda place: -totals[place])[:_PARTITIONS]
    figure = graphs.Figure(
        [
            graphs.Bar(
                name="useful" if not key else names.get(key, key),
                x=heaviest,
                y=[parts[key].get(place, 0) for place in heaviest],
                marker={"color": _COLOURS.get(key, "#999999")},
            )
            for key in sorted(parts)
        ]
    )
    figure.update_layout(
        barmode="stack",
        height=360,
        yaxis={"title": {"text": "tokens"}},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )
    return figure


# Text is put into the table as text, never as HTML.
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d5d9de;
  --soft: #f3f5f7 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e4e8ec; --paper: #14181d; --line: #39414b; --soft: #1f252c }}
}}
body {{ font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1240px; margin: 24px auto; padding: 0 20px }}
h2 {{ font-size: 18px; margin: 32px 0 4px }} h4 {{ font-size: 22px; margin: 0 0 12px }}
table {{ border-collapse: collapse; margin: 8px 0 16px; font-variant-numeric: tabular-nums }}
th, td {{ border-bottom: 1px solid var(--line); padding: 4px 12px 4px 0; text-align: left;
  vertical-align: top }}
#calls {{ width: 100%; font-size: 13px }} #calls th {{ cursor: pointer; background: var(--soft) }}
#calls td:nth-child(12) {{ max-width: 320px; overflow-wrap: anywhere }}
input, select, button {{ font: inherit; color: inherit; background: var(--soft); padding: 5px 9px;
  border: 1px solid var(--line); border-radius: 5px; margin-right: 8px }}
input {{ width: 320px }} a {{ color: #3d8bd4 }} .scroll {{ overflow-x: auto }}
small {{ opacity: .7; overflow-wrap: anywhere }}
</style></head><body>
<small>{traces}</small>
{summary}
{figures}
<section><h2>Calls</h2>{note}
<p><input id="search" placeholder="search prompts, keys, errors, ids"><select id="cause"></select>
<button id="back">&larr;</button><button id="on">&rarr;</button> <span id="shown"></span></p>
<div class="scroll"><table id="calls"><thead></thead><tbody></tbody></table></div></section>
<script>{plotly}</script>
<script type="application/json" id="data">{data}</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
function draw() {{
  const ink = dark.matches ? "#e4e8ec" : "#1b1f24", line = dark.matches ? "#39414b" : "#d5d9de";
  for (const [name, figure] of Object.entries(data.figures)) {{
    const axis = {{ gridcolor: line, zerolinecolor: line }};
    const given = figure.layout;
    const layout = {{ ...given, template: undefined, paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)", font: {{ color: ink }},
      margin: {{ l: 60, r: 20, t: 30, b: 45, autoexpand: true }},
      xaxis: {{ ...axis, automargin: true, ...given.xaxis }},
      yaxis: {{ ...axis, automargin: true, ...given.yaxis }} }};
    Plotly.react(name, figure.data, layout, {{ responsive: true, displayModeBar: false }});
  }}
}}
draw(); dark.addEventListener("change", draw);
const heads = ["time (UTC)", "function", "stage", "partition", "attempt", "seconds", "tokens",
  "cost", "made again by", "error", "keys", "prompt"];
const texts = data.calls.map(call => call.join(" ").toLowerCase());
let order = data.calls.map((_, i) => i), first = 0, by = 0, down = false;
const rows = 50, $ = id => document.getElementById(id);
$("cause").append(new Option("all calls", "*"), new Option("first of their kind", ""));
for (const [key, name] of Object.entries(data.names)) $("cause").append(new Option(name, key));
const head = document.querySelector("#calls thead").insertRow();
heads.forEach((name, i) => {{
  const cell = document.createElement("th"); cell.textContent = name;
  cell.onclick = () => {{ down = by === i ? !down : i > 4 && i < 8; by = i; select(); }};
  head.append(cell);
}});
function select() {{
  const wanted = $("search").value.toLowerCase(), cause = $("cause").value;
  order = data.calls.map((_, i) => i).filter(i => texts[i].includes(wanted) &&
    (cause === "*" || data.calls[i][8] === cause));
  const sign = down ? -1 : 1;
  if (by || down) order.sort((a, b) => {{
    const one = data.calls[a][by] ?? "", two = data.calls[b][by] ?? "";
    return sign * (one < two ? -1 : one > two ? 1 : 0);
  }});
  first = 0; show();
}}
function show() {{
  const body = document.querySelector("#calls tbody"); body.replaceChildren();
  for (const i of order.slice(first, first + rows)) {{
    const call = data.calls[i], row = body.insertRow();
    heads.forEach((_, column) => {{
      const cell = row.insertCell();
      const value = column === 8 ? data.names[call[8]] ?? call[8] : call[column];
      const text = column === 7 && value != null ? "$" + value.toFixed(6) : value ?? "";
      if (column === 0 && data.uri) {{
        const link = document.createElement("a"); link.textContent = text;
        link.href = data.uri + "/#/experiments/" + encodeURIComponent(call[14]) +
          "/traces?selectedEvaluationId=" + encodeURIComponent(call[12]);
        link.title = call[12] + " " + call[13]; cell.append(link);
      }} else cell.textContent = text;
    }});
  }}
  const last = Math.min(first + rows, order.length);
  $("shown").textContent = (order.length ? first + 1 : 0) + " to " + last + " of " + order.length;
}}
$("search").oninput = select; $("cause").onchange = select;
$("back").onclick = () => {{ first = Math.max(0, first - rows); show(); }};
$("on").onclick = () => {{ if (first + rows < order.length) first += rows; show(); }};
show();
</script></body></html>
"""
