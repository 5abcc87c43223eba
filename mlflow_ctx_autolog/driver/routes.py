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
from mlflow_ctx_autolog.stores import otlp
from mlflow_ctx_autolog.stores import tracking_store as store
from mlflow_ctx_autolog.stores.tracking_server import redirect_of

__all__ = ["check_relay", "describe_transport", "transport", "warn", "warn_of_old_store"]


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
    if wanted == "driver":
        return None, "the transport is set to 'driver'"
    if wanted == "direct" and uri is None:
        raise UnsupportedStoreError(f"The transport is set to 'direct', but {reason}.")
    is_here = uri is not None and store.is_of_this_host(uri)
    if wanted == "auto" and is_here and spark_api.has_workers_elsewhere(session):
        return None, f"workers on other hosts cannot reach {uri}"
    return uri, reason


def describe_transport(config: Config) -> str:
    """Return a sentence that says how spans reach the store, and why.

    Args:
        config: The settings in force.

    Raises:
        UnsupportedStoreError: They cannot.
    """
    uri, reason = transport(config)
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
    warnings.warn(message, CtxAutologWarning, stacklevel=depth)
