"""What calls come to, small enough to travel with a receipt and to be kept with a trace."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlflow_ctx_autolog.spans.attributes import FINISH_REASONS, USAGE_UNKNOWN
from mlflow_ctx_autolog.spans.quality import ANSWER_CHARS, FLAGS, signals_of

__all__ = ["CALL_SUMS", "SUMMED", "CallSums", "Sketch"]

# Metadata of a trace: the sums over its calls, as JSON.
CALL_SUMS = "mlflow_ctx_autolog.call_sums"

_FIRST_TOKEN = ("gen_ai.response.time_to_first_chunk", "gen_ai.server.time_to_first_token")
_RESENDS, _REUSED_FROM = "http.request.resend_count", "llm.reused_from"
# What was asked.
_MODEL = "model"

# Attributes of a call's span that are summed up.
SUMMED = (
    FINISH_REASONS,
    ANSWER_CHARS,
    *FLAGS,
    *_FIRST_TOKEN,
    _RESENDS,
    _REUSED_FROM,
    USAGE_UNKNOWN,
    _MODEL,
)

# Buckets grow by the sixteenth root of two, as those of OpenTelemetry's exponential histograms of
# scale 4, so that a percentile is known to 2.2 %. Less than a millisecond, and more than a day, are
# one bucket each. The sketches of libraries know extreme percentiles better, which nobody asks
# here, for a dependency on each worker.
_SCALE = 16
_LEAST, _MOST = 1e-3, 86_400.0
# Models that are told apart: one whose name is made for each call must not grow a receipt.
_MODELS, _LONGEST_NAME = 20, 100


@dataclass
class Sketch:
    """Seconds, by how often they fell into buckets of fixed bounds: what two processes have, added.

    Args:
        buckets: How many fell into each, by its index: of bucket ``i`` they are more than
            ``2 ** (i / 16)`` and at most ``2 ** ((i + 1) / 16)`` seconds.
    """

    buckets: Counter[int] = field(default_factory=Counter)

    def add(self, seconds: float) -> None:
        """Add one."""
        bounded = min(max(seconds, _LEAST), _MOST)
        self.buckets[math.ceil(math.log2(bounded) * _SCALE) - 1] += 1

    def merge(self, other: Sketch) -> None:
        """Add all of another."""
        self.buckets.update(other.buckets)

    @property
    def count(self) -> int:
        """How many there are."""
        return self.buckets.total()

    def to_list(self) -> list[int]:
        """Return the lowest index, and how many fell into each bucket from there on."""
        if not self.buckets:
            return []
        lowest, highest = min(self.buckets), max(self.buckets)
        return [lowest, *(self.buckets[index] for index in range(lowest, highest + 1))]

    @classmethod
    def from_list(cls, numbers: object) -> Sketch:
        """Return what :meth:`to_list` made; nothing of anything else."""
        sketch = cls()
        if isinstance(numbers, list) and all(isinstance(each, int) for each in numbers):
            for place, number in enumerate(numbers[1:]):
                if number > 0:
                    sketch.buckets[numbers[0] + place] = number
        return sketch

    def percentile(self, percent: float) -> float | None:
        """Return seconds that so many percent do not exceed, to 2.2 %; None without any."""
        wanted = max(1, math.ceil(self.count * percent / 100))
        for index in sorted(self.buckets):
            wanted -= self.buckets[index]
            if wanted <= 0:
                return float(2 ** ((index + 0.5) / _SCALE))
        return None


@dataclass
class CallSums:
    """The sums over some calls.

    Args:
        calls: How many were made.
        errors: Of these, ended in an error.
        resends: How many times the client has sent one again.
        reused: Calls that were answered by what an earlier one has paid for.
        unknown: Calls that were answered, and whose tokens are not all known.
        answered: Calls whose answer says something about its quality.
        odd: Of these, with one signal at least.
        signals: How many answers have each signal.
        models: How many calls asked each model, of the first twenty.
        latency: Of the calls that have ended.
        first_token: Of streams.
    """

    calls: int = 0
    errors: int = 0
    resends: int = 0
    reused: int = 0
    unknown: int = 0
    answered: int = 0
    odd: int = 0
    signals: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    latency: Sketch = field(default_factory=Sketch)
    first_token: Sketch = field(default_factory=Sketch)

    def add(self, attributes: Mapping[str, Any], seconds: float, *, failed: bool) -> None:
        """Add a call that has ended.

        Args:
            attributes: Of its span, with values as they were before they were JSON.
            seconds: How long it took.
            failed: Whether it ended in an error.
        """
        self.calls += 1
        self.errors += failed
        resends = attributes.get(_RESENDS)
        self.resends += resends if isinstance(resends, int) else 0
        if attributes.get(_REUSED_FROM) is not None:
            self.reused += 1
        else:
            self.latency.add(seconds)
        self.unknown += attributes.get(USAGE_UNKNOWN) is True
        if isinstance(model := attributes.get(_MODEL), str):
            self._count_models({model[:_LONGEST_NAME]: 1})
        signals = signals_of(attributes)
        self.answered += attributes.get(ANSWER_CHARS) is not None or bool(signals)
        self.odd += bool(signals)
        for signal in signals:
            self.signals[signal] += 1
        first = next((each for name in _FIRST_TOKEN if (each := attributes.get(name))), None)
        if isinstance(first, (int, float)):
            self.first_token.add(float(first))

    def merge(self, other: CallSums) -> None:
        """Add all of another."""
        for name in _NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.signals.update(other.signals)
        self._count_models(other.models)
        self.latency.merge(other.latency)
        self.first_token.merge(other.first_token)

    def _count_models(self, models: Mapping[str, int]) -> None:
        for name, calls in models.items():
            if name in self.models or len(self.models) < _MODELS:
                self.models[name] += calls

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON: what is 0 or empty is left out."""
        found: dict[str, Any] = {name: getattr(self, name) for name in _NUMBERS}
        for name in _COUNTERS:
            found[name] = dict(getattr(self, name))
        for name in _SKETCHES:
            found[name] = getattr(self, name).to_list()
        return {name: value for name, value in found.items() if value}

    @classmethod
    def from_dict(cls, fields: object) -> CallSums:
        """Return what :meth:`to_dict` made; of anything else what can be read."""
        given = fields if isinstance(fields, Mapping) else {}
        sums = cls()
        for name in _NUMBERS:
            setattr(sums, name, _whole(given.get(name)))
        for name in _COUNTERS:
            if isinstance(counts := given.get(name), Mapping):
                setattr(sums, name, Counter({str(key): _whole(n) for key, n in counts.items()}))
        for name in _SKETCHES:
            setattr(sums, name, Sketch.from_list(given.get(name)))
        return sums

    def to_json(self) -> str:
        """Serialise to one JSON object."""
        return json.dumps(self.to_dict(), separators=(",", ":"))


_NUMBERS = ("calls", "errors", "resends", "reused", "unknown", "answered", "odd")
_COUNTERS = ("signals", "models")
_SKETCHES = ("latency", "first_token")


def _whole(value: object) -> int:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return max(0, value) if is_number and isinstance(value, int) else 0
