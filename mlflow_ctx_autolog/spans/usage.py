"""What an answer says of its tokens, as the server has sent it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["usage_of_answer"]

# MLflow's names, each with those of OpenAI's APIs: chat and completions, responses and images.
_NAMES = {
    "input_tokens": ("prompt_tokens", "input_tokens"),
    "output_tokens": ("completion_tokens", "output_tokens"),
    "total_tokens": ("total_tokens",),
    "cache_read_input_tokens": ("cache_read_input_tokens",),
    "cache_creation_input_tokens": ("cache_creation_input_tokens",),
}
_DETAILS = ("prompt_tokens_details", "input_tokens_details")


def usage_of_answer(usage: Any, *, has_output: bool = True) -> dict[str, float]:
    """Return tokens by MLflow's names: what can be read of them, empty where nothing can.

    Servers send nulls, floats and texts for numbers, or only some of them. Where both input and
    output are known, their sum is the total, whatever the server has added up.

    Args:
        usage: The value of ``usage`` in the server's answer.
        has_output: Whether the answer costs tokens, as all do but embeddings.
    """
    if not isinstance(usage, Mapping):
        return {}
    counts = {
        name: number
        for name, theirs in _NAMES.items()
        if (number := _first_number(usage, theirs)) is not None
    }
    for details in _DETAILS:
        inner = usage.get(details)
        if (
            isinstance(inner, Mapping)
            and (cached := _number(inner.get("cached_tokens"))) is not None
        ):
            counts["cache_read_input_tokens"] = cached
    if "input_tokens" in counts and "output_tokens" in counts:
        counts["total_tokens"] = counts["input_tokens"] + counts["output_tokens"]
    elif "input_tokens" in counts:
        if not has_output:
            counts.setdefault("total_tokens", counts["input_tokens"])
        elif counts.get("total_tokens") == counts["input_tokens"]:
            # Which leaves out what the answer has cost.
            del counts["total_tokens"]
    return counts


def _first_number(usage: Mapping[str, Any], names: tuple[str, ...]) -> float | None:
    return next((n for name in names if (n := _number(usage.get(name))) is not None), None)


def _number(value: Any) -> float | None:
    """Return a count of tokens, whatever it was sent as; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (OverflowError, ValueError):
        return None
    if not math.isfinite(number) or number < 0:
        return None
    return int(number) if number.is_integer() else number
