"""What a Spark Connect server tells its client, this driver, of the plans that it has run."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from mlflow_ctx_autolog.patching import Patch
from mlflow_ctx_autolog.stores.stored_trace import ANY_FUNCTION

__all__ = ["ExecutedPlans"]

_CACHE_SCAN = "InMemoryTableScan"
_PYTHON_NODE = re.compile("Python|Pandas|InArrow")
# Of the latest ones.
_KEPT = 300


class ExecutedPlans:
    """Notes, for each operation of a Spark Connect session, which nodes its final plan had.

    The server sends them with an action's results, and the client hands them to nobody else.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._patch: Patch | None = None
        self._plans: OrderedDict[str, tuple[int, dict[str, int]]] = OrderedDict()

    def watch(self, session: Any) -> None:
        """Note the plans of a session, if it is one of Spark Connect. Idempotent."""
        # A classic session has a property of the public name, which raises.
        client = type(getattr(session, "__dict__", {}).get("_client"))
        if self._patch is None and hasattr(client, "_execute_and_fetch_as_iterator"):
            self._patch = Patch(client, "_execute_and_fetch_as_iterator", self._fetch)
        if self._patch is not None:
            self._patch.apply()

    def unwatch(self) -> None:
        """Idempotent."""
        if self._patch is not None:
            self._patch.revert()

    def since(self, time_ms: int) -> dict[str, dict[str, int]]:
        """Return, for each operation since a time, how many nodes of its plan were of a kind.

        Args:
            time_ms: Milliseconds since the epoch.

        Returns:
            By operation id: how many nodes run Python functions, as :data:`ANY_FUNCTION`, and how
            many read a cached table (``InMemoryTableScan``). Without operations that do neither.
        """
        with self._lock:
            return {
                operation: nodes
                for operation, (ended, nodes) in self._plans.items()
                if ended >= time_ms
            }

    def _fetch(
        self, original: Callable[..., Iterator[Any]], *args: Any, **kwargs: Any
    ) -> Iterator[Any]:
        metrics = []
        for item in original(*args, **kwargs):
            if type(item).__name__ == "PlanMetrics":
                metrics.append(item)
            yield item
        # Whatever a later release sends, the user's results have come.
        with suppress(Exception):
            self._note(kwargs["req"] if "req" in kwargs else args[1], metrics)

    def _note(self, request: Any, metrics: list[Any]) -> None:
        names = {each.plan_id: str(each.name) for each in metrics}
        nodes = Counter(kind for name in names.values() if (kind := _kind(name)) is not None)
        if not nodes:
            return
        with self._lock:
            self._plans[str(request.operation_id)] = (time.time_ns() // 1_000_000, dict(nodes))
            while len(self._plans) > _KEPT:
                self._plans.popitem(last=False)


def _kind(name: str) -> str | None:
    if _CACHE_SCAN in name:
        return _CACHE_SCAN
    return ANY_FUNCTION if _PYTHON_NODE.search(name) else None
