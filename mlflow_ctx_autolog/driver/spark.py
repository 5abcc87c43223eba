"""What a Spark session says of itself, and what is asked of it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import re
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from mlflow_ctx_autolog.driver.daemon_path import tell_daemons

__all__ = [
    "active_session",
    "application_id",
    "has_workers_elsewhere",
    "is_private_network",
    "most_hosts",
    "pickled",
    "relay_of",
    "run_on_workers",
    "session_of",
    "setting",
    "settings_of",
    "spark_context",
    "started_session",
    "tell_daemons_of",
]


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
    of_rdd = getattr(receiver, "__dict__", {}).get("ctx")
    return of_rdd or _context_of_classic(receiver) or active_session()


def _context_of_classic(receiver: Any) -> Any:
    """Return the SparkContext that a UDF of classic Spark will be used in, without asking Spark."""
    if type(receiver).__module__ not in ("pyspark.sql.udf", "pyspark.sql.udtf"):
        return None
    return importlib.import_module("pyspark").SparkContext._active_spark_context


def tell_daemons_of(spark: Any) -> None:
    """See :func:`~mlflow_ctx_autolog.driver.daemon_path.tell_daemons`."""
    if (context := spark_context(spark)) is not None:
        tell_daemons(context, _facts_of(context))


def application_id(spark: Any) -> str | None:
    """Return Spark's application id; None where the session does not tell."""
    context = spark_context(spark)
    if context is not None:
        return _facts_of(context)[_APPLICATION_ID]
    return setting(spark, "spark.app.id", "") or None


def setting(spark: Any, name: str, default: str) -> str | None:
    """Return one of Spark's settings, ``default`` where it is not set; None if it is not told."""
    try:
        context = spark_context(spark)
        conf = spark.conf if context is None else _facts_of(context)
        return str(conf.get(name, default))
    except Exception:
        return None


def settings_of(spark: Any, names: Sequence[str]) -> dict[str, str | None]:
    """Return settings of Spark's, None for those not set; those that it does not tell are left out.

    Args:
        spark: A session, classic or Connect.
        names: The settings.
    """
    context = spark_context(spark)
    found: dict[str, str | None] = {}
    for name in names:
        with contextlib.suppress(Exception):
            conf = spark.conf if context is None else _facts_of(context)
            found[name] = conf.get(name, None)
    return found


def max_result_bytes(spark: Any) -> int | None:
    """Return how many bytes the results of a stage may have, 0 for no limit; None if unknown."""
    text = setting(spark, "spark.driver.maxResultSize", "1g")
    found = re.fullmatch(r"(\d+)\s*([kmgtp]?)i?b?", (text or "").strip().lower())
    if found is None:
        return None
    return int(found[1]) << 10 * " kmgtp".index(found[2] or " ")


_APPLICATION_ID = "spark.app.id"
# What stays as it is while a SparkContext lives, for which the JVM is asked hundreds of times.
_facts: weakref.WeakKeyDictionary[Any, dict[str, str]] = weakref.WeakKeyDictionary()


def _facts_of(context: Any) -> dict[str, str]:
    if context not in _facts:
        settings = dict(context._conf.getAll())
        _facts[context] = {**settings, _APPLICATION_ID: str(context.applicationId)}
    return _facts[context]


def most_hosts(spark: Any) -> int | None:
    """Return on how many hosts Spark may come to have executors; None where that is not known.

    A cluster that grows may have one on as many as it may have executors.
    """
    found = settings_of(spark, ("spark.master", *_GROWTH))
    if (found.get("spark.master") or "").startswith("local"):
        return 1
    if str(found.get(_GROWTH[0])).lower() == "true":
        most = str(found.get(_GROWTH[1]))
        return int(most) if most.isdecimal() and 0 < int(most) < _UNLIMITED else None
    context = spark_context(spark)
    if context is None:
        return None
    try:
        executors = context._jsc.sc().statusTracker().getExecutorInfos()
        hosts = Counter(str(executor.host()) for executor in executors)
        # The driver is among them.
        hosts[str(context._conf.get("spark.driver.host"))] -= 1
    except Exception:
        return None
    # None may have come yet.
    return len(+hosts) or None


_GROWTH = ("spark.dynamicAllocation.enabled", "spark.dynamicAllocation.maxExecutors")
# Spark's default for that is the largest number that it has.
_UNLIMITED = (1 << 31) - 1


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

    tell_daemons_of(spark)
    if tasks is None:
        context = spark_context(spark)
        at_once = _TASKS_ON_CONNECT if context is None else int(context.defaultParallelism)
        tasks = min(max(at_once, _FEWEST_TASKS), _MOST_TASKS)

    def call(_: int) -> str:
        return function(argument)

    module = sys.modules[getattr(function, "function", function).__module__]
    cloudpickle.register_pickle_by_value(module)
    try:
        ask = udf(call, "string", useArrow=False)
        rows = spark.range(0, tasks, 1, tasks).select(ask("id")).collect()
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    return [str(row[0]) for row in rows]


def pickled(value: object) -> bytes:
    """Return functions of the user's as Spark pickles them: those of a notebook by value.

    Apart from the function handed over: where a worker cannot unpickle them, since it lacks their
    module, that is no reason for the user's job to fail.

    Raises:
        Exception: They cannot be pickled.
    """
    from pyspark import cloudpickle

    return bytes(cloudpickle.dumps(value))


def relay_of(spark: Any, receive: Callable[[Sequence[Any]], None]) -> Any:
    """Return an accumulator that hands what tasks add to it to ``receive``, on the driver.

    It relays what tasks that succeeded have added, as they end; those that failed relay nothing.
    None on Spark Connect, which has no accumulators.
    """
    context = spark_context(spark)
    if context is None:
        return None
    if context not in _relays:
        _relays[context] = context.accumulator([], _receiving_param(receive))
    return _relays[context]


# One for each SparkContext: Spark keeps track of every accumulator there is.
_relays: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


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


def spark_context(spark: Any) -> Any:
    """Return the SparkContext of a session, or what is one; None on Spark Connect."""
    # Asked of the class: its object would ask the JVM.
    if hasattr(type(spark), "applicationId"):
        return spark
    # Spark Connect has no SparkContext, and says so by raising.
    try:
        return spark.sparkContext
    except Exception:
        return None
