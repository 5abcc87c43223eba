"""What is noted of the plans that a Spark Connect server has run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from mlflow_ctx_autolog.driver.executed_plans import ExecutedPlans


class Node:
    """As the server sends it: a node of the plan that it has run."""

    def __init__(self, plan_id: int, name: str) -> None:
        self.plan_id, self.name = plan_id, name


class Client:
    """As that of Spark Connect, as far as it is asked: makes something of each node."""

    def _build_metrics(self, metrics: Any) -> Iterator[Any]:
        return (built(node) for node in metrics.metrics)


def built(node: Node) -> str:
    if node.name == "broken":
        raise ValueError("the client's own")
    return f"{node.name}, built"


def answered(plans: ExecutedPlans, operation: str, *nodes: Node) -> list[str]:
    """Run a plan, which has these nodes."""
    plans.expect(SimpleNamespace(operation_id=operation))
    return list(Client()._build_metrics(SimpleNamespace(metrics=nodes)))


@pytest.fixture
def plans() -> Iterator[ExecutedPlans]:
    found = ExecutedPlans()
    yield found
    found.unwatch()


SESSION = SimpleNamespace(_client=Client())


def test_nodes_are_counted_by_kind(plans: ExecutedPlans) -> None:
    nodes = [
        Node(number, name)
        for number, name in enumerate(
            ("MapInPandas", "ArrowEvalPython", "InMemoryTableScan", "Project")
        )
    ]
    plans.watch(SESSION)
    plans.watch(SESSION)

    assert answered(plans, "operation-1", *nodes) == [f"{node.name}, built" for node in nodes]
    # Some come twice.
    answered(plans, "operation-1", nodes[0])
    assert plans.since(0) == {"operation-1": {"*": 2, "InMemoryTableScan": 1}}
    assert plans.since(1 << 62) == {}


def test_plans_without_functions_are_left_out(plans: ExecutedPlans) -> None:
    plans.watch(SESSION)
    answered(plans, "operation-1", Node(1, "Range"))
    assert plans.since(0) == {}


def test_functions_are_told_of_once_they_have_run() -> None:
    """Not where a plan was only looked at, reads a cache, or runs what others handed over."""
    told: list[int] = []
    plans = ExecutedPlans(told.append)
    plans.watch(SESSION)
    answered(plans, "of others", Node(1, "ArrowEvalPython"))
    plans.hand_over()
    plans.hand_over()
    answered(plans, "cached", Node(1, "InMemoryTableScan"))
    assert told == []
    for _ in range(2):
        answered(plans, "run", Node(1, "ArrowEvalPython"))
    plans.unwatch()
    assert told == [2]


def test_what_cannot_be_noted_is_no_error(plans: ExecutedPlans) -> None:
    plans.watch(SESSION)
    nodes = SimpleNamespace(metrics=[Node(1, "MapInPandas")])
    # Nothing was requested on this thread.
    assert list(Client()._build_metrics(nodes)) == ["MapInPandas, built"]
    assert plans.since(0) == {}


def test_errors_are_the_clients(plans: ExecutedPlans) -> None:
    """No frame of ours is in their tracebacks."""
    plans.watch(SESSION)
    with pytest.raises(ValueError, match="the client's own") as raised:
        answered(plans, "operation-1", Node(1, "broken"))
    names = [entry.name for entry in raised.traceback]
    assert names[1:] == ["answered", "<genexpr>", "built"]


def test_each_thread_has_its_own_requests(plans: ExecutedPlans) -> None:
    plans.watch(SESSION)
    plans.expect(SimpleNamespace(operation_id="of this thread"))
    other = threading.Thread(target=answered, args=(plans, "of another", Node(1, "MapInPandas")))
    other.start()
    other.join()
    list(Client()._build_metrics(SimpleNamespace(metrics=[Node(1, "InMemoryTableScan")])))
    assert plans.since(0) == {
        "of another": {"*": 1},
        "of this thread": {"InMemoryTableScan": 1},
    }


def test_of_the_latest_operations_only(plans: ExecutedPlans) -> None:
    """The memory of a driver that runs for weeks is bounded."""
    plans.watch(SESSION)
    for number in range(1000):
        answered(plans, str(number), Node(1, "MapInPandas"))
    assert "999" in plans.since(0)
    assert len(plans.since(0)) == 300


def test_a_classic_session_has_nothing_to_watch(plans: ExecutedPlans) -> None:
    class Session:
        @property
        def client(self) -> Any:
            raise RuntimeError("only supported with Spark Connect")

    plans.watch(Session())
    plans.watch(None)
    assert plans.since(0) == {}
