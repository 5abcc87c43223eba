"""What is sent to a collector, and what its answers mean."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceResponse,
)

from mlflow_ctx_autolog.delivery.spool import Record
from mlflow_ctx_autolog.exceptions import StoreError
from mlflow_ctx_autolog.stores.otlp import collector_uri, send_to_collector
from mlflow_ctx_autolog.testing import Collector

RECORDS = [Record("span", "a", b"\x0a\x00"), Record("span", "b", b"\x0a\x00")]
HTTP = {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running


def _environment(collector: Collector, **variables: str) -> dict[str, str]:
    named = {f"OTEL_EXPORTER_OTLP_{name}": value for name, value in variables.items()}
    return {**HTTP, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.uri, **named}


def _send(collector: Collector, **variables: str) -> None:
    environment = _environment(collector, **variables)
    send_to_collector(collector_uri(environment), RECORDS, environment)


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_a_batch_is_one_message(collector: Collector, compression: str) -> None:
    """With the headers that the variables name, decoded, and compressed where they say so."""
    _send(collector, COMPRESSION=compression, HEADERS="a=b%20c, x-d=e=f,nonsense")

    (request,) = collector.received
    assert collector.messages == [b"\x0a\x00\x0a\x00"]
    assert request.headers["content-type"] == "application/x-protobuf"
    assert (request.headers["a"], request.headers["x-d"]) == ("b c", "e=f")
    assert (request.headers.get("content-encoding") == "gzip") is (compression == "gzip")


def test_variables_of_traces_win(collector: Collector) -> None:
    """Those for all signals are heeded where there is none for traces."""
    environment = {
        **_environment(collector, HEADERS="a=all"),
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{collector.uri}/v1/traces",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "a=traces",
    }
    send_to_collector(collector_uri(environment), RECORDS, environment)

    assert collector.received[0].headers["a"] == "traces"


@pytest.mark.parametrize(
    ("status", "refused"), [(400, True), (413, True), (401, False), (429, False), (503, False)]
)
def test_an_answer_that_is_no_success_is_an_error(
    collector: Collector, status: int, refused: bool
) -> None:
    """Which tells whether the same will ever be taken."""
    collector.status = status
    with pytest.raises(StoreError, match=f"it answered {status}") as caught:
        _send(collector)

    assert caught.value.refused is refused


def test_spans_that_a_collector_rejects_are_refused(
    collector: Collector,
) -> None:
    """How many they are is told; the others must not be sent again."""
    rejected = ExportTracePartialSuccess(rejected_spans=1, error_message="too large")
    answer = ExportTraceServiceResponse(partial_success=rejected)
    collector.body = answer.SerializeToString()
    with pytest.raises(StoreError, match="it rejected 1 spans: too large") as caught:
        _send(collector)

    assert (caught.value.refused, caught.value.rejected) == (False, 1)


def test_a_collector_that_is_away_is_an_error() -> None:
    """That names the cause and can be tried again."""
    with pytest.raises(StoreError, match=r"cannot be reached: .*refused") as caught:
        send_to_collector("otlp+http://127.0.0.1:9/v1/traces", RECORDS, {})

    assert not caught.value.refused
