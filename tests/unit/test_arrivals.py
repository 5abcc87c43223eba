"""Spans that came home, on the driver."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import SpanEvent
from workload import stored_trace

from mlflow_ctx_autolog import tracing
from mlflow_ctx_autolog.arrivals import Arrivals
from mlflow_ctx_autolog.testing import TrackingServer


def _finished_span(parent: mlflow.entities.LiveSpan) -> bytes:
    """Return a span as another process would send it, below one of this process's."""
    with mlflow.start_span("away", span_type="CHAT_MODEL") as span:
        span.set_inputs({"messages": [{"role": "user", "content": "grüße"}]})
        span.set_attribute("numbers", [1, 2.5])
        span.add_event(SpanEvent("retry"))
        span.set_status("ERROR")
    assert span.parent_id == parent.span_id
    return tracing.span_to_bytes(span.to_immutable_span())


def test_a_span_survives_the_way_home(experiment_id: str) -> None:
    """What is parsed on the driver is what was serialised on the worker."""
    with mlflow.start_span("driver") as parent:
        payload = _finished_span(parent)
    span = tracing.span_from_bytes(payload)

    assert span.name == "away"
    assert span.parent_id == parent.span_id
    assert span.trace_id == parent.trace_id
    assert span.span_type == "CHAT_MODEL"
    assert span.inputs == {"messages": [{"role": "user", "content": "grüße"}]}
    assert span.attributes["numbers"] == [1, 2.5]
    assert span.status.status_code == "ERROR"
    assert [event.name for event in span.events] == ["retry"]


def test_where_spans_cannot_be_stored_singly_they_join_the_open_trace(
    experiment_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's file store gets them with the driver's own spans, from whichever thread."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(tmp_path.as_uri())
    mlflow.set_experiment("files")
    arrivals = Arrivals()
    with mlflow.start_span("driver") as span:
        payload = _from_a_worker(_finished_span(span))
        thread = threading.Thread(
            target=arrivals.receive, args=([(None, experiment_id, payload, "")],)
        )
        thread.start()
        thread.join()

    assert _stored_names(span) == ["away", "driver", "from a worker"]


def _stored_names(span: mlflow.entities.LiveSpan) -> list[str]:
    return sorted(each.name for each in stored_trace(span.trace_id).spans)


def _from_a_worker(payload: bytes) -> bytes:
    """Return a span as another one, which this process has not recorded itself."""
    proto = tracing.OTelProtoSpan.FromString(payload)
    proto.span_id = b"12345678"
    proto.name = "from a worker"
    return bytes(proto.SerializeToString())


def test_spans_that_come_too_late_are_said_to_be_lost(
    experiment_id: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One warning names the trace and what to do, where the store needs the trace to be open."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(tmp_path.as_uri())
    mlflow.set_experiment("files")
    arrivals = Arrivals()
    with mlflow.start_span("driver") as span:
        payload = _finished_span(span)
    mlflow.flush_trace_async_logging()
    arrivals.receive([(None, experiment_id, payload, "")] * 3)

    (warning,) = _warnings(caplog)
    assert span.trace_id in warning
    assert "inside the span" in warning


def test_spans_that_missed_their_store_are_delivered(
    experiment_id: str, server: TrackingServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The driver stores them, and one warning says why the workers could not."""
    arrivals = Arrivals()
    with mlflow.start_span("driver") as span:
        payload = _from_a_worker(_finished_span(span))
    arrived = [(server.uri, experiment_id, payload, "no route")]
    arrivals.receive(arrived)
    arrivals.receive(arrived)

    assert arrivals.flush(60)
    assert _stored_names(span) == ["away", "driver", "from a worker"]
    (warning,) = _warnings(caplog)
    assert server.uri in warning
    assert "no route" in warning


def test_spans_for_the_driver_are_delivered_to_its_own_store(
    experiment_id: str, server: TrackingServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the store takes single spans, those without an address go to the driver's, quietly."""
    arrivals = Arrivals()
    with mlflow.start_span("driver") as span:
        payload = _from_a_worker(_finished_span(span))
        arrivals.receive([(None, experiment_id, payload, "")])

    assert arrivals.flush(60)
    assert _stored_names(span) == ["away", "driver", "from a worker"]
    assert _warnings(caplog) == []


def test_what_is_no_span_breaks_nothing(
    experiment_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Garbage is refused with one warning; Spark, which hands it over, sees no exception."""
    arrivals = Arrivals()
    arrivals.receive([(None, experiment_id, b"\xff garbage", "")])
    arrivals.receive([(None, experiment_id, b"\xff garbage", "")])
    assert len(_warnings(caplog)) == 1


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "mlflow_ctx_autolog.arrivals" and record.levelno == logging.WARNING
    ]
