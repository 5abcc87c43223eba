"""What the driver does: capture its trace context and send it along."""

from __future__ import annotations

import sys
import uuid
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

from mlflow_ctx_autolog import spark as spark_api
from mlflow_ctx_autolog import tracing
from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.context import DriverContext
from mlflow_ctx_autolog.exceptions import CtxAutologWarning, UnsupportedStoreError
from mlflow_ctx_autolog.spark_task import in_spark_task
from mlflow_ctx_autolog.worker import process_id

__all__ = ["Driver", "broadcast", "capture", "traced"]

F = TypeVar("F", bound=Callable[..., Any])


class Driver:
    """The settings in force on the driver, and whether it has said that no span is active."""

    def __init__(self) -> None:
        self.config: Config | None = None
        self.warned_of_no_span = False

    def carry(
        self, function: Callable[..., Any], receiver: Any, repeated: bool
    ) -> Callable[..., Any]:
        """Return ``function`` with the context of this moment; itself if that cannot be had."""
        try:
            carrier = broadcast(spark_api.session_of(receiver))
        except UnsupportedStoreError as error:
            _warn(f"The model calls of {_named(function)} will not be traced. {error}")
            return function
        except Exception as error:
            _warn(
                f"The model calls of {_named(function)} will not be traced, since the trace "
                f"context could not be captured: {type(error).__name__}: {error}"
            )
            return function
        return spark_api.carrying(function, carrier, required=False, repeated=repeated)


driver = Driver()


def capture() -> DriverContext:
    """Return the trace context of this moment: the active span, and where its trace is stored.

    Raises:
        UnsupportedStoreError: The tracking store cannot take spans from workers.
    """
    return _capture(spark_api.active_session())


def broadcast(spark: Any = None) -> Any:
    """Capture the trace context of this moment and send it to the workers.

    Args:
        spark: A Spark session or context; the active session by default.

    Returns:
        A carrier for :func:`attach`: a Spark broadcast of the serialised
        :class:`DriverContext`; on Spark Connect, which has no broadcasts, that text itself.

    Raises:
        UnsupportedStoreError: The tracking store cannot take spans from workers.
    """
    session = spark_api.active_session() if spark is None else spark
    return spark_api.broadcast_text(session, _capture(session).to_json())


def traced(function: F, spark: Any = None) -> F:
    """Return ``function`` so that it carries the trace context of this moment to the workers.

    For those who want to see it where :func:`enable` does it unseen. Call it where you hand the
    function to Spark, inside the driver's span::

        with mlflow.start_span("extract"):
            df.mapInPandas(ctx_autolog.traced(extract), schema)

    Args:
        function: Any function that Spark can run.
        spark: A Spark session; the active one by default.

    Raises:
        UnsupportedStoreError: The tracking store cannot take spans from workers.
    """
    if in_spark_task() or spark_api.carries(function):
        # A module that wraps at import is imported on the workers, too.
        return function
    return cast(F, spark_api.carrying(function, broadcast(spark), required=True))


def _capture(session: Any) -> DriverContext:
    headers = tracing.active_span_headers()
    if not headers:
        _warn_of_no_span()
    return DriverContext(
        tracking_uri=tracing.portable_tracking_uri(),
        experiment_id=tracing.current_experiment_id(),
        traceparent=headers.get("traceparent"),
        tracestate=headers.get("tracestate"),
        session_id=None if headers else f"spark-{uuid.uuid4()}",
        application_id=None if session is None else spark_api.application_id(session),
        process_id=process_id(),
        config=driver.config or Config.from_env(),
    )


def _warn_of_no_span() -> None:
    if not driver.warned_of_no_span:
        driver.warned_of_no_span = True
        _warn(
            "No MLflow span is active, so each Spark task becomes a trace of its own; the tasks "
            "of one job share a session. To get one trace, hand the function to Spark inside a "
            'span: with mlflow.start_span("my-job"): ...'
        )


def _named(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


def _warn(message: str) -> None:
    """Warn at the line of the user's that led here."""
    frame, depth = sys._getframe(1), 2
    ours = ("mlflow_ctx_autolog", "pyspark")
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ours:
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, CtxAutologWarning, stacklevel=depth)
