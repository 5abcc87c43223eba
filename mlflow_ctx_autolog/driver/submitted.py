"""A function as Spark gets it: pickled by its own rules, beside what a worker needs to trace it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["SubmittedFunction", "is_submitted"]


@dataclass(frozen=True)
class SubmittedFunction:
    """Takes the place of the user's function where Spark pickles it, and nowhere else.

    What comes out on the worker is the function, run as a traced task attempt. It pickles without
    this library, so that a worker that lacks it can say so; and equal ones pickle alike, so that
    Spark sees that two expressions are the same.

    Args:
        function: The user's function, or PySpark's own around it, or a class.
        options: What :func:`~mlflow_ctx_autolog.worker.runner.load_submitted` takes.
        carrier: A broadcast of a driver context's JSON, or that JSON.
        relay: A Spark accumulator that takes receipts to the driver; None where there is none.
        filters: Functions of the user's that spans go through, as Spark pickles them.
    """

    function: Any
    options: Mapping[str, Any]
    carrier: Any
    relay: Any = None
    filters: bytes | None = None

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        options = {**self.options}
        return _load, (self.function, options, self.carrier, self.relay, self.filters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the user's function. On the driver there is no task to trace."""
        return self.function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # What PySpark asks of a function: its name, its signature, its code.
        if name in _ASKED:
            return getattr(self.function, name)
        raise AttributeError(name)

    def is_like(self, other: SubmittedFunction) -> bool:
        """Whether another one pickles alike."""
        return (
            self.function is other.function
            and self.options == other.options
            and self.carrier is other.carrier
            and self.relay is other.relay
            and self.filters == other.filters
        )


_ASKED = frozenset(
    (
        *(
            "__name__",
            "__qualname__",
            "__wrapped__",
            "__code__",
            "__annotations__",
            "__signature__",
        ),
        # Of a data source.
        "name",
    )
)


def is_submitted(function: Any) -> bool:
    """Whether a function carries a context already."""
    return isinstance(function, SubmittedFunction)


def _loader() -> Callable[..., Any]:
    # Within a function, since it is pickled by value.
    def load(function: Any, options: Any, *carried: Any) -> Any:
        try:
            from mlflow_ctx_autolog.worker.data_sources import load_data_source
            from mlflow_ctx_autolog.worker.runner import load_submitted
        except ImportError as error:
            import socket
            import sys

            raise ImportError(
                "mlflow-ctx-autolog cannot be imported on the Spark worker "
                f"{socket.gethostname()} by {sys.executable}: {error}. Install it on every "
                "node of the cluster (pip install mlflow-ctx-autolog); or send it along, "
                "spark-submit --py-files mlflow_ctx_autolog.zip, which is its wheel by another "
                "name; or call mlflow_ctx_autolog.disable() on the driver."
            ) from error
        if options.get("data_source"):
            return load_data_source(function, options, lambda *made: (load, (*made, *carried)))
        return load_submitted(function, options, *carried)

    return load


_load = _loader()
