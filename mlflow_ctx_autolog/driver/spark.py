"""All that touches PySpark on the driver: functions handed over, broadcasts, the application."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
import inspect
import itertools
import logging
import re
import sys
import threading
import time
import types
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from mlflow_ctx_autolog.patching import Patch
from mlflow_ctx_autolog.worker.spark_task import CONTEXT_PROPERTY

__all__ = [
    "Handed",
    "Handovers",
    "active_session",
    "application_id",
    "attaching",
    "broadcast_text",
    "carries",
    "carrying",
    "executor_hosts",
    "has_accumulators",
    "has_workers_elsewhere",
    "is_private_network",
    "job_facts",
    "name_of",
    "pickled",
    "run_on_workers",
    "session_of",
    "set_context",
    "setting",
    "settings_of",
    "started_session",
    "way_home",
]

_logger = logging.getLogger(__name__)

_CARRIES = "__mlflow_ctx_autolog__"


@dataclass(frozen=True)
class _Handover:
    """A method of PySpark through which functions reach the workers.

    Args:
        modules: Where the class lives, in the order to look: it moved between releases.
        owner: The class.
        method: Its method.
        parameter: The parameter that takes the function, the first after ``self``; None where
            the function is the ``func`` of the object itself.
        once: Whether Spark calls the function once in a task attempt, with the partition, rather
            than many times.
        registered: Whether the function is registered under a name, for any use later.
        wraps_result: Whether the function is what the method returns, rather than a parameter.
        on_driver: Whether Spark calls the function on the driver.
    """

    modules: tuple[str, ...]
    owner: str
    method: str
    parameter: str | None = None
    once: bool = False
    registered: bool = False
    wraps_result: bool = False
    on_driver: bool = False


_RDD = ("pyspark.core.rdd", "pyspark.rdd")
_UDF, _CONNECT_UDF = ("pyspark.sql.udf",), ("pyspark.sql.connect.udf",)
_UDTF, _CONNECT_UDTF = ("pyspark.sql.udtf",), ("pyspark.sql.connect.udtf",)
_CONNECT_CLIENT = ("pyspark.sql.connect.client.core",)
_STREAM = ("pyspark.sql.streaming.readwriter",)
_CONNECT_STREAM = ("pyspark.sql.connect.streaming.readwriter",)

# The few through which all others go: mapInPandas(), groupBy().applyInPandas() and the pandas API
# make UDFs, and RDD.map() is a mapPartitionsWithIndex(). Each use of a UDF becomes part of a plan
# here: one that is defined once carries the context of each use.
_HANDOVERS = (
    _Handover(_UDF, "UserDefinedFunction", "__call__"),
    _Handover(_UDF, "UserDefinedFunction", "_create_judf", "func", registered=True),
    _Handover(_CONNECT_UDF, "UserDefinedFunction", "_build_common_inline_user_defined_function"),
    _Handover(_CONNECT_CLIENT, "SparkConnectClient", "register_udf", "function", registered=True),
    _Handover(_UDTF, "UserDefinedTableFunction", "__call__"),
    _Handover(_UDTF, "UserDefinedTableFunction", "_create_judtf", "func", registered=True),
    _Handover(
        _CONNECT_UDTF,
        "UserDefinedTableFunction",
        "_build_common_inline_user_defined_table_function",
    ),
    _Handover(_CONNECT_CLIENT, "SparkConnectClient", "register_udtf", "function", registered=True),
    _Handover(_RDD, "RDD", "mapPartitionsWithIndex", "f", once=True),
    _Handover(_RDD, "RDDBarrier", "mapPartitions", "f", once=True),
    _Handover(_RDD, "RDDBarrier", "mapPartitionsWithIndex", "f", once=True),
    # Connect's writer asks the classic one for the function, too.
    _Handover(
        _STREAM, "DataStreamWriter", "_construct_foreach_function", once=True, wraps_result=True
    ),
    _Handover(_STREAM, "DataStreamWriter", "foreachBatch", "func", on_driver=True),
    _Handover(_CONNECT_STREAM, "DataStreamWriter", "foreachBatch", "func", on_driver=True),
)

# Where plans are built; a command in SQL text runs before there is a DataFrame of it.
_PLANS = (
    (("pyspark.sql.classic.dataframe", "pyspark.sql.dataframe"), "DataFrame", "__init__"),
    (("pyspark.sql.connect.dataframe",), "DataFrame", "__init__"),
    (("pyspark.sql.session",), "SparkSession", "sql"),
    (("pyspark.sql.connect.session",), "SparkSession", "sql"),
)

# PythonEvalType of mapInPandas() and mapInArrow(), whose functions are called once in a task.
_ONCE = (205, 207)
# Of transformWithState(), whose processors Spark asks for their states before there is a task.
_ASKED_FIRST = (211, 212, 213, 214)


@dataclass(frozen=True)
class Handed:
    """A function that is being handed to Spark.

    Args:
        function: What Spark would run: the user's function or PySpark's own around it, or a class.
        name: The name of the user's function.
        receiver: The RDD, UDF or writer it is handed to; None where that is not known.
        repeated: Whether Spark calls it many times in a task attempt.
        registered: Whether it is registered under a name, for any use later.
        on_driver: Whether Spark calls it on the driver.
        asked_first: Whether Spark also loads it before there is a task, without broadcasts.
    """

    function: Callable[..., Any]
    name: str
    receiver: Any
    repeated: bool
    registered: bool
    on_driver: bool
    asked_first: bool


class Handovers:
    """Makes the functions that users hand to Spark carry the driver's context.

    Args:
        wrap: Called with each of them; returns what Spark gets instead. Not called for PySpark's
            own functions, nor for one that carries a context already.
        follow: Called with the session or DataFrame as plans are built, once functions are
            registered: what they belong to is known when they are used.
    """

    def __init__(
        self,
        wrap: Callable[[Handed], Callable[..., Any]],
        follow: Callable[[Any], None],
    ) -> None:
        self._wrap = wrap
        self._follow = follow
        self._patches: list[Patch] = []
        self._has_registered = False

    def install(self) -> None:
        """Patch every hand-over that the installed PySpark has. Idempotent."""
        if not self._patches:
            for handover in _HANDOVERS:
                owner = _find_owner(handover.modules, handover.owner, handover.method)
                if owner is not None:
                    replacement = self._replacement(handover)
                    self._patches.append(Patch(owner, handover.method, replacement))
            for modules, name, method in _PLANS:
                if (owner := _find_owner(modules, name, method)) is not None:
                    self._patches.append(Patch(owner, method, self._follow_plan))
        for patch in self._patches:
            patch.apply()

    def uninstall(self) -> None:
        """Take the patches back. What Spark was given meanwhile keeps its context. Idempotent."""
        for patch in self._patches:
            patch.revert()

    def _replacement(self, handover: _Handover) -> Callable[..., Any]:
        parameter = handover.parameter

        def hand_over(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            receiver, *rest = args
            if parameter in kwargs:
                kwargs[parameter] = self._prepared(kwargs[parameter], receiver, handover)
            elif rest:
                rest[0] = self._prepared(rest[0], receiver, handover)
            return original(receiver, *rest, **kwargs)

        def use(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            udf, *columns = args
            function = self._prepared(udf.func, udf, handover)
            if function is not udf.func:
                udf = _with_function(udf, function)
            return original(udf, *columns, **kwargs)

        def make(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return self._prepared(original(*args, **kwargs), None, handover)

        if handover.wraps_result:
            return make
        return use if parameter is None else hand_over

    def _prepared(self, function: Any, receiver: Any, handover: _Handover) -> Any:
        users = _users_function(function)
        if users is None or carries(users) or carries(function):
            return function
        kind = getattr(receiver, "evalType", None)
        self._has_registered |= handover.registered
        return self._wrap(
            Handed(
                function,
                name_of(users),
                receiver,
                repeated=not (handover.once or kind in _ONCE),
                registered=handover.registered,
                on_driver=handover.on_driver,
                # A class is one of a table function, which can be asked for its schema.
                asked_first=kind in _ASKED_FIRST or isinstance(function, type),
            )
        )

    def _follow_plan(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._has_registered:
            return original(*args, **kwargs)
        if original.__name__ == "sql":
            self._follow(args[0])
            return original(*args, **kwargs)
        original(*args, **kwargs)
        self._follow(args[0])
        return None


def _with_function(udf: Any, function: Callable[..., Any]) -> Any:
    """Return a copy of a UDF with another function; the user's own stays as it is."""
    changed = copy.copy(udf)
    changed.func = function
    # Where classic Spark keeps the JVM's side of the UDF once it has been used.
    for placeholder in ("_judf_placeholder", "_judtf_placeholder"):
        if hasattr(changed, placeholder):
            setattr(changed, placeholder, None)
    return changed


def _find_owner(modules: Sequence[str], name: str, method: str) -> type | None:
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


def _users_function(function: Any, depth: int = 5) -> Any:
    """Return the user's function, also from inside of PySpark's around it; None if there is none.

    PySpark hands over functions of its own: RDD.map(f) is a mapPartitionsWithIndex() of one that
    holds f, and RDD.count() of one that holds none. An object whose methods Spark calls will do
    for a function.
    """
    module = _top_module(function)
    if module in ("builtins", "_operator"):
        return None
    if module != "pyspark":
        is_one = callable(function) or any(hasattr(function, name) for name in _CALLED_METHODS)
        return function if is_one else None
    if depth == 0:
        return None
    held = (_users_function(each, depth - 1) for each in _held_by(function))
    return next((users for users in held if users is not None), None)


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


def carries(function: Any) -> bool:
    """Whether a function carries a context already."""
    return hasattr(function, _CARRIES)


def carrying(
    function: Callable[..., Any],
    carrier: object,
    *,
    required: bool,
    name: str | None = None,
    repeated: bool = False,
    follows: bool = False,
    way_home: Any = None,
    filters: bytes | None = None,
) -> Callable[..., Any]:
    """Return a function that runs ``function`` as a traced task attempt, wherever it is run.

    It pickles by value, without this library, so that a worker that lacks the library can say
    so. It looks like ``function`` to :mod:`inspect`. Of a class, such as that of a table function,
    a subclass is returned, the methods of which run in one task.

    Args:
        function: The user's function.
        carrier: A broadcast of a driver context's JSON, or that JSON.
        required: Raise on the worker where the carrier cannot be read, rather than run untraced.
        name: The name of the task's span; by default that of the function.
        repeated: Whether one task attempt calls the function many times.
        follows: Whether the context that the driver has set for the query, by
            :func:`set_context`, goes before the carrier.
        way_home: What :func:`way_home` returned, for spans that the worker cannot store.
        filters: Functions of the user's that spans go through, :func:`pickled`.
    """
    name = name or name_of(function)
    import_worker = _worker_importer()
    arrived = _Arrival()
    runner: Callable[..., Any] | None = None

    def run_by_worker(function: Callable[..., Any], takes_rows: bool) -> Any:
        nonlocal runner
        if runner is None:
            runner = import_worker().task_runner(
                name,
                carrier,
                required=required,
                repeated=repeated,
                follows=follows,
                way_home=way_home,
                filters=filters,
                arrived=arrived,
            )
        return runner(function, takes_rows)

    if not isinstance(function, type):
        return _running(function, run_by_worker)
    methods = {
        method: _running(vars(owner)[method], run_by_worker, takes_rows=method == "eval")
        for method in ("__init__", "eval", "terminate", "cleanup")
        for owner in [next((each for each in function.__mro__ if method in vars(each)), object)]
        if inspect.isfunction(vars(owner).get(method))
    }
    names = {key: getattr(function, key) for key in ("__module__", "__qualname__", "__doc__")}
    return type(function.__name__, (function,), {**names, **methods, _CARRIES: True})


class _Arrival:
    """Becomes the time, in seconds since the epoch, at which it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return time.time, ()


def _running(
    function: Callable[..., Any], run_by_worker: Callable[..., Any], takes_rows: bool = True
) -> Callable[..., Any]:
    run: Callable[..., Any] | None = None

    @functools.wraps(function)
    def run_as_task(*args: Any, **kwargs: Any) -> Any:
        nonlocal run
        if run is None:
            run = run_by_worker(function, takes_rows)
        try:
            return run(*args, **kwargs)
        except BaseException as error:
            from mlflow_ctx_autolog.exceptions import users_traceback

            raise error.with_traceback(users_traceback(error))  # noqa: B904 - the same error

    # Spark asks for the number of parameters without looking through wrappers.
    with contextlib.suppress(TypeError, ValueError):
        run_as_task.__signature__ = _bare_signature(function)  # type: ignore[attr-defined]
    setattr(run_as_task, _CARRIES, True)
    return run_as_task


def attaching(function: Callable[..., Any], carrier: object, name: str) -> Callable[..., Any]:
    """Return a function that runs ``function`` below the span that a carrier names.

    For functions that Spark calls on the driver: in its own process, or, on Spark Connect, in one
    beside the server. Like what :func:`carrying` returns, it pickles by value.

    Args:
        function: The user's function.
        carrier: A broadcast of a driver context's JSON, or that JSON.
        name: The name of the span of each call, where it is not run in the driver's process.
    """
    import_worker = _worker_importer()

    @functools.wraps(function)
    def run_attached(*args: Any, **kwargs: Any) -> Any:
        with import_worker().attach(carrier, name):
            return function(*args, **kwargs)

    setattr(run_attached, _CARRIES, True)
    return run_attached


def _worker_importer() -> Callable[[], Any]:
    def import_worker() -> Any:
        try:
            from mlflow_ctx_autolog.worker import runner as worker
        except ImportError as error:
            import socket
            import sys

            raise ImportError(
                "mlflow-ctx-autolog cannot be imported on the Spark worker "
                f"{socket.gethostname()} by {sys.executable}: {error}. Install it on every "
                "node of the cluster (pip install mlflow-ctx-autolog), or call "
                "mlflow_ctx_autolog.disable() on the driver."
            ) from error
        return worker

    return import_worker


def _bare_signature(function: Callable[..., Any]) -> inspect.Signature:
    # Without annotations, which need not pickle.
    signature = inspect.signature(function)
    empty = inspect.Parameter.empty
    bare = [parameter.replace(annotation=empty) for parameter in signature.parameters.values()]
    return inspect.Signature(bare)


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a function, by which its tasks go."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", None) or type(function).__name__


def set_context(spark: Any, traceparent: str | None, capture: Callable[[], str]) -> None:
    """Say what functions that are registered by name belong to, when a query uses them.

    Holds for the queries that this thread runs from here on; on Spark Connect, which knows nothing
    of the client's threads, for those of the session.

    Args:
        spark: A session.
        traceparent: The span that they belong to. Nothing is done where that has been said.
        capture: Returns the JSON of its context.
    """
    context = _spark_context(spark)
    scope = _scopes.setdefault(spark if context is None else context, _Scope(context is None))
    if scope.traceparent == traceparent:
        return
    if context is None:
        spark.conf.set(CONTEXT_PROPERTY, capture())
    else:
        context.setLocalProperty(CONTEXT_PROPERTY, capture())
    scope.traceparent = traceparent


class _Scope:
    """What :func:`set_context` was told last: in a session, or in each thread."""

    def __init__(self, is_shared: bool) -> None:
        self._told: Any = types.SimpleNamespace() if is_shared else threading.local()

    @property
    def traceparent(self) -> str | None:
        return getattr(self._told, "traceparent", "nothing")

    @traceparent.setter
    def traceparent(self, traceparent: str | None) -> None:
        self._told.traceparent = traceparent


# By SparkContext; by session of Spark Connect.
_scopes: weakref.WeakKeyDictionary[Any, _Scope] = weakref.WeakKeyDictionary()


def active_session() -> Any:
    """Return the active Spark session, classic or Connect; None if there is none."""
    if importlib.util.find_spec("pyspark") is None:
        return None
    from pyspark.sql import SparkSession

    # None is active in a thread of the user's own, where the default session will do.
    with contextlib.suppress(Exception):
        return SparkSession.active()
    return None


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
    """Return the session of a DataFrame, the context of an RDD; else the active session.

    Of a session, that is itself.
    """
    if hasattr(type(receiver), "createDataFrame"):
        return receiver
    # Asked of the class: a DataFrame has its columns as attributes.
    if hasattr(type(receiver), "sparkSession"):
        return receiver.sparkSession
    return getattr(receiver, "__dict__", {}).get("ctx") or active_session()


def application_id(spark: Any) -> str | None:
    """Return Spark's application id; None where the session does not tell."""
    context = _spark_context(spark)
    if context is not None:
        return str(context.applicationId)
    return setting(spark, "spark.app.id", "") or None


def setting(spark: Any, name: str, default: str) -> str | None:
    """Return one of Spark's settings, ``default`` where it is not set; None if it is not told."""
    try:
        context = _spark_context(spark)
        conf = spark.conf if context is None else context._conf
        return str(conf.get(name, default))
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


def executor_hosts(spark: Any) -> int:
    """Return on how many hosts Spark has executors now; 1 where it does not tell."""
    context = _spark_context(spark)
    if context is None:
        return 1
    try:
        executors = context._jsc.sc().statusTracker().getExecutorInfos()
        hosts = Counter(str(executor.host()) for executor in executors)
        # The driver is among them.
        hosts[str(context._conf.get("spark.driver.host"))] -= 1
    except Exception:
        return 1
    return max(1, len(+hosts))


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


# Milliseconds that Spark may take to tell its own listeners what has happened.
_NEWS = 2000
# Executions and jobs, of the latest ones, and tasks of a stage, that are looked at.
_EXECUTIONS, _JOBS, _TASKS = 300, 1000, 5000


def job_facts(spark: Any, functions: Collection[str], since: int) -> dict[str, Any] | None:
    """Return what Spark knows of the jobs of a session, and does not tell its workers.

    Args:
        spark: A session or context.
        functions: The names of the functions that were handed over.
        since: Milliseconds since the epoch; what began before is left out.

    Returns:
        ``plans``: for each SQL execution, how many nodes of its final plan run each function or
        scan a cached table; ``speculative``: ids of task attempts that were copies, None where
        Spark does not say; ``jobs``: the job of each stage. None on Spark Connect, and when Spark
        has stopped.
    """
    context = _spark_context(spark)
    if context is None or context._jsc is None:
        return None
    core = context._jsc.sc()
    with contextlib.suppress(Exception):
        core.listenerBus().waitUntilEmpty(_NEWS)
    status = core.statusStore()
    jobs: dict[int, int] = {}
    speculative: list[int] | None = []
    for job in _latest(status.jobsList(None), _JOBS, by=lambda job: int(job.jobId())):
        submitted = job.submissionTime()
        if submitted.isDefined() and submitted.get().getTime() < since:
            break
        for stage in _items(job.stageIds()):
            jobs.setdefault(stage, int(job.jobId()))
    if context._conf.get("spark.speculation", "false") == "true":
        try:
            speculative = [each for stage in jobs for each in _speculative_attempts(status, stage)]
        except Exception as error:
            _logger.info("Spark does not say which task attempts were copies: %r", error)
            speculative = None
    session = spark if hasattr(spark, "_jsparkSession") else _session_in(context)
    plans = {} if session is None else _plans(session._jsparkSession, functions, since)
    return {"plans": plans, "speculative": speculative, "jobs": jobs}


def _session_in(context: Any) -> Any:
    from pyspark.sql import SparkSession

    session = getattr(SparkSession, "_instantiatedSession", None)
    return session if session is not None and session.sparkContext is context else None


def _speculative_attempts(status: Any, stage: int) -> Iterator[int]:
    for attempt in range(status.lastStageAttempt(stage).attemptId() + 1):
        copies = status.speculationSummary(stage, attempt)
        if copies.isDefined():
            for task in _items(status.taskList(stage, attempt, _TASKS)):
                if task.speculative():
                    yield int(task.taskId())


def _plans(session: Any, functions: Collection[str], since: int) -> dict[str, dict[str, int]]:
    status = session.sharedState().statusStore()
    plans: dict[str, dict[str, int]] = {}
    executions = status.executionsList()
    for execution in _latest(executions, _EXECUTIONS, by=lambda each: int(each.executionId())):
        if execution.submissionTime() < since:
            break
        nodes: Counter[str] = Counter()
        for node in _items(status.planGraph(execution.executionId()).allNodes()):
            if node.name() == "InMemoryTableScan":
                nodes[node.name()] += 1
            else:
                named = set(re.findall(r"\w+(?=\()", node.desc()))
                nodes.update(named.intersection(functions))
        plans[str(execution.executionId())] = dict(nodes)
    return plans


def _items(sequence: Any) -> Iterator[Any]:
    for index in range(sequence.size()):
        yield sequence.apply(index)


def _latest(sequence: Any, count: int, by: Callable[[Any], int]) -> list[Any]:
    return sorted(_items(sequence), key=by, reverse=True)[:count]


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
