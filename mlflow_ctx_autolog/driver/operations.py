"""Traces of actions on Spark Connect that no span was active for, which their tasks write."""

from __future__ import annotations

import time

from mlflow_ctx_autolog.context import DriverContext
from mlflow_ctx_autolog.delivery.records import Destination
from mlflow_ctx_autolog.driver.books import Book
from mlflow_ctx_autolog.driver.mlflow_traces import info_of_trace
from mlflow_ctx_autolog.stores.sending import appends
from mlflow_ctx_autolog.stores.tracking_store import current_tracking_uri, store_takes_spans
from mlflow_ctx_autolog.task import driver_trace_id
from mlflow_ctx_autolog.worker.spark_task import operation_scope

__all__ = ["book_of_operation"]


def book_of_operation(shared: DriverContext, operation: str) -> Book | None:
    """Return a book for the trace of an action; None where its tasks have none together.

    Args:
        shared: What the functions that it has run carry.
        operation: The id of the action's operation.
    """
    if appends(shared.tracking_uri):
        return None
    # As its tasks name it.
    trace_id = driver_trace_id(shared.of_action("", operation_scope(operation)))
    if trace_id is None or shared.experiment_id is None:
        return None
    where = Destination(current_tracking_uri(), shared.experiment_id, workspace=shared.workspace)
    info = info_of_trace(trace_id, shared.experiment_id, time.time_ns(), {}, {})
    book = Book(where, info, store_takes_spans(), receipts_come_home=False, closed_by_tasks=True)
    # Of which nothing is to be shown: when it is over, nobody here is told.
    book.has_ended, book.shown = True, 0
    return book
