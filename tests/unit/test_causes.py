"""Why a request was made again, on calls and attempts made for the purpose."""

from __future__ import annotations

from typing import Any

import pytest

from mlflow_ctx_autolog.reporting.calls import Attempt, Call, SparkFacts
from mlflow_ctx_autolog.reporting.causes import judge, skewed_hosts

SECOND = 1_000_000_000
ONCE = SparkFacts({"0": {"extract": 1}, "1": {"extract": 1}}, frozenset(), {0: 0, 1: 1, 2: 2})
TWICE = SparkFacts({"0": {"extract": 2}}, frozenset(), {0: 0, 1: 1})


def attempt(number: int, /, **changes: Any) -> Attempt:
    """An attempt that runs for the second with its number, in stage 0 of SQL execution 0."""
    facts: dict[str, Any] = {
        "span_id": f"task {number} {changes.get('process', 1)}",
        "trace_id": "tr-1",
        "function": "extract",
        "facts": SparkFacts(),
        "operation": None,
        "application": "app-1",
        "action": "0",
        "stage": 0,
        "partition": 0,
        "number": 0,
        "attempt_id": number,
        "handover": "one",
        "call_site": None,
        "speculation": None,
        "host": "worker",
        "process": 1,
        "outcome": "completed",
        "started": number * SECOND,
        "ended": number * SECOND + SECOND // 2,
        **changes,
    }
    facts.setdefault("execution", facts["action"])
    if facts["outcome"] == "running":
        facts["ended"] = None
    facts.setdefault("last_seen", facts["ended"] or facts["started"])
    return Attempt(**facts)


def call(task: Attempt | None, number: int = 0, **changes: Any) -> Call:
    """One call of an attempt, the same request in all."""
    started = (0 if task is None else task.started) + number
    facts: dict[str, Any] = {
        "trace_id": "tr-1",
        "experiment_id": "0",
        "span_id": f"call {started}",
        "interface": "Completions",
        "model": "gpt-test",
        "attempt": task,
        "started": started,
        "ended": started + 1,
        "failed": False,
        "error": None,
        "request": "same",
        "annotations": {},
        "resends": 0,
        "usage": {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3},
        "cost": None,
        "first_token": None,
        "prompt": "",
        **changes,
    }
    return Call(**facts)


def cause_of(one: Attempt, two: Attempt, *others: Call, skewed: tuple[str, ...] = ()) -> str:
    """Return why the second attempt made the request of the first again."""
    calls = sorted((call(one), call(two), *others), key=lambda each: each.started)
    (found,) = [each.cause for each in judge(calls, skewed=skewed) if each.cause is not None]
    return found.key


# Two attempts, how the second differs, and what that says.
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another SQL execution": ({}, {"action": "1", "stage": 1}, "another_action"),
    "another execution of the same action": (
        {"action": "0", "execution": "1"},
        {"action": "0", "execution": "2", "stage": 1, "handover": "two"},
        "plan_twice",
    ),
    "an RDD's action after an SQL one": ({}, {"action": None, "stage": 1}, "another_action"),
    "both actions read a cache": (
        {"facts": SparkFacts({"0": {"InMemoryTableScan": 1}})},
        {"facts": SparkFacts({"1": {"InMemoryTableScan": 1}}), "action": "1", "stage": 1},
        "lost_cache",
    ),
    "persisted too late": (
        {"facts": SparkFacts({"0": {"extract": 1}})},
        {"facts": SparkFacts({"1": {"InMemoryTableScan": 1}}), "action": "1", "stage": 1},
        "another_action",
    ),
    "another use of the function": ({}, {"stage": 1, "handover": "two"}, "plan_twice"),
    "twice in the plan, in another stage": ({"facts": TWICE}, {"stage": 1}, "plan_twice"),
    "twice in the plan, in another partition": ({"facts": TWICE}, {"partition": 1}, "plan_twice"),
    "both stages at once": ({}, {"stage": 1, "started": SECOND}, "plan_twice"),
    "another stage, nothing known": ({}, {"stage": 1}, "unknown"),
    "lost blocks of a shuffle": ({"facts": ONCE}, {"stage": 1}, "stage_retry"),
    "lost blocks of a cache": (
        {"facts": SparkFacts({"0": {"extract": 1, "InMemoryTableScan": 1}})},
        {"stage": 1},
        "lost_cache",
    ),
    "the stage again": ({}, {"number": 0}, "stage_retry"),
    "the stage again, after a retry": ({"number": 1}, {"number": 0}, "stage_retry"),
    "failed before": ({"outcome": "failed"}, {"number": 1}, "task_retry"),
    "killed, speculation off": (
        {"outcome": "running"},
        {"number": 1, "speculation": False},
        "task_retry",
    ),
    "killed, speculation on": (
        {"outcome": "running"},
        {"number": 1, "speculation": True},
        "unknown",
    ),
    "still seen after the copy began": (
        {"outcome": "running", "last_seen": 5 * SECOND},
        {"number": 1, "speculation": True},
        "speculative_copy",
    ),
    "a copy, as Spark says": (
        {"outcome": "running", "facts": SparkFacts({}, frozenset({2}), {0: 0})},
        {"number": 1, "speculation": True},
        "speculative_copy",
    ),
    "no copy, as Spark says": (
        {"outcome": "running", "facts": ONCE},
        {"number": 1, "speculation": True},
        "task_retry",
    ),
    "another partition, plan known": ({"facts": ONCE}, {"partition": 1}, "duplicate_row"),
    "another partition, nothing known": ({}, {"partition": 1}, "unknown"),
    "two RDD jobs": (
        {"action": None, "facts": ONCE},
        {"action": None, "stage": 1},
        "another_action",
    ),
    "two lines of the driver": (
        {"action": None, "call_site": "count at a.py:1"},
        {"action": None, "stage": 1, "call_site": "collect at a.py:2"},
        "another_action",
    ),
    "RDDs, nothing known": ({"action": None}, {"action": None, "stage": 1}, "unknown"),
    "one task, two processes": ({}, {"attempt_id": 1, "process": 2}, "udf_duplicated"),
    "one task, two uses": ({}, {"attempt_id": 1, "process": 2, "handover": "two"}, "plan_twice"),
    "no ids": ({"attempt_id": None}, {}, "unknown"),
    "no partition's attempt number": ({"number": None}, {"number": 1}, "unknown"),
    "no hand-over": ({}, {"handover": None, "stage": 1}, "unknown"),
}


@pytest.mark.parametrize(
    ("nodes", "changes", "cause"),
    [
        (2, {"partition": 1}, "plan_twice"),
        (1, {"partition": 1}, "duplicate_row"),
        (2, {"stage": 1}, "plan_twice"),
        (1, {"stage": 1}, "stage_retry"),
    ],
)
def test_plans_that_do_not_name_their_functions(
    nodes: int, changes: dict[str, Any], cause: str
) -> None:
    """Where an operation runs one function, its nodes are that one's; of several, nothing is."""
    facts = SparkFacts({"operation-1": {"*": nodes}})
    one, two = (
        attempt(number, facts=facts, operation="operation-1", **each)
        for number, each in ((1, {}), (2, changes))
    )
    other = attempt(3, facts=facts, operation="operation-1", function="parse", partition=2)

    judged = judge([call(one), call(two)], attempts=[one, two])
    assert [each.cause and each.cause.key for each in judged] == [None, cause]
    judged = judge([call(one), call(two)], attempts=[one, two, other])
    assert [each.cause and each.cause.key for each in judged] == [None, "unknown"]


@pytest.mark.parametrize("name", PAIRS)
def test_cause_of_a_pair(name: str) -> None:
    """Each relation of two attempts has its cause, and none is made up where facts are missing."""
    before, after, expected = PAIRS[name]
    one = attempt(1, **before)
    two = attempt(2, **{"facts": one.facts, "action": one.action, **after})

    assert cause_of(one, two) == expected


def test_copy_that_overtakes_is_a_copy() -> None:
    """Which of the two was faster does not matter: it is the later attempt that was the copy."""
    straggler = attempt(1, ended=9 * SECOND, speculation=True)
    copy = attempt(2, number=1, speculation=True)
    judged = judge([call(copy), call(straggler, 5 * SECOND)])

    assert [each.cause and each.cause.key for each in judged] == [None, "speculative_copy"]


def test_same_request_in_one_attempt() -> None:
    """It is a duplicate row, or the client's retry where the first has failed."""
    task = attempt(1)
    again, retried = call(task, 2), call(task, 4)
    failed = call(task, 2, failed=True)

    assert [each.cause and each.cause.key for each in judge([call(task), again])] == [
        None,
        "duplicate_row",
    ]
    judged = judge([failed, retried])
    assert [each.cause and each.cause.key for each in judged] == [None, "client_retry"]
    assert [each.kept for each in judged] == [False, True]


def test_part_of_a_partition_is_rows_not_a_plan() -> None:
    """What is evaluated again is a whole partition; less than that are duplicate rows."""
    one, two = attempt(1, facts=TWICE), attempt(2, facts=TWICE, partition=1)

    assert cause_of(one, two, call(two, 3, request="another")) == "duplicate_row"


def test_clocks_that_disagree_are_not_compared() -> None:
    """Attempts on hosts whose clocks disagree do not overlap, whatever their times say."""
    one = attempt(1, outcome="running", last_seen=9 * SECOND, speculation=True)
    two = attempt(2, number=1, speculation=True, host="other")

    assert cause_of(one, two) == "speculative_copy"
    assert cause_of(one, two, skewed=("other",)) == "unknown"
    assert skewed_hosts([one, two], opened=int(1.5 * SECOND)) == {"worker": 0.5}


def test_closest_relative_explains() -> None:
    """Of several earlier calls, one of the same attempt says more than one of another action."""
    one, two = attempt(1), attempt(2, action="1", stage=1)
    judged = judge([call(one), call(two), call(two, 5)])

    assert [each.cause and each.cause.key for each in judged] == [
        None,
        "another_action",
        "duplicate_row",
    ]
    assert judged[2].repeats is judged[1].call


def test_other_functions_and_nameless_requests_are_distinct() -> None:
    """The same request of two functions, and calls that say nothing, repeat nothing."""
    one, two = attempt(1), attempt(2, function="review", action="1")
    judged = judge([call(one), call(two), call(one, 3, request=None), call(one, 4, request=None)])

    assert [each.cause for each in judged] == [None] * 4


def test_users_key_decides() -> None:
    """What the user calls the same request is the same, whatever was asked."""
    task = attempt(1)
    calls = [call(task, number, request=str(number)) for number in range(3)]
    judged = judge(calls, key=lambda each: "one")

    assert [each.cause and each.cause.key for each in judged] == [None, *["duplicate_row"] * 2]
