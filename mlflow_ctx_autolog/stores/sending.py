"""Storing records, in whatever kind of store they belong."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from urllib.parse import urlsplit

from mlflow_ctx_autolog.delivery.records import Destination, Record
from mlflow_ctx_autolog.stores.databricks import is_table, send_to_table
from mlflow_ctx_autolog.stores.http import untraced
from mlflow_ctx_autolog.stores.otlp import is_collector, send_to_collector
from mlflow_ctx_autolog.stores.tracking_server import send_to_server, speaks_to

__all__ = ["appends", "is_database", "needs_mlflow", "send", "send_to"]

# As MLflow names them at the beginning of a tracking URI.
_DATABASES = ("mssql", "mysql", "postgresql", "sqlite")


def appends(uri: str | None) -> bool:
    """Whether a store keeps a span as often as it is sent, so that each is sent when it has ended.

    So do collectors and tables of Unity Catalog; they are told of nothing but spans.
    """
    return is_collector(uri) or is_table(uri)


def needs_mlflow(uri: str | None) -> bool:
    """Whether records can be sent to an address only by a process that has MLflow loaded.

    So it is with databases, traces of Databricks' experiments, folders of files, and log-ins that
    only MLflow can make.
    """
    return uri is not None and not appends(uri) and not speaks_to(uri)


def is_database(uri: str | None) -> bool:
    """Whether an address is that of a database, as SQLite's, rather than of a server by HTTP."""
    return uri is not None and urlsplit(uri).scheme.partition("+")[0] in _DATABASES


def send(
    destination: Destination, records: Sequence[Record], environ: Mapping[str, str] = os.environ
) -> None:
    """Store records, spans in one request. Storing a record again replaces it.

    What :func:`appends` is sent no more than the spans.

    Args:
        destination: Where they belong.
        records: What to store.
        environ: Where the variables of the log-in are: after a task has ended, for one, those that
            it had. MLflow's own client reads those of the process.

    Raises:
        StoreError: The store does not answer, or refuses them.
    """
    uri = destination.tracking_uri
    spans = [record for record in records if record.kind == "span"]
    if uri is not None and is_collector(uri):
        send_to_collector(uri, spans, environ)
    elif uri is not None and is_table(uri):
        send_to_table(uri, destination.experiment_id, spans, environ)
    elif speaks_to(uri, environ):
        send_to_server(destination, records, environ)
    else:
        from mlflow_ctx_autolog.stores.tracking_store import send_by_mlflow

        with untraced():
            send_by_mlflow(destination, records)


def send_to(
    tracking_uri: str | None, destination: Destination, records: Sequence[Record]
) -> Destination:
    """Store records in ``tracking_uri``, wherever they were to go; return where they went.

    Without one, those that had no address of their own go to MLflow's configured store.

    Raises:
        StoreError: The store does not answer, or refuses them.
    """
    uri = tracking_uri or destination.tracking_uri
    if uri is None:
        from mlflow_ctx_autolog.stores.tracking_store import current_tracking_uri

        uri = current_tracking_uri()
    used = replace(destination, tracking_uri=uri)
    send(used, records)
    return used
