"""An HTTP server that speaks the OpenAI chat API, with answers given by a Python function."""

from __future__ import annotations

import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any

from .tcp import DroppingServer


class EndpointError(Exception):
    """Raised by an answer function to make the endpoint reply with an HTTP error."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = dict(headers or {})


@dataclass(frozen=True)
class Request:
    """One chat completion request as the server received it."""

    path: str
    headers: dict[str, str]
    """Header values by lower-case name."""
    body: dict[str, Any]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation, oldest message first."""
        messages: list[dict[str, Any]] = self.body["messages"]
        return messages

    @property
    def model(self) -> str:
        """The name of the model asked for."""
        return str(self.body["model"])

    @property
    def prompt(self) -> str:
        """The text of the last user message, or "" when there is none."""
        for message in reversed(self.messages):
            if message.get("role") == "user":
                return message_text(message)
        return ""


def message_text(message: Mapping[str, Any]) -> str:
    """Return the text of a message whose content is a string or a list of parts."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    parts = [part.get("text") for part in content if isinstance(part, dict)]
    return "\n".join(part for part in parts if isinstance(part, str))


def count_tokens(text: str) -> int:
    """Count one token per whitespace-separated word."""
    return len(text.split())


def default_answer(request: Request) -> str:
    """Echo the first 40 characters of the prompt in a sentence."""
    return f'You asked: "{request.prompt[:40]}".'


class OpenAIEndpoint:
    """A local OpenAI endpoint: POST /v1/chat/completions and GET /v1/models.

    It listens from construction until `close` and is its own context manager. ``answer`` maps
    a `Request` to the assistant's text; it is called from many threads at once. When it raises
    `EndpointError` the client gets that status; any other exception becomes a 500 that names
    the exception's type. ``latency`` is the wait in seconds before each completion.

    Usage figures follow one rule: one token per whitespace-separated word, over the text of all
    messages (prompt) and of the answer (completion).
    """

    def __init__(
        self,
        answer: Callable[[Request], str] = default_answer,
        latency: float = 0.0,
        port: int = 0,
    ) -> None:
        self.answer = answer
        self.latency = latency
        self._lock = threading.Lock()
        self._requests: list[Request] = []
        self._total_tokens = 0
        self._closed = False
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.endpoint = self
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": 0.02},
            name="openai-endpoint",
            daemon=True,
        )
        self._thread.start()

    @property
    def base_url(self) -> str:
        """The address to give to ``OpenAI(base_url=...)``."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def requests(self) -> list[Request]:
        """The well-formed completion requests received so far, in order of arrival (a copy)."""
        with self._lock:
            return list(self._requests)

    @property
    def total_tokens(self) -> int:
        """The sum of ``usage.total_tokens`` over all completions sent."""
        with self._lock:
            return self._total_tokens

    def close(self) -> None:
        """Stop listening and drop open connections. Calling it again does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._server.shutdown()
        self._server.server_close()
        self._server.drop_connections()
        self._thread.join()

    def __enter__(self) -> OpenAIEndpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _received(self, request: Request) -> None:
        with self._lock:
            self._requests.append(request)

    def _billed(self, tokens: int) -> None:
        with self._lock:
            self._total_tokens += tokens


class _Server(DroppingServer):
    endpoint: OpenAIEndpoint


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        if self.path.partition("?")[0] == "/v1/models":
            model = {"id": "local", "object": "model", "created": 0, "owned_by": "local"}
            self._reply(200, {"object": "list", "data": [model]})
        else:
            self._reply_error(404, f"Unknown request URL: GET {self.path}")

    def do_POST(self) -> None:
        try:
            request = self._read_request()
            endpoint = self.server.endpoint
            endpoint._received(request)
            if endpoint.latency > 0:
                time.sleep(endpoint.latency)
            answer = endpoint.answer(request)
        except EndpointError as error:
            self._reply_error(error.status, error.message, error.headers)
        except Exception as error:
            self._reply_error(500, f"The answer function raised {type(error).__name__}.")
        else:
            self._reply_completion(request, answer)

    def _read_request(self) -> Request:
        """Read the request's body; raises EndpointError when it is not a completion request."""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            # The unread body would be taken for the next request.
            self.close_connection = True
            raise EndpointError(411, "Send the body with a Content-Length header.")
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.partition("?")[0] != "/v1/chat/completions":
            raise EndpointError(404, f"Unknown request URL: POST {self.path}")
        try:
            body = json.loads(content)
        except ValueError:
            raise EndpointError(400, "We could not parse the JSON body of your request.") from None
        _check(body)
        headers = {name.lower(): value for name, value in self.headers.items()}
        return Request(self.path, headers, body)

    def _reply_completion(self, request: Request, answer: str) -> None:
        prompt_tokens = sum(count_tokens(message_text(m)) for m in request.messages)
        completion_tokens = count_tokens(answer)
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
        self.server.endpoint._billed(usage["total_tokens"])
        if request.body.get("stream"):
            self._reply_events(_chunks(request, answer, usage))
        else:
            self._reply(200, _completion(request, answer, usage))

    def _reply(
        self, status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> None:
        content = json.dumps(body).encode()
        fields = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        # One write: a body sent after its head waits some 40 ms for a delayed ACK.
        self.wfile.write(self._head(status, {**fields, **(headers or {})}) + content)

    def _reply_error(
        self, status: int, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        error = {"message": message, "type": kind, "param": None, "code": None}
        self._reply(status, {"error": error}, headers)

    def _reply_events(self, events: Iterator[Mapping[str, Any]]) -> None:
        fields = {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"}
        pending = self._head(200, fields)
        for event in events:
            self.wfile.write(pending + _frame(json.dumps(event)))
            pending = b""
        self.wfile.write(_frame("[DONE]") + b"0\r\n\r\n")

    def _head(self, status: int, fields: Mapping[str, str]) -> bytes:
        try:
            phrase = HTTPStatus(status).phrase
        except ValueError:
            phrase = "Unknown"
        lines = [f"HTTP/1.1 {status} {phrase}"]
        lines += [f"{name}: {value}" for name, value in fields.items()]
        if self.close_connection:
            lines.append("Connection: close")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def send_error(
        self,
        code: int,
        message: str | None = None,
        explain: str | None = None,  # noqa: ARG002
    ) -> None:
        """Answer requests that the base class refuses, such as unknown methods."""
        self.close_connection = True
        self._reply_error(code, message or "The request could not be understood.")

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Keep standard error free of access logs."""


def _check(body: Any) -> None:
    """Raise EndpointError when a parsed body is not a completion request."""
    if not isinstance(body, dict):
        raise EndpointError(400, "The request body must be a JSON object.")
    if not isinstance(body.get("model"), str):
        raise EndpointError(400, "You must provide a model parameter.")
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise EndpointError(400, "You must provide messages: a list of objects.")


def _completion(request: Request, answer: str, usage: Mapping[str, int]) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    return {
        "id": _completion_id(),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": [choice],
        "usage": dict(usage),
    }


def _chunks(request: Request, answer: str, usage: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """Yield the chat.completion.chunk objects of a streamed answer, a word at a time."""
    options = request.body.get("stream_options")
    include_usage = isinstance(options, dict) and bool(options.get("include_usage"))
    common: dict[str, Any] = {
        "id": _completion_id(),
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": request.model,
    }
    if include_usage:
        common["usage"] = None

    def chunk(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**common, "choices": [choice]}

    yield chunk({"role": "assistant", "content": ""})
    for piece in re.findall(r"\s*\S+\s*", answer) or [answer]:
        yield chunk({"content": piece})
    yield chunk({}, "stop")
    if include_usage:
        yield {**common, "choices": [], "usage": dict(usage)}


def _completion_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def _frame(data: str) -> bytes:
    """Encode one server-sent event as one HTTP chunk."""
    event = f"data: {data}\n\n".encode()
    return f"{len(event):x}\r\n".encode() + event + b"\r\n"
