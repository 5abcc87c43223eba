"""What the servers for tests have in common that answer HTTP requests out of one function."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any, TypeVar

from .tcp import DroppingServer

ServerT = TypeVar("ServerT", bound="HTTPServer")


@dataclass(frozen=True)
class Received:
    """One request, as it came in; the names of its headers in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Reply:
    """What is answered to a request."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class HTTPServer(ABC):
    """A server on 127.0.0.1 that keeps what it received, and answers what `reply` returns.

    It listens from construction until `close` and is its own context manager.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._received: list[Received] = []
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.answers = self
        self.port = self._server.port
        self._server.start("http-server")

    @abstractmethod
    def reply(self, request: Received) -> Reply:
        """Return the answer to a request; called from many threads, one at a time."""

    @property
    def uri(self) -> str:
        """The server's address, without a path."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def received(self) -> list[Received]:
        """The requests so far, oldest first."""
        with self._lock:
            return list(self._received)

    def answer(self, request: Received) -> Reply:
        """Keep a request and return the answer to it."""
        with self._lock:
            self._received.append(request)
            return self.reply(request)

    def close(self) -> None:
        """Stop listening, and cut the connections that are open."""
        self._server.stop()

    def __enter__(self: ServerT) -> ServerT:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Server(DroppingServer):
    answers: HTTPServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        reply = self.server.answers.answer(Received(self.command, self.path, headers, body))
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.body)

    do_GET = do_POST = do_PUT = do_PATCH = _serve  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Log nothing."""
