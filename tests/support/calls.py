"""The calls that the OpenAI client can make, each as a function of a client, sync and async."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
from pydantic import create_model

from mlflow_ctx_autolog.testing import Answer, EndpointError, Request, ToolCall

MODEL = "gpt-test"
USAGE = {"stream_options": {"include_usage": True}}
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
PIXEL = "data:image/png;base64,iVBORw0KGgo="
SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "clause", "schema": {"type": "object", "properties": {}}},
}
# Longer than a client waits that gives up.
PATIENCE, DELAY = 0.3, 1.0


def clause() -> Any:
    """Return the model of a structured answer; made where it is used, as it does not pickle."""
    return create_model("Clause", number=(int, ...))


def answer() -> Callable[[Request], Any]:
    """Return what the endpoint answers: by what the prompt says of the case."""
    turns: dict[str, int] = {}
    lock = threading.Lock()

    def answer(request: Request) -> Any:
        prompt = request.prompt
        with lock:
            turn = turns[prompt] = turns.get(prompt, 0) + 1
        if "refused" in prompt:
            raise EndpointError(400, "No such clause.")
        if "sent again" in prompt and turn % 3:
            raise EndpointError(429, "Slow down.", {"Retry-After-Ms": "1"})
        if "never answered" in prompt:
            raise EndpointError(503, "Not today.", {"Retry-After-Ms": "1"})
        if "timed out" in prompt:
            time.sleep(DELAY)
        if "cut" in prompt:
            return Answer("seven years and more", breaks_after=2)
        if "error event" in prompt:
            error = EndpointError(500, "Too hot.")
            return Answer("seven years and more", breaks_after=2, break_with=error)
        if request.schema is not None:
            return {"number": 7}
        if request.body.get("tools"):
            return Answer(tool_calls=[ToolCall("look_up", {"clause": 7})])
        return "seven years and more"

    return answer


@dataclass(frozen=True)
class Call:
    """One way to call a model, and what its span must say.

    Args:
        row: How the table of what is covered names it.
        sync: Makes the call with a client; takes the prompt, and returns what the user got.
        asynchronous: The same, with an async client.
        needs: The part of the client that it needs.
        usage: Tokens that the server reports, None where it reports none.
        streamed: Whether the answer comes in chunks.
        left_early: Whether these are not read to their end.
    """

    row: str
    sync: Callable[[Any, str], Any]
    asynchronous: Callable[[Any, str], Awaitable[Any]]
    needs: str = "chat"
    span_type: str = "CHAT_MODEL"
    status: str = "OK"
    usage: bool = True
    resends: int | None = None
    streamed: bool = False
    left_early: bool = False


def messages(prompt: str) -> list[Any]:
    return [{"role": "user", "content": prompt}]


def image(prompt: str) -> list[Any]:
    parts = [
        {"type": "text", "text": prompt},
        {"type": "image_url", "image_url": {"url": PIXEL}},
    ]
    return [{"role": "user", "content": parts}]


def chat(client: Any, name: str) -> Any:
    """Return a method of the chat API, which older releases of the client have under beta."""
    found = getattr(client.chat.completions, name, None)
    return found or getattr(client.beta.chat.completions, name)


def text(reply: Any) -> Any:
    message = reply.choices[0].message
    calls = [call.function.arguments for call in message.tool_calls or []]
    return [message.content, calls, reply.usage.total_tokens]


def pieces(chunks: Iterable[Any]) -> list[Any]:
    return [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]


def error(failure: Exception) -> list[str]:
    return [type(failure).__name__, str(failure)]


def create(**more: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return a plain chat completion, sync and async."""
    make_messages = more.pop("make_messages", messages)

    def sync(client: Any, prompt: str) -> Any:
        content = make_messages(prompt)
        return text(client.chat.completions.create(model=MODEL, messages=content, **more))

    async def asynchronous(client: Any, prompt: str) -> Any:
        content = make_messages(prompt)
        return text(await client.chat.completions.create(model=MODEL, messages=content, **more))

    return sync, asynchronous


def failing(**options: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return a chat completion that may fail, of a client with other options."""
    sync_create, async_create = create()

    def sync(client: Any, prompt: str) -> Any:
        try:
            return sync_create(client.with_options(**options), prompt)
        except Exception as failure:
            return error(failure)

    async def asynchronous(client: Any, prompt: str) -> Any:
        try:
            return await async_create(client.with_options(**options), prompt)
        except Exception as failure:
            return error(failure)

    return sync, asynchronous


def read_stream(client: Any, prompt: str) -> Any:
    asked = {"model": MODEL, "messages": messages(prompt), "stream": True, **USAGE}
    return pieces(client.chat.completions.create(**asked))


async def async_read_stream(client: Any, prompt: str) -> Any:
    asked = {"model": MODEL, "messages": messages(prompt), "stream": True, **USAGE}
    stream = await client.chat.completions.create(**asked)
    return pieces([chunk async for chunk in stream])


def leave_stream(client: Any, prompt: str) -> Any:
    stream = client.chat.completions.create(model=MODEL, messages=messages(prompt), stream=True)
    return pieces(next(stream) for _ in range(2))


async def async_leave_stream(client: Any, prompt: str) -> Any:
    asked = {"model": MODEL, "messages": messages(prompt), "stream": True}
    stream = await client.chat.completions.create(**asked)
    return pieces([await stream.__anext__() for _ in range(2)])


def close_stream(client: Any, prompt: str) -> Any:
    with chat(client, "stream")(model=MODEL, messages=messages(prompt)) as stream:
        return [event.type for event in (next(stream), next(stream))]


async def async_close_stream(client: Any, prompt: str) -> Any:
    async with chat(client, "stream")(model=MODEL, messages=messages(prompt)) as stream:
        return [event.type for event in (await stream.__anext__(), await stream.__anext__())]


def break_stream(client: Any, prompt: str) -> Any:
    got = []
    try:
        for chunk in client.chat.completions.create(
            model=MODEL, messages=messages(prompt), stream=True
        ):
            got += pieces([chunk])
    except Exception as failure:
        got += error(failure)
    return got


async def async_break_stream(client: Any, prompt: str) -> Any:
    got = []
    asked = {"model": MODEL, "messages": messages(prompt), "stream": True}
    try:
        async for chunk in await client.chat.completions.create(**asked):
            got += pieces([chunk])
    except Exception as failure:
        got += error(failure)
    return got


def stream_events(client: Any, prompt: str) -> Any:
    with chat(client, "stream")(model=MODEL, messages=messages(prompt), **USAGE) as stream:
        types = [event.type for event in stream]
        return [types, text(stream.get_final_completion())]


async def async_stream_events(client: Any, prompt: str) -> Any:
    async with chat(client, "stream")(model=MODEL, messages=messages(prompt), **USAGE) as stream:
        types = [event.type async for event in stream]
        return [types, text(await stream.get_final_completion())]


def parse(client: Any, prompt: str) -> Any:
    reply = chat(client, "parse")(model=MODEL, messages=messages(prompt), response_format=clause())
    return reply.choices[0].message.parsed.number


async def async_parse(client: Any, prompt: str) -> Any:
    reply = await chat(client, "parse")(
        model=MODEL, messages=messages(prompt), response_format=clause()
    )
    return reply.choices[0].message.parsed.number


def raw_response(client: Any, prompt: str) -> Any:
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=messages(prompt))
    return [raw.headers["content-type"], text(raw.parse())]


async def async_raw_response(client: Any, prompt: str) -> Any:
    completions = client.chat.completions.with_raw_response
    raw = await completions.create(model=MODEL, messages=messages(prompt))
    return [raw.headers["content-type"], text(raw.parse())]


def streaming_response(client: Any, prompt: str) -> Any:
    completions = client.chat.completions.with_streaming_response
    with completions.create(model=MODEL, messages=messages(prompt)) as response:
        return [response.headers["content-type"], text(response.parse())]


async def async_streaming_response(client: Any, prompt: str) -> Any:
    completions = client.chat.completions.with_streaming_response
    async with completions.create(model=MODEL, messages=messages(prompt)) as response:
        return [response.headers["content-type"], text(await response.parse())]


def respond(client: Any, prompt: str) -> Any:
    reply = client.responses.create(model=MODEL, input=prompt)
    return [reply.output_text, reply.usage.total_tokens]


async def async_respond(client: Any, prompt: str) -> Any:
    reply = await client.responses.create(model=MODEL, input=prompt)
    return [reply.output_text, reply.usage.total_tokens]


def respond_parsed(client: Any, prompt: str) -> Any:
    return client.responses.parse(
        model=MODEL, input=prompt, text_format=clause()
    ).output_parsed.number


async def async_respond_parsed(client: Any, prompt: str) -> Any:
    reply = await client.responses.parse(model=MODEL, input=prompt, text_format=clause())
    return reply.output_parsed.number


def respond_streamed(client: Any, prompt: str) -> Any:
    with client.responses.stream(model=MODEL, input=prompt) as stream:
        types = [event.type for event in stream]
        return [types, stream.get_final_response().output_text]


async def async_respond_streamed(client: Any, prompt: str) -> Any:
    async with client.responses.stream(model=MODEL, input=prompt) as stream:
        types = [event.type async for event in stream]
        return [types, (await stream.get_final_response()).output_text]


def embed(client: Any, prompt: str) -> Any:
    return client.embeddings.create(model=MODEL, input=[prompt]).data[0].embedding


async def async_embed(client: Any, prompt: str) -> Any:
    return (await client.embeddings.create(model=MODEL, input=[prompt])).data[0].embedding


def generate_image(client: Any, prompt: str) -> Any:
    return client.images.generate(model=MODEL, prompt=prompt).data[0].b64_json


async def async_generate_image(client: Any, prompt: str) -> Any:
    return (await client.images.generate(model=MODEL, prompt=prompt)).data[0].b64_json


def complete(client: Any, prompt: str) -> Any:
    return client.completions.create(model=MODEL, prompt=prompt).choices[0].text


async def async_complete(client: Any, prompt: str) -> Any:
    return (await client.completions.create(model=MODEL, prompt=prompt)).choices[0].text


STREAM = {"streamed": True}
LEFT = {"streamed": True, "left_early": True, "usage": False}
BROKEN = {"streamed": True, "status": "ERROR", "usage": False}
FAILED = {"status": "ERROR", "usage": False}
RESPONSES = {"needs": "responses"}

CREATE = "`chat.completions.create`"
CALLS = [
    Call(CREATE, *create()),
    Call(f"{CREATE}, images in messages", *create(make_messages=image)),
    Call(f"{CREATE}, tool calls", *create(tools=TOOLS)),
    Call(f"{CREATE}, structured output", *create(response_format=SCHEMA)),
    Call(f"{CREATE}, `stream=True`", read_stream, async_read_stream, **STREAM),
    Call(f"{CREATE}, `stream=True`, left half-way", leave_stream, async_leave_stream, **LEFT),
    Call(f"{CREATE}, `stream=True`, cut half-way", break_stream, async_break_stream, **BROKEN),
    Call(
        f"{CREATE}, `stream=True`, error event half-way", break_stream, async_break_stream, **BROKEN
    ),
    Call(f"{CREATE}, `with_raw_response`", raw_response, async_raw_response),
    Call(f"{CREATE}, `with_streaming_response`", streaming_response, async_streaming_response),
    Call(f"{CREATE}, refused", *failing(), **FAILED),
    Call(f"{CREATE}, sent again by the client", *failing(max_retries=2), resends=2),
    Call(f"{CREATE}, never answered", *failing(max_retries=1), resends=1, **FAILED),
    Call(f"{CREATE}, timed out", *failing(timeout=PATIENCE, max_retries=1), resends=1, **FAILED),
    Call("`chat.completions.parse`", parse, async_parse),
    Call("`chat.completions.stream`", stream_events, async_stream_events, **STREAM),
    Call("`chat.completions.stream`, closed half-way", close_stream, async_close_stream, **LEFT),
    Call("`responses.create`", respond, async_respond, **RESPONSES),
    Call("`responses.parse`", respond_parsed, async_respond_parsed, **RESPONSES),
    Call("`responses.stream`", respond_streamed, async_respond_streamed, **RESPONSES, **STREAM),
    Call("`embeddings.create`", embed, async_embed, "embeddings", "EMBEDDING"),
    Call("`images.generate`", generate_image, async_generate_image, "images", "TOOL"),
    Call("`completions.create`", complete, async_complete, "completions", "LLM"),
]


def client_of(kind: str, mode: str, url: str) -> Any:
    """Return a client of the endpoint at an address."""
    import openai

    name = f"Async{kind}" if mode == "async" else kind
    if kind == "DatabricksOpenAI":
        import databricks_openai
        from databricks.sdk import WorkspaceClient

        workspace = WorkspaceClient(host=url, token="not-a-token")
        return getattr(databricks_openai, name)(workspace, max_retries=0)
    address = (
        {"azure_endpoint": url, "api_version": "2024-10-21"}
        if kind == "AzureOpenAI"
        else {"base_url": f"{url}/v1"}
    )
    return getattr(openai, name)(api_key="not-a-key", max_retries=0, **address)


def prompt_of(kind: str, mode: str, row: str) -> str:
    """Return a prompt that no other case has."""
    return f"{kind}, {mode}: {row}."


def caller(url: str) -> Callable[[Iterable[pd.DataFrame]], Iterator[pd.DataFrame]]:
    """Return a function for mapInPandas that makes the call that each row names."""
    calls = {call.row: call for call in CALLS}

    def make_calls(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        async def make(call: Call, kind: str, prompt: str) -> Any:
            async with client_of(kind, "async", url) as client:
                return await call.asynchronous(client, prompt)

        for batch in batches:
            got = []
            for kind, mode, row in zip(batch["kind"], batch["mode"], batch["row"], strict=True):
                prompt = prompt_of(kind, mode, row)
                if mode == "async":
                    result = asyncio.run(make(calls[row], kind, prompt))
                else:
                    result = calls[row].sync(client_of(kind, mode, url), prompt)
                got.append(json.dumps(result))
            yield batch.assign(got=got)

    return make_calls
