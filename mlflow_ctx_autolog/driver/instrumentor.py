"""The places of PySpark through which functions reach the workers."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow_ctx_autolog.driver.submitted import SubmittedFunction, is_submitted
from mlflow_ctx_autolog.patching import Patch, Redirect

__all__ = [
    "FunctionUse",
    "SparkInstrumentor",
    "find_class",
    "name_of",
    "users_function",
    "users_function_of",
]


@dataclass(frozen=True)
class _PatchPoint:
    """A method of PySpark through which functions reach the workers.

    Args:
        modules: Where the class lives, in the order to look: it moved between releases.
        owner: The class.
        method: Its method, or property.
        attribute: The attribute of the object that holds the function, where it has one.
        parameter: The parameter that takes the function, the first after ``self``, where not.
            Where there is neither, the function is what the method returns.
        once: Whether Spark calls the function once in a task attempt, with the partition, rather
            than many times.
        on_driver: Whether Spark calls it on the driver, or beside the server.
        data_source: Whether it is a data source's class.
    """

    modules: tuple[str, ...]
    owner: str
    method: str
    attribute: str | None = None
    parameter: str | None = None
    once: bool = False
    on_driver: bool = False
    data_source: bool = False


_RDD = ("pyspark.core.rdd", "pyspark.rdd")
_UDF, _UDTF = ("pyspark.sql.udf",), ("pyspark.sql.udtf",)
_STREAM = ("pyspark.sql.streaming.readwriter",)
_CONNECT_STREAM = ("pyspark.sql.connect.streaming.readwriter",)
_CONNECT_EXPRESSIONS = ("pyspark.sql.connect.expressions",)
_CONNECT_PLAN = ("pyspark.sql.connect.plan",)
_DATA_SOURCE = ("pyspark.sql.datasource",)

# The few through which all others go: mapInPandas(), groupBy().applyInPandas() and the pandas API
# make UDFs, and RDD.map() is a mapPartitionsWithIndex(). Where the object itself holds the
# function, a copy of it that holds another is asked instead, and what the user has stays as it is.
_PATCH_POINTS = (
    _PatchPoint(_UDF, "UserDefinedFunction", "__call__", attribute="func"),
    _PatchPoint(_UDF, "UserDefinedFunction", "_judf", attribute="func"),
    _PatchPoint(_UDTF, "UserDefinedTableFunction", "__call__", attribute="func"),
    _PatchPoint(_UDTF, "UserDefinedTableFunction", "_judtf", attribute="func"),
    _PatchPoint(_CONNECT_EXPRESSIONS, "PythonUDF", "to_plan", attribute="_func"),
    _PatchPoint(_CONNECT_PLAN, "PythonUDTF", "to_plan", attribute="_func"),
    _PatchPoint(_RDD, "RDD", "mapPartitionsWithIndex", parameter="f", once=True),
    _PatchPoint(_RDD, "RDDBarrier", "mapPartitions", parameter="f", once=True),
    _PatchPoint(_RDD, "RDDBarrier", "mapPartitionsWithIndex", parameter="f", once=True),
    # Connect's writer asks the classic one for the function, too.
    _PatchPoint(_STREAM, "DataStreamWriter", "_construct_foreach_function", once=True),
    _PatchPoint(
        _CONNECT_STREAM, "DataStreamWriter", "foreachBatch", parameter="func", on_driver=True
    ),
    _PatchPoint(
        _DATA_SOURCE, "DataSourceRegistration", "register", parameter="dataSource", data_source=True
    ),
    _PatchPoint(
        _CONNECT_PLAN, "PythonDataSource", "to_plan", attribute="_data_source", data_source=True
    ),
)

# What Spark Connect registers under a name goes through these.
_REGISTERED = (
    (_CONNECT_EXPRESSIONS, "CommonInlineUserDefinedFunction", "to_plan_udf"),
    (_CONNECT_PLAN, "CommonInlineUserDefinedTableFunction", "udtf_plan"),
)

_RDD_POINT = _PatchPoint(_RDD, "PipelinedRDD", "_jrdd", attribute="func", once=True)

# PythonEvalType of mapInPandas() and mapInArrow(), whose functions are called once in a task.
_ONCE = (205, 207)
# Of transformWithState(), whose processors Spark asks for their states before there is a task.
_ASKED_FIRST = (211, 212, 213, 214)


@dataclass(frozen=True)
class FunctionUse:
    """A function that is being handed to Spark.

    Args:
        function: What Spark would run: the user's function or PySpark's own around it, or a class.
        users: The user's function.
        receiver: The RDD, UDF or writer it is handed to; None where that is not known.
        repeated: Whether Spark calls it many times in a task attempt.
        on_driver: Whether Spark calls it on the driver, or beside the server.
        asked_first: Whether Spark also loads it before there is a task, without broadcasts.
        data_source: Whether it is a data source's class, of which Spark makes functions for tasks.
    """

    function: Callable[..., Any]
    users: Callable[..., Any]
    receiver: Any
    repeated: bool
    on_driver: bool
    asked_first: bool
    data_source: bool


class SparkInstrumentor:
    """Has Spark get the user's functions beside what a worker needs to trace them.

    Args:
        submit: Called with each use of a function; returns what Spark gets instead, None where that
            is the function as it is. Not called for PySpark's own functions.
        too_late: Called with an RDD of the user's of which Spark has the function already.
    """

    def __init__(
        self,
        submit: Callable[[FunctionUse], SubmittedFunction | None],
        too_late: Callable[[Any], None] = lambda _: None,
    ) -> None:
        self._submit = submit
        self._too_late = too_late
        # By which Spark knows the functions that came by here.
        self.names: set[str] = set()
        self._rdds: weakref.WeakSet[Any] = weakref.WeakSet()
        self._patches: list[Patch | Redirect] = []
        # Keeps the JVM's side of a UDF from one use to the next, as PySpark does with the user's.
        self._copies: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def install(self) -> None:
        """Patch every point that the installed PySpark has. Idempotent."""
        if not self._patches:
            for point in _PATCH_POINTS:
                owner = find_class(point.modules, point.owner, point.method)
                if owner is not None:
                    self._patches.append(self._patch(owner, point))
            for modules, name, method in _REGISTERED:
                if (owner := find_class(modules, name, method)) is not None:
                    self._patches.append(Redirect(owner, method, self._named))
            if (owner := find_class(_RDD, "PipelinedRDD", "_jrdd")) is not None:
                self._patches.append(Redirect(owner, "_jrdd", self._with_submitted_rdd))
        for patch in self._patches:
            patch.apply()

    def uninstall(self) -> None:
        """Take the patches back. What Spark was given meanwhile keeps its context. Idempotent."""
        for patch in self._patches:
            patch.revert()
        self._copies.clear()

    def _patch(self, owner: type, point: _PatchPoint) -> Patch | Redirect:
        if point.attribute is not None:
            receiver = functools.partial(self._with_submitted, point, point.attribute)
            return Redirect(owner, point.method, receiver)
        if point.parameter is None:

            def make(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                return self._submitted(original(*args, **kwargs), None, point)

            return Patch(owner, point.method, make)
        parameter = point.parameter

        def take(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            receiver, *rest = args
            if parameter in kwargs:
                kwargs[parameter] = self._submitted(kwargs[parameter], receiver, point)
            elif rest:
                rest[0] = self._submitted(rest[0], receiver, point)
            return original(receiver, *rest, **kwargs)

        return Patch(owner, point.method, take)

    def _with_submitted(self, point: _PatchPoint, attribute: str, holder: Any) -> Any:
        """Return a copy of what holds a function, with what Spark is to get instead."""
        self._named(holder)
        function = getattr(holder, attribute)
        submitted = self._submitted(function, holder, point)
        if submitted is function:
            return holder
        known = self._copies.get(holder)
        if known is not None and _is_current(known, holder, getattr(known, attribute), submitted):
            return known
        changed = copy.copy(holder)
        setattr(changed, attribute, submitted)
        # Where classic Spark keeps the JVM's side of the UDF once it has been used.
        for placeholder in ("_judf_placeholder", "_judtf_placeholder"):
            if hasattr(changed, placeholder):
                setattr(changed, placeholder, None)
        self._copies[holder] = changed
        return changed

    def _named(self, holder: Any) -> Any:
        names = (getattr(holder, name, None) for name in ("_name", "_function_name"))
        self.names.update(name for name in names if isinstance(name, str))
        return holder

    def _with_submitted_rdd(self, rdd: Any) -> Any:
        """Have Spark get a function that an RDD has held since before there were patches."""
        if rdd._jrdd_val is None:
            self._rdds.add(rdd)
            submitted = self._submitted(rdd.func, rdd, _RDD_POINT, users_function_of(rdd))
            if submitted is not rdd.func:
                # Not by copy, since an RDD says that it must not be pickled.
                changed = object.__new__(type(rdd))
                vars(changed).update({**vars(rdd), "func": submitted})
                # Spark's side of it is the RDD's own from now on, as if it had made it.
                assert changed._jrdd is not None
                vars(rdd).update({**vars(changed), "func": rdd.func})
        elif rdd not in self._rdds and not rdd.is_cached:
            self._too_late(rdd)
        return rdd

    def _submitted(
        self, function: Any, receiver: Any, point: _PatchPoint, users: Any = None
    ) -> Any:
        if is_submitted(function) or (users := users or users_function(function)) is None:
            return function
        kind = getattr(receiver, "evalType", getattr(receiver, "_eval_type", None))
        use = FunctionUse(
            function,
            users,
            receiver,
            repeated=not (point.once or kind in _ONCE),
            on_driver=point.on_driver,
            # A table function or a data source can be asked for its schema.
            asked_first=kind in _ASKED_FIRST or isinstance(function, type),
            data_source=point.data_source,
        )
        return self._submit(use) or function


def _is_current(known: Any, holder: Any, before: Any, now: SubmittedFunction) -> bool:
    deterministic = [getattr(each, "deterministic", None) for each in (known, holder)]
    return bool(before.is_like(now) and deterministic[0] == deterministic[1])


def find_class(modules: Sequence[str], name: str, method: str) -> type | None:
    """Return a class of the installed PySpark that has a method; None if there is none.

    Args:
        modules: Where it may live, in the order to look.
        name: The class.
        method: Its method, or property.
    """
    for module in modules:
        if module.startswith("pyspark.sql.connect.") and importlib.util.find_spec("grpc") is None:
            # Spark Connect without its own dependencies. From a main module that is not a file,
            # PySpark would say that it skips its tests, and end the process.
            continue
        try:
            owner = getattr(importlib.import_module(module), name, None)
        except (ImportError, SystemExit):
            # Not in this release, or as above.
            continue
        if isinstance(owner, type) and hasattr(owner, method):
            return owner
    return None


def users_function(function: Any, depth: int = 5) -> Any:
    """Return the user's function, also from inside of PySpark's around it; None if there is none.

    PySpark hands over functions of its own: RDD.map(f) is a mapPartitionsWithIndex() of one that
    holds f, and RDD.count() of one that holds none. An object whose methods Spark calls will do
    for a function. There is none in what was submitted before.
    """
    if is_submitted(function):
        return None
    module = _top_module(function)
    if module in ("builtins", "_operator", _OURS):
        return None
    if module != "pyspark":
        is_one = callable(function) or any(hasattr(function, name) for name in _CALLED_METHODS)
        return function if is_one else None
    if depth == 0:
        return None
    held = (users_function(each, depth - 1) for each in _held_by(function))
    return next((users for users in held if users is not None), None)


def users_function_of(rdd: Any) -> Any:
    """Return the first of the user's functions that an RDD and those before it run untraced."""
    function, steps = rdd.func, []
    while getattr(function, "__name__", None) == "pipeline_func" and not is_submitted(function):
        cells = zip(function.__code__.co_freevars, function.__closure__, strict=True)
        held = {name: cell.cell_contents for name, cell in cells}
        steps.append(held["func"])
        function = held["prev_func"]
    found = (users_function(step) for step in (function, *reversed(steps)))
    return next((users for users in found if users is not None), None)


_OURS = __name__.partition(".")[0]
# Of the object that DataStreamWriter.foreach() takes, and of a StatefulProcessor.
_CALLED_METHODS = ("process", "handleInputRows")


def _top_module(function: Any) -> str:
    module = getattr(function, "__module__", None) or type(function).__module__
    return str(module).partition(".")[0]


def _held_by(function: Any) -> Iterator[Any]:
    values = list(getattr(getattr(function, "__self__", function), "__dict__", {}).values())
    for cell in getattr(function, "__closure__", None) or ():
        # Not filled yet where a function is defined later than one that uses it.
        with contextlib.suppress(ValueError):
            values.append(cell.cell_contents)
    yield from (value for value in values if not isinstance(value, type))


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a function, by which its tasks go."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", None) or type(function).__name__
