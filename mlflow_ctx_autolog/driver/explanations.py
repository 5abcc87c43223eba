"""What a receipt that is not complete means, and what to do about it."""

from __future__ import annotations

from mlflow_ctx_autolog.delivery.directory import default_directory
from mlflow_ctx_autolog.delivery.receipts import Loss, Receipt

__all__ = ["explain"]

# What to do about spans that are dropped, by the way in which they are.
_REMEDIES = {
    Loss.NO_ROOM: "spool_max_bytes and max_waiting_bytes can be raised",
    Loss.REFUSED: "give the process a spool_directory that it can write to",
    Loss.REFUSED_UNNAMED: "the log of the collector says why",
    Loss.TOO_LATE: "run the action inside the span, or use a store that takes single spans",
}


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
