"""How good answers are, without a judge: what each shows, and what only all together show."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow_ctx_autolog.reporting.calls import Call

__all__ = ["SIGNALS", "Quality", "add_signals_of_all"]

# By how people call them; the last two come to light among all calls of a function and model.
SIGNALS = {
    "cut_off": "cut off",
    "content_filter": "stopped by a content filter",
    "refused": "refused",
    "empty": "empty",
    "invalid_json": "no JSON",
    "rejected": "rejected by parse()",
    "invalid_tool_calls": "tool call without valid arguments",
    "canned": "canned reply",
    "odd_length": "length far from the rest",
}

# A canned reply: the same answer, no shorter than this, to so many different requests and so large
# a share of all. Labels, as "yes" or {"kind": "invoice"}, are shorter.
_CANNED_CHARS, _CANNED_REQUESTS, _CANNED_SHARE = 40, 5, 0.01
# A length far from the rest: so many (robust) standard deviations of the logarithm from the median,
# no fewer than three times as long or as short, among at least so many answers.
_ODD_DEVIATIONS, _ODD_FACTOR, _ODD_ANSWERS = 5.0, 3.0, 30
# The median absolute deviation of a normal distribution, in standard deviations; and the least
# deviation that is taken for one, where most answers are equally long.
_MAD, _LEAST_DEVIATION = 0.6745, 0.1


@dataclass
class Quality:
    """How good the answers of some calls are.

    Args:
        answered: Calls whose answer says something about its quality.
        odd: Of these, with one signal at least.
        signals: How many have each signal, the most frequent first.
        chars: Characters of the answers: median.
    """

    answered: int
    odd: int
    signals: dict[str, int]
    chars: float | None

    @classmethod
    def of(cls, calls: Iterable[Call]) -> Quality:
        """Add up the signals of calls."""
        answered = [call for call in calls if call.was_answered]
        counted = Counter(signal for call in answered for signal in call.signals)
        lengths = [call.chars for call in answered if call.chars]
        return cls(
            len(answered),
            sum(bool(call.signals) for call in answered),
            dict(sorted(counted.items(), key=lambda item: (-item[1], item[0]))),
            statistics.median(lengths) if lengths else None,
        )

    def share(self, signal: str) -> float:
        """Return which part of the answers has a signal."""
        return self.signals.get(signal, 0) / self.answered if self.answered else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return what is counted, and the share of each signal."""
        shares = {signal: round(self.share(signal), 9) for signal in self.signals}
        return {**vars(self), "shares": shares}


def add_signals_of_all(calls: Sequence[Call]) -> None:
    """Add to each call the signals that only all calls together show: canned, odd_length."""
    groups: defaultdict[tuple[str, str | None], list[Call]] = defaultdict(list)
    for call in calls:
        if call.chars is not None and not call.failed:
            groups[call.function, call.model].append(call)
    for group in groups.values():
        for signal, found in (("canned", _canned(group)), ("odd_length", _odd(group))):
            for call in found:
                call.signals |= {signal}


def _canned(calls: Sequence[Call]) -> list[Call]:
    by_answer: defaultdict[str, list[Call]] = defaultdict(list)
    for call in calls:
        if call.answer_hash is not None and (call.chars or 0) >= _CANNED_CHARS:
            by_answer[call.answer_hash].append(call)
    least = max(_CANNED_REQUESTS, _CANNED_SHARE * len(calls))
    return [
        call
        for alike in by_answer.values()
        if len({each.request or each.span_id for each in alike}) >= least
        for call in alike
    ]


def _odd(calls: Sequence[Call]) -> list[Call]:
    texts = [(call, math.log(call.chars)) for call in calls if call.chars]
    if len(texts) < _ODD_ANSWERS:
        return []
    middle = statistics.median(length for _, length in texts)
    deviation = statistics.median(abs(length - middle) for _, length in texts) / _MAD
    far = max(_ODD_DEVIATIONS * max(deviation, _LEAST_DEVIATION), math.log(_ODD_FACTOR))
    return [call for call, length in texts if abs(length - middle) > far]
