"""Conditions under which a comparison fails, for CI and for a scheduled job's last task."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mlflow_ctx_autolog.reporting import chance
from mlflow_ctx_autolog.reporting.causes import CAUSES
from mlflow_ctx_autolog.reporting.comparison import ALPHA, Comparison, Difference
from mlflow_ctx_autolog.reporting.comparison_text import growth_text, number_text
from mlflow_ctx_autolog.reporting.signals import SIGNALS
from mlflow_ctx_autolog.reporting.text import percent

__all__ = ["Condition", "NotJudgedError", "failures", "parse_condition"]

_CONDITION = re.compile(r"\s*([\w:.]+)\s*(?:@\s*(.+?)\s*)?>\s*([\d.]+)\s*(%?)\s*")
_GROWTH = (
    *("cost", "cost_per_call", "cost_per_1000_rows", "calls", "calls_per_row"),
    *("input_tokens", "output_tokens", "input_tokens_per_1000_rows", "output_tokens_per_1000_rows"),
    *(f"{prefix}p{percent_}" for prefix in ("", "first_token_") for percent_ in (50, 95, 99)),
)
_SHARES = (*SIGNALS, "odd", "errors", "repeats", *(f"repeats:{cause.key}" for cause in CAUSES))


class NotJudgedError(ValueError):
    """A condition cannot be judged, since what it asks for is not known."""


@dataclass(frozen=True)
class Condition:
    """A metric that may not grow by more than a limit, or be more than a share of the calls after.

    Args:
        text: As it was given.
        metric: Its name.
        part: A function, a model, or both as ``"extract, gpt-x"``; "" for all of the job.
        limit: Growth (0.1 is 10 %), or a share.
    """

    text: str
    metric: str
    part: str
    limit: float

    @property
    def is_share(self) -> bool:
        """Whether it asks for a share of the calls after, rather than for growth."""
        return self.metric not in _GROWTH


def parse_condition(text: str) -> Condition:
    """Return the condition that ``"cost>10%"`` or ``"invalid_json@extract>1%"`` is.

    Raises:
        ValueError: It is none.
    """
    found = _CONDITION.fullmatch(text)
    metric = found[1] if found else ""
    if found is None or not (metric in _GROWTH + _SHARES or metric.startswith("errors:")):
        raise ValueError(
            f"{text!r} is no condition: it must be METRIC>NUMBER% or METRIC@FUNCTION>NUMBER%. The "
            f"metrics are, for growth, {', '.join(_GROWTH)}, and for shares of the calls after, "
            f"{', '.join(_SHARES)}, errors:KIND"
        )
    try:
        limit = float(found[3])
    except ValueError:
        raise ValueError(f"{text!r} holds {found[3]!r}, which is no number") from None
    return Condition(text, metric, found[2] or "", limit / 100 if found[4] else limit)


def failures(
    comparison: Comparison, conditions: Sequence[Condition], *, strict: bool = False
) -> list[str]:
    """Return why a comparison fails, one sentence for each condition that is not met.

    Args:
        comparison: What was found.
        conditions: What may not be.
        strict: Also where chance may explain it.

    Raises:
        NotJudgedError: What a condition asks for is not known, or its part is not in both jobs.
    """
    level = ALPHA / max(1, len(conditions))
    return [
        reason
        for condition in conditions
        for each in _asked(comparison, condition)
        if (reason := _failure(condition, each, level, strict)) is not None
    ]


def _asked(comparison: Comparison, condition: Condition) -> list[Difference]:
    names = condition.part
    parts = [
        each
        for each in comparison.differences
        if (names in (each.function, each.model, each.part) if names else not each.function)
    ]
    if not parts and condition.part and comparison.is_single:
        # All of the job is of one function and model.
        report = comparison.after
        if condition.part in (*report["functions"], *report["models"]):
            parts = [each for each in comparison.differences if not each.function]
    if not parts:
        raise NotJudgedError(f"{condition.text}: nothing named {condition.part!r} is in both jobs")
    found = [each for each in parts if each.metric == condition.metric]
    if not found and not condition.is_share:
        raise NotJudgedError(
            f"{condition.text}: {condition.metric} is not known of both jobs; see what the "
            "comparison has"
        )
    return found


def _failure(condition: Condition, each: Difference, level: float, strict: bool) -> str | None:
    of = f" of {each.part}" if each.function else ""
    if condition.is_share:
        some, all_ = each.counts or (0, 0)
        if not all_ or some / all_ <= condition.limit:
            return None
        if not strict and chance.exceeds(some, all_, condition.limit) > level:
            return None
        share = f"{percent(some / all_)} ({some:,} of {all_:,})"
        return (
            f"{condition.text}: {each.label}{of}: {share} after, {percent(each.before or 0)} before"
        )
    if each.before is None or each.after is None:
        raise NotJudgedError(
            f"{condition.text}: {each.label}{of} is not known of both jobs"
            + ("; give prices" if each.unit == "$" else "")
        )
    if each.after <= each.before * (1 + condition.limit):
        return None
    if not strict and (each.chance is None or each.chance > ALPHA):
        return None
    numbers = (
        f"from {number_text(vars(each), each.before)} to {number_text(vars(each), each.after)}"
    )
    return f"{condition.text}: {each.label}{of} grew by {growth_text(vars(each))}, {numbers}"
