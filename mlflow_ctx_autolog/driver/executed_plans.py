"""What a Spark Connect server tells its client, this driver, of the plans that it has run."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
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

    Args:
        functions_ran: Called with the number of functions that an action of this thread has run,
            which were handed over on it: not those of a plan that was only looked at, registered,
            or read from a cache.
        request_ran: Called with each request of which the plan has run functions, whoever has
            handed them over.
    """

    def __init__(
        self,
        functions_ran: Callable[[int], None] = lambda _: None,
        request_ran: Callable[[Any], None] = lambda _: None,
    ) -> None:
        self._functions_ran = functions_ran
        self._request_ran = request_ran
        self._lock = threading.Lock()
        self._patch: Patch | None = None
        self._requested = threading.local()
        self._plans: OrderedDict[str, _Plan] = OrderedDict()

    def watch(self, session: Any) -> None:
        """Note the plans of a session, if it is one of Spark Connect. Idempotent."""
        # A classic session has a property of the public name, which raises.
        client = type(getattr(session, "__dict__", {}).get("_client"))
        if self._patch is None and hasattr(client, "_build_metrics"):
            self._patch = Patch(client, "_build_metrics", self._build_metrics)
        if self._patch is not None:
            self._patch.apply()

    def unwatch(self) -> None:
        """Idempotent."""
        if self._patch is not None:
            self._patch.revert()

    def expect(self, request: Any) -> None:
        """Take what comes next on this thread for the answer to a request.

        Args:
            request: Names its operation, once it has been sent.
        """
        self._requested.last = request

    def hand_over(self) -> None:
        """Note that a function was handed over on this thread."""
        self._requested.functions = getattr(self._requested, "functions", 0) + 1

    def since(self, time_ms: int) -> dict[str, dict[str, int]]:
        """Return, for each operation since a time, how many nodes of its plan were of a kind.

        Args:
            time_ms: Milliseconds since the epoch.

        Returns:
            By operation id: how many nodes run Python functions, as :data:`ANY_FUNCTION`, and how
            many read a cached table (``InMemoryTableScan``). Without operations that do neither.
        """
        with self._lock:
            latest = {name: plan for name, plan in self._plans.items() if plan.ended >= time_ms}
            return {name: nodes for name, plan in latest.items() if (nodes := plan.kinds())}

    def _build_metrics(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Whatever a later release sends, the user's results come.
        with suppress(Exception):
            request = self._requested.last
            if self._note(str(request.operation_id), args[1].metrics):
                self._request_ran(request)
        # Nothing of the user's, and no error, goes through here: it is a generator yet to run.
        return original(*args, **kwargs)

    def _note(self, operation: str, metrics: Iterable[Any]) -> bool:
        """Note nodes of a plan; return whether it has run functions."""
        names = {each.plan_id: str(each.name) for each in metrics}
        with self._lock:
            plan = self._plans.setdefault(operation, _Plan())
            plan.names.update(names)
            plan.ended = time.time_ns() // 1_000_000
            has_function = ANY_FUNCTION in plan.kinds()
            while len(self._plans) > _KEPT:
                self._plans.popitem(last=False)
        if has_function and (functions := getattr(self._requested, "functions", 0)):
            self._requested.functions = 0
            self._functions_ran(functions)
        return has_function


@dataclass
class _Plan:
    """The names of a plan's nodes, by their ids, and when they were last told of."""

    names: dict[int, str] = field(default_factory=dict)
    ended: int = 0

    def kinds(self) -> dict[str, int]:
        kinds = (_kind(name) for name in self.names.values())
        return dict(Counter(kind for kind in kinds if kind is not None))


def _kind(name: str) -> str | None:
    if _CACHE_SCAN in name:
        return _CACHE_SCAN
    return ANY_FUNCTION if _PYTHON_NODE.search(name) else None
