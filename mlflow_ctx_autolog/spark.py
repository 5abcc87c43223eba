"""All that touches PySpark on the driver: functions handed over, broadcasts, the application."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
import inspect
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from mlflow_ctx_autolog.patching import Patch

__all__ = [
    "Handovers",
    "active_session",
    "application_id",
    "broadcast_text",
    "carries",
    "carrying",
    "has_accumulators",
    "has_workers_elsewhere",
    "is_private_network",
    "pickled",
    "run_on_workers",
    "session_of",
    "settings_of",
    "started_session",
    "way_home",
]

_CARRIES = "__mlflow_ctx_autolog__"


@dataclass(frozen=True)
class _Handover:
    """A method of PySpark that takes a function to run on the workers.

    Args:
        modules: Where the class lives, in the order to look: it moved between releases.
        owner: The class.
        method: Its method.
        parameter: The parameter that takes the function, the first after ``self``; None where
            the function is the ``func`` of the object itself.
        repeated: Whether Spark calls the function many times in one task attempt, rather than
            once with the partition.
    """

    modules: tuple[str, ...]
    owner: str
    method: str
    parameter: str | None
    repeated: bool = False


_CLASSIC = ("pyspark.sql.classic.dataframe", "pyspark.sql.dataframe")
_CONNECT = ("pyspark.sql.connect.dataframe",)
_RDD = ("pyspark.core.rdd", "pyspark.rdd")

_HANDOVERS = (
    _Handover(_CLASSIC, "DataFrame", "mapInPandas", "func"),
    _Handover(_CLASSIC, "DataFrame", "mapInArrow", "func"),
    _Handover(_CLASSIC, "DataFrame", "foreach", "f", repeated=True),
    _Handover(_CLASSIC, "DataFrame", "foreachPartition", "f"),
    _Handover(_CONNECT, "DataFrame", "mapInPandas", "func"),
    _Handover(_CONNECT, "DataFrame", "mapInArrow", "func"),
    _Handover(_CONNECT, "DataFrame", "foreach", "f", repeated=True),
    _Handover(_CONNECT, "DataFrame", "foreachPartition", "f"),
    _Handover(_RDD, "RDD", "map", "f", repeated=True),
    _Handover(_RDD, "RDD", "foreach", "f", repeated=True),
    _Handover(_RDD, "RDD", "mapPartitions", "f"),
    _Handover(_RDD, "RDD", "foreachPartition", "f"),
    # Where each use of a UDF becomes part of a plan, also of those that groupBy().applyInPandas()
    # and its kin make: a UDF defined once carries the context of each use.
    _Handover(("pyspark.sql.udf",), "UserDefinedFunction", "__call__", None, repeated=True),
    _Handover(
        ("pyspark.sql.connect.udf",),
        "UserDefinedFunction",
        "_build_common_inline_user_defined_function",
        None,
        repeated=True,
    ),
)

# (function, what it was handed to, whether it is called repeatedly) -> what Spark gets instead
Wrap = Callable[[Callable[..., Any], Any, bool], Callable[..., Any]]


class Handovers:
    """Makes the functions that users hand to Spark carry the driver's context.

    Args:
        wrap: Called with a user's function, the DataFrame, RDD or UDF it was handed to, and
            whether Spark calls it many times in a task; returns what Spark gets instead. Not
            called for PySpark's own functions, nor for one that carries a context already.
    """

    def __init__(self, wrap: Wrap) -> None:
        self._wrap = wrap
        self._patches: list[Patch] = []

    def install(self) -> None:
        """Patch every hand-over that the installed PySpark has. Idempotent."""
        if not self._patches:
            for handover in _HANDOVERS:
                if (owner := _find_owner(handover)) is not None:
                    replacement = self._replacement(handover)
                    self._patches.append(Patch(owner, handover.method, replacement))
        for patch in self._patches:
            patch.apply()

    def uninstall(self) -> None:
        """Take the patches back. What Spark was given meanwhile keeps its context. Idempotent."""
        for patch in self._patches:
            patch.revert()

    def _replacement(self, handover: _Handover) -> Callable[..., Any]:
        parameter, repeated = handover.parameter, handover.repeated

        def hand_over(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            receiver, *rest = args
            if parameter in kwargs:
                kwargs[parameter] = self._prepared(kwargs[parameter], receiver, repeated)
            elif rest:
                rest[0] = self._prepared(rest[0], receiver, repeated)
            return original(receiver, *rest, **kwargs)

        def use(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            udf, *columns = args
            function = self._prepared(udf.func, udf, repeated)
            if function is not udf.func:
                udf = _with_function(udf, function)
            return original(udf, *columns, **kwargs)

        return use if parameter is None else hand_over

    def _prepared(self, function: Any, receiver: Any, repeated: bool) -> Any:
        if not callable(function) or carries(function) or _is_pysparks(function):
            return function
        return self._wrap(function, receiver, repeated)


def _with_function(udf: Any, function: Callable[..., Any]) -> Any:
    """Return a copy of a UDF with another function; the user's own stays as it is."""
    changed = copy.copy(udf)
    changed.func = function
    # Where classic Spark keeps the JVM's side of the UDF once it has been used.
    if hasattr(changed, "_judf_placeholder"):
        changed._judf_placeholder = None
    return changed


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
    function: Callable[..., Any],
    carrier: object,
    *,
    required: bool,
    repeated: bool = False,
    way_home: Any = None,
    filters: bytes | None = None,
) -> Callable[..., Any]:
    """Return a function that runs ``function`` as a traced task attempt, wherever it is run.

    It pickles by value, without this library, so that a worker that lacks the library can say
    so. It looks like ``function`` to :mod:`inspect`.

    Args:
        function: The user's function.
        carrier: A broadcast of a driver context's JSON, or that JSON.
        required: Raise on the worker where the carrier cannot be read, rather than run untraced.
        repeated: Whether one task attempt calls the function many times.
        way_home: What :func:`way_home` returned, for spans that the worker cannot store.
        filters: Functions of the user's that spans go through, :func:`pickled`.
    """
    name = _name_of(function)
    run: Callable[..., Any] | None = None

    @functools.wraps(function)
    def run_as_task(*args: Any, **kwargs: Any) -> Any:
        nonlocal run
        if run is None:
            try:
                from mlflow_ctx_autolog.worker import task_runner
            except ImportError as error:
                import socket
                import sys

                raise ImportError(
                    "mlflow-ctx-autolog cannot be imported on the Spark worker "
                    f"{socket.gethostname()} by {sys.executable}: {error}. Install it on every "
                    "node of the cluster (pip install mlflow-ctx-autolog), or call "
                    "mlflow_ctx_autolog.disable() on the driver."
                ) from error
            run = task_runner(
                function,
                name,
                carrier,
                required=required,
                repeated=repeated,
                way_home=way_home,
                filters=filters,
            )
        return run(*args, **kwargs)

    # Spark asks for the number of parameters without looking through wrappers.
    with contextlib.suppress(TypeError, ValueError):
        run_as_task.__signature__ = _bare_signature(function)  # type: ignore[attr-defined]
    setattr(run_as_task, _CARRIES, True)
    return run_as_task


def _bare_signature(function: Callable[..., Any]) -> inspect.Signature:
    # Without annotations, which need not pickle.
    signature = inspect.signature(function)
    empty = inspect.Parameter.empty
    bare = [parameter.replace(annotation=empty) for parameter in signature.parameters.values()]
    return inspect.Signature(bare)


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


@contextlib.contextmanager
def started_session(master: str | None, remote: str | None) -> Iterator[tuple[Any, str | None]]:
    """Start a Spark session for a block; yield it, or None and why there is none.

    Args:
        master: Spark's master; by default what Spark is configured for.
        remote: The address of a Spark Connect server instead.
    """
    session, problem = None, None
    try:
        from pyspark.sql import SparkSession

        builder = SparkSession.builder.appName("mlflow-ctx-autolog doctor")
        if remote is not None:
            builder = builder.remote(remote)
        else:
            builder = builder.config("spark.ui.showConsoleProgress", "false")
            builder = builder if master is None else builder.master(master)
        session = builder.getOrCreate()
    except Exception as error:
        problem = f"there is no Spark session: {type(error).__name__}: {error}"
    try:
        yield session, problem
    finally:
        if session is not None:
            session.stop()


def session_of(receiver: Any) -> Any:
    """Return the session of a DataFrame, the context of an RDD; else the active session."""
    # Asked of the class: a DataFrame has its columns as attributes.
    if hasattr(type(receiver), "sparkSession"):
        return receiver.sparkSession
    return vars(receiver).get("ctx") or active_session()


def application_id(spark: Any) -> str | None:
    """Return Spark's application id; None where the session does not tell."""
    context = _spark_context(spark)
    if context is not None:
        return str(context.applicationId)
    try:
        return str(spark.conf.get("spark.app.id"))
    except Exception:
        return None


def settings_of(spark: Any, names: Sequence[str]) -> dict[str, str | None]:
    """Return settings of Spark's, None for those not set; those that it does not tell are left out.

    Args:
        spark: A session, classic or Connect.
        names: The settings.
    """
    context = _spark_context(spark)
    found: dict[str, str | None] = {}
    for name in names:
        with contextlib.suppress(Exception):
            found[name] = (
                spark.conf.get(name, None) if context is None else context.getConf().get(name, None)
            )
    return found


def has_workers_elsewhere(spark: Any) -> bool:
    """Whether tasks may run on other hosts than this one, as far as the session tells."""
    master = settings_of(spark, ["spark.master"]).get("spark.master")
    if master is None or master.startswith("local"):
        return False
    # A cluster on this host, by the address of its master.
    return urlsplit(master).hostname not in ("localhost", "127.0.0.1")


def is_private_network(spark: Any) -> bool | None:
    """Whether nobody else can read what Spark sends to the workers; None if it does not tell.

    That is so where they are on this machine, and where Spark's network encryption is on.
    """
    found = settings_of(spark, ["spark.master", *itertools.chain(*_ENCRYPTED_WITH)])
    master = found.get("spark.master")
    if master is None:
        return None
    return master.startswith("local") or any(
        all(found.get(name) == "true" for name in names) for names in _ENCRYPTED_WITH
    )


# https://spark.apache.org/docs/latest/security.html#network-encryption
_ENCRYPTED_WITH = (
    ("spark.authenticate", "spark.network.crypto.enabled"),
    ("spark.authenticate", "spark.authenticate.enableSaslEncryption"),
    ("spark.ssl.rpc.enabled",),
)


# Tasks by which workers are asked: on Spark Connect, which does not say how many can run at once;
# elsewhere at least and at most.
_TASKS_ON_CONNECT, _FEWEST_TASKS, _MOST_TASKS = 4, 2, 32


def run_on_workers(
    spark: Any, function: Callable[[str], str], argument: str, tasks: int | None = None
) -> list[str]:
    """Call a function once in each of some tasks, and return what it returned.

    It is a plain UDF, so that a worker needs nothing but Python and Spark's own code.

    Args:
        spark: A session, classic or Connect.
        function: The function; it and the other functions of its module travel by value.
        argument: What it is called with.
        tasks: How many; by default as many as run at once, within reason.

    Raises:
        Exception: What Spark raises where a task fails.
    """
    from pyspark import cloudpickle
    from pyspark.sql.functions import udf

    if tasks is None:
        context = _spark_context(spark)
        at_once = _TASKS_ON_CONNECT if context is None else int(context.defaultParallelism)
        tasks = min(max(at_once, _FEWEST_TASKS), _MOST_TASKS)

    def call(_: int) -> str:
        return function(argument)

    # Not a user's function, which would be traced.
    setattr(call, _CARRIES, True)
    module = sys.modules[function.__module__]
    cloudpickle.register_pickle_by_value(module)
    try:
        ask = udf(call, "string", useArrow=False)
        rows = spark.range(0, tasks, 1, tasks).select(ask("id")).collect()
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    return [str(row[0]) for row in rows]


def broadcast_text(spark: Any, text: str) -> Any:
    """Return a Spark broadcast of ``text``; the text itself on Spark Connect, which has none."""
    context = _spark_context(spark)
    return text if context is None else context.broadcast(text)


def pickled(value: object) -> bytes:
    """Return functions of the user's as Spark pickles them: those of a notebook by value.

    Apart from the function handed over: where a worker cannot unpickle them, since it lacks their
    module, that is no reason for the user's job to fail.

    Raises:
        Exception: They cannot be pickled.
    """
    from pyspark import cloudpickle

    return bytes(cloudpickle.dumps(value))


def has_accumulators(spark: Any) -> bool:
    """Whether tasks can hand something back by an accumulator: not on Spark Connect."""
    return _spark_context(spark) is not None


def way_home(spark: Any, receive: Callable[[Sequence[Any]], None]) -> Any:
    """Return an accumulator that hands what tasks add to it to ``receive``, on the driver.

    It brings home what tasks that succeeded have added, as they end; those that failed bring
    nothing. None on Spark Connect, which has no accumulators.
    """
    context = _spark_context(spark)
    if context is None:
        return None
    if context not in _ways_home:
        _ways_home[context] = context.accumulator([], _receiving_param(receive))
    return _ways_home[context]


# One for each SparkContext: Spark keeps track of every accumulator there is.
_ways_home: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _receiving_param(receive: Callable[[Sequence[Any]], None]) -> Any:
    from pyspark.accumulators import AccumulatorParam, AddingAccumulatorParam

    class ReceivingParam(AccumulatorParam[list[Any]]):  # type: ignore[misc]
        """Keeps nothing on the driver; on workers it is Spark's own, which adds up lists."""

        def zero(self, value: list[Any]) -> list[Any]:  # noqa: ARG002
            return []

        def addInPlace(self, value1: list[Any], value2: list[Any]) -> list[Any]:  # noqa: N802
            receive(value2)
            return value1

        def __reduce__(self) -> tuple[type, tuple[list[Any]]]:
            return AddingAccumulatorParam, ([],)

    return ReceivingParam()


def _spark_context(spark: Any) -> Any:
    if hasattr(spark, "applicationId"):
        return spark
    # Spark Connect has no SparkContext, and says so by raising.
    try:
        return spark.sparkContext
    except Exception:
        return None
