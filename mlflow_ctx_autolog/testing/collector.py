"""An OpenTelemetry collector that takes spans by OTLP over HTTP."""

from __future__ import annotations

import gzip

from .http import HTTPServer, Received, Reply


class Collector(HTTPServer):
    """Takes what is posted to /v1/traces, and keeps it.

    ``key`` is the value that the header ``x-collector-key`` must have; None for no log-in.
    ``status`` and ``body`` are what it answers from then on, at first 200 and nothing.
    """

    def __init__(self, key: str | None = None) -> None:
        self.key = key
        self.status = 200
        self.body = b""
        super().__init__()

    @property
    def messages(self) -> list[bytes]:
        """The ``ExportTraceServiceRequest`` messages that it has taken, oldest first."""
        return [_content(request) for request in self.received if self._status(request) == 200]

    def reply(self, request: Received) -> Reply:
        """See `HTTPServer`."""
        return Reply(self._status(request), self.body, {"Content-Type": "application/x-protobuf"})

    def _status(self, request: Received) -> int:
        if (request.method, request.path) != ("POST", "/v1/traces"):
            return 404
        if self.key is not None and request.headers.get("x-collector-key") != self.key:
            return 401
        return self.status


def _content(request: Received) -> bytes:
    is_gzip = request.headers.get("content-encoding") == "gzip"
    return gzip.decompress(request.body) if is_gzip else request.body
