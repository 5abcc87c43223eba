"""An endpoint that sends documents as they are, and what real servers send."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Document = dict[str, Any]


@dataclass
class Canned:
    """What is sent next: one document, or a stream of them, and what was asked.

    Args:
        url: The endpoint's address.
        sends: A document, or a list for a stream; None breaks the stream off.
        asked: Body and headers of each request.
        headers: Sent along with each answer.
    """

    url: str = ""
    sends: Any = None
    asked: list[tuple[Document, dict[str, str]]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)


@contextmanager
def canned() -> Iterator[Canned]:
    """Run an endpoint."""
    state = Canned()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            state.asked.append((body, {k.lower(): v for k, v in self.headers.items()}))
            kind, data = "application/json", b""
            if isinstance(state.sends, list):
                kind, data = "text/event-stream", _stream(state.sends)
            else:
                data = json.dumps(state.sends).encode()
            is_broken = isinstance(state.sends, list) and None in state.sends
            self.send_response(200)
            self.send_header("content-type", kind)
            for name, value in state.headers.items():
                self.send_header(name, value)
            # One that is broken promises more than it has.
            self.send_header("content-length", str(len(data) + is_broken))
            self.end_headers()
            self.wfile.write(data)
            if is_broken:
                self.close_connection = True

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def _stream(documents: Sequence[Document | None]) -> bytes:
    events = b"".join(
        b"data: " + json.dumps(each).encode() + b"\n\n" for each in documents if each is not None
    )
    return events if None in documents else events + b"data: [DONE]\n\n"


# https://platform.openai.com/docs/api-reference/chat/object
CHAT: Document = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1741569952,
    "model": "gpt-4o-2024-08-06",
    "service_tier": "default",
    "system_fingerprint": "fp_1",
}
CHAT_USAGE: Document = {
    "prompt_tokens": 19,
    "completion_tokens": 10,
    "total_tokens": 29,
    "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
}


def choice(text: str | None, reason: str | None = "stop", index: int = 0, **more: Any) -> Document:
    message = {"role": "assistant", "content": text, "refusal": None, "annotations": [], **more}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}


def chat(*choices: Document, usage: Any = CHAT_USAGE, **more: Any) -> Document:
    """Return an answer of chat completions."""
    return {**CHAT, "choices": list(choices), "usage": usage, **more}


def chunk(delta: Any, reason: str | None = None, index: int = 0, **more: Any) -> Document:
    choices = [{"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}]
    return {**CHAT, "object": "chat.completion.chunk", "choices": choices, **more}


def usage_chunk(usage: Any, **more: Any) -> Document:
    return {**CHAT, "object": "chat.completion.chunk", "choices": [], "usage": usage, **more}


def chunks(answer: Document) -> list[Document | None]:
    """Return the pieces in which OpenAI streams an answer, with usage asked for."""
    found: list[Document | None] = []
    for each in answer["choices"]:
        index, message = each["index"], each["message"]
        first = {"role": "assistant", "content": message["content"] and ""}
        found.append(chunk(first, index=index))
        found += [chunk({"content": half}, index=index) for half in _halves(message["content"])]
        if message["refusal"]:
            found += [chunk({"refusal": half}, index=index) for half in _halves(message["refusal"])]
        for number, call in enumerate(message.get("tool_calls") or ()):
            empty = {**call, "index": number, "function": {**call["function"], "arguments": ""}}
            found.append(chunk({"tool_calls": [empty]}, index=index))
            for half in _halves(call["function"]["arguments"]):
                piece = {"index": number, "function": {"arguments": half}}
                found.append(chunk({"tool_calls": [piece]}, index=index))
        found.append(chunk({}, each["finish_reason"], index=index))
    if answer["usage"] is not None:
        found.append(usage_chunk(answer["usage"]))
    return found


def _halves(text: str | None) -> list[str]:
    return [] if not text else [text[: len(text) // 2], text[len(text) // 2 :]]


# https://platform.openai.com/docs/api-reference/responses/object
RESPONSE: Document = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1741476542,
    "model": "gpt-4o-2024-08-06",
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "error": None,
    "incomplete_details": None,
}
RESPONSE_USAGE: Document = {
    "input_tokens": 19,
    "input_tokens_details": {"cached_tokens": 0},
    "output_tokens": 10,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 29,
}


def output(text: str, status: str = "completed") -> Document:
    content = [{"type": "output_text", "text": text, "annotations": []}]
    return _message(content, status)


def refusal(text: str) -> Document:
    return _message([{"type": "refusal", "refusal": text}], "completed")


def _message(content: list[Document], status: str) -> Document:
    return {
        "type": "message",
        "id": "msg_1",
        "status": status,
        "role": "assistant",
        "content": content,
    }


def response(
    *items: Document, status: str = "completed", usage: Any = RESPONSE_USAGE, **more: Any
) -> Document:
    """Return an answer of the Responses API."""
    return {**RESPONSE, "status": status, "output": list(items), "usage": usage, **more}


def events(answer: Document) -> list[Document | None]:
    """Return the events in which OpenAI streams a response."""
    begun = {**answer, "status": "in_progress", "output": [], "usage": None, "error": None}
    found: list[Document | None] = [{"type": "response.created", "response": begun}]
    for index, item in enumerate(answer["output"]):
        place = {"output_index": index}
        opened = {**item, "status": "in_progress"}
        if item["type"] == "message":
            opened["content"] = []
        found.append({"type": "response.output_item.added", **place, "item": opened})
        for number, part in enumerate(item.get("content") or ()):
            about = {**place, "content_index": number, "item_id": item["id"]}
            kind, text = (
                ("output_text", part["text"]) if "text" in part else ("refusal", part["refusal"])
            )
            empty = {**part, ("text" if "text" in part else "refusal"): ""}
            found.append({"type": "response.content_part.added", **about, "part": empty})
            found += [
                {"type": f"response.{kind}.delta", **about, "delta": half, "logprobs": []}
                for half in _halves(text)
            ]
        if answer["status"] == "completed":
            found.append({"type": "response.output_item.done", **place, "item": item})
    ended = {**answer, "output": [] if answer["status"] == "failed" else answer["output"]}
    found.append({"type": f"response.{answer['status']}", "response": ended})
    for number, event in enumerate(found):
        if event is not None:
            event["sequence_number"] = number
    return found
