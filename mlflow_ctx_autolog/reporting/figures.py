"""The charts of a report's page, each with a title that says what to do."""

from __future__ import annotations

import html
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow_ctx_autolog.reporting.text import percent, seconds

__all__ = ["Figure", "figures", "figures_over_time", "plotly_script"]

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
_GREY = "#999999"
_PARTITIONS = 30
# Calls that are drawn one by one, and tasks; and calls with a text of their own under the mouse.
_DRAWN, _DRAWN_TASKS, _LABELLED = 4_000, 2_000, 1_500
# A partition that has so many times the tokens of the middle one, and a share of the time in which
# so much less goes on than at the height of the job, are worth doing something about.
_SKEWED, _IDLE = 2.0, 0.25


@dataclass(frozen=True)
class Figure:
    """A chart.

    Args:
        name: Unique on the page.
        title: What it shows, and what to do about it.
        drawing: For plotly, as JSON.
    """

    name: str
    title: str
    drawing: Mapping[str, Any]


def plotly_script() -> str:
    """Return plotly's code for a page.

    Raises:
        ImportError: plotly is missing.
    """
    try:
        import plotly.offline as offline
    except ImportError as error:
        raise ImportError(
            f"The HTML report is drawn with plotly, which cannot be imported ({error}); "
            "pip install 'mlflow-ctx-autolog[report]'. print(report) and to_dict() do without."
        ) from error
    return str(offline.get_plotlyjs())


def figures(
    summary: Row, calls: Sequence[Row], tasks: Sequence[Row], matter: Sequence[Row]
) -> list[Figure]:
    """Return the charts of a report; those that would show nothing are left out.

    Args:
        summary: What ``CallReport.to_dict()`` returned.
        calls: A row for each call.
        tasks: A row for each task attempt.
        matter: Those calls that are drawn, whatever is left out.
    """
    import plotly.graph_objects as graphs

    names = {key: cause["name"] for key, cause in summary["causes"].items()}
    found = [
        _timeline(graphs, calls, tasks, matter, names),
        _concurrency(graphs, summary),
        _by_cause(graphs, summary),
        _heaviest(graphs, calls, names),
    ]
    return [
        Figure(name, title, json.loads(figure.to_json()))
        for each in found
        if each is not None
        for name, title, figure in [each]
    ]


def figures_over_time(
    numbers: Mapping[str, tuple[str, str, Sequence[float | None]]],
    moments: Sequence[str],
    groups: Mapping[str, Sequence[int]],
) -> list[Figure]:
    """Return a chart for each number over time; of those that nobody knows, none.

    Args:
        numbers: By name, the title, the unit and the value at each moment.
        moments: In the ISO format.
        groups: Which places are of one line, by its name.
    """
    import plotly.graph_objects as graphs

    found = []
    for name, (title, unit, values) in numbers.items():
        if all(value is None for value in values):
            continue
        figure = graphs.Figure(
            [
                graphs.Scatter(
                    name=html.escape(group),
                    x=[moments[place] for place in places],
                    y=[values[place] for place in places],
                    mode="lines+markers",
                    connectgaps=False,
                )
                for group, places in groups.items()
            ]
        )
        axis = {"tickprefix": "$"} if unit == "$" else {"tickformat": ".1%"} if unit == "%" else {}
        figure.update_layout(
            height=240,
            yaxis={"rangemode": "tozero", **axis},
            colorway=[colour for key, colour in _COLOURS.items() if key != "unknown"],
            legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
            showlegend=len(groups) > 1,
        )
        found.append(Figure(name, title, json.loads(figure.to_json())))
    return found


def _timeline(
    graphs: Any, calls: Sequence[Row], tasks: Sequence[Row], matter: Sequence[Row], names: Any
) -> Any:
    """Draw each worker as a lane, its tasks as bars and its calls as lines on them."""
    if not calls:
        return None
    start = min(row["started"] for row in [*calls, *tasks])
    drawn, drawn_tasks = _drawn(calls, matter), tasks[:_DRAWN_TASKS]
    by_id = {task["span_id"]: task for task in drawn_tasks}
    lanes = _lanes(drawn_tasks)
    figure = graphs.Figure()
    figure.add_trace(
        graphs.Bar(
            name="task attempt",
            orientation="h",
            base=[_offset(task["started"], start) for task in drawn_tasks],
            x=[max(0.001, _offset(task["ended"], task["started"])) for task in drawn_tasks],
            y=[lanes[task["span_id"]] for task in drawn_tasks],
            width=0.8,
            marker={"color": "rgba(128,128,128,.22)", "line": {"width": 1, "color": "#888"}},
            text=[_task(task) for task in drawn_tasks],
            textposition="none",
            hovertemplate="%{text}<extra></extra>",
        )
    )
    groups: defaultdict[str, list[Row]] = defaultdict(list)
    for call in drawn:
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
            if len(drawn) <= _LABELLED:
                texts += [_label(call), _label(call), ""]
        figure.add_trace(
            graphs.Scatter(
                name="useful" if not key else names.get(key, key),
                x=xs,
                y=ys,
                mode="lines",
                line={"color": _COLOURS.get(key, _GREY), "width": 6},
                text=texts or None,
                hovertemplate="%{text}<extra></extra>" if texts else "%{x} s<extra></extra>",
            )
        )
    labels = _lane_labels(drawn_tasks, lanes)
    if any(call["task"] not in by_id for call in drawn):
        labels[driver_lane] = "driver"
    figure.update_layout(
        height=min(760, 170 + 24 * len(labels)),
        xaxis={"title": {"text": "seconds since the first task"}},
        yaxis={
            "tickvals": list(labels),
            "ticktext": list(labels.values()),
            "ticks": "outside",
            "tickcolor": "rgba(0,0,0,0)",
            "autorange": "reversed",
        },
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )
    part = (
        "" if len(drawn) == len(calls) else f" ({len(drawn):,} of {len(calls):,} calls are drawn)"
    )
    return "timeline", f"{_timeline_title(tasks)}{part}", figure


def _drawn(calls: Sequence[Row], matter: Sequence[Row]) -> Sequence[Row]:
    if len(calls) <= _DRAWN:
        return calls
    every = -(-len(calls) // max(1, _DRAWN - len(matter)))
    kept = {id(call) for call in matter} | {id(call) for call in calls[::every]}
    return [call for call in calls if id(call) in kept]


def _timeline_title(tasks: Sequence[Row]) -> str:
    if len(tasks) < 2:
        return "Tasks and calls over time"
    start, end = min(task["started"] for task in tasks), max(task["ended"] for task in tasks)
    ends = sorted(task["ended"] for task in tasks)
    # From where on no more than a quarter of the tasks have not ended.
    alone = (end - ends[int(0.75 * len(ends))]) / max(1, end - start)
    if alone > _IDLE:
        return (
            f"The last tasks run alone for {percent(alone)} of the time: make partitions smaller "
            "and even, with repartition()"
        )
    return "Tasks end together: workers are busy to the end"


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
    figure.update_layout(height=210, xaxis={"title": {"text": "seconds since the first call"}})
    numbers = [number for _, number in moments]
    mean, most = statistics.fmean(numbers), max(numbers)
    title = f"{mean:.1f} calls at a time, {most:.0f} at most"
    if mean < 1.5:
        title += ": hand rows to a pool of threads, or make more partitions, to be faster"
    elif mean < most / 2:
        title += ": the endpoint could take more for most of the time; make partitions even"
    return "concurrency", title, figure


def _by_cause(graphs: Any, summary: Row) -> Any:
    rows = [("useful", "", summary["useful"])]
    rows += [(cause["name"], key, cause) for key, cause in summary["causes"].items()]
    unit = "cost" if summary["made"]["cost"] else "tokens"
    if len(rows) == 1 or not summary["made"][unit]:
        return None
    texts = [f"{sums['requests']:,} requests, {sums['money']}" for *_, sums in rows]
    figure = graphs.Figure(
        graphs.Bar(
            orientation="h",
            y=[_wrapped(name) for name, _, _ in rows],
            x=[sums[unit] or 0 for _, _, sums in rows],
            marker={"color": [_COLOURS.get(key, _GREY) for _, key, _ in rows]},
            text=texts,
            textposition="auto",
            hovertemplate="%{y}: %{text}<extra></extra>",
        )
    )
    prefix = {"tickprefix": "$"} if unit == "cost" else {}
    figure.update_layout(
        height=100 + 40 * len(rows),
        xaxis={"title": {"text": "cost" if unit == "cost" else "tokens"}, **prefix},
        yaxis={
            "autorange": "reversed",
            "automargin": True,
            "ticks": "outside",
            "tickcolor": "rgba(0,0,0,0)",
        },
    )
    first = next(iter(summary["causes"].values()))
    share = percent((summary["repeated"][unit] or 0) / summary["made"][unit])
    title = f"{share} of the {unit} is for repeats. Most of them: {first['name']}. {first['fix']}"
    return "causes", title, figure


def _wrapped(name: str) -> str:
    return html.escape(name).replace(": ", ":<br>")


def _heaviest(graphs: Any, calls: Sequence[Row], names: Any) -> Any:
    """Draw the tokens of the heaviest partitions, by cause."""
    totals: defaultdict[str, int] = defaultdict(int)
    parts: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    for call in calls:
        if call["task"] is not None:
            place = f"{call['stage']} / {call['partition']}"
            totals[place] += int(call["tokens"])
            parts[call["cause"] or ""][place] += int(call["tokens"])
    if len(totals) < 2 or not any(totals.values()):
        return None
    heaviest = sorted(totals, key=lambda place: -totals[place])[:_PARTITIONS]
    figure = graphs.Figure(
        [
            graphs.Bar(
                name="useful" if not key else names.get(key, key),
                x=heaviest,
                y=[parts[key].get(place, 0) for place in heaviest],
                marker={"color": _COLOURS.get(key, _GREY)},
            )
            for key in sorted(parts)
        ]
    )
    figure.update_layout(
        barmode="stack",
        height=320,
        xaxis={"title": {"text": "stage / partition"}, "type": "category"},
        yaxis={"title": {"text": "tokens"}},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )
    # Repeats have causes and fixes of their own.
    useful = [parts[""].get(place, 0) for place in totals]
    times = max(useful) / (statistics.median(useful) or 1)
    if times > _SKEWED:
        title = (
            f"The heaviest partition has {times:.1f} times the tokens of the middle one: "
            "repartition() by what makes rows long"
        )
    else:
        title = f"Partitions are even: the heaviest has {times:.1f} times the middle one's tokens"
    return "partitions", title, figure


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
    return {
        lanes[task["span_id"]]: html.escape(f"{task['host']} {task['process']}") for task in tasks
    }


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
