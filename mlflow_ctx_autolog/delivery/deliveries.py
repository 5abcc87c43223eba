"""A process's deliveries, one for each place where records belong."""

from __future__ import annotations

import time
from collections.abc import Callable

from mlflow_ctx_autolog.delivery.outbox import Outbox
from mlflow_ctx_autolog.delivery.receipts import Counts
from mlflow_ctx_autolog.delivery.records import Destination

__all__ = ["Deliveries"]


class Deliveries:
    """A process's deliveries, one for each destination, made on first use."""

    def __init__(self, make: Callable[[Destination], Outbox]) -> None:
        self._make = make
        self._by_destination: dict[Destination, Outbox] = {}

    def to(self, destination: Destination) -> Outbox:
        """Return the delivery to a destination."""
        found = self._by_destination.get(destination)
        # setdefault, since two threads may ask for the first time at once.
        return found or self._by_destination.setdefault(destination, self._make(destination))

    def all(self) -> list[Outbox]:
        """Return those that have been made."""
        return list(self._by_destination.values())

    def counts(self, owner: str) -> Counts:
        """Return what became of what was submitted under ``owner``, wherever it belongs."""
        found = Counts()
        for each in self.all():
            counts = each.counts(owner)
            found.made += counts.made
            found.delivered += counts.delivered
            found.losses.update(counts.losses)
            found.set_aside += counts.set_aside
        return found

    def flush(self, timeout: float, *, give_up_if_down: bool = False) -> bool:
        """Send all that waits; return whether it was stored within ``timeout`` seconds in all.

        Args:
            timeout: Seconds to wait at most.
            give_up_if_down: See :meth:`Outbox.flush`; for stores that are known to be down.
        """
        deadline = time.monotonic() + timeout
        flushed = []
        for each in self.all():
            # Lest one that hangs cost the others their time.
            each.hurry()
        for each in self.all():
            remaining = max(0.0, deadline - time.monotonic())
            flushed.append(each.flush(remaining, give_up=give_up_if_down and each.store_is_down))
        return all(flushed)
