"""What the driver does: capture its trace context and send it along."""

from __future__ import annotations

import sys
import time
import uuid
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

from mlflow_ctx_autolog import process, store, tracing, versions
from mlflow_ctx_autolog import spark as spark_api
from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.context import DriverContext
from mlflow_ctx_autolog.exceptions import (
    CtxAutologWarning,
    IncompleteTraceError,
    UnsupportedStoreError,
)
from mlflow_ctx_autolog.ledger import Ledger
from mlflow_ctx_autolog.receipts import Receipt
from mlflow_ctx_autolog.spark_task import in_spark_task
from mlflow_ctx_autolog.worker import process_id

__all__ = [
    "Driver",
    "broadcast",
    "capture",
    "describe_transport",
    "flush",
    "receipt",
    "settings",
    "traced",
    "transport",
    "warn",
    "warn_of_old_store",
]

F = TypeVar("F", bound=Callable[..., Any])


class Driver:
    """The settings in force on the driver, and what it has been told to remember."""

    def __init__(self) -> None:
        self.config: Config | None = None
        self.warned_of_no_span = False
        self.enabled_at = 0.0
        self.ledger = Ledger(settings)

    def carry(
        self, function: Callable[..., Any], receiver: Any, repeated: bool
    ) -> Callable[..., Any]:
        """Return ``function`` with the context of this moment; itself if that cannot be had."""
        try:
            session = spark_api.session_of(receiver)
            return self.carrying(function, session, required=False, repeated=repeated)
        except UnsupportedStoreError as error:
            warn(f"The model calls of {_named(function)} will not be traced. {error}")
        except Exception as error:
            warn(
                f"The model calls of {_named(function)} will not be traced, since the trace "
                f"context could not be captured: {type(error).__name__}: {error}"
            )
        return function

    def carrying(
        self, function: Callable[..., Any], session: Any, *, required: bool, repeated: bool
    ) -> Callable[..., Any]:
        """Return ``function`` with the context of this moment, and a way home for its spans.

        Raises:
            UnsupportedStoreError: The spans can reach the store neither directly nor by way of
                the driver.
        """
        way_home = spark_api.way_home(session, self.ledger.receive)
        context = _capture(session, receipts_come_home=way_home is not None, functions=1)
        if context.tracking_uri is None:
            _check_way_home(way_home is not None, context.traceparent is not None)
        carrier = spark_api.broadcast_text(session, context.to_json())
        return spark_api.carrying(
            function, carrier, required=required, repeated=repeated, way_home=way_home
        )


def settings() -> Config:
    """Return the settings in force on the driver."""
    return driver.config or Config.from_env()


driver = Driver()


def describe_transport() -> str:
    """Return a sentence that says how spans reach the store, and why.

    Raises:
        UnsupportedStoreError: They cannot.
    """
    uri, reason = transport()
    way = "with the task to the driver, which stores them" if uri is None else "from the workers"
    return f"Spans travel {way}: {reason}."


def warn_of_old_store() -> None:
    """Warn of a release of MLflow whose store cannot end a trace that workers have written to."""
    try:
        version = store.store_version()
    except Exception:
        # Whether the store can be reached is not the question here.
        return
    if version is not None and versions.is_older(version, than="3.10"):
        warn(
            f"The traces are kept by MLflow {version}, which fails when a trace ends that workers "
            "have stored calls in: the end of the driver's span then waits for minutes. The calls "
            "themselves are kept. Upgrade the tracking server to 3.10 or newer."
        )


def _check_way_home(has_accumulators: bool, has_parent: bool) -> None:
    if not has_accumulators:
        raise UnsupportedStoreError(
            f"Spans would have to come home to the driver, since {transport()[1]}; Spark Connect "
            "has no way for them. Use a tracking server that its workers can reach."
        )
    if not has_parent and not store.store_takes_spans():
        raise UnsupportedStoreError(
            f"No MLflow span is active, and {transport()[1]}, so that their spans cannot be "
            'stored without one. Hand the function to Spark inside with mlflow.start_span("my-job")'
        )


def transport() -> tuple[str | None, str]:
    """Return the tracking URI for workers, None where spans come home; and why.

    Raises:
        UnsupportedStoreError: Spans can take neither way.
    """
    uri, reason = store.worker_tracking_uri()
    wanted = settings().transport
    if wanted == "driver":
        return None, "the transport is set to 'driver'"
    if wanted == "direct" and uri is None:
        raise UnsupportedStoreError(f"The transport is set to 'direct', but {reason}.")
    return uri, reason


def flush(timeout: float = 30.0) -> bool:
    """Send finished spans now: on a worker its own, on the driver those that came home.

    Args:
        timeout: Seconds to wait at most.

    Returns:
        Whether everything that had finished is stored. What the driver's own code traces is
        MLflow's to flush, with ``mlflow.flush_trace_async_logging()``.
    """
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
            these, and adds up what they have told, without asking the store.
        timeout: Seconds to wait at most for what is on its way; by default ``flush_timeout``.

    Raises:
        KeyError: The trace was not handed to Spark by this process.
        IncompleteTraceError: With ``strict=True``, the store does not have all spans.
    """
    seconds = settings().flush_timeout if timeout is None else timeout
    found = driver.ledger.receipt(trace_id, seconds)
    if settings().strict and not found.complete:
        raise IncompleteTraceError(driver.ledger.explain(found), found)
    return found


def capture() -> DriverContext:
    """Return the trace context of this moment: the active span, and where its trace is stored.

    Raises:
        UnsupportedStoreError: Spans of workers cannot reach the tracking store.
    """
    return _capture(spark_api.active_session(), receipts_come_home=False)


def broadcast(spark: Any = None) -> Any:
    """Capture the trace context of this moment and send it to the workers.

    Args:
        spark: A Spark session or context; the active session by default.

    Returns:
        A carrier for :func:`attach`: a Spark broadcast of the serialised
        :class:`DriverContext`; on Spark Connect, which has no broadcasts, that text itself.

    Raises:
        UnsupportedStoreError: Spans of workers cannot reach the tracking store.
    """
    session = spark_api.active_session() if spark is None else spark
    context = _capture(session, receipts_come_home=False)
    if context.tracking_uri is None:
        raise UnsupportedStoreError(
            f"Spans would have to come home to the driver, since {transport()[1]}; those of "
            "attach() cannot. Use enable() or traced()."
        )
    return spark_api.broadcast_text(session, context.to_json())


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
        UnsupportedStoreError: Spans of workers cannot reach the tracking store.
    """
    if in_spark_task() or spark_api.carries(function):
        # A module that wraps at import is imported on the workers, too.
        return function
    session = spark_api.active_session() if spark is None else spark
    # Nobody says here whether Spark will call it once or many times in a task.
    return cast(F, driver.carrying(function, session, required=True, repeated=True))


def _capture(session: Any, *, receipts_come_home: bool, functions: int = 0) -> DriverContext:
    headers = tracing.active_span_headers()
    tracking_uri, _ = transport()
    driver.ledger.open(receipts_come_home=receipts_come_home, functions=functions)
    if not headers and store.store_takes_spans():
        _warn_of_no_span()
    return DriverContext(
        tracking_uri=tracking_uri,
        experiment_id=tracing.current_experiment_id(),
        traceparent=headers.get("traceparent"),
        tracestate=headers.get("tracestate"),
        session_id=None if headers else f"spark-{uuid.uuid4()}",
        application_id=None if session is None else spark_api.application_id(session),
        process_id=process_id(),
        config=settings(),
    )


def _warn_of_no_span() -> None:
    if not driver.warned_of_no_span:
        driver.warned_of_no_span = True
        warn(
            "No MLflow span is active, so each Spark task becomes a trace of its own; the tasks "
            "of one job share a session. To get one trace, hand the function to Spark inside a "
            'span: with mlflow.start_span("my-job"): ...'
        )


def _named(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


def warn(message: str) -> None:
    """Warn at the line of the user's that led here."""
    frame, depth = sys._getframe(1), 2
    ours = ("mlflow_ctx_autolog", "pyspark")
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ours:
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, CtxAutologWarning, stacklevel=depth)
