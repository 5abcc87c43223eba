"""Spans for an OpenTelemetry collector, by OTLP over HTTP."""

from __future__ import annotations

import gzip
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from mlflow_ctx_autolog.delivery.spool import Record
from mlflow_ctx_autolog.exceptions import StoreError, UnsupportedStoreError
from mlflow_ctx_autolog.stores.answers import failure, root_cause

__all__ = ["collector_uri", "is_collector", "otlp_record", "send_to_collector"]

# Before the collector's own address, which so is told from a tracking server's.
_SCHEME = "otlp+"
# Seconds that the collector may take to answer one request.
_ANSWER_TIME = 30.0
_PROTOCOL = "http/protobuf"


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


def otlp_record(span: Any, owner: str = "") -> Record:
    """Return a finished span of OpenTelemetry's SDK as a record, as its own exporters encode it.

    Raises:
        ImportError: opentelemetry-exporter-otlp-proto-http is not installed.
    """
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans

    payload = encode_spans([span]).SerializeToString()
    return Record("span", format(span.context.span_id, "016x"), bytes(payload), owner)


def send_to_collector(
    uri: str, records: Sequence[Record], environ: Mapping[str, str] = os.environ
) -> None:
    """Send spans in one request, with the headers that this process's variables name.

    Raises:
        StoreError: The collector does not answer, or does not take them all.
    """
    # OTLP messages one after the other are one message with the spans of all.
    body = b"".join(record.payload for record in records)
    headers = {"Content-Type": "application/x-protobuf", **_headers(environ)}
    if _variable(environ, "COMPRESSION") == "gzip":
        headers["Content-Encoding"] = "gzip"
        body = gzip.compress(body)
    try:
        answer = requests.post(
            uri.removeprefix(_SCHEME),
            data=body,
            headers=headers,
            timeout=_ANSWER_TIME,
            verify=_variable(environ, "CERTIFICATE") or True,
            allow_redirects=False,
        )
    except requests.RequestException as error:
        raise StoreError(f"it cannot be reached: {root_cause(error)}") from error
    if not 200 <= answer.status_code < 300:
        raise failure(answer, "set OTEL_EXPORTER_OTLP_HEADERS where this process runs")
    _check_all_were_taken(answer.content)


def _check_all_were_taken(content: bytes) -> None:
    try:
        answer = ExportTraceServiceResponse.FromString(content)
    except Exception:
        # Collectors that answer in JSON, or not at all, have taken everything.
        return
    rejected = answer.partial_success.rejected_spans
    if rejected:
        reason = answer.partial_success.error_message
        raise StoreError(f"it rejected {rejected} spans: {reason}", refused=True)


def _headers(environ: Mapping[str, str]) -> dict[str, str]:
    # https://opentelemetry.io/docs/specs/otel/protocol/exporter/#specifying-headers-via-environment-variables
    pairs = (pair.partition("=") for pair in (_variable(environ, "HEADERS") or "").split(","))
    return {name.strip(): unquote(value.strip()) for name, found, value in pairs if found}


def _variable(environ: Mapping[str, str], name: str) -> str | None:
    return environ.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}") or environ.get(
        f"OTEL_EXPORTER_OTLP_{name}"
    )
