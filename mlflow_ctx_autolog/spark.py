"""All that touches PySpark on the driver: functions handed over, broadcasts, the application."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlflow_ctx_autolog.patching import Patch

__all__ = [
    "Handovers",
    "active_session",
    "application_id",
    "broadcast_text",
    "carrying",
    "session_of",
]

_CARRIES = "__mlflow_ctx_autolog__"


@dataclass(frozen=True)
class _Handover:
    """A method of PySpark that takes a function to run on the workers.

    Args:
        modules: Where the class lives, in the order to look: it moved between releases.
        owner: The class.
        method: Its method.
        parameter: The name of the parameter that takes the function, the first after ``self``.
    """

    modules: tuple[str, ...]
    owner: str
    method: str
    parameter: str


_CLASSIC = ("pyspark.sql.classic.dataframe", "pyspark.sql.dataframe")
_CONNECT = ("pyspark.sql.connect.dataframe",)
_RDD = ("pyspark.core.rdd", "pyspark.rdd")

_HANDOVERS = (
    _Handover(_CLASSIC, "DataFrame", "mapInPandas", "func"),
    _Handover(_CLASSIC, "DataFrame", "mapInArrow", "func"),
    _Handover(_CLASSIC, "DataFrame", "foreachPartition", "f"),
    _Handover(_CONNECT, "DataFrame", "mapInPandas", "func"),
    _Handover(_CONNECT, "DataFrame", "mapInArrow", "func"),
    _Handover(_CONNECT, "DataFrame", "foreachPartition", "f"),
    _Handover(_RDD, "RDD", "mapPartitions", "f"),
    _Handover(_RDD, "RDD", "foreachPartition", "f"),
)


class Handovers:
    """Makes the functions that users hand to Spark carry the driver's context.

    Args:
        wrap: Called with a user's function and the DataFrame or RDD it was handed to; returns
            what Spark gets instead. Not called for PySpark's own functions, nor for one that
            carries a context already.
    """

    def __init__(self, wrap: Callable[[Callable[..., Any], Any], Callable[..., Any]]) -> None:
        self._wrap = wrap
        self._patches: list[Patch] = []

    def install(self) -> None:
        """Patch every hand-over that the installed PySpark has. Idempotent."""
        if not self._patches:
            for handover in _HANDOVERS:
                if (owner := _find_owner(handover)) is not None:
                    replacement = self._replacement(handover.parameter)
                    self._patches.append(Patch(owner, handover.method, replacement))
        for patch in self._patches:
            patch.apply()

    def uninstall(self) -> None:
        """Take the patches back. What Spark was given meanwhile keeps its context. Idempotent."""
        for patch in self._patches:
            patch.revert()

    def _replacement(self, parameter: str) -> Callable[..., Any]:
        def hand_over(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if parameter in kwargs:
                kwargs[parameter] = self._prepared(kwargs[parameter], args[0])
            elif len(args) > 1:
                args = (args[0], self._prepared(args[1], args[0]), *args[2:])
            return original(*args, **kwargs)

        return hand_over

    def _prepared(self, function: Any, receiver: Any) -> Any:
        if not callable(function) or carries(function) or _is_pysparks(function):
            return function
        return self._wrap(function, receiver)


def _find_owner(handover: _Handover) -> type | None:
    for module in handover.modules:
        try:
            owner = getattr(importlib.import_module(module), handover.owner, None)
        except ImportError:
            # Not in this release, or Spark Connect without its own dependencies.
            continue
        if isinstance(owner, type) and hasattr(owner, handover.method):
            return owner
    return None


def _is_pysparks(function: Any) -> bool:
    # PySpark calls these methods itself, too: RDD.count() is a mapPartitions().
    return (getattr(function, "__module__", None) or "").partition(".")[0] == "pyspark"


def carries(function: Any) -> bool:
    """Whether a function carries a context already."""
    return hasattr(function, _CARRIES)


def carrying(
    function: Callable[..., Any], carrier: object, *, required: bool
) -> Callable[..., Any]:
    """Return a function that runs ``function`` as a traced task attempt, wherever it is run.

    It pickles by value, without this library, so that a worker that lacks the library can say
    so. It looks like ``function`` to :mod:`inspect`.

    Args:
        function: The user's function.
        carrier: A broadcast of a driver context's JSON, or that JSON.
        required: Raise on the worker where the carrier cannot be read, rather than run untraced.
    """
    name = _name_of(function)

    @functools.wraps(function)
    def run_as_task(*args: Any, **kwargs: Any) -> Any:
        try:
            from mlflow_ctx_autolog.worker import run_traced
        except ImportError as error:
            import socket
            import sys

            raise ImportError(
                f"mlflow-ctx-autolog cannot be imported on the Spark worker {socket.gethostname()} "
                f"by {sys.executable}: {error}. Install it on every node of the cluster (pip "
                "install mlflow-ctx-autolog), or call mlflow_ctx_autolog.disable() on the driver."
            ) from error
        return run_traced(function, name, carrier, required, args, kwargs)

    setattr(run_as_task, _CARRIES, True)
    return run_as_task


def _name_of(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", None) or type(function).__name__


def active_session() -> Any:
    """Return the active Spark session, classic or Connect; None if there is none."""
    if importlib.util.find_spec("pyspark") is None:
        return None
    from pyspark.sql import SparkSession

    return SparkSession.getActiveSession()


def session_of(receiver: Any) -> Any:
    """Return the session of a DataFrame, or the context of an RDD."""
    # Asked of the class: a DataFrame has its columns as attributes.
    return receiver.sparkSession if hasattr(type(receiver), "sparkSession") else receiver.ctx


def application_id(spark: Any) -> str | None:
    """Return Spark's application id; None where the session does not tell."""
    context = _spark_context(spark)
    if context is not None:
        return str(context.applicationId)
    try:
        return str(spark.conf.get("spark.app.id"))
    except Exception:
        return None


def broadcast_text(spark: Any, text: str) -> Any:
    """Return a Spark broadcast of ``text``; the text itself on Spark Connect, which has none."""
    context = _spark_context(spark)
    return text if context is None else context.broadcast(text)


def _spark_context(spark: Any) -> Any:
    if hasattr(spark, "applicationId"):
        return spark
    # Spark Connect has no SparkContext, and says so by raising.
    try:
        return spark.sparkContext
    except Exception:
        return None
