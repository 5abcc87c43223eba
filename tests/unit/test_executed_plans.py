"""What is noted of the plans that a Spark Connect server has run."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from mlflow_ctx_autolog.driver.executed_plans import ExecutedPlans


class PlanMetrics:
    """As the client of Spark Connect has them."""

    def __init__(self, plan_id: int, name: str) -> None:
        self.plan_id, self.name = plan_id, name


class Client:
    """Has run one plan, whose nodes come after the results, some of them twice."""

    def __init__(self, *items: Any) -> None:
        self.items = items
        self.is_closed = False

    def _execute_and_fetch_as_iterator(self, request: Any, observations: Any) -> Iterator[Any]:
        try:
            for item in self.items:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.is_closed = True


@pytest.fixture
def plans() -> Iterator[ExecutedPlans]:
    found = ExecutedPlans()
    yield found
    found.unwatch()


REQUEST = SimpleNamespace(operation_id="operation-1")


def test_nodes_are_counted_by_kind(plans: ExecutedPlans) -> None:
    nodes = ("MapInPandas", "ArrowEvalPython", "InMemoryTableScan", "Project")
    metrics = [PlanMetrics(number, name) for number, name in enumerate(nodes)]
    client = Client("rows", *metrics, metrics[0])
    plans.watch(SimpleNamespace(_client=client))
    plans.watch(SimpleNamespace(_client=client))

    assert list(client._execute_and_fetch_as_iterator(REQUEST, {})) == list(client.items)
    assert plans.since(0) == {"operation-1": {"*": 2, "InMemoryTableScan": 1}}
    assert plans.since(1 << 62) == {}


def test_plans_without_functions_are_left_out(plans: ExecutedPlans) -> None:
    client = Client(PlanMetrics(1, "Range"))
    plans.watch(SimpleNamespace(_client=client))
    list(client._execute_and_fetch_as_iterator(REQUEST, {}))
    assert plans.since(0) == {}


def test_what_cannot_be_noted_is_no_error(plans: ExecutedPlans) -> None:
    client = Client(PlanMetrics(1, "MapInPandas"))
    plans.watch(SimpleNamespace(_client=client))
    assert list(client._execute_and_fetch_as_iterator(object(), {})) == list(client.items)
    assert plans.since(0) == {}


def test_errors_and_early_ends_are_the_clients(plans: ExecutedPlans) -> None:
    """What the user sees and does is as without it."""
    client = Client("rows", ValueError("the query's"))
    plans.watch(SimpleNamespace(_client=client))
    with pytest.raises(ValueError, match="the query's"):
        list(client._execute_and_fetch_as_iterator(REQUEST, {}))

    client.items = ("rows", "more rows")
    client.is_closed = False
    results = client._execute_and_fetch_as_iterator(REQUEST, {})
    assert next(results) == "rows"
    results.close()  # type: ignore[attr-defined]
    assert client.is_closed


def test_of_the_latest_operations_only(plans: ExecutedPlans) -> None:
    """The memory of a driver that runs for weeks is bounded."""
    client = Client(PlanMetrics(1, "MapInPandas"))
    plans.watch(SimpleNamespace(_client=client))
    for number in range(1000):
        request = SimpleNamespace(operation_id=str(number))
        list(client._execute_and_fetch_as_iterator(request, {}))
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
