"""What MLflow's list of traces shows of a job, where its user has said nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mlflow_ctx_autolog.delivery.receipts import TaskReceipt
from mlflow_ctx_autolog.driver.books import Book
from mlflow_ctx_autolog.driver.job_lines import amounts_of_job, counted
from mlflow_ctx_autolog.spans.call_sums import CallSums

__all__ = ["write_previews"]

# Names that are shown of functions, and of models.
_SHOWN = 3


def write_previews(book: Book) -> None:
    """Write into what is known of a trace what went into it and what came of it.

    Names and numbers, and no content. What the user has set, or MLflow has taken from the inputs
    and outputs of the trace's root, stays. Of a trace without tasks MLflow says it by itself.
    """
    if not (tasks := book.tasks()):
        return
    sums = CallSums()
    sums.merge(book.sums)
    for task in tasks:
        sums.merge(CallSums.from_dict(task.sums))
    texts = {
        "request_preview": _what_ran(tasks, sorted(sums.models)),
        "response_preview": _what_came(book, tasks),
    }
    for name, text in texts.items():
        if getattr(book.info, name) in (None, book.previews.get(name)):
            setattr(book.info, name, text)
            book.previews[name] = text


def _what_ran(tasks: Sequence[TaskReceipt], models: Sequence[str]) -> str:
    """Return which functions ran on how many rows, and which models they asked."""
    rows: Counter[str] = Counter()
    for task in tasks:
        rows[task.function] += task.rows
    functions = [
        f"{name} on {counted(count, 'row')}" if count else name
        for name, count in sorted(rows.items())
        if name
    ]
    parts = [_some(functions), counted(len(tasks), "task"), _some(models)]
    return "; ".join(part for part in parts if part)


def _what_came(book: Book, tasks: Sequence[TaskReceipt]) -> str:
    """Return how many calls were made, with what came of them."""
    calls = book.sums.calls + sum(task.calls for task in tasks)
    errors = book.sums.errors + sum(task.errors for task in tasks)
    parts = [counted(calls, "call"), counted(errors, "error")]
    if (repeats := _repeats(calls, tasks)) is not None:
        parts.append(counted(repeats, "repeat"))
    return ", ".join([*parts, *amounts_of_job(book, {})])


def _repeats(calls: int, tasks: Sequence[TaskReceipt]) -> int | None:
    """Return how many requests were made before in the job; None unless tasks have told of all."""
    told = Counter(request for task in tasks for request in task.requests)
    repeats = sum(task.repeats for task in tasks)
    # Those of child processes and of the driver are not told.
    is_all = told.total() + repeats >= calls and not any(task.requests_untold for task in tasks)
    return repeats + told.total() - len(told) if is_all and calls else None


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
