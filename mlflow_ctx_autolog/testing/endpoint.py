"""An HTTP server that speaks the OpenAI API, with answers given by a Python function."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .model import Answer, AnswerFunction, EndpointError, Request, as_answer, default_answer
from .openai_api import APIS, error_document, usage
from .tcp import DroppingServer

# Of OpenAI, of Azure, with or without a deployment, and of a Databricks workspace.
_ADDRESS = re.compile(
    r"(?:/v1|/openai/v1|(?P<azure>/openai)(?:/deployments/(?P<deployment>[^/]+))?"
    r"|/serving-endpoints|/ai-gateway/(?:mlflow|openai)/v1)/(?P<api>.+)"
)
_APIS_BY_PATH = {api.path: name for name, api in APIS.items()}


class OpenAIEndpoint:
    """A local OpenAI endpoint: chat completions, responses, completions, embeddings and images.

    Streamed or not, at the addresses of OpenAI (`base_url`), and, below `url`, at those of Azure
    and of a Databricks workspace::

        OpenAI(base_url=endpoint.base_url, api_key="any")
        AzureOpenAI(azure_endpoint=endpoint.url, api_version="2024-10-21", api_key="any")
        DatabricksOpenAI(WorkspaceClient(host=endpoint.url, token="any"))

    It listens from construction until `close` and is its own context manager.

    Usage figures follow one rule: one token per whitespace-separated word, over the text of all
    messages (prompt) and of the answer (completion). An embedding depends on its text alone, and
    an image is one pixel.

    Args:
        answer: Maps a `Request` to what the model answers: a text, a dict as JSON for structured
            output, or an `Answer` with tool calls or a stream that breaks. It is called for each
            request, from many threads at once. When it raises `EndpointError` the client gets
            that status; any other exception becomes a 500 that names the exception's type. See
            `script` for answers in turn.
        latency: Seconds to wait before each answer.
        port: Where to listen on 127.0.0.1; 0 for any free port.
    """

    def __init__(
        self,
        answer: AnswerFunction = default_answer,
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
        self.port = self._server.port
        self._server.start("openai-endpoint")

    @property
    def url(self) -> str:
        """The address to give to ``AzureOpenAI(azure_endpoint=...)``, or as a workspace's host."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        """The address to give to ``OpenAI(base_url=...)``."""
        return f"{self.url}/v1"

    @property
    def requests(self) -> list[Request]:
        """The well-formed requests to a model received so far, in order of arrival (a copy)."""
        with self._lock:
            return list(self._requests)

    @property
    def total_tokens(self) -> int:
        """The sum of ``usage.total_tokens`` over all answers given."""
        with self._lock:
            return self._total_tokens

    def close(self) -> None:
        """Stop listening and drop open connections. Calling it again does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._server.stop()

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
        path = self.path.partition("?")[0]
        if path == "/v1/models":
            model = {"id": "local", "object": "model", "created": 0, "owned_by": "local"}
            self._reply(200, {"object": "list", "data": [model]})
        elif path == "/.well-known/databricks-config":
            # What a WorkspaceClient asks its host when it is made.
            self._reply(200, {"oidc_endpoint": f"{self.server.endpoint.url}/oidc"})
        else:
            self._reply_error(404, f"Unknown request URL: GET {self.path}")

    def do_POST(self) -> None:
        try:
            request = self._read_request()
            endpoint = self.server.endpoint
            endpoint._received(request)
            if endpoint.latency > 0:
                time.sleep(endpoint.latency)
            answer = as_answer(endpoint.answer(request))
        except EndpointError as error:
            self._reply_error(error.status, error.message, error.headers)
        except Exception as error:
            self._reply_error(500, f"The answer function raised {type(error).__name__}.")
        else:
            self._reply_answer(request, answer)

    def _read_request(self) -> Request:
        """Read the request's body; raises EndpointError when it is no request to a model."""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            # The unread body would be taken for the next request.
            self.close_connection = True
            raise EndpointError(411, "Send the body with a Content-Length header.")
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        name, deployment = self._called()
        try:
            body = json.loads(content)
        except ValueError:
            raise EndpointError(400, "We could not parse the JSON body of your request.") from None
        if not isinstance(body, dict):
            raise EndpointError(400, "The request body must be a JSON object.")
        if not deployment and not isinstance(body.get("model"), str):
            raise EndpointError(400, "You must provide a model parameter.")
        APIS[name].check(body)
        headers = {name.lower(): value for name, value in self.headers.items()}
        return Request(self.path, headers, body, name, deployment)

    def _called(self) -> tuple[str, str]:
        """Return the name of the API that was called, and the deployment, if any."""
        address = urlsplit(self.path)
        found = _ADDRESS.fullmatch(address.path)
        name = found and _APIS_BY_PATH.get(found["api"])
        if not found or not name:
            raise EndpointError(404, f"Unknown request URL: POST {self.path}")
        if found["azure"] and "api-version" not in parse_qs(address.query):
            raise EndpointError(404, "Resource not found: an Azure address needs api-version=...")
        return name, unquote(found["deployment"] or "")

    def _reply_answer(self, request: Request, answer: Answer) -> None:
        api = APIS[request.api]
        if not api.answers:
            answer = Answer()
        self.server.endpoint._billed(usage(request, answer)["total_tokens"])
        if request.body.get("stream") and api.events is not None:
            self._reply_events(api.events(request, answer), named=request.api == "responses")
        else:
            self._reply(200, api.reply(request, answer))

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
        self._reply(status, error_document(status, message), headers)

    def _reply_events(self, events: Iterator[Mapping[str, Any]], *, named: bool) -> None:
        fields = {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"}
        pending = self._head(200, fields)
        try:
            for event in events:
                self.wfile.write(pending + _frame(event, named))
                pending = b""
        except EndpointError as error:
            document = {"type": "error", **error_document(error.status, error.message)}
            self.wfile.write(_frame(document, named) + _LAST_CHUNK)
        except ConnectionAbortedError:
            self.close_connection = True
        else:
            self.wfile.write((b"" if named else _chunk("data: [DONE]")) + _LAST_CHUNK)

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


_LAST_CHUNK = b"0\r\n\r\n"


def _frame(event: Mapping[str, Any], named: bool) -> bytes:
    """Encode one server-sent event."""
    name = f"event: {event['type']}\n" if named else ""
    return _chunk(f"{name}data: {json.dumps(event)}")


def _chunk(text: str) -> bytes:
    """Encode the text of one server-sent event as one HTTP chunk."""
    event = f"{text}\n\n".encode()
    return f"{len(event):x}\r\n".encode() + event + b"\r\n"
