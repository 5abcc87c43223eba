"""Which action of Spark's a thread runs, by its number and its name."""

from __future__ import annotations

import functools
import itertools
import sys
import threading
from collections.abc import Callable
from typing import Any

from mlflow_ctx_autolog.driver.instrumentor import find_class
from mlflow_ctx_autolog.patching import Redirect

__all__ = ["Actions"]

_DATAFRAME = (
    "collect count show toPandas toArrow take head first tail foreach foreachPartition isEmpty "
    "toLocalIterator checkpoint localCheckpoint"
)
_WRITER = "save saveAsTable insertInto parquet json csv orc text xml jdbc"
_WRITER_V2 = "create replace createOrReplace append overwrite overwritePartitions"
_RDD = (
    "collect count take first top takeOrdered takeSample foreach foreachPartition isEmpty reduce "
    "treeReduce fold aggregate treeAggregate sum max min mean stats countByKey countByValue "
    "collectAsMap lookup toLocalIterator saveAsTextFile saveAsPickleFile"
)
_PLACES = (
    (("pyspark.sql.classic.dataframe", "pyspark.sql.dataframe"), "DataFrame", _DATAFRAME),
    (("pyspark.sql.connect.dataframe",), "DataFrame", _DATAFRAME),
    (("pyspark.sql.readwriter",), "DataFrameWriter", _WRITER),
    (("pyspark.sql.connect.readwriter",), "DataFrameWriter", _WRITER),
    (("pyspark.sql.readwriter",), "DataFrameWriterV2", _WRITER_V2),
    (("pyspark.sql.connect.readwriter",), "DataFrameWriterV2", _WRITER_V2),
    (("pyspark.core.rdd", "pyspark.rdd"), "RDD", _RDD),
)
# They run actions of their own, later on.
_STREAMS = ((("pyspark.sql.streaming.readwriter",), "DataStreamWriter", "start toTable"),)
# Who calls one action to carry out another.
_INSIDE = ("pyspark", "py4j", __name__.partition(".")[0])


class Actions:
    """Numbers the actions that the user's code runs, since Spark tells tasks of RDDs of none.

    An action is noted as its method is looked up, so that no frame of ours is around it.

    Args:
        look_at: Is shown what an action, or the start of a stream, is asked of, ahead of it.
    """

    def __init__(self, look_at: Callable[[Any], None] = lambda _: None) -> None:
        self._look_at = look_at
        self._numbers = itertools.count(1)
        self._latest = threading.local()
        self._redirects: list[Redirect] = []

    @property
    def latest(self) -> str | None:
        """The last action of this thread, as ``7.collect``; None if there was none."""
        return getattr(self._latest, "action", None)

    def install(self) -> None:
        """Idempotent."""
        if not self._redirects:
            for modules, owner, methods in (*_PLACES, *_STREAMS):
                for method in methods.split():
                    found = find_class(modules, owner, method)
                    if found is not None:
                        is_numbered = owner != "DataStreamWriter"
                        note = functools.partial(self._note, method if is_numbered else None)
                        self._redirects.append(Redirect(found, method, note))
        for redirect in self._redirects:
            redirect.apply()

    def uninstall(self) -> None:
        """Idempotent."""
        for redirect in self._redirects:
            redirect.revert()

    def _note(self, method: str | None, receiver: Any) -> Any:
        frame: Any = sys._getframe(1)
        while frame.f_back and frame.f_globals.get("__name__") in (__name__, Redirect.__module__):
            frame = frame.f_back
        caller = str(frame.f_globals.get("__name__")).partition(".")[0]
        if caller not in _INSIDE:
            if method is not None:
                self._latest.action = f"{next(self._numbers)}.{method}"
            self._look_at(receiver)
        return receiver
