"""What an answer costs by what the user says: by prices, or by a gateway's own header."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Price", "Pricing", "cost_of"]

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
    total = usage.get("total_tokens")
    tokens_in, tokens_out = usage.get("input_tokens"), usage.get("output_tokens")
    # An embedding has no output, which no server says.
    if total is not None and tokens_in is not None and tokens_out is None:
        tokens_out = max(0, total - tokens_in)
    if total is not None and tokens_out is not None and tokens_in is None:
        tokens_in = max(0, total - tokens_out)
    if tokens_in is None or tokens_out is None:
        return {}
    costs = tokens_in * price[0] / 1e6, tokens_out * price[1] / 1e6
    return {"input_cost": costs[0], "output_cost": costs[1], "total_cost": sum(costs)}


def _dollars(text: object) -> float | None:
    try:
        amount = float(str(text))
    except ValueError:
        return None
    return amount if 0 <= amount < math.inf else None
