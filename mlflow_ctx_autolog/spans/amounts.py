"""Token usage and cost, added up over a tree of spans as they end."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping

__all__ = ["Amounts", "Tally", "add", "parse_amounts"]

# By MLflow's names: "input_tokens", "total_tokens", "total_cost", and so on.
Amounts = dict[str, float]


def add(total: Amounts, amounts: Mapping[str, float]) -> None:
    """Add amounts to a total, name by name."""
    for name, amount in amounts.items():
        total[name] = total.get(name, 0) + amount


def parse_amounts(value: object) -> Amounts:
    """Return the numbers of a JSON object, as MLflow keeps usage and cost; empty for all else."""
    if isinstance(value, (str, bytes)):
        try:
            value = json.loads(value)
        except ValueError:
            return {}
    if not isinstance(value, dict):
        return {}
    return {
        str(name): amount
        for name, amount in value.items()
        if isinstance(amount, (int, float)) and not isinstance(amount, bool)
    }


class Tally:
    """Adds up what the spans below one span report, as MLflow does.

    A span that reports an amount of its own speaks for all below it: a chain's span repeats what
    its model calls have reported already. Children end before their parents, so that nothing of
    a finished span has to be kept.
    """

    def __init__(self) -> None:
        self._below: defaultdict[str | None, Amounts] = defaultdict(dict)

    def ended(self, span_id: str, parent_id: str | None, own: Amounts) -> None:
        """Take a finished span with the amounts that it reports itself."""
        below = self._below.pop(span_id, {})
        if amounts := own or below:
            add(self._below[parent_id], amounts)

    @property
    def total(self) -> Amounts:
        """The sum so far."""
        total: Amounts = {}
        for amounts in list(self._below.values()):
            add(total, amounts)
        return total
