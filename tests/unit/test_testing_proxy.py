"""The proxy that fails on command."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest

from mlflow_ctx_autolog.testing import EndpointError, OpenAIEndpoint, Slow, Status, UnreliableProxy

PATH = "/v1/chat/completions"
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hello?"}]})


@pytest.fixture
def proxy(endpoint: OpenAIEndpoint) -> Iterator[UnreliableProxy]:
    upstream = endpoint.base_url.removesuffix("/v1")
    with UnreliableProxy(upstream) as running:
        yield running


def connected(proxy: UnreliableProxy, timeout: float = 20) -> Any:
    return closing(http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=timeout))


def ask(connection: http.client.HTTPConnection) -> tuple[int, Mapping[str, str], bytes]:
    """Return status, headers and body of one request over a connection."""
    connection.request("POST", PATH, BODY)
    reply = connection.getresponse()
    return reply.status, reply.headers, reply.read()


def status(proxy: UnreliableProxy) -> int:
    """Return the status of a request over a connection of its own."""
    with connected(proxy) as connection:
        return ask(connection)[0]


def first_bytes(proxy: UnreliableProxy, request: bytes) -> bytes:
    """Return what the first read after a request brings."""
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as client:
        client.sendall(request)
        return client.recv(65536)


def wait_for(proxy: UnreliableProxy, count: int) -> None:
    """Wait until the proxy has received so many requests."""
    received = threading.Event()
    while len(proxy.requests) < count:
        received.wait(0.005)


def test_passes_requests_on(proxy: UnreliableProxy, endpoint: OpenAIEndpoint) -> None:
    """A connection is kept over several requests, and each reply is that of upstream."""
    with connected(proxy) as connection:
        code, headers, body = ask(connection)
        first = connection.sock
        connection.request("GET", "/v1/models?limit=1")
        models = connection.getresponse()
        assert json.loads(models.read())["object"] == "list"
        assert connection.sock is first is not None

    assert code == 200
    assert headers["Content-Type"] == "application/json"
    assert json.loads(body)["choices"][0]["message"]["content"] == 'You asked: "Hello?".'
    assert proxy.requests == [("POST", PATH), ("GET", "/v1/models?limit=1")]
    assert proxy.uri == f"http://127.0.0.1:{proxy.port}"


def test_headers_and_errors_are_passed_on(proxy: UnreliableProxy, endpoint: OpenAIEndpoint) -> None:
    """Upstream sees the client's headers with its own address; the client sees its errors."""

    def answer(_: object) -> str:
        raise EndpointError(418, "no", {"Retry-After": "7"})

    endpoint.answer = answer
    with connected(proxy) as connection:
        connection.request("POST", PATH, BODY, {"Authorization": "Bearer secret"})
        reply = connection.getresponse()
        reply.read()
    (request,) = endpoint.requests
    assert (reply.status, reply.headers["Retry-After"]) == (418, "7")
    assert request.headers["authorization"] == "Bearer secret"
    assert request.headers["host"] == f"127.0.0.1:{endpoint.port}"


def test_refused_connections(proxy: UnreliableProxy, endpoint: OpenAIEndpoint) -> None:
    """Nobody listens, open connections are dropped, and the address is the same afterwards."""
    uri = proxy.uri
    with connected(proxy) as connection:
        assert ask(connection)[0] == 200
        proxy.mode = "refuse"
        proxy.mode = "refuse"
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            ask(connection)
    with pytest.raises(ConnectionRefusedError):
        status(proxy)

    proxy.mode = "pass"
    assert (proxy.uri, status(proxy)) == (uri, 200)
    assert len(proxy.requests) == len(endpoint.requests) == 2


def test_refusing_from_the_start(endpoint: OpenAIEndpoint) -> None:
    """The address is known before anybody listens at it."""
    upstream = endpoint.base_url.removesuffix("/v1")
    with UnreliableProxy(upstream, mode="refuse") as proxy:
        with pytest.raises(ConnectionRefusedError):
            status(proxy)
        proxy.mode = "pass"
        assert status(proxy) == 200


@pytest.mark.parametrize(
    ("mode", "retry_after"),
    [
        (Status(500), None),
        (Status(429, {"Retry-After": "3"}), "3"),
        (Status(401), None),
        (Status(403), None),
    ],
)
def test_status(
    proxy: UnreliableProxy, endpoint: OpenAIEndpoint, mode: Status, retry_after: str | None
) -> None:
    """Requests are answered with an error on a connection that stays, and go no further."""
    proxy.mode = mode
    with connected(proxy) as connection:
        code, headers, _ = ask(connection)
        first = connection.sock
        assert ask(connection)[0] == code == mode.code
        assert connection.sock is first
    assert headers.get("Retry-After") == retry_after
    assert len(proxy.requests) == 2
    assert endpoint.requests == []


def test_hanging_until_the_mode_changes(proxy: UnreliableProxy, endpoint: OpenAIEndpoint) -> None:
    """A request is read and not answered until the mode changes."""
    proxy.mode = "hang"
    with connected(proxy, timeout=0.1) as connection, pytest.raises(TimeoutError):
        ask(connection)
    with ThreadPoolExecutor() as pool:
        pending = pool.submit(status, proxy)
        wait_for(proxy, 2)
        assert not pending.done()
        assert endpoint.requests == []
        proxy.mode = Status(503)
        assert pending.result() == 503


def test_hanging_requests_end_with_the_proxy(proxy: UnreliableProxy) -> None:
    """Closing the proxy drops requests that wait for an answer."""
    proxy.mode = "hang"
    with ThreadPoolExecutor() as pool:
        pending = pool.submit(status, proxy)
        wait_for(proxy, 1)
        proxy.close()
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            pending.result()


def test_slow(proxy: UnreliableProxy, endpoint: OpenAIEndpoint) -> None:
    """A request is passed on after a delay, unless its connection is dropped meanwhile."""
    proxy.mode = Slow(0.01)
    assert status(proxy) == 200
    proxy.mode = Slow(60)
    with connected(proxy, timeout=0.1) as connection, pytest.raises(TimeoutError):
        ask(connection)
    proxy.mode = "refuse"
    proxy.mode = "pass"
    assert status(proxy) == 200
    assert (len(proxy.requests), len(endpoint.requests)) == (3, 2)


def test_garbage(proxy: UnreliableProxy, endpoint: OpenAIEndpoint) -> None:
    """Success is claimed, with a body that is neither JSON nor text."""
    proxy.mode = "garbage"
    with connected(proxy) as connection:
        code, headers, body = ask(connection)
        assert ask(connection)[0] == code == 200
    assert headers["Content-Type"] == "text/html"
    with pytest.raises(ValueError, match="decode"):
        json.loads(body)
    assert endpoint.requests == []


def test_upstream_is_away(proxy: UnreliableProxy, endpoint: OpenAIEndpoint) -> None:
    """What a gateway says when there is nothing behind it."""
    endpoint.close()
    assert status(proxy) == 502


def test_reply_is_one_write(proxy: UnreliableProxy) -> None:
    """Head and body arrive together, without waiting for a delayed ACK between them."""
    proxy.mode = Status(500)
    reply = first_bytes(proxy, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert reply.endswith(b"\r\n\r\nThe proxy answers 500.\n")


def test_chunked_body_is_refused(proxy: UnreliableProxy) -> None:
    """A body without a length is not taken for the next request."""
    reply = first_bytes(proxy, b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert reply.startswith(b"HTTP/1.1 411 ")
    assert b"\r\nConnection: close\r\n" in reply
    assert proxy.requests == []


def test_many_threads(proxy: UnreliableProxy, endpoint: OpenAIEndpoint) -> None:
    """Each request of many clients is counted once, while the mode changes under them."""
    modes = ["pass", Status(500), "garbage", Slow(0.001)] * 5
    with ThreadPoolExecutor(8) as pool:
        pending = [pool.submit(status, proxy) for _ in range(80)]
        for mode in modes:
            proxy.mode = mode  # type: ignore[assignment]
        codes = {each.result() for each in pending}
    assert codes <= {200, 500}
    assert proxy.requests == [("POST", PATH)] * 80


def test_life(endpoint: OpenAIEndpoint) -> None:
    """Closing twice does nothing more; a closed proxy takes no mode; upstream must be HTTP."""
    with UnreliableProxy(endpoint.base_url) as proxy:
        threads = threading.active_count()
    proxy.close()
    with pytest.raises(ConnectionRefusedError):
        status(proxy)
    with pytest.raises(RuntimeError, match="closed"):
        proxy.mode = "pass"
    assert threading.active_count() <= threads
    with pytest.raises(ValueError, match="sqlite"):
        UnreliableProxy("sqlite:///mlflow.db")
