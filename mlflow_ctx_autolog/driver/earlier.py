"""Functions that Spark was given before tracing was on, found where an action is to run them."""

from __future__ import annotations

import re
import weakref
from bisect import bisect
from collections.abc import Callable, Collection, Iterator
from typing import Any

from mlflow_ctx_autolog.driver import spark as spark_api
from mlflow_ctx_autolog.driver.instrumentor import name_of, users_function_of

__all__ = ["EarlierFunctions", "functions_in"]

# How a tree of plan nodes is asked for with all columns, however many there are; a flag more from
# Spark 4.1 on.
_ALL_COLUMNS = (True, False, 1_000_000, False)
_CACHED = "InMemoryRelation"
# What may come before the parenthesis of a function's arguments.
_NAME = re.compile(r"[\w<>.$]+$")
_CALL = re.compile(r"([A-Za-z_]\w*)\s*\(")


class EarlierFunctions:
    """Says which functions that an action runs are beyond reach, once for each of them.

    Where a DataFrame of classic Spark was built before tracing was on, the JVM has its functions,
    pickled; and so the session has what was registered. The plan tells them apart from later ones:
    its expressions are numbered as they are made, and a registered function has a name.

    Args:
        names: Of all functions that went through the patches of PySpark.
        traces: Whether all functions are to be traced now.
        warn: Is told what to say.
    """

    def __init__(
        self, names: Collection[str], traces: Callable[[], bool], warn: Callable[[str], None]
    ) -> None:
        self._names = names
        self._traces = traces
        self._warn = warn
        # The JVM's numbers of expressions when tracing was turned on, off, on, and so forth.
        self._turns: list[int] = []
        self._told: set[str] = set()
        # To show a plan of many columns takes a tenth of a second.
        self._looked_at: weakref.WeakSet[Any] = weakref.WeakSet()
        self._is_on = False
        self._is_late = False
        self._registered: set[str] | None = None

    def install(self) -> None:
        """Take what is made from now on for traced. Idempotent."""
        if not self._is_on:
            self._is_on = True
            self._turn()
            self._is_late = spark_api.active_session() is not None
            self._registered = None
            self._told.clear()
            self._looked_at.clear()

    def uninstall(self) -> None:
        """Take what is made from now on for untraced. Idempotent."""
        if self._is_on:
            self._is_on = False
            self._turn()

    def look_at(self, receiver: Any) -> None:
        """Say what an action is to run untraced, of a DataFrame or its writer. Never raises.

        On Spark Connect, where the plan is made as it is sent, there is nothing to say yet.
        """
        frame = getattr(receiver, "__dict__", {}).get("_df", receiver)
        if not (self._traces() and any(self._turns)) or not hasattr(type(frame), "sparkSession"):
            # Spark has no plan that is older, or this is an RDD.
            return
        try:
            if frame in self._looked_at:
                return
            self._looked_at.add(frame)
            found = functions_in(_plan_of(frame))
            self._say({name for name, number in found if self._is_earlier(name, number)})
        except Exception:
            # A plan that cannot be shown, for which Spark has its own words.
            return

    def look_at_request(self, request: Any) -> None:
        """Say what a request to Spark Connect has called by names that were registered before."""
        if not (self._traces() and self._is_late):
            return
        called = set(_called_by_name(request.plan)) - {name.lower() for name in self._names}
        if not called:
            return
        if self._registered is None:
            # Set before the server is asked, since that is a request, too.
            self._registered = set()
            rows = spark_api.active_session().sql("SHOW USER FUNCTIONS").collect()
            self._registered = {str(row[0]).rpartition(".")[2].lower() for row in rows}
        self._say(called & self._registered)

    def say_of_rdd(self, rdd: Any) -> None:
        """Say that an RDD was computed before, so that Spark has its function."""
        if self._traces() and (users := users_function_of(rdd)) is not None:
            self._say({name_of(users)})

    def _turn(self) -> None:
        number = _next_number()
        # The first is the begin of being on; before Spark has begun, all is to come.
        self._turns.append(max(number, self._turns[-1] if self._turns else 0))

    def _is_earlier(self, name: str, number: int) -> bool:
        is_from_between = bisect(self._turns, number) % 2 == 0
        return is_from_between or name not in self._names

    def _say(self, names: set[str]) -> None:
        if not (new := sorted(names - self._told)):
            return
        self._told.update(new)
        one = len(new) == 1
        self._warn(
            f"{', '.join(new)} {'was' if one else 'were'} handed to Spark before tracing was "
            f"turned on, so that model calls {'it makes' if one else 'they make'} in this job are "
            "not traced: Spark has pickled the function already. Call ctx_autolog.enable() first; "
            "or build the DataFrame, or register the function, once more."
        )


def functions_in(tree: str) -> Iterator[tuple[str, int]]:
    """Yield the Python functions of a plan, with the numbers of their expressions.

    Args:
        tree: The plan, as Spark shows it. What lies below a cached table is left out.
    """
    cached: int | None = None
    for line in tree.splitlines():
        depth = len(line) - len(line.lstrip(" :+-*"))
        if cached is not None and depth > cached:
            continue
        cached = depth if _CACHED in line else None
        for end in re.finditer(r"\)#(\d+)", line):
            begin = _opening(line, end.start())
            name = _NAME.search(line[:begin])
            # A column may be called sum(x), and has no numbered column within.
            if name and "#" in line[begin : end.start()]:
                yield name[0], int(end[1])


def _opening(line: str, end: int) -> int:
    depth = 0
    for position in range(end, -1, -1):
        depth += {")": 1, "(": -1}.get(line[position], 0)
        if not depth:
            return position
    return 0


def _plan_of(frame: Any) -> str:
    execution = frame._jdf.queryExecution()
    try:
        return str(execution.withCachedData().treeString(*_ALL_COLUMNS, False))
    except Exception:
        return str(execution.withCachedData().treeString(*_ALL_COLUMNS))


def _next_number() -> int:
    context = spark_api.spark_context(spark_api.active_session())
    if context is None:
        return 0
    try:
        catalyst = context._jvm.org.apache.spark.sql.catalyst
        return int(catalyst.expressions.NamedExpression.newExprId().id())
    except Exception:
        return 0


def _called_by_name(message: Any) -> Iterator[str]:
    """Yield what a message of Spark Connect calls, or what of its SQL looks like a call.

    In small letters, and without what it brings along itself.
    """
    is_inline = message.DESCRIPTOR.name.startswith("CommonInline")
    for field, value in message.ListFields():
        if isinstance(value, str):
            if field.name in ("query", "sql", "expression"):
                yield from map(str.lower, _CALL.findall(value))
            elif field.name == "function_name" and not is_inline:
                yield value.lower()
        elif field.message_type is not None and hasattr(value, "ListFields"):
            yield from _called_by_name(value)
        elif field.message_type is not None and not hasattr(value, "items"):
            for each in value:
                yield from _called_by_name(each)
