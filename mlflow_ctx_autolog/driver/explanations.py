"""What a receipt that is not complete means, what words that differ do, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlflow_ctx_autolog.delivery.directory import default_directory
from mlflow_ctx_autolog.delivery.receipts import Loss, Receipt
from mlflow_ctx_autolog.driver.books import Book
from mlflow_ctx_autolog.driver.mlflow_traces import said
from mlflow_ctx_autolog.spans.trace_update import CONTENT, LINKED_PROMPTS, differing

__all__ = ["explain", "explain_silence", "explain_words", "silence_of"]

# What to do about spans that are dropped, by the way in which they are.
_REMEDIES = {
    Loss.NO_ROOM: "spool_max_bytes and max_waiting_bytes can be raised",
    Loss.REFUSED: "give the process a spool_directory that it can write to",
    Loss.REFUSED_UNNAMED: "the log of the collector says why",
    Loss.TOO_LATE: "run the action inside the span, or use a store that takes single spans",
}


# What tasks say differently is named so often.
_NAMED = 3


def explain_words(book: Book) -> str | None:
    """Return a text on what is said of a trace in more ways than one; None where nothing is."""
    updates = book.updates()
    found = [
        f"{name} is {_quoted(name, last)} for one task and {_quoted(name, other)} for another"
        for name, (other, last) in differing(updates).items()
        if name not in book.own_words
    ]
    for name, value in book.trace_update().items():
        here = said(book.info, name) if name in book.own_words else value
        if here != value and name != LINKED_PROMPTS:
            found.append(
                f"{name} is {_quoted(name, here)} on the driver, {_quoted(name, value)} for a task"
            )
    if not found:
        return None
    more = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return (
        f"What is said of trace {book.trace_id} differs: {'; '.join(found[:_NAMED])}{more}. The "
        "driver's word holds; of tasks, that of the latest attempt. What differs from row to row "
        "belongs on a span: mlflow.get_current_active_span().set_attribute()."
    )


def _quoted(name: str, value: str) -> str:
    # Neither prompts nor pages of them in a log.
    return "one text" if name in CONTENT else repr(value[:80])


def explain_silence(book: Book, likely_causes: Callable[[Any], str]) -> str | None:
    """Return a text on functions that have left no spans of their calls; None where none has.

    Args:
        book: Their trace.
        likely_causes: Returns what keeps spans of ``calls``, or of ``tasks``, from the store.
    """
    tasks = book.tasks()
    reasons = [task.silence for task in tasks if task.silence is not None]
    if reasons:
        subject = f"{len(reasons)} of {len(tasks)} tasks of trace {book.trace_id}"
        return silence_of(subject, reasons[0], likely_causes)
    if book.handed_over and not tasks and not book.receipts_come_home and book.is_complete:
        return (
            f"{book.handed_over} functions have run in trace {book.trace_id}, and there is "
            "not a span of their tasks: something has kept all of them from the store. "
            f"{likely_causes('tasks')}"
        )
    return None


def silence_of(subject: str, reason: str, likely_causes: Callable[[Any], str]) -> str:
    """Return a text on tasks that told of calls which have left no spans, and why."""
    said = f"{subject} ran on workers, and their model calls left no span: {reason}."
    return f"{said} {likely_causes('calls')}"


def explain(receipt: Receipt, spool_directory: str | None) -> str:
    """Return a text on a receipt that is not complete: what, why, and what to do.

    Args:
        receipt: It.
        spool_directory: Where processes keep what waits; None for the default.
    """
    directory = spool_directory or default_directory()
    subject = f"Trace {receipt.trace_id}" if receipt.trace_id else "What tasks have made"
    said = [f"{subject} is not complete in the tracking store: {receipt}."]
    if receipt.first_error:
        said.append(f"The first reason: {receipt.first_error}.")
    elif receipt.stored is None:
        said.append("The first reason: the store does not answer.")
    elif receipt.waiting and not receipt.unknown:
        said.append(
            "The first reason: none was refused; a worker that is killed takes with it what it "
            "holds."
        )
    for way, count in receipt.losses.items():
        said.append(f"{count:,} lost: {way}; {_REMEDIES[Loss(way)]}.")
    if receipt.waiting:
        said.append(
            "What waits is sent again as long as this process lives; after that, "
            f"mlflow-ctx-autolog recover {directory} sends what is left on a host."
        )
    if receipt.unknown:
        hosts = ", ".join(host for host in receipt.unknown if host) or "the hosts of the workers"
        said.append(
            "They ended without a word, or have not ended. The next task on their host sends what "
            f"they have left; so does mlflow-ctx-autolog recover on {hosts} (in {directory})."
        )
    return " ".join(said)
