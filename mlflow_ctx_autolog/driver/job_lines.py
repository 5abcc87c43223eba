"""What a job has come to, in one line, once its span has ended."""

from __future__ import annotations

from collections.abc import Mapping

from mlflow_ctx_autolog.delivery.receipts import Receipt, TaskReceipt
from mlflow_ctx_autolog.driver.books import Book
from mlflow_ctx_autolog.driver.mlflow_traces import list_price
from mlflow_ctx_autolog.driver.screens import a_screen
from mlflow_ctx_autolog.log_ins import safe_logger, without_credentials
from mlflow_ctx_autolog.prices import Price, cost_of

__all__ = ["amounts", "amounts_of_job", "cost_of_task", "counted", "job_line", "show_job"]

_logger = safe_logger(__name__)


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
    calls = book.sums.calls + sum(task.calls for task in book.tasks())
    parts = [counted(calls, "call"), *amounts_of_job(book, prices)]
    parts.append(f"{receipt.stored:,} spans stored" if receipt.complete else f"{receipt}")
    line = f"{_name(book)}: {', '.join(parts)}"
    link = _link(book)
    return line if link is None else f"{line}. {link}"


def amounts_of_job(book: Book, prices: Mapping[str, Price]) -> list[str]:
    """Return tokens and cost of a job as texts, and of how many calls they are not known.

    Args:
        book: Its trace.
        prices: See :class:`~mlflow_ctx_autolog.Config`.
    """
    tasks = book.tasks()
    usage, cost = book.totals()
    costs = [cost_of_task(task, prices) for task in tasks]
    found = book.priced.get("total_cost") or cost.get("total_cost") or 0.0
    # What is told may be of some calls alone.
    found = max(found, sum(dollars for dollars, _ in costs))
    untold = book.sums.unknown + sum(task.sums.get("unknown", 0) for task in tasks)
    unpriced = sum(number for _, number in costs)
    return amounts(int(usage.get("total_tokens", 0)), found, untold, unpriced)


def amounts(tokens: int, cost: float, untold: int, unpriced: int) -> list[str]:
    """Return tokens and cost as texts, and of how many calls they are not known.

    Args:
        tokens: Those that are known.
        cost: US dollars, as far as they are known.
        untold: Calls of which not all tokens are known.
        unpriced: Calls of which they are, and no price.
    """
    found = [f"{'at least ' if untold else ''}{tokens:,} tokens"]
    unknown = untold
    # Where nobody has said what they cost, a nought would be wrong.
    if cost:
        unknown += unpriced
        found.append(f"{'at least ' if unknown else ''}${cost:,.4f}")
    if unknown:
        found[-1] += f" (not known of {counted(unknown, 'call')})"
    return found


def cost_of_task(task: TaskReceipt, prices: Mapping[str, Price]) -> tuple[float, int]:
    """Return what the calls of a task have cost in US dollars, as far as that is known.

    And of how many of those whose tokens are known no price is known.

    Args:
        task: What it has told.
        prices: US dollars for a million input and output tokens, by model; of others, MLflow's.
    """
    found, unpriced = task.cost.get("total_cost", 0.0), 0
    for model, (sent, answered, calls) in task.models.items():
        price = prices.get(model) or list_price(model)
        if price is None:
            unpriced += calls
        else:
            usage = {"input_tokens": sent, "output_tokens": answered}
            found += cost_of(price, usage)["total_cost"]
    # What a budget has estimated is not "at least" so much.
    is_estimated = bool(task.sums.get("unknown"))
    return found if is_estimated else max(found, task.spent), unpriced


def counted(count: int, name: str) -> str:
    """Return a number of things with their name."""
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
