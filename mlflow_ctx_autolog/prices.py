"""What an answer costs by what the user says, by prices or a gateway's own header; its tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Price", "Pricing", "cost_of", "in_and_out", "is_unknown", "least_total"]

# US dollars for a million input and a million output tokens.
Price = tuple[float, float]


@dataclass(frozen=True)
class Pricing:
    """What the user says of prices; it goes before what MLflow knows.

    Args:
        prices: By the names of models.
        cost_header: The response header in which a gateway says what an answer has cost, in US
            dollars; it goes before the prices.
    """

    prices: Mapping[str, Price] = field(default_factory=dict)
    cost_header: str | None = None

    def cost(
        self, models: tuple[object, ...], usage: Mapping[str, float], headers: Mapping[str, str]
    ) -> dict[str, float]:
        """Return what an answer has cost, by MLflow's names; empty where the user does not say.

        Args:
            models: The names that its model goes by, the most telling first.
            usage: Its tokens.
            headers: Those of the response.
        """
        if self.cost_header is not None:
            stated = _dollars(headers.get(self.cost_header))
            if stated is not None:
                return {"total_cost": stated}
        price = next((p for model in models if (p := self.prices.get(str(model)))), None)
        return {} if price is None else cost_of(price, usage)


def cost_of(price: Price, usage: Mapping[str, float]) -> dict[str, float]:
    """Return what tokens cost, by MLflow's names; empty where input or output is not known.

    Args:
        price: Of their model.
        usage: Tokens, by MLflow's names.
    """
    tokens = in_and_out(usage)
    if tokens is None:
        return {}
    costs = tokens[0] * price[0] / 1e6, tokens[1] * price[1] / 1e6
    return {"input_cost": costs[0], "output_cost": costs[1], "total_cost": sum(costs)}


def in_and_out(usage: Mapping[str, float]) -> tuple[float, float] | None:
    """Return input and output tokens; None where one is not known, and does not follow.

    Args:
        usage: Tokens of one call, by MLflow's names.
    """
    total = usage.get("total_tokens")
    sent, answered = usage.get("input_tokens"), usage.get("output_tokens")
    # An embedding has no output, which no server says.
    if total is not None and sent is not None and answered is None:
        answered = max(0, total - sent)
    if total is not None and answered is not None and sent is None:
        sent = max(0, total - answered)
    return None if sent is None or answered is None else (sent, answered)


def least_total(usage: Mapping[str, float]) -> float:
    """Return how many tokens a call has used, or how many at least.

    Args:
        usage: Tokens of one call, by MLflow's names.
    """
    if "input_tokens" in usage and "output_tokens" in usage:
        # A server's own total may be wrong.
        return usage["input_tokens"] + usage["output_tokens"]
    parts = usage.get("input_tokens", 0) + usage.get("output_tokens", 0)
    return max(parts, usage.get("total_tokens", 0))


def is_unknown(said: object, usage: Mapping[str, float], *, failed: bool) -> bool:
    """Whether a call was answered, and nobody knows all of its tokens.

    Args:
        said: What its span says of that; None where it was recorded by others, and says nothing.
        usage: Tokens that its span tells, by MLflow's names.
        failed: Whether it has ended in an error.
    """
    if said is not None:
        return said is True
    # Of a call that failed, most likely nothing was to be paid.
    return (bool(usage) or not failed) and in_and_out(usage) is None


def _dollars(text: object) -> float | None:
    try:
        amount = float(str(text))
    except ValueError:
        return None
    return amount if 0 <= amount < math.inf else None
