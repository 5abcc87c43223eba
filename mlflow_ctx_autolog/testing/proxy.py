"""An HTTP reverse proxy that fails on command, to put in front of a tracking server."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

from .tcp import DroppingServer

_UPSTREAM_TIMEOUT = 120.0
_GARBAGE = b"<!DOCTYPE html><html><title>Portal</title>\xff\xfe\x00\x80\xc3\x28</html>"
# Those of RFC 9110, section 7.6.1, that concern one connection only, and those that are made anew.
_NOT_PASSED_ON = {
    "connection",
    "content-length",
    "host",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}


@dataclass(frozen=True)
class Status:
    """A mode of `UnreliableProxy`: every request is answered with this status and headers."""

    code: int
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Slow:
    """A mode of `UnreliableProxy`: every request is passed on after so many seconds."""

    seconds: float


Mode = Literal["pass", "refuse", "hang", "garbage"] | Status | Slow


class UnreliableProxy:
    """A reverse proxy on 127.0.0.1 that does to clients what networks and servers do.

    It is there from construction until `close`, at one address, and is its own context manager.
    What happens to a request is for `mode` to say, which can be set at any time by any thread:

    - ``"pass"``: it goes to ``upstream`` and the reply comes back; 502 where upstream is away.
    - ``"refuse"``: nobody listens; open connections are dropped, new ones refused.
    - ``Status(code, headers)``: it is answered with an HTTP error, such as ``Status(500)`` or
      ``Status(429, {"Retry-After": "1"})``.
    - ``"hang"``: it is read and not answered, until the mode changes and says what becomes of it.
    - ``Slow(seconds)``: it is passed on after a delay.
    - ``"garbage"``: it is answered with 200 and a body that is neither JSON nor text.
    """

    def __init__(self, upstream: str, mode: Mode = "pass", port: int = 0) -> None:
        address = urlsplit(upstream)
        if address.scheme != "http" or address.hostname is None:
            raise ValueError(f"upstream={upstream!r} is not an address such as http://127.0.0.1:80")
        self._upstream = (address.hostname, address.port or 80)
        self._changed = threading.Condition()
        self._requests: list[tuple[str, str]] = []
        self._mode: Mode = mode
        self._closed = False
        self._server: _Server | None = None
        self.port = port
        self._listen()
        if mode == "refuse":
            self._stop_listening()

    @property
    def uri(self) -> str:
        """The address to give to ``mlflow.set_tracking_uri``; the same over the proxy's life."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def mode(self) -> Mode:
        """What happens to requests from now on."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        with self._changed:
            if self._closed:
                raise RuntimeError("The proxy is closed.")
            self._mode = mode
            if mode == "refuse":
                self._stop_listening()
            else:
                self._listen()
            self._changed.notify_all()

    @property
    def requests(self) -> list[tuple[str, str]]:
        """Method and path of each request received so far, in order of arrival (a copy)."""
        with self._changed:
            return list(self._requests)

    def close(self) -> None:
        """Stop listening and drop open connections. Calling it again does nothing."""
        with self._changed:
            self._closed = True
            self._stop_listening()
            self._changed.notify_all()

    def __enter__(self) -> UnreliableProxy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _listen(self) -> None:
        if self._server is None:
            self._server = _Server(("127.0.0.1", self.port), _Handler)
            self._server.proxy = self
            self.port = self._server.port
            self._server.start("unreliable-proxy")

    def _stop_listening(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.stop()

    def _mode_for(self, server: _Server, method: str, path: str) -> Mode:
        """Count a request and return what is to happen to it, once that is known."""
        with self._changed:
            self._requests.append((method, path))
            self._changed.wait_for(lambda: self._mode != "hang" or self._server is not server)
            if isinstance(mode := self._mode, Slow):
                # Cut short where the connection is dropped.
                self._changed.wait_for(lambda: self._server is not server, mode.seconds)
            return mode if self._server is server else "refuse"


class _Server(DroppingServer):
    proxy: UnreliableProxy


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            self.send_error(411)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        mode = self.server.proxy._mode_for(self.server, self.command, self.path)
        if mode == "refuse":
            self.close_connection = True
        elif mode == "garbage":
            self._reply(200, [("Content-Type", "text/html")], _GARBAGE)
        elif isinstance(mode, Status):
            self._reply_status(mode)
        else:
            self._pass_on(body)

    do_DELETE = do_OPTIONS = do_PATCH = do_POST = do_PUT = do_GET  # noqa: N815

    def _pass_on(self, body: bytes) -> None:
        connection = http.client.HTTPConnection(
            *self.server.proxy._upstream, timeout=_UPSTREAM_TIMEOUT
        )
        try:
            connection.request(self.command, self.path, body, dict(_end_to_end(self.headers)))
            reply = connection.getresponse()
            content = reply.read()
        except (OSError, http.client.HTTPException):
            self._reply_status(Status(502))
        else:
            self._reply(reply.status, _end_to_end(reply.headers), content)
        finally:
            connection.close()

    def _reply_status(self, status: Status) -> None:
        fields = {"Content-Type": "text/plain", **status.headers}
        self._reply(status.code, fields.items(), f"The proxy answers {status.code}.\n".encode())

    def _reply(self, status: int, fields: Iterable[tuple[str, str]], content: bytes) -> None:
        try:
            phrase = HTTPStatus(status).phrase
        except ValueError:
            phrase = "Unknown"
        lines = [f"HTTP/1.1 {status} {phrase}"]
        lines += [f"{name}: {value}" for name, value in fields]
        if status not in (204, 304):
            lines.append(f"Content-Length: {len(content)}")
        if self.close_connection:
            lines.append("Connection: close")
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        # One write: a body sent after its head waits some 40 ms for a delayed ACK.
        self.wfile.write(head + content)

    def send_error(
        self,
        code: int,
        message: str | None = None,  # noqa: ARG002
        explain: str | None = None,  # noqa: ARG002
    ) -> None:
        """Answer requests that cannot be understood."""
        self.close_connection = True
        self._reply_status(Status(code))

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Keep standard error free of access logs."""


def _end_to_end(headers: Message) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers.items() if name.lower() not in _NOT_PASSED_ON]
