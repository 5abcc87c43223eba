"""What users call on the driver, besides ``enable``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from mlflow_ctx_autolog import tracing
from mlflow_ctx_autolog.arguments import check_function, check_number, check_spark, check_type
from mlflow_ctx_autolog.context import DriverContext
from mlflow_ctx_autolog.delivery.receipts import Receipt
from mlflow_ctx_autolog.driver import spark as spark_api
from mlflow_ctx_autolog.driver.handover import captured, driver, settings
from mlflow_ctx_autolog.driver.routes import transport
from mlflow_ctx_autolog.exceptions import (
    IncompleteTraceError,
    UnsupportedStoreError,
)
from mlflow_ctx_autolog.worker import process
from mlflow_ctx_autolog.worker.spark_task import in_spark_task

__all__ = ["broadcast", "capture", "flush", "receipt", "traced"]

F = TypeVar("F", bound=Callable[..., Any])


def flush(timeout: float = 30.0) -> bool:
    """Send finished spans now: on a worker its own, on the driver those that came home.

    Args:
        timeout: Seconds to wait at most.

    Returns:
        Whether everything that had finished is stored. What the driver's own code traces is
        MLflow's to flush, with ``mlflow.flush_trace_async_logging()``.
    """
    check_number("timeout", timeout, "seconds, at least 0")
    deadline = time.monotonic() + timeout
    own = process.flush(timeout)
    return driver.ledger.flush(max(0.0, deadline - time.monotonic())) and own


def receipt(trace_id: str | None = None, timeout: float | None = None) -> Receipt:
    """Return what became of the spans of a trace, having asked the store.

    On Spark Connect, and for attempts of tasks that failed, it is the store that knows what a
    task has made; elsewhere each task tells the driver.

    Args:
        trace_id: A trace whose context was handed to Spark; by default the last one. Where no
            span was active, so that each task is a trace of its own, the receipt is of all
            these, and adds up what they have told, without asking the store. So is that of a
            trace which goes to a collector, without the driver's own spans.
        timeout: Seconds to wait at most for what is on its way; by default ``flush_timeout``.

    Raises:
        ValueError: The trace was not handed to Spark by this process.
        TypeError: An argument is of the wrong type.
        IncompleteTraceError: With ``strict=True``, the store does not have all spans.
    """
    takes = "the id of a trace that this process has handed to Spark, or None for the last one"
    check_type("trace_id", trace_id, (str, type(None)), takes)
    seconds = settings().flush_timeout if timeout is None else timeout
    check_number("timeout", seconds, "seconds, at least 0, or None for flush_timeout")
    try:
        found = driver.ledger.receipt(trace_id, seconds)
    except KeyError:
        raise ValueError(
            f"trace_id={trace_id!r} is not known here; receipt() takes {takes}. Of any trace in "
            "the store, report() tells."
        ) from None
    if settings().strict and not found.complete:
        raise IncompleteTraceError(driver.ledger.explain(found), found)
    return found


def capture() -> DriverContext:
    """Return the trace context of this moment: the active span, and where its trace is stored.

    Raises:
        UnsupportedStoreError: Spans of workers cannot reach the tracking store.
    """
    return captured(spark_api.active_session())


def broadcast(spark: Any = None) -> Any:
    """Capture the trace context of this moment and send it to the workers.

    Args:
        spark: A Spark session or context; the active session by default.

    Returns:
        A carrier for :func:`attach`: a Spark broadcast of the serialised
        :class:`DriverContext`; on Spark Connect, which has no broadcasts, that text itself.

    Raises:
        TypeError: That is no session.
        ValueError: None is active.
        UnsupportedStoreError: Spans of workers cannot reach the tracking store.
    """
    check_spark("spark", spark)
    session = spark_api.active_session() if spark is None else spark
    if session is None:
        raise ValueError(
            "spark=None stands for the active Spark session, and none is active; start one, or "
            "pass it. Without Spark, capture().to_json() is a carrier."
        )
    context = captured(session)
    if context.tracking_uri is None:
        raise UnsupportedStoreError(
            f"Spans would have to come home to the driver, since {transport(settings())[1]}; those "
            "of attach() cannot. Use enable() or traced()."
        )
    context_of_spark = spark_api.spark_context(session)
    text = context.to_json()
    return text if context_of_spark is None else context_of_spark.broadcast(text)


def traced(function: F, spark: Any = None) -> F:
    """Have Spark get ``function`` with the trace context, also where nothing is enabled.

    For those who want to see it where :func:`enable` does it unseen::

        with mlflow.start_span("extract"):
            df.mapInPandas(ctx_autolog.traced(extract), schema).collect()

    Args:
        function: Any function that Spark can run.
        spark: A Spark session; the active one by default.

    Returns:
        The function itself: only what Spark makes of it is another.

    Raises:
        TypeError: That is no function, or no session.
        UnsupportedStoreError: Spans of workers cannot reach the tracking store.
    """
    check_function("function", function)
    check_spark("spark", spark)
    # A module that marks its functions at import is imported on the workers, too.
    if not in_spark_task() and tracing.is_on():
        transport(settings(), spark)
        driver.mark(function)
    return function
