"""What a job has come to, in one line, once its span has ended."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from mlflow_ctx_autolog.delivery.receipts import Receipt, TaskReceipt
from mlflow_ctx_autolog.driver.books import Book
from mlflow_ctx_autolog.driver.mlflow_traces import list_price
from mlflow_ctx_autolog.driver.screens import a_screen
from mlflow_ctx_autolog.log_ins import without_credentials
from mlflow_ctx_autolog.prices import Price, cost_of

__all__ = ["cost_of_task", "job_line", "show_job"]

_logger = logging.getLogger(__name__)


def show_job(line: str) -> None:
    """Show a line to whoever looks: in a terminal, in a notebook, else in the log at INFO."""
    if (screen := a_screen()) is None:
        _logger.info("%s", line)
        return
    screen.show(line)
    screen.close()


def job_line(book: Book, receipt: Receipt, prices: Mapping[str, Price]) -> str:
    """Return what a job has come to: name, calls, tokens, cost, what is stored, where to look.

    Args:
        book: Its trace.
        receipt: What became of its spans.
        prices: See :class:`~mlflow_ctx_autolog.Config`.
    """
    tasks = book.tasks()
    calls = book.sums.calls + sum(task.calls for task in tasks)
    usage, cost = book.totals()
    parts = [_counted(calls, "call"), f"{int(usage.get('total_tokens', 0)):,} tokens"]
    found = book.priced.get("total_cost") or cost.get("total_cost")
    if not found:
        known = [amount for task in tasks if (amount := cost_of_task(task, prices)) is not None]
        found = sum(known)
    if found:
        # Where nobody has said what they cost, a nought would be wrong.
        untold = book.sums.unknown + sum(task.sums.get("unknown", 0) for task in tasks)
        least = "at least " if untold else ""
        parts.append(f"{least}${found:,.4f}")
    parts.append(f"{receipt.stored:,} spans stored" if receipt.complete else f"{receipt}")
    line = f"{_name(book)}: {', '.join(parts)}"
    link = _link(book)
    return line if link is None else f"{line}. {link}"


def cost_of_task(task: TaskReceipt, prices: Mapping[str, Price]) -> float | None:
    """Return what the calls of a task have cost in US dollars; None where nobody knows.

    Args:
        task: What it has told.
        prices: US dollars for a million input and output tokens, by model; of others, MLflow's.
    """
    told = task.spent or task.cost.get("total_cost")
    if told:
        return told
    found = None
    for model, (sent, answered) in task.models.items():
        price = prices.get(model) or list_price(model)
        if price is not None:
            usage = {"input_tokens": sent, "output_tokens": answered}
            found = (found or 0.0) + cost_of(price, usage)["total_cost"]
    return found


def _counted(count: int, name: str) -> str:
    return f"{count:,} {name}{'s' * (count != 1)}"


def _name(book: Book) -> str:
    return str(book.name or book.info.tags.get("mlflow.traceName") or book.trace_id)


def _link(book: Book) -> str | None:
    """Return where the trace is shown; None where the store is no server."""
    uri = without_credentials(book.destination.tracking_uri) or ""
    if not uri.startswith(("http://", "https://")):
        return None
    place = f"{uri.rstrip('/')}/#/experiments/{book.info.experiment_id}/traces"
    return f"{place}?selectedEvaluationId={book.info.trace_id}"
