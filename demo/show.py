"""The tables and the tree that the demonstration prints."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from mlflow.entities import Span, Trace
from results import Outcome
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

MAX_TASKS = 8
MAX_CALLS = 3
SAMPLE_ROWS = 5


def comparison(outcomes: list[Outcome]) -> Table:
    """Set the runs side by side."""
    table = Table(title="What each run left in MLflow", title_justify="left")
    table.add_column("")
    for outcome in outcomes:
        table.add_column(outcome.title, justify="right")

    def row(label: str, values: list[str], goals: list[bool] | None = None) -> None:
        if goals is not None:
            colours = ("green" if goal else "red" for goal in goals)
            values = [f"[{c}]{value}[/{c}]" for c, value in zip(colours, values, strict=True)]
        table.add_row(label, *values)

    row("calls made", [str(o.calls) for o in outcomes])
    row("traces", [str(o.traces) for o in outcomes])
    row(
        "call spans kept",
        [f"{o.call_spans} of {o.calls}" for o in outcomes],
        [o.call_spans == o.calls for o in outcomes],
    )
    row(
        "call spans under the driver's trace",
        [f"{o.call_spans_under_driver} of {o.calls}" for o in outcomes],
        [o.call_spans_under_driver == o.calls for o in outcomes],
    )
    if all(o.tokens_billed is not None for o in outcomes):
        row(
            "tokens on the driver's trace",
            [f"{o.tokens:,} of {o.tokens_billed:,} billed" for o in outcomes],
            [o.tokens == o.tokens_billed for o in outcomes],
        )
    else:
        row("tokens on the driver's trace", [f"{o.tokens:,}" for o in outcomes])
    row("seconds", [f"{o.seconds:.1f}" for o in outcomes])
    return table


def trace_tree(trace: Trace) -> Tree:
    """Draw a trace: the driver's span, the Spark tasks below it, their calls below them."""
    children: dict[str | None, list[Span]] = defaultdict(list)
    for span in sorted(trace.data.spans, key=lambda span: span.start_time_ns):
        children[span.parent_id].append(span)
    roots = children[None]
    if not roots:
        return Tree("[red]the driver's span is missing[/red]")
    tree = Tree(f"[bold]{escape(roots[0].name)}[/bold]  {_seconds(roots[0])}")
    tasks = children[roots[0].span_id]
    for task in _first(tasks, MAX_TASKS):
        branch = tree.add(f"[cyan]{escape(task.name)}[/cyan]  {_task_facts(task)}")
        calls = children[task.span_id]
        for call in _first(calls, MAX_CALLS):
            branch.add(f"{escape(call.name)}  {_call_facts(call)}")
        _more(branch, calls, MAX_CALLS)
    _more(tree, tasks, MAX_TASKS)
    return tree


def sample(rows: list[tuple[str, str, str, str]]) -> Table:
    """Show some of the extracted entitlements, different ones where possible."""
    table = Table(title=f"{len(rows)} entitlements found; for example", title_justify="left")
    table.add_column("document", max_width=24)
    table.add_column("who", max_width=24)
    table.add_column("may", max_width=44)
    table.add_column("under which terms", max_width=44)
    # Many licences are copies of one another, so rows that start alike count as one.
    distinct = list({row[2][:60]: row for row in reversed(rows)}.values())[::-1]
    first = list({row[0]: row for row in reversed(distinct)}.values())[::-1]
    others = [row for row in distinct if row not in first]
    for row in (first + others)[:SAMPLE_ROWS]:
        table.add_row(*(escape(_short(cell)) for cell in row))
    return table


def make_console() -> Console:
    """Return a console; when not on a terminal, wide enough to keep lines in one piece."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)


def _first(spans: list[Span], limit: int) -> list[Span]:
    """Return the spans to show; one more than ``limit`` takes no more room than saying so."""
    return spans if len(spans) <= limit + 1 else spans[:limit]


def _more(tree: Tree, spans: list[Span], limit: int) -> None:
    left = len(spans) - len(_first(spans, limit))
    if left:
        tree.add(f"[dim]... and {left} more[/dim]")


def _seconds(span: Span) -> str:
    end = span.end_time_ns
    return "not ended" if end is None else f"{(end - span.start_time_ns) / 1e9:.2f} s"


def _task_facts(task: Span) -> str:
    attributes: dict[str, Any] = task.attributes
    parts = [
        f"partition {attributes.get('spark.partition.id', '?')}",
        f"rows {attributes.get('spark.rows.in', '?')} in, "
        f"{attributes.get('spark.rows.out', '?')} out",
        f"calls {attributes.get('llm.calls', '?')}",
        _seconds(task),
    ]
    return ", ".join(parts)


def _call_facts(call: Span) -> str:
    usage = call.attributes.get("mlflow.chat.tokenUsage") or {}
    tokens = f"{usage['total_tokens']:,} tokens, " if "total_tokens" in usage else ""
    return tokens + _seconds(call)


def _short(text: str, length: int = 110) -> str:
    return text if len(text) <= length else text[:length].rsplit(" ", 1)[0] + " ..."
