"""Python data sources, in the programs in which Spark makes functions for tasks of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mlflow_ctx_autolog.patching import Patch
from mlflow_ctx_autolog.worker.spark_task import hide_own_frames

__all__ = ["load_data_source"]

# Of PySpark, around the user's method of a reader or writer: what runs in tasks.
_METHODS = {"data_source_read_func": "read", "data_source_write_func": "write"}

Reduced = tuple[Callable[..., Any], tuple[Any, ...]]
Submit = Callable[[Any, Mapping[str, Any]], Reduced]


def load_data_source(source: Any, options: Mapping[str, Any], submit: Submit) -> Any:
    """Return a data source as it is, and have what Spark makes of it here submitted like it.

    The class that the user has registered comes to a program of Spark's, which makes an instance of
    it for another one, which makes a function for tasks of its reader or writer. Each of these
    programs hands on what it has made by pickling it, and ends where it cannot. So class, instance,
    reader and writer are the user's own wherever they are looked at.

    Args:
        source: The user's class, or an instance of it.
        options: What :func:`~mlflow_ctx_autolog.worker.runner.load_submitted` takes.
        submit: Returns how something is unpickled so that it carries options, and what came along.
    """
    global _next
    from pyspark.serializers import CloudPickleSerializer

    hide_own_frames()
    _next = options, submit
    _patches.setdefault("dumps", Patch(CloudPickleSerializer, "dumps", _dumps)).apply()
    return source


# What the next thing that is made here of a data source carries: a process may serve several.
_next: tuple[Mapping[str, Any], Submit] | None = None
_patches: dict[str, Patch] = {}


def _dumps(original: Callable[..., Any], serializer: Any, made: Any) -> Any:
    return original(serializer, made if _next is None else _submitted(made, *_next))


def _submitted(made: Any, options: Mapping[str, Any], submit: Submit) -> Any:
    """Return what is pickled instead of what Spark has made, where that is of a data source."""
    global _next
    from pyspark.sql.datasource import DataSource

    if isinstance(made, DataSource):
        _next = None
        return _Reduced(submit(made, options))
    function = made[0] if isinstance(made, tuple) and made else None
    if (method := _METHODS.get(getattr(function, "__name__", ""))) is None:
        return made
    _next = None
    own = {"name": f"{options['name']}.{method}", "repeated": False, "data_source": False}
    return (_Reduced(submit(function, {**options, **own})), *made[1:])


class _Reduced:
    """Is unpickled as it is told."""

    def __init__(self, reduced: Reduced) -> None:
        self._reduced = reduced

    def __reduce__(self) -> Reduced:
        return self._reduced
