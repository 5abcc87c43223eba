"""Which way spans of workers reach the store, and what is said of a way that they cannot."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from mlflow_ctx_autolog import versions
from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.driver import spark as spark_api
from mlflow_ctx_autolog.exceptions import (
    CtxAutologWarning,
    UnsupportedStoreError,
)
from mlflow_ctx_autolog.log_ins import without_credentials, without_log_ins
from mlflow_ctx_autolog.stores import databricks, otlp
from mlflow_ctx_autolog.stores import tracking_store as store
from mlflow_ctx_autolog.stores.sending import is_database
from mlflow_ctx_autolog.stores.tracking_server import redirect_of

__all__ = [
    "check_relay",
    "describe_transport",
    "is_relayed",
    "spans_per_host",
    "transport",
    "warn",
    "warn_of_old_store",
]

# Hosts among which a trace is shared out where nobody knows how many there will be.
_HOSTS = 20


def transport(config: Config, session: Any = None) -> tuple[str | None, str]:
    """Return where workers send spans, None where these come home; and why.

    Args:
        config: The settings in force.
        session: A Spark session or context; the active session by default.

    Raises:
        UnsupportedStoreError: Spans can take neither way.
    """
    wanted = config.transport
    session = spark_api.active_session() if session is None else session
    exports_to_collector = store.exports_to_collector()
    if wanted == "otlp" or (wanted == "auto" and exports_to_collector):
        collector = otlp.collector_uri()
        if not exports_to_collector:
            raise UnsupportedStoreError(
                "The transport is set to 'otlp', but MLflow on the driver stores its spans in "
                "another place, so that calls would be apart from the span they belong to. Unset "
                "MLflow's trace destination, MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT and "
                "MLFLOW_ENABLE_OTLP_EXPORTER."
            )
        return collector, "MLflow on the driver exports to an OTLP endpoint"
    if exports_to_collector:
        raise UnsupportedStoreError(
            f"The transport is set to {wanted!r}, but MLflow on the driver sends its spans to the "
            "OTLP endpoint that OpenTelemetry's variables name. Set the transport to 'otlp', or "
            "MLFLOW_ENABLE_OTLP_EXPORTER=false."
        )
    uri, reason = store.worker_tracking_uri()
    if (table := _table(config, session)) is not None:
        return table
    if wanted == "driver":
        return None, "the transport is set to 'driver'"
    if wanted == "direct" and uri is None:
        raise UnsupportedStoreError(f"The transport is set to 'direct', but {reason}.")
    is_here = uri is not None and store.is_of_this_host(uri)
    if wanted == "auto" and is_here and spark_api.has_workers_elsewhere(session):
        return None, f"workers on other hosts cannot reach {uri}"
    return uri, reason


def _table(config: Config, session: Any) -> tuple[str, str] | None:
    """Return where workers append spans to a Unity Catalog table, and why; None where they don't.

    With ``auto`` they do where their log-in is known, or where there is no other way.
    """
    workspace = None if config.transport == "driver" else store.table_workspace()
    if workspace is None:
        return None
    uri, token = databricks.table_uri(workspace), databricks.TOKEN_VARIABLE
    if config.databricks_token is not None:
        return uri, f"{workspace} takes spans, with the tokens of databricks_token"
    if token in config.forward_env:
        return uri, f"{workspace} takes spans, with the {token} of forward_env"
    if config.transport == "direct":
        return uri, f"{workspace} takes spans, with the log-in that workers have"
    if session is not None and spark_api.spark_context(session) is None:
        return uri, (
            f"{workspace} takes spans, and Spark Connect has no other way: workers need a log-in, "
            f"which forward_env=[{token!r}] or databricks_token= gives them, unless databricks-sdk "
            "finds one there"
        )
    return None


def is_relayed(config: Config, uri: str | None) -> bool:
    """Whether workers that see this driver's directory leave it to the driver to store spans.

    Args:
        config: The settings in force.
        uri: Where workers would send spans; None where they cannot.
    """
    return uri is None or (is_database(uri) and config.transport != "direct")


def describe_transport(config: Config) -> str:
    """Return a sentence that says how spans reach the store, and why.

    Args:
        config: The settings in force.

    Raises:
        UnsupportedStoreError: They cannot.
    """
    uri, reason = transport(config)
    if uri is not None and is_relayed(config, uri):
        way = f"with the task to the driver, which stores them in {uri}"
        return f"Spans travel {way}: a worker would have to load MLflow to write to a database."
    if uri is None:
        place = without_credentials(store.current_tracking_uri())
        way = f"with the task to the driver, which stores them in {place}"
    else:
        way = f"from the workers to {uri}"
    return f"Spans travel {way}: {reason}."


def warn_of_old_store() -> None:
    """Warn of a release of MLflow whose store cannot end a trace that workers have written to.

    And of a server that sends elsewhere, where nothing is sent.
    """
    uri = store.current_tracking_uri()
    target = redirect_of(uri)
    if target is not None:
        warn(
            f"The tracking server at {without_log_ins(uri)} sends to {without_log_ins(target)}, "
            "and spans are not sent where nobody has said to. If that is your server, say "
            f"mlflow.set_tracking_uri({without_log_ins(target)!r})."
        )
        return
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


def check_relay(config: Config, *, has_accumulators: bool) -> None:
    """Raise where spans would have to come home, and cannot.

    Raises:
        UnsupportedStoreError: It is so.
    """
    if not has_accumulators:
        raise UnsupportedStoreError(
            f"Spans would have to come home to the driver, since {transport(config)[1]}; Spark "
            "Connect has no way for them. Use a tracking server that its workers can reach."
        )


def warn(message: str) -> None:
    """Warn at the line of the user's that led here."""
    frame, depth = sys._getframe(1), 2
    ours = ("mlflow_ctx_autolog", "pyspark")
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ours:
        frame, depth = frame.f_back, depth + 1
    warnings.warn(without_log_ins(message), CtxAutologWarning, stacklevel=depth)


def spans_per_host(config: Config, session: Any) -> int | None:
    """Return how many spans below tasks a trace takes on each host; None for all.

    Args:
        config: The settings in force.
        session: A Spark session or context; None where it is not known.
    """
    limit = config.max_spans_per_trace
    # A store for whole traces takes them from the driver, which holds them until the root ends.
    if limit is None or not store.store_takes_spans() or store.span_table() is not None:
        return None
    hosts = 1 if session is None else spark_api.most_hosts(session)
    if hosts is None:
        return max(1, limit // _HOSTS)
    # A part for each host, but not so small that a job of few partitions has no use of it, unless
    # the whole became too large.
    return max(1, limit // hosts, min(limit // 10, 2 * limit // hosts))
