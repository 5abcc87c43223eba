"""Spans for an OpenTelemetry collector, by OTLP over HTTP."""

from __future__ import annotations

import gzip
import importlib.util
import json
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from mlflow_ctx_autolog.delivery.records import Record
from mlflow_ctx_autolog.exceptions import StoreError, UnsupportedStoreError, warn_once
from mlflow_ctx_autolog.log_ins import safe_logger
from mlflow_ctx_autolog.stores.answers import Answer, failure
from mlflow_ctx_autolog.stores.http import TLS, exchange

__all__ = ["check_all_were_taken", "collector_uri", "is_collector", "send_to_collector"]

_logger = safe_logger(__name__)

# Before the collector's own address, which so is told from a tracking server's.
_SCHEME = "otlp+"
# Seconds that the collector may take for one exchange, where no variable says; and at most.
_ANSWER_TIME, _LONGEST_TIME = 30.0, 300.0
_PROTOCOL, _PROTOBUF = "http/protobuf", "application/x-protobuf"


def is_collector(uri: str | None) -> bool:
    """Whether an address is what :func:`collector_uri` returns."""
    return uri is not None and uri.startswith(_SCHEME)


def collector_uri(environ: Mapping[str, str] = os.environ) -> str:
    """Return the address that OpenTelemetry's variables name, for :func:`send_to_collector`.

    ``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`` is one as it is, ``OTEL_EXPORTER_OTLP_ENDPOINT`` without
    the path; ``OTEL_EXPORTER_OTLP_TRACES_PROTOCOL`` or ``OTEL_EXPORTER_OTLP_PROTOCOL`` must say
    ``http/protobuf``.

    Raises:
        UnsupportedStoreError: There is none that spans can be sent to from workers.
    """
    endpoint = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if not endpoint and (base := environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")):
        endpoint = f"{base.rstrip('/')}/v1/traces"
    if not endpoint:
        raise UnsupportedStoreError(
            "The transport is otlp, but neither OTEL_EXPORTER_OTLP_TRACES_ENDPOINT nor "
            "OTEL_EXPORTER_OTLP_ENDPOINT is set on the driver."
        )
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or "@" in parts.netloc:
        # Without the address, which may hold a password.
        raise UnsupportedStoreError(
            "The OTLP endpoint must be an http or https address without user name and password; "
            "set a log-in by OTEL_EXPORTER_OTLP_HEADERS on the workers."
        )
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL"
    )
    if protocol != _PROTOCOL:
        raise UnsupportedStoreError(
            f"The OTLP protocol is {protocol or 'not set, which is grpc to MLflow'}, and workers "
            f"speak {_PROTOCOL} only. Set OTEL_EXPORTER_OTLP_PROTOCOL={_PROTOCOL}, and the "
            "endpoint to the collector's HTTP port, 4318 by default."
        )
    if not _has_exporter():
        raise UnsupportedStoreError(
            "OTLP needs the package opentelemetry-exporter-otlp-proto-http on driver and workers: "
            "pip install 'mlflow-ctx-autolog[otlp]'"
        )
    return f"{_SCHEME}{endpoint}"


def _has_exporter() -> bool:
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


def send_to_collector(
    uri: str, records: Sequence[Record], environ: Mapping[str, str] = os.environ
) -> None:
    """Send spans in one request, as OpenTelemetry's variables of this process say.

    Raises:
        StoreError: The collector does not answer, or does not take them all.
    """
    if not records:
        return
    # OTLP messages one after the other are one message with the spans of all.
    body = b"".join(record.payload for record in records)
    headers = {"Content-Type": _PROTOBUF, **_headers(environ)}
    compression = (_variable(environ, "COMPRESSION") or "none").lower()
    if compression == "gzip":
        body = gzip.compress(body)
    elif compression == "deflate":
        body = zlib.compress(body)
    if compression in ("gzip", "deflate"):
        headers["Content-Encoding"] = compression
    url = uri.removeprefix(_SCHEME)
    answer = exchange(
        "POST",
        url,
        headers=headers,
        body=body,
        seconds=_seconds(environ),
        tls=TLS(
            _variable(environ, "CERTIFICATE") or True,
            _variable(environ, "CLIENT_CERTIFICATE"),
            _variable(environ, "CLIENT_KEY"),
        ),
    )
    if not 200 <= answer.status < 300:
        raise failure(answer, "set OTEL_EXPORTER_OTLP_HEADERS where this process runs", url)
    check_all_were_taken(answer)


def check_all_were_taken(answer: Answer) -> None:
    """Raise where an answer says that spans were rejected, or is no collector's.

    Raises:
        StoreError: It is so. Those that were taken with them must not be sent again.
    """
    if answer.kind in ("text/html", "application/xhtml+xml"):
        raise StoreError(f"it answered with {answer.kind}, as no collector does")
    if not answer.content:
        return
    try:
        if answer.kind == "application/json":
            partial = json.loads(answer.content).get("partialSuccess") or {}
            rejected = int(partial.get("rejectedSpans") or 0)
            reason = str(partial.get("errorMessage") or "")
        else:
            from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
                ExportTraceServiceResponse,
            )

            parsed = ExportTraceServiceResponse.FromString(answer.content)
            rejected = parsed.partial_success.rejected_spans
            reason = parsed.partial_success.error_message
    except Exception:
        raise StoreError(f"it answered with {answer.kind} that no collector says") from None
    if rejected:
        raise StoreError(f"it rejected {rejected} spans: {reason}", rejected=rejected)


def _headers(environ: Mapping[str, str]) -> dict[str, str]:
    text = _variable(environ, "HEADERS")
    if not text:
        return {}
    from opentelemetry.util.re import parse_env_headers

    # Whose warning would quote one that it cannot read, with whatever secret is in it.
    logger = logging.getLogger("opentelemetry.util.re")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        found = dict(parse_env_headers(text, liberal=True))
    finally:
        logger.disabled = was_disabled
    given = [each for each in text.split(",") if each.strip()]
    if len(found) < len(given):
        warn_once(
            _logger,
            "headers",
            f"Of the {len(given)} headers in OTEL_EXPORTER_OTLP_HEADERS, {len(found)} can be read; "
            "each must be name=value, with what is no letter or digit in the value as %XX.",
        )
    return found


def _seconds(environ: Mapping[str, str]) -> float:
    try:
        seconds = float(_variable(environ, "TIMEOUT") or _ANSWER_TIME)
    except ValueError:
        return _ANSWER_TIME
    return min(seconds, _LONGEST_TIME) if seconds > 0 else _ANSWER_TIME


def _variable(environ: Mapping[str, str], name: str) -> str | None:
    return environ.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}") or environ.get(
        f"OTEL_EXPORTER_OTLP_{name}"
    )
