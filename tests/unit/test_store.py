"""What is said to a tracking store, and what is made of its answers."""

from __future__ import annotations

import email.utils
import json
import shutil
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import mlflow
import pytest
from mlflow.entities import Span, SpanEvent, TraceInfo
from mlflow.entities.trace_location import TraceLocation
from mlflow.entities.trace_state import TraceState
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

from mlflow_ctx_autolog.delivery.spool import Destination, Record
from mlflow_ctx_autolog.exceptions import StoreError
from mlflow_ctx_autolog.stores import tracking_store as store
from mlflow_ctx_autolog.stores.sending import send, send_to

PROTOBUF = {"Content-Type": "application/x-protobuf"}
JSON = {"Content-Type": "application/json"}


class Stub(ThreadingHTTPServer):
    """A server that gives every request the answer it was told to give, and remembers it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.status, self.headers, self.body = 200, PROTOBUF, b""
        # Of some paths, another body.
        self.bodies: dict[str, bytes] = {}
        self.requests: list[tuple[str, dict[str, str], bytes]] = []

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def will_answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.status, self.headers, self.body = status, headers, body


class Answers(BaseHTTPRequestHandler):
    server: Stub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append((self.path, headers, body))
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        content = self.server.bodies.get(self.path, self.server.body)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def stub() -> Iterator[Stub]:
    with Stub() as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def spans(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Span]:
    """A root and a call below it, as this process has recorded them."""
    path = shutil.copy(empty_database, tmp_path_factory.mktemp("spans"))
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{path}")
    with mlflow.start_span("driver") as root, mlflow.start_span("away", "CHAT_MODEL") as call:
        call.set_inputs({"messages": [{"role": "user", "content": "grüße"}]})
        call.set_attribute("numbers", [1, 2.5])
        call.add_event(SpanEvent("retry"))
        call.set_status("ERROR")
    mlflow.flush_trace_async_logging()
    mlflow.set_tracking_uri(before)
    return [root.to_immutable_span(), call.to_immutable_span()]


def trace_info(trace_id: str = "tr-1") -> TraceInfo:
    return TraceInfo(
        trace_id=trace_id,
        trace_location=TraceLocation.from_experiment_id("0"),
        request_time=1_000,
        state=TraceState.IN_PROGRESS,
        trace_metadata={store.TRACE_KEY: trace_id},
    )


def records_of(spans: list[Span]) -> list[Record]:
    return [store.span_record(span) for span in spans]


def refusal(stub: Stub, spans: list[Span]) -> StoreError:
    """Return what sending spans raises, which took one request."""
    with pytest.raises(StoreError) as caught:
        send(Destination(stub.uri, "7"), records_of(spans))
    assert len(stub.requests) == 1
    return caught.value


def test_a_span_survives_the_way(spans: list[Span]) -> None:
    """What is read from a record is the span that it was made of."""
    record = store.span_record(spans[1], owner="task")
    assert (record.kind, record.key, record.owner) == ("span", spans[1].span_id, "task")

    (span,) = store.spans_of([record])
    assert (span.name, span.span_type) == ("away", "CHAT_MODEL")
    assert (span.trace_id, span.parent_id) == (spans[0].trace_id, spans[0].span_id)
    assert (span.start_time_ns, span.end_time_ns) == (
        spans[1].start_time_ns,
        spans[1].end_time_ns,
    )
    assert span.inputs == {"messages": [{"role": "user", "content": "grüße"}]}
    assert span.attributes["numbers"] == [1, 2.5]
    assert span.status.status_code == "ERROR"
    assert [event.name for event in span.events] == ["retry"]


def test_only_records_of_spans_are_read_as_such(spans: list[Span]) -> None:
    """Spans come in the order of their records; what is known of a trace is none."""
    first, second = records_of(spans)
    mixed = [second, store.trace_record(trace_info()), first]
    assert [span.name for span in store.spans_of(mixed)] == ["away", "driver"]


def test_what_is_no_otlp_is_not_read() -> None:
    """A damaged payload raises instead of giving no spans."""
    with pytest.raises(Exception, match="rror parsing"):
        store.spans_of([Record("span", "1", b"\xff garbage")])


def test_joined_payloads_are_one_message(spans: list[Span]) -> None:
    """The payloads of records, one after the other, are one OTLP message with all their spans."""
    message = TracesData.FromString(b"".join(record.payload for record in records_of(spans)))
    names = [
        span.name
        for resource in message.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert names == ["driver", "away"]


def test_spans_go_in_one_request(stub: Stub, spans: list[Span]) -> None:
    """All spans of a batch are one OTLP request to their experiment."""
    send(Destination(stub.uri, "7"), records_of(spans))

    ((path, headers, body),) = stub.requests
    assert path == "/v1/traces"
    assert headers["content-type"] == "application/x-protobuf"
    assert headers["x-mlflow-experiment-id"] == "7"
    assert len(TracesData.FromString(body).resource_spans) == 2


def test_what_is_known_of_a_trace_goes_after_its_spans(stub: Stub, spans: list[Span]) -> None:
    """A trace's own record is one request to MLflow, in JSON, after those of spans."""
    stub.will_answer(200, JSON, b'{"trace": {}}')
    stub.bodies["/v1/traces"] = b"{}"
    records = [store.trace_record(trace_info("tr-7")), *records_of(spans)]
    send(Destination(stub.uri, "7"), records)

    assert [path for path, _, _ in stub.requests] == ["/v1/traces", "/api/3.0/mlflow/traces"]
    info = json.loads(stub.requests[1][2])["trace"]["trace_info"]
    assert info["trace_id"] == "tr-7"
    assert info["trace_metadata"][store.TRACE_KEY] == "tr-7"


@pytest.mark.parametrize("status", [401, 403])
def test_a_rejected_log_in_names_the_settings(stub: Stub, spans: list[Span], status: int) -> None:
    """Where the log-in is not enough, the error says which variables to set, and where."""
    stub.will_answer(status, {})
    error = refusal(stub, spans)
    assert str(status) in str(error)
    assert "MLFLOW_TRACKING_TOKEN" in str(error)
    assert (error.refused, error.retry_after) == (False, None)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_the_store_will_not_have_is_refused(
    stub: Stub, spans: list[Span], status: int
) -> None:
    """An answer that speaks of the request itself is a refusal, with the store's words."""
    stub.will_answer(status, {}, b"of \n no   use")
    error = refusal(stub, spans)
    assert error.refused
    assert f"{status} " in str(error)
    assert "of no use" in str(error)


@pytest.mark.parametrize("status", [404, 409, 429, 500, 502, 503, 504])
def test_what_may_pass_is_no_refusal(stub: Stub, spans: list[Span], status: int) -> None:
    """Any other error is one to be tried again, and is not tried again here."""
    stub.will_answer(status, {}, b"x" * 1000)
    error = refusal(stub, spans)
    assert (error.refused, error.retry_after) == (False, None)
    assert f"{status} " in str(error)
    assert len(str(error)) < 300


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7),
        ("0.5", 0.5),
        ("-3", None),
        ("0", None),
        ("86400", 300),
        ("soon", None),
        ("nan", None),
        ("inf", 300),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_a_store_says_when_to_come_again(
    stub: Stub, spans: list[Span], status: int, header: str, seconds: float | None
) -> None:
    """Retry-After is read as a number of seconds, within limits; what is no pause says nothing."""
    stub.will_answer(status, {"Retry-After": header})
    assert refusal(stub, spans).retry_after == seconds


def test_a_store_says_the_date_to_come_again(stub: Stub, spans: list[Span]) -> None:
    """Retry-After is read as a date, too; one that has passed says nothing."""
    date = email.utils.formatdate(time.time() + 200, usegmt=True)
    stub.will_answer(503, {"Retry-After": date})
    retry_after = refusal(stub, spans).retry_after
    assert retry_after is not None
    assert 100 <= retry_after <= 200

    stub.requests.clear()
    stub.will_answer(503, {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"})
    assert refusal(stub, spans).retry_after is None


@pytest.mark.parametrize(
    ("headers", "kind"), [({"Content-Type": "text/html"}, "text/html"), ({}, "nothing")]
)
def test_success_that_is_not_mlflows_is_none(
    stub: Stub, spans: list[Span], headers: dict[str, str], kind: str
) -> None:
    """A proxy's page with status 200 does not count as stored spans."""
    stub.will_answer(200, headers, b"<h1>Sign in</h1>")
    error = refusal(stub, spans)
    assert kind in str(error)
    assert not error.refused


@pytest.mark.parametrize("body", [b"<h1>Sign in</h1>", b"", b"[]", b"{}"])
def test_a_trace_counts_as_stored_where_the_answer_is_json(stub: Stub, body: bytes) -> None:
    """What is known of a trace is not stored where the answer is anything but a JSON object."""
    stub.will_answer(200, JSON, body)
    with pytest.raises(StoreError, match="JSON"):
        send(Destination(stub.uri, "7"), [store.trace_record(trace_info())])
    assert len(stub.requests) == 1


def test_a_store_that_is_not_there(spans: list[Span]) -> None:
    """A refused connection is an error to be tried again."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(StoreError, match="cannot be reached") as caught:
        send(Destination(f"http://127.0.0.1:{port}", "7"), records_of(spans))
    assert (caught.value.refused, caught.value.retry_after) == (False, None)


def test_mlflows_log_in_is_used(
    stub: Stub, spans: list[Span], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token that MLflow would use is used, and stands in no error."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "planted-secret")
    stub.will_answer(401, {})
    error = refusal(stub, spans)
    assert stub.requests[0][1]["authorization"] == "Bearer planted-secret"
    assert "planted-secret" not in str(error)


def test_spans_are_counted_by_the_store(stub: Stub) -> None:
    """Counting is one question, about one trace of one experiment."""
    answer = {"data_points": [{"values": {"COUNT": 3.0}}, {"values": {"COUNT": 2.0}}]}
    stub.will_answer(200, JSON, json.dumps(answer).encode())
    assert store.count_spans(Destination(stub.uri, "7"), "tr-7") == 5

    ((path, _, body),) = stub.requests
    assert path == "/api/3.0/mlflow/traces/metrics"
    question = json.loads(body)
    assert question["experiment_ids"] == ["7"]
    assert question["filters"] == [f"trace.metadata.{store.TRACE_KEY} = 'tr-7'"]


def test_a_store_that_cannot_count_says_so(stub: Stub) -> None:
    """An error is not taken for a count of none."""
    stub.will_answer(404, {})
    with pytest.raises(StoreError, match="404"):
        store.count_spans(Destination(stub.uri, "7"), "tr-7")


def test_a_database_takes_spans_and_counts_them(database: Destination, spans: list[Span]) -> None:
    """Without a server, records go the same way; storing one again leaves one."""
    trace_id = spans[0].trace_id
    records = [*records_of(spans), store.trace_record(trace_info(trace_id))]
    for _ in range(2):
        send(database, records)

    assert store.count_spans(database, trace_id) == 2
    info, stored = store.read_trace(database, trace_id)
    assert info.trace_id == trace_id
    assert sorted(span.name for span in stored) == ["away", "driver"]


def test_costs_are_summed_up_by_the_database(database: Destination, spans: list[Span]) -> None:
    """What the store has found calls to have cost is added up by MLflow's names."""
    trace_id = spans[0].trace_id
    send(database, [store.trace_record(trace_info(trace_id)), *records_of(spans)])
    assert store.sum_of_costs(database, trace_id) == {}

    with mlflow.start_span("priced") as span:
        price = {"input_cost": 1.0, "output_cost": 2.0, "total_cost": 3.0}
        span.set_attribute("mlflow.llm.cost", price)
    info = trace_info(span.trace_id)
    send(database, [store.trace_record(info), store.span_record(span.to_immutable_span())])
    assert store.sum_of_costs(database, span.trace_id) == price


def test_a_trace_that_is_not_there_cannot_be_read(database: Destination) -> None:
    """Asking for spans of an unknown trace is an error of ours, not MLflow's."""
    with pytest.raises(StoreError, match="tr-unknown"):
        store.read_trace(database, "tr-unknown")


def test_a_database_that_cannot_be_opened(tmp_path: Path, spans: list[Span]) -> None:
    """Errors of the database are ours, too."""
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"no database at all" * 100)
    with pytest.raises(StoreError):
        send(Destination(f"sqlite:///{broken}", "0"), records_of(spans))


def test_a_database_refuses_what_is_no_span(database: Destination) -> None:
    """What can never be stored is refused, so that it does not hold up what comes after it."""
    with pytest.raises(StoreError) as caught:
        send(database, [Record("span", "1", b"\xff garbage")])
    assert caught.value.refused


@pytest.mark.parametrize("planned", [None, "http://127.0.0.1:9"])
def test_records_can_be_sent_elsewhere(stub: Stub, spans: list[Span], planned: str | None) -> None:
    """With an address that is asked for, records go there, wherever they were to go."""
    used = send_to(stub.uri, Destination(planned, "7"), records_of(spans))
    assert used == Destination(stub.uri, "7")
    assert stub.requests[0][1]["x-mlflow-experiment-id"] == "7"


def test_records_go_where_they_were_to_go(stub: Stub, spans: list[Span]) -> None:
    """Where no address is asked for, records keep to their own."""
    used = send_to(None, Destination(stub.uri, "7"), records_of(spans))
    assert used == Destination(stub.uri, "7")
    assert len(stub.requests) == 1


def test_records_without_any_address_go_to_mlflows_store(
    database: Destination, spans: list[Span]
) -> None:
    """Spans that only the driver could store are stored where MLflow is told to."""
    assert send_to(None, Destination(None, "0"), records_of(spans)) == database
    _, stored = store.read_trace(database, spans[0].trace_id)
    assert len(stored) == 2
