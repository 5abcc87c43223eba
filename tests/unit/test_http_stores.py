"""Stores over plain HTTP: without MLflow, within a time, with its log-in, and untraced."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import context as otel_context

from mlflow_ctx_autolog.delivery.records import Destination, Record
from mlflow_ctx_autolog.exceptions import CtxAutologWarning, StoreError
from mlflow_ctx_autolog.stores import otlp, tracking_server
from mlflow_ctx_autolog.stores import sending as sending_module
from mlflow_ctx_autolog.stores.http import TLS, exchange
from mlflow_ctx_autolog.stores.sending import needs_mlflow, send
from mlflow_ctx_autolog.stores.tracking_server import redirect_of

SPAN = Record("span", "a", b"\x0a\x00")
TRACE = Record("trace", "tr-1", json.dumps({"trace_id": "tr-1"}).encode())
LOG_INS = ("TOKEN", "USERNAME", "PASSWORD", "AUTH", "AWS_SIGV4")


@pytest.fixture(autouse=True)
def _no_log_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in LOG_INS:
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class Server(ThreadingHTTPServer):
    """Remembers requests and gives the answer that it is told to give."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.status, self.headers, self.body = 200, {"Content-Type": "application/json"}, b"{}"

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append((self.path, headers, body))
        self.send_response(self.server.status)
        content = self.server.body
        if self.path.endswith("/traces") and "mlflow" in self.path:
            content = b'{"trace": {}}'
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def running(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    with running(Server()) as server:
        yield server


def to(server: Server, **fields: Any) -> Destination:
    return Destination(server.uri, "7", **fields)


# Without MLflow.

LEAN = """
import json, sys
from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.delivery import recovery, receipts, host_account
from mlflow_ctx_autolog.delivery.deliveries import Deliveries
from mlflow_ctx_autolog.delivery.sender import Delivery
from mlflow_ctx_autolog.delivery.spool import Destination, Record
from mlflow_ctx_autolog.stores.sending import send

config = Config(spool_directory=sys.argv[2])
deliveries = Deliveries(lambda destination: Delivery(destination, send, config))
for uri in sys.argv[1], f"otlp+{sys.argv[1]}/collector":
    delivery = deliveries.to(Destination(uri, "7"))
    delivery.submit(Record("span", "a", bytes([10, 0]), "task"))
    delivery.submit(Record("trace", "tr-1", b'{"trace_id": "tr-1"}'))
assert deliveries.flush(20), [each.first_error for each in deliveries.all()]
print(json.dumps(sorted(sys.modules)))
"""


def test_no_mlflow_is_loaded_to_deliver_over_http(server: Server, tmp_path: Path) -> None:
    """Nor OpenTelemetry's SDK, its exporter, pandas, pyarrow, requests or SQLite."""
    command = [sys.executable, "-c", LEAN, server.uri, str(tmp_path / "spools")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    loaded = {tuple(name.split(".")[:2]) for name in json.loads(ran.stdout)}

    packages = {name[0] for name in loaded}
    assert not packages & {"mlflow", "pandas", "pyarrow", "requests", "urllib3", "sqlite3"}
    assert not {("opentelemetry", "sdk"), ("opentelemetry", "exporter")} & loaded
    paths = sorted(path for path, _, _ in server.requests)
    assert paths == ["/api/3.0/mlflow/traces", "/collector", "/v1/traces"]


@pytest.mark.parametrize(
    ("uri", "variables", "needed"),
    [
        ("http://host", {}, False),
        ("https://host/path", {"MLFLOW_TRACKING_TOKEN": "token"}, False),
        ("otlp+http://host", {"MLFLOW_TRACKING_AUTH": "kubernetes"}, False),
        (None, {}, False),
        ("http://host", {"MLFLOW_TRACKING_AUTH": "kubernetes"}, True),
        ("http://host", {"MLFLOW_TRACKING_AWS_SIGV4": "true"}, True),
        ("http://host", {"HTTP_PROXY": "socks5://proxy:1080"}, True),
        ("sqlite:////tmp/x.db", {}, True),
        ("postgresql://host/db", {}, True),
        ("databricks://profile", {}, True),
        ("/some/folder", {}, True),
    ],
)
def test_it_is_known_what_needs_mlflow(
    monkeypatch: pytest.MonkeyPatch, uri: str | None, variables: dict[str, str], needed: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert needs_mlflow(uri) is needed


def test_plugins_for_headers_need_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Since only it knows what they add."""
    monkeypatch.setattr(tracking_server, "_has_header_plugins", lambda: True)
    assert needs_mlflow("http://host")


# What MLflow's client would say.


def test_a_trace_is_sent_as_mlflow_sends_it(server: Server) -> None:
    """Its duration in the form of the interface, which is not that of the record."""
    from mlflow.entities import TraceInfo
    from mlflow.entities.trace_location import TraceLocation
    from mlflow.entities.trace_state import TraceState
    from mlflow.protos.service_pb2 import StartTraceV3
    from mlflow.utils.proto_json_utils import parse_dict

    from mlflow_ctx_autolog.stores.tracking_store import trace_record

    info = TraceInfo(
        trace_id="tr-7",
        trace_location=TraceLocation.from_experiment_id("7"),
        request_time=1_700_000_000_123,
        execution_duration=61_005,
        state=TraceState.OK,
        trace_metadata={"a": "b"},
        tags={"c": "d"},
        request_preview="grüße",
    )
    send(to(server, workspace="team"), [trace_record(info)])

    ((path, headers, body),) = server.requests
    assert path == "/api/3.0/mlflow/traces"
    assert headers["content-type"] == "application/json"
    assert headers["x-mlflow-workspace"] == "team"
    message = StartTraceV3()
    parse_dict(json.loads(body), message)
    assert TraceInfo.from_proto(message.trace.trace_info) == info


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


LogIn = Callable[[Server, pytest.MonkeyPatch, Path], str]


def _by_token(server: Server, monkeypatch: pytest.MonkeyPatch, home: Path) -> str:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "the-token")
    return server.uri


def _by_password(server: Server, monkeypatch: pytest.MonkeyPatch, home: Path) -> str:
    _by_token(server, monkeypatch, home)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "the-password")
    return server.uri


def _by_file(server: Server, monkeypatch: pytest.MonkeyPatch, home: Path) -> str:
    (home / ".mlflow").mkdir()
    lines = ("[mlflow]", "mlflow_tracking_username = bob", "mlflow_tracking_password = 100%%")
    (home / ".mlflow" / "credentials").write_text("\n".join(lines))
    return server.uri


def _by_address(server: Server, monkeypatch: pytest.MonkeyPatch, home: Path) -> str:
    return server.uri.replace("//", "//cy:p%40ss@")


def _by_netrc(server: Server, monkeypatch: pytest.MonkeyPatch, home: Path) -> str:
    (home / ".netrc").write_text("machine 127.0.0.1 login dee password net-password")
    (home / ".netrc").chmod(0o600)
    return _by_token(server, monkeypatch, home)


@pytest.mark.parametrize("way", [_by_token, _by_password, _by_file, _by_address, _by_netrc])
def test_the_log_in_is_mlflows(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: LogIn
) -> None:
    """Whatever MLflow's own client sends in the same place, this one does."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking._tracking_service.utils import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    uri = way(server, monkeypatch, tmp_path)
    send(Destination(uri, "7"), [SPAN])
    try:
        http_request(get_default_host_creds(uri), "/v1/traces", "POST", max_retries=0, data=b"")
    except MlflowException as error:  # pragma: no cover
        raise AssertionError from error

    (_, ours, _), (_, theirs, _) = server.requests
    assert ours["authorization"] == theirs["authorization"]
    assert ours["host"] == theirs["host"]


def test_the_log_in_may_be_one_that_a_task_has_had(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its variables are no more in the environment as its spans are sent."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "of the process")
    send(to(server), [SPAN], {"MLFLOW_TRACKING_TOKEN": "of-the-task"})
    assert server.requests[0][1]["authorization"] == "Bearer of-the-task"


def test_a_token_with_a_line_break_is_told_of_and_not_told(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it comes from a secret that was made with echo."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "planted-secret\n")
    with pytest.raises(StoreError, match="line break") as caught:
        send(to(server), [SPAN])
    assert "planted-secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert server.requests == []


# Encrypted.


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of this host's, with its key, that no authority has signed."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    host = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([host]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path


@pytest.fixture
def encrypted(certificate: Path) -> Iterator[tuple[Server, str]]:
    """A server that wants a certificate of its clients, too, and its address."""
    server = Server()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.load_verify_locations(certificate)
    context.verify_mode = ssl.CERT_OPTIONAL
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with running(server):
        yield server, server.uri.replace("http:", "https:")


def test_certificates_are_checked_as_the_variables_say(
    encrypted: tuple[Server, str], certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, uri = encrypted
    with pytest.raises(StoreError, match="certificate verify failed"):
        send(Destination(uri, "7"), [SPAN])
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    send(Destination(uri, "7"), [SPAN])
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate))
    with pytest.raises(StoreError, match="both set"):
        send(Destination(uri, "7"), [SPAN])
    monkeypatch.delenv("MLFLOW_TRACKING_INSECURE_TLS")
    monkeypatch.setenv("MLFLOW_TRACKING_CLIENT_CERT_PATH", str(certificate))
    send(Destination(uri, "7"), [SPAN])
    monkeypatch.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    send(Destination(uri, "7"), [SPAN])
    assert len(server.requests) == 3


def test_certificates_for_a_collector(encrypted: tuple[Server, str], certificate: Path) -> None:
    """The one that it has, and the one that it is shown."""
    server, uri = encrypted
    names = ("CERTIFICATE", "CLIENT_CERTIFICATE", "CLIENT_KEY")
    variables = {f"OTEL_EXPORTER_OTLP_{name}": str(certificate) for name in names}
    otlp.send_to_collector(f"otlp+{uri}/x", [SPAN], variables)
    assert [path for path, _, _ in server.requests] == ["/x"]


# By a proxy.


def test_a_proxy_is_asked_for_the_way(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its log-in, and not where NO_PROXY says so."""
    monkeypatch.setenv("HTTP_PROXY", f"http://pia:prox%21@127.0.0.1:{server.server_port}")
    send(Destination("http://far.example:5000/base", "7"), [SPAN])
    ((path, headers, _),) = server.requests
    assert path == "http://far.example:5000/base/v1/traces"
    assert headers["host"] == "far.example:5000"
    assert headers["proxy-authorization"] == _basic("pia", "prox!")

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    send(to(server), [SPAN])
    assert server.requests[1][0] == "/v1/traces"


# Within a time.


@pytest.fixture
def trickling() -> Iterator[tuple[str, list[bytes]]]:
    """A server that answers a byte at a time; what it sends before is in the list."""
    start: list[bytes] = []
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while not stop.is_set():
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                threading.Thread(target=trickle, args=(connection,), daemon=True).start()

        def trickle(connection: socket.socket) -> None:
            with connection:
                connection.recv(65536)
                try:
                    connection.sendall(start[0])
                    while not stop.wait(0.05):
                        connection.sendall(b"x")
                except OSError:
                    pass

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", start
        stop.set()
        listening.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "start", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"]
)
def test_an_answer_that_trickles_has_an_end(
    trickling: tuple[str, list[bytes]], start: bytes
) -> None:
    """However much of it has come: the time is for the whole exchange."""
    uri, first = trickling
    first.append(start)
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"did not answer within 0\.5 seconds") as caught:
        exchange("POST", uri, headers={}, body=b"", seconds=0.5)
    assert 0.4 < time.monotonic() - began < 3
    assert not caught.value.refused


def test_a_name_server_that_is_silent_has_an_end(
    trickling: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time for the exchange is that for the host's name, too; a number needs none."""
    real, is_over = socket.getaddrinfo, threading.Event()

    def look_up(*args: Any, flags: int = 0, **kwargs: Any) -> Any:
        if not flags & socket.AI_NUMERICHOST:
            is_over.wait(60)
        return real(*args, flags=flags, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    uri, first = trickling
    first.append(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n")
    named = uri.replace("127.0.0.1", "localhost")
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"did not answer within 0\.5 seconds"):
        exchange("POST", named, headers={}, body=b"", seconds=0.5)
    assert time.monotonic() - began < 5
    assert exchange("POST", uri, headers={}, body=b"", seconds=30).status == 200
    is_over.set()
    assert exchange("POST", named, headers={}, body=b"", seconds=30).status == 200


def test_a_name_that_stands_for_nothing_cannot_be_reached() -> None:
    with pytest.raises(StoreError, match="cannot be reached"):
        exchange("POST", "http://store.invalid", headers={}, body=b"", seconds=30)


def test_a_server_that_takes_nothing_has_an_end() -> None:
    """Also where the request is too large to be gone before it is read."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        uri = f"http://127.0.0.1:{listening.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(StoreError, match="did not answer"):
            exchange("POST", uri, headers={}, body=bytes(50_000_000), seconds=0.5)
        assert time.monotonic() - began < 5


def test_the_time_for_a_collector_is_what_the_variable_says(
    trickling: tuple[str, list[bytes]],
) -> None:
    uri, first = trickling
    first.append(b"")
    variables = {"OTEL_EXPORTER_OTLP_TIMEOUT": "60", "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "0.3"}
    with pytest.raises(StoreError, match=r"within 0\.3 seconds"):
        otlp.send_to_collector(f"otlp+{uri}", [SPAN], variables)
    for nonsense in ("soon", "nan", "-1", "0"):
        assert otlp._seconds({"OTEL_EXPORTER_OTLP_TIMEOUT": nonsense}) == otlp._ANSWER_TIME


# Nowhere else, and nobody else's answer.


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed_and_its_target_named(server: Server, status: int) -> None:
    server.status = status
    server.headers = {"Location": "https://other.example/base/v1/traces"}
    with pytest.raises(StoreError, match="sends to https://other") as caught:
        send(to(server), [SPAN])
    assert caught.value.redirect == "https://other.example/base/v1/traces"
    assert not caught.value.refused
    assert len(server.requests) == 1


def test_enable_names_where_a_server_sends_to(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the form in which it can be set, and without the log-in."""
    from mlflow_ctx_autolog.driver import routes

    server.status, server.headers = 301, {"Location": "https://other.example/base/version"}
    assert redirect_of(server.uri) == "https://other.example/base"
    uri = server.uri.replace("//", "//bob:planted-secret@")
    monkeypatch.setattr(routes.store, "current_tracking_uri", lambda: uri)
    with pytest.warns(CtxAutologWarning, match="sends to https://other.example/base,") as caught:
        routes.warn_of_old_store()
    assert "set_tracking_uri('https://other.example/base')" in str(caught[0].message)
    assert "planted-secret" not in str(caught[0].message)

    server.status, server.headers = 200, {}
    assert redirect_of(server.uri) is None
    assert redirect_of("http://127.0.0.1:9") is None
    assert redirect_of("sqlite:////tmp/x.db") is None


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("text/html", b"<html>Sign in</html>"),
        ("text/html", b""),
        ("application/json", b'{"log_in": "please"}'),
        ("application/json", b"[]"),
        ("application/x-protobuf", b"<html>Sign in</html>"),
    ],
)
def test_only_the_stores_own_answer_counts(server: Server, kind: str, body: bytes) -> None:
    server.headers, server.body = {"Content-Type": kind}, body
    with pytest.raises(StoreError, match="it answered with") as caught:
        send(to(server), [SPAN])
    assert not caught.value.refused


@pytest.mark.parametrize(
    ("kind", "body", "taken"),
    [
        ("application/x-protobuf", b"", True),
        ("text/plain", b"", True),
        ("application/json", b"{}", True),
        ("application/json", b'{"partialSuccess": {}}', True),
        ("text/html", b"<html>Sign in</html>", False),
        ("text/html; charset=utf-8", b"", False),
        ("text/plain", b"Sign in", False),
        ("application/json", b"not JSON", False),
        ("application/x-protobuf", b"<html>Sign in</html>", False),
    ],
)
def test_only_a_collectors_own_answer_counts(
    server: Server, kind: str, body: bytes, taken: bool
) -> None:
    server.headers, server.body = {"Content-Type": kind}, body
    if taken:
        otlp.send_to_collector(f"otlp+{server.uri}", [SPAN], {})
    else:
        with pytest.raises(StoreError, match="it answered with"):
            otlp.send_to_collector(f"otlp+{server.uri}", [SPAN], {})


def test_success_in_part_in_json(server: Server) -> None:
    """As the protocol writes it: numbers of 64 bits are texts."""
    partial = {"partialSuccess": {"rejectedSpans": "3", "errorMessage": "too old"}}
    server.body = json.dumps(partial).encode()
    with pytest.raises(StoreError, match="it rejected 3 spans: too old") as caught:
        otlp.send_to_collector(f"otlp+{server.uri}", [SPAN], {})
    assert caught.value.rejected == 3


def test_headers_that_cannot_be_read_are_not_quoted(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """By nobody: they hold log-ins."""
    variables = {"OTEL_EXPORTER_OTLP_HEADERS": "api-key=good%20one, planted-secret\x01"}
    otlp.send_to_collector(f"otlp+{server.uri}", [SPAN], variables)
    assert server.requests[0][1]["api-key"] == "good one"
    assert "planted" not in caplog.text


# Nobody's span.


def test_instrumentations_are_told_to_look_away(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While something is sent, by us or by MLflow for us, and no longer."""
    seen: list[tuple[object, object]] = []

    def look(*_: object) -> None:
        keys = ("suppress_instrumentation", "suppress_http_instrumentation")
        first, second = (otel_context.get_value(key) for key in keys)
        seen.append((first, second))

    real = socket.getaddrinfo

    def getaddrinfo(*args: Any, **kwargs: Any) -> Any:
        look()
        return real(*args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    send(to(server), [SPAN])
    monkeypatch.undo()

    from mlflow_ctx_autolog.stores import tracking_store

    monkeypatch.setattr(tracking_store, "send_by_mlflow", look)
    sending_module.send(Destination("sqlite:////nowhere.db", "0"), [SPAN])
    look()
    assert seen == [(True, True), (True, True), (None, None)]


def test_tls_contexts_are_made_once() -> None:
    """To read all authorities for each batch would cost more than to send it."""
    from mlflow_ctx_autolog.stores import http

    assert http._tls_context(TLS(), None) is http._tls_context(TLS(), None)
