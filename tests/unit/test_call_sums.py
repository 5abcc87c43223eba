"""Sums that travel, and percentiles of what was never kept."""

from __future__ import annotations

import json
import math
import random

import pytest

from mlflow_ctx_autolog.spans.call_sums import CallSums, Sketch
from mlflow_ctx_autolog.stores.stored_trace import joined_metadata, split_metadata


@pytest.mark.parametrize("percent", [50, 95, 99])
def test_percentiles_are_known_to_a_few_percent(percent: int) -> None:
    """Of two processes together as of one, for short and long calls alike."""
    numbers = random.Random(3)
    for scale in (0.002, 0.5, 30.0):
        seconds = [scale * numbers.lognormvariate(0, 0.7) for _ in range(5000)]
        one, two = Sketch(), Sketch()
        for place, each in enumerate(seconds):
            (one if place % 3 else two).add(each)
        one.merge(two)

        true = sorted(seconds)[math.ceil(len(seconds) * percent / 100) - 1]
        assert one.percentile(percent) == pytest.approx(true, rel=0.023)


def test_sketch_takes_whatever_clocks_say() -> None:
    """Nothing, less than nothing and more than a day fall into the buckets at the ends."""
    sketch = Sketch()
    for seconds in (0.0, -1.0, 1e-9, 1e9, math.inf):
        sketch.add(seconds)

    assert sketch.count == 5
    assert len(sketch.buckets) == 2
    assert Sketch().percentile(50) is None


def test_sums_travel() -> None:
    """What was added is there after the journey, and added up with others."""
    sums = CallSums()
    sums.add(
        {
            "gen_ai.response.finish_reasons": ["length"],
            "llm.answer.chars": 5,
            "model": "gpt-5",
            "http.request.resend_count": 2,
            "gen_ai.response.time_to_first_chunk": 0.2,
        },
        1.0,
        failed=False,
    )
    sums.add({}, 0.5, failed=True)
    sums.add({"llm.reused_from": "tr-1/a", "llm.answer.chars": 1}, 0.0, failed=False)
    sums.add({"llm.usage.unknown": True}, 1.0, failed=False)
    other = CallSums.from_dict(json.loads(sums.to_json()))
    assert other == sums
    other.merge(sums)

    assert (other.calls, other.errors, other.resends, other.reused) == (8, 2, 4, 2)
    assert (other.answered, other.odd, other.unknown) == (4, 2, 2)
    assert other.signals == {"cut_off": 2}
    assert other.models == {"gpt-5": 2}
    assert (other.latency.count, other.first_token.count) == (6, 2)


@pytest.mark.parametrize(
    "fields", [None, 7, [], {"calls": "many", "latency": [3, -5, 0], "signals": [1], "models": 7}]
)
def test_nonsense_is_nothing(fields: object) -> None:
    """What arrives from outside is parsed, and what cannot be is left out."""
    found = CallSums.from_dict(fields)

    assert found.calls == 0
    assert found.latency.count == 0


def test_sums_are_small() -> None:
    """Of calls as unlike as can be, they fit where a store keeps metadata: 8000 characters."""
    sums = CallSums()
    for step in range(4000):
        told = {"gen_ai.response.time_to_first_chunk": 1.01**step, "model": f"{step}" * 100}
        sums.add(told, 1.01**step, failed=False)

    assert len(sums.to_json()) < 8000


@pytest.mark.parametrize("length", [0, 1, 249, 250, 251, 246, 247, 492, 493, 8000])
def test_metadata_of_any_length(length: int) -> None:
    """Each piece is as short as MLflow's REST API lets through, and a missing one is noticed."""
    text = ("0123456789|" * 800)[:length]
    pieces = split_metadata("key", text)

    assert joined_metadata({**pieces, "key.77": "of a longer text before"}, "key") == text
    assert all(len(piece) <= 250 for piece in pieces.values())
    if len(pieces) > 1:
        del pieces[f"key.{len(pieces) - 1}"]
        assert joined_metadata(pieces, "key") is None
    assert joined_metadata({}, "key") is None
