"""The documents of the OpenAI API: how each request is checked, and what is replied to it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import struct
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .model import Answer, EndpointError, Request, ToolCall, message_text, prompt_tokens

Document = dict[str, Any]
Events = Iterator[Document]

# The smallest PNG: one transparent pixel.
_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJg"
    "gg=="
)


@dataclass(frozen=True)
class API:
    """One of the APIs.

    Args:
        path: The end of its address.
        check: Raises `EndpointError` where a body is no request to it.
        reply: Returns the reply's document.
        events: Returns the documents of a streamed reply; None where there are no streams.
        answers: Whether the reply holds what the model answers.
    """

    path: str
    check: Callable[[Document], None]
    reply: Callable[[Request, Answer], Document]
    events: Callable[[Request, Answer], Events] | None = None
    answers: bool = True


def usage(request: Request, answer: Answer) -> dict[str, int]:
    """Return the tokens of a request and its answer, by the names of chat completions."""
    asked, answered = prompt_tokens(request), answer.tokens
    return {
        "prompt_tokens": asked,
        "completion_tokens": answered,
        "total_tokens": asked + answered,
    }


def error_document(status: int, message: str) -> Document:
    """Return the body of an error's reply."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _new_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4().hex}"


def _pieces(answer: Answer) -> Iterator[str]:
    """Yield the words of a text with the space around them, and break where the answer says so."""
    pieces = re.findall(r"\s*\S+\s*", answer.text) or [answer.text]
    if answer.breaks_after is None:
        yield from pieces
        return
    yield from pieces[: answer.breaks_after]
    raise answer.break_with or ConnectionAbortedError


def _chat_check(body: Document) -> None:
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise EndpointError(400, "You must provide messages: a list of objects.")


def _chat_call(call: ToolCall) -> Document:
    function = {"name": call.name, "arguments": json.dumps(dict(call.arguments))}
    return {"id": _new_id("call_"), "type": "function", "function": function}


def _chat_reply(request: Request, answer: Answer) -> Document:
    message: Document = {"role": "assistant", "content": answer.text, "refusal": None}
    if answer.tool_calls:
        message["content"] = answer.text or None
        message["tool_calls"] = [_chat_call(call) for call in answer.tool_calls]
    reason = "tool_calls" if answer.tool_calls else "stop"
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    return {
        "id": _new_id("chatcmpl-"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": [choice],
        "usage": usage(request, answer),
    }


def _wants_usage(request: Request) -> bool:
    options = request.body.get("stream_options")
    return isinstance(options, dict) and bool(options.get("include_usage"))


def _chat_events(request: Request, answer: Answer) -> Events:
    common: Document = {
        "id": _new_id("chatcmpl-"),
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": request.model,
    }
    if _wants_usage(request):
        common["usage"] = None

    def chunk(delta: Document, finish_reason: str | None = None) -> Document:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**common, "choices": [choice]}

    yield chunk({"role": "assistant", "content": ""})
    if answer.text or not answer.tool_calls:
        for piece in _pieces(answer):
            yield chunk({"content": piece})
    for index, call in enumerate(map(_chat_call, answer.tool_calls)):
        arguments = call["function"]["arguments"]
        call["function"]["arguments"] = ""
        yield chunk({"tool_calls": [{"index": index, **call}]})
        yield chunk({"tool_calls": [{"index": index, "function": {"arguments": arguments}}]})
    yield chunk({}, "tool_calls" if answer.tool_calls else "stop")
    if _wants_usage(request):
        yield {**common, "choices": [], "usage": usage(request, answer)}


def _needs(name: str) -> Callable[[Document], None]:
    def check(body: Document) -> None:
        if not isinstance(body.get(name), (str, list)) or not body[name]:
            raise EndpointError(400, f"You must provide {name}: a text or a list.")

    return check


def _response(request: Request, status: str) -> Document:
    """Return a response without its output."""
    body = request.body
    return {
        "id": _new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "status": status,
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "metadata": body.get("metadata") or {},
        "model": request.model,
        "output": [],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "text": body.get("text") or {"format": {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "top_p": 1.0,
        "usage": None,
    }


def _output_text(text: str) -> Document:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _output_message(content: list[Document], status: str) -> Document:
    return {
        "id": _new_id("msg_"),
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": content,
    }


def _output_calls(answer: Answer) -> list[Document]:
    return [
        {
            "id": _new_id("fc_"),
            "type": "function_call",
            "status": "completed",
            "call_id": _new_id("call_"),
            "name": call.name,
            "arguments": json.dumps(dict(call.arguments)),
        }
        for call in answer.tool_calls
    ]


def _response_usage(request: Request, answer: Answer) -> Document:
    counts = usage(request, answer)
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counts["total_tokens"],
    }


def _response_reply(request: Request, answer: Answer) -> Document:
    output = _output_calls(answer)
    if answer.text or not output:
        output.insert(0, _output_message([_output_text(answer.text)], "completed"))
    tokens = _response_usage(request, answer)
    return {**_response(request, "completed"), "output": output, "usage": tokens}


def _response_events(request: Request, answer: Answer) -> Events:
    for number, event in enumerate(_response_steps(request, answer)):
        yield {**event, "sequence_number": number}


def _response_steps(request: Request, answer: Answer) -> Events:
    begun = _response(request, "in_progress")
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    output = []
    calls = _output_calls(answer)
    if answer.text or not calls:
        message = _output_message([], "in_progress")
        yield {"type": "response.output_item.added", "output_index": 0, "item": message}
        place = {"item_id": message["id"], "output_index": 0, "content_index": 0}
        yield {"type": "response.content_part.added", **place, "part": _output_text("")}
        for piece in _pieces(answer):
            delta = {"delta": piece, "logprobs": []}
            yield {"type": "response.output_text.delta", **place, **delta}
        part = _output_text(answer.text)
        done = {"text": answer.text, "logprobs": []}
        yield {"type": "response.output_text.done", **place, **done}
        yield {"type": "response.content_part.done", **place, "part": part}
        message = {**message, "status": "completed", "content": [part]}
        yield {"type": "response.output_item.done", "output_index": 0, "item": message}
        output.append(message)
    for call in calls:
        place = {"output_index": len(output)}
        begun_call = {**call, "status": "in_progress", "arguments": ""}
        yield {"type": "response.output_item.added", **place, "item": begun_call}
        about = {**place, "item_id": call["id"]}
        arguments = call["arguments"]
        yield {"type": "response.function_call_arguments.delta", **about, "delta": arguments}
        done = {"name": call["name"], "arguments": arguments}
        yield {"type": "response.function_call_arguments.done", **about, **done}
        yield {"type": "response.output_item.done", **place, "item": call}
        output.append(call)
    tokens = _response_usage(request, answer)
    ended = {**begun, "status": "completed", "output": output, "usage": tokens}
    yield {"type": "response.completed", "response": ended}


def _text_completion(request: Request) -> Document:
    return {
        "id": _new_id("cmpl-"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": request.model,
    }


def _text_choice(text: str, finish_reason: str | None) -> Document:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}


def _completion_reply(request: Request, answer: Answer) -> Document:
    choices = [_text_choice(answer.text, "stop")]
    return {**_text_completion(request), "choices": choices, "usage": usage(request, answer)}


def _completion_events(request: Request, answer: Answer) -> Events:
    common = _text_completion(request)
    for piece in _pieces(answer):
        yield {**common, "choices": [_text_choice(piece, None)]}
    yield {**common, "choices": [_text_choice("", "stop")]}
    if _wants_usage(request):
        yield {**common, "choices": [], "usage": usage(request, answer)}


def _embedding(text: str, dimensions: int) -> list[float]:
    """Return a vector of length 1 that depends on nothing but the text."""
    seeds = (hashlib.sha256(f"{number} {text}".encode()).digest() for number in range(dimensions))
    values = [int.from_bytes(seed[:4], "big") / 2**31 - 1 for seed in seeds]
    length = math.sqrt(sum(value * value for value in values)) or 1.0
    return [value / length for value in values]


def _embedding_reply(request: Request, answer: Answer) -> Document:  # noqa: ARG001
    data = []
    for index, message in enumerate(request.messages):
        values = _embedding(message_text(message), int(request.body.get("dimensions") or 8))
        vector: object = values
        if request.body.get("encoding_format") == "base64":
            vector = base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
        data.append({"object": "embedding", "index": index, "embedding": vector})
    tokens = prompt_tokens(request)
    spent = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": request.model, "usage": spent}


def _image_reply(request: Request, answer: Answer) -> Document:  # noqa: ARG001
    tokens = prompt_tokens(request)
    return {
        "created": int(time.time()),
        "data": [{"b64_json": _PNG} for _ in range(int(request.body.get("n") or 1))],
        "usage": {
            "input_tokens": tokens,
            "input_tokens_details": {"image_tokens": 0, "text_tokens": tokens},
            "output_tokens": 0,
            "total_tokens": tokens,
        },
    }


APIS: Mapping[str, API] = {
    "chat.completions": API("chat/completions", _chat_check, _chat_reply, _chat_events),
    "responses": API("responses", _needs("input"), _response_reply, _response_events),
    "completions": API("completions", _needs("prompt"), _completion_reply, _completion_events),
    "embeddings": API("embeddings", _needs("input"), _embedding_reply, answers=False),
    "images": API("images/generations", _needs("prompt"), _image_reply, answers=False),
}
