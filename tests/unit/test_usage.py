"""Usage: what a tree of spans comes to, counted once."""

from __future__ import annotations

from typing import Any

import pytest

from mlflow_ctx_autolog.spans.amounts import Amounts, Tally, add, parse_amounts


def test_amounts_are_added_name_by_name() -> None:
    """Each name has a sum of its own, and what was added is left as it was."""
    total: Amounts = {"input_tokens": 1}
    more = {"input_tokens": 2, "output_tokens": 3}
    add(total, more)
    add(total, {})

    assert total == {"input_tokens": 3, "output_tokens": 3}
    assert more == {"input_tokens": 2, "output_tokens": 3}


@pytest.mark.parametrize(
    ("value", "amounts"),
    [
        ({"input_tokens": 1, "total_cost": 0.5}, {"input_tokens": 1, "total_cost": 0.5}),
        ('{"input_tokens": 1}', {"input_tokens": 1}),
        (b'{"input_tokens": 1}', {"input_tokens": 1}),
        ({"input_tokens": 1, "details": {"cached": 1}}, {"input_tokens": 1}),
        ({"input_tokens": None, "output_tokens": "3", "flag": True}, {}),
        ("{}", {}),
        ("[1, 2]", {}),
        ("7", {}),
        ("not JSON", {}),
        (b"\xff", {}),
        ("", {}),
        (None, {}),
        (7, {}),
        ([("input_tokens", 1)], {}),
    ],
)
def test_amounts_are_read_from_what_mlflow_keeps(value: Any, amounts: Amounts) -> None:
    """Numbers by name are read from an object or its JSON; all else is no amounts."""
    assert parse_amounts(value) == amounts


def test_amounts_of_siblings_are_added() -> None:
    """What the children of one span report is added up."""
    tally = Tally()
    for number in range(3):
        tally.ended(f"call {number}", "task", {"input_tokens": 1, "output_tokens": number})

    assert tally.total == {"input_tokens": 3, "output_tokens": 3}


def test_span_without_amounts_speaks_for_those_below() -> None:
    """What is reported at the bottom arrives at the top, through spans that report nothing."""
    tally = Tally()
    tally.ended("call", "tool", {"input_tokens": 1})
    tally.ended("tool", "agent", {})
    tally.ended("agent", "task", {})

    assert tally.total == {"input_tokens": 1}


def test_span_that_repeats_those_below_is_counted_once() -> None:
    """A chain's own report stands for the calls below it, and not for those beside it."""
    tally = Tally()
    tally.ended("call 1", "chain", {"input_tokens": 1})
    tally.ended("call 2", "chain", {"input_tokens": 2})
    tally.ended("beside", "task", {"input_tokens": 10})
    tally.ended("chain", "task", {"input_tokens": 3})

    assert tally.total == {"input_tokens": 13}


def test_report_far_above_stands_for_all_below() -> None:
    """Also where spans without a report lie between a chain and its calls, they count once."""
    tally = Tally()
    tally.ended("call", "tool", {"input_tokens": 1})
    tally.ended("tool", "chain", {})
    tally.ended("chain", "task", {"input_tokens": 1})

    assert tally.total == {"input_tokens": 1}


def test_total_of_a_tree_that_is_not_finished() -> None:
    """What has ended counts at once, though its parent is still open."""
    tally = Tally()
    tally.ended("call 1", "chain", {"input_tokens": 1})
    assert tally.total == {"input_tokens": 1}
    tally.ended("call 2", None, {"input_tokens": 2})

    assert tally.total == {"input_tokens": 3}


def test_total_is_a_copy() -> None:
    """Changing a total does not change the tally."""
    tally = Tally()
    tally.ended("call", "task", {"input_tokens": 1})
    tally.total["input_tokens"] = 100

    assert tally.total == {"input_tokens": 1}


def test_nothing_is_kept_of_finished_spans() -> None:
    """The tally of a task with many calls is as small as that of a task with one."""
    tally = Tally()
    for number in range(100):
        tally.ended(f"call {number}", f"tool {number}", {"input_tokens": 1})
        tally.ended(f"tool {number}", "task", {})

    assert tally.total == {"input_tokens": 100}
    assert len(tally._below) == 1


def test_nothing_reported_is_nothing() -> None:
    """Without a report the total has no names, rather than zeros."""
    tally = Tally()
    tally.ended("call", "task", {})

    assert tally.total == {}
