"""What some calls come to, and how amounts are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow_ctx_autolog.reporting.calls import Call

__all__ = ["Sums", "at_least", "dollars", "percentiles"]


@dataclass
class Sums:
    """What some calls come to.

    Args:
        calls: How many were made.
        reused: Of these, answered by what an earlier call has paid for: nothing was sent.
        resends: How many times the client sent one of them again.
        errors: Of the calls, ended in an error.
        input_tokens: As the endpoint counted them.
        output_tokens: The same.
        tokens: Both together.
        cost: US dollars, over the calls whose cost is known.
        unpriced: Calls that used tokens, and whose price is not known.
        unmetered: Calls that were answered, and of which nobody knows all tokens.
    """

    calls: int = 0
    reused: int = 0
    resends: int = 0
    errors: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    tokens: int = 0
    cost: float = 0.0
    unpriced: int = 0
    unmetered: int = 0

    @classmethod
    def of(cls, calls: Iterable[Call]) -> Sums:
        """Add up calls."""
        sums = cls()
        for call in calls:
            sums.calls += 1
            usage = call.usage
            if usage:
                sums.input_tokens += int(usage.get("input_tokens", 0))
                sums.output_tokens += int(usage.get("output_tokens", 0))
                sums.tokens += int(call.tokens)
            if call.cost:
                sums.cost += call.cost
            sums.errors += call.failed
            sums.resends += call.resends
            sums.reused += call.reused_from is not None
            sums.unmetered += call.usage_unknown
            sums.unpriced += call.cost is None and not call.usage_unknown
        return sums

    @property
    def requests(self) -> int:
        """What was sent to the endpoint: the calls that were not reused, and the resends."""
        return self.calls - self.reused + self.resends

    @property
    def unknown(self) -> int:
        """Calls whose cost is not known, in whole or in part, so that the sum is "at least"."""
        return self.unpriced + self.unmetered

    @property
    def money(self) -> str:
        """The cost as a text: "-" where none is known, "at least" where that of some is not."""
        return at_least(self.cost, self.unknown)

    def to_dict(self) -> dict[str, Any]:
        """Return the sums; the cost is None where that of no call is known."""
        cost = None if self.unknown and not self.cost else round(self.cost, 9)
        more = {"money": self.money, "requests": self.requests, "unknown": self.unknown}
        return {**vars(self), "cost": cost, **more}


def dollars(amount: float) -> str:
    """Return US dollars as people write them: ``$1,204.50``, ``$0.0375``, ``$0.00005``, ``$0``."""
    if not amount:
        return "$0"
    size = abs(amount)
    # Cents at least; below ten of them, three digits that count.
    places = 2 if size >= 0.1 else 2 - math.floor(math.log10(size))
    text = f"{size:,.{places}f}"
    whole, _, fraction = text.partition(".")
    return f"{'-' if amount < 0 else ''}${whole}.{fraction.rstrip('0').ljust(2, '0')}"


def at_least(cost: float, unknown: int) -> str:
    """Return a cost as a text, of which that of some calls is not known."""
    if not unknown:
        return dollars(cost)
    return f"at least {dollars(cost)}" if cost else "-"


def percentiles(
    values: Iterable[float | None], percents: Sequence[int] = (50, 95, 99)
) -> dict[str, float]:
    """Return the smallest value that so many percent of all do not exceed, as ``{"p50": ...}``.

    Empty where there are no values; None is none.
    """
    known = sorted(value for value in values if value is not None)
    if not known:
        return {}
    return {
        f"p{percent}": known[max(0, math.ceil(len(known) * percent / 100) - 1)]
        for percent in percents
    }
