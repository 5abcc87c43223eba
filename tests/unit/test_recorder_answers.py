"""What is recorded of every kind of answer: tokens, status, finish reason and text."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import canned
import openai
import pytest
from canned import CHAT_USAGE, Canned, chat, choice, chunk, chunks, output, response, usage_chunk
from pydantic import BaseModel
from recording import Keeper

from mlflow_ctx_autolog.exceptions import BudgetExceeded
from mlflow_ctx_autolog.prices import in_and_out

HAS_RESPONSES = find_spec("openai.resources.responses") is not None


class Clause(BaseModel):
    """What `parse()` is asked for."""

    number: int


def counts(asked: float | None, answered: float | None, **more: float) -> dict[str, float]:
    """Return usage by MLflow's names."""
    known = {"input_tokens": asked, "output_tokens": answered}
    found = {name: count for name, count in known.items() if count is not None}
    return {**found, "total_tokens": sum(found.values()), **more}


PLAIN = counts(19, 10, cache_read_input_tokens=0)
CALLS = [
    {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": '{"c": 7}'}},
    {"id": "call_2", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
]


@dataclass(frozen=True)
class Kind:
    """One kind of answer of one API.

    Args:
        name: What it is.
        sends: The document; of a stream its pieces are made of it, unless given.
        usage: What the span must say of tokens; None where it must say that they are unknown.
        texts: What the span's outputs must say, choice by choice.
        reasons: Its finish reasons.
        streams: The pieces of a stream, where they are no document's.
        status: The span's status.
        has_usage: False where nobody asks what it cost: an error.
        only_streams: Whether there is no such document.
        says: What more must be in the outputs.
    """

    name: str
    sends: Any
    usage: dict[str, float] | None = field(default_factory=lambda: PLAIN)
    texts: tuple[str | None, ...] = ("half an answer",)
    reasons: tuple[str, ...] | None = ("stop",)
    streams: Any = None
    status: str = "OK"
    has_usage: bool = True
    only_streams: bool = False
    says: tuple[str, ...] = ()


def usage(**more: Any) -> dict[str, Any]:
    return {**CHAT_USAGE, **more}


TEXT = "half an answer"
ODD = {
    "only a total": ({"total_tokens": 12}, {"total_tokens": 12}),
    "a null among them": (
        {"prompt_tokens": 7, "completion_tokens": None, "total_tokens": 7},
        {"input_tokens": 7},
    ),
    "only input": ({"prompt_tokens": 7}, {"input_tokens": 7}),
    "input and a total": (
        {"prompt_tokens": 7, "total_tokens": 12},
        {"input_tokens": 7, "total_tokens": 12},
    ),
    "a null total": (
        {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": None},
        counts(7, 5),
    ),
    "texts": (
        {"prompt_tokens": "7", "completion_tokens": "5", "total_tokens": "12"},
        counts(7, 5),
    ),
    "floats": (
        {"prompt_tokens": 7.0, "completion_tokens": 5.0, "total_tokens": 12.0},
        counts(7, 5),
    ),
    "a wrong total": (
        {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 99},
        counts(7, 5),
    ),
    "nothing in it": ({}, None),
    "no object": ("many", None),
}

CHAT_KINDS = [
    Kind("complete", chat(choice(TEXT))),
    Kind("cut off", chat(choice(TEXT, "length")), reasons=("length",)),
    Kind("filtered", chat(choice(TEXT, "content_filter")), reasons=("content_filter",)),
    Kind("refused", chat(choice(None, refusal="No.")), texts=(None,), says=("No.",)),
    Kind("without usage", chat(choice(TEXT), usage=None), usage=None),
    Kind(
        "cached and reasoning tokens",
        chat(
            choice(TEXT),
            usage=usage(
                prompt_tokens_details={"cached_tokens": 16, "audio_tokens": 3},
                completion_tokens_details={"reasoning_tokens": 8, "audio_tokens": 1},
            ),
        ),
        usage=counts(19, 10, cache_read_input_tokens=16),
    ),
    Kind(
        "several choices",
        chat(choice("one two"), choice("uno dos", "length", 1)),
        texts=("one two", "uno dos"),
        reasons=("stop", "length"),
    ),
    Kind(
        "tool calls",
        chat(choice(None, "tool_calls", tool_calls=CALLS)),
        texts=(None,),
        reasons=("tool_calls",),
        says=('{\\"c\\": 7}', '{\\"a\\": 1}', "look_up", "call_2"),
    ),
    *(
        Kind(f"usage: {name}", chat(choice(TEXT), usage=sent), usage=known)
        for name, (sent, known) in ODD.items()
    ),
    Kind(
        "an error with status 200",
        {"error": {"message": "upstream is away", "code": 502}},
        usage=None,
        has_usage=False,
        texts=(),
        reasons=None,
        status="ERROR",
        says=("upstream is away",),
        # Which the client itself takes for an error.
        streams=[{"error": {"message": "upstream is away", "code": 502}}],
    ),
    # https://learn.microsoft.com/azure/ai-services/openai/concepts/content-streaming
    Kind(
        "Azure's stream",
        None,
        only_streams=True,
        streams=[
            {
                "choices": [],
                "created": 0,
                "id": "",
                "model": "",
                "object": "",
                "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": {}}],
            },
            chunk({"role": "assistant", "content": "half "}),
            chunk({"content": "an answer"}),
            chunk({}, "stop"),
            usage_chunk(CHAT_USAGE),
            {
                "id": "",
                "object": "",
                "created": 0,
                "model": "",
                "choices": [{"index": 0, "finish_reason": None, "content_filter_offsets": {}}],
            },
        ],
    ),
    # litellm/proxy/proxy_server.py, async_data_generator: usage beside the last choice.
    Kind(
        "LiteLLM's stream",
        None,
        only_streams=True,
        streams=[
            chunk({"role": "assistant", "content": "half "}, citations=None),
            chunk({"content": "an answer", "audio": None, "tool_calls": None}),
            chunk({}, "stop", usage=CHAT_USAGE),
        ],
    ),
    # vllm/entrypoints/openai: with continuous_usage_stats, each piece says what there is so far.
    Kind(
        "vLLM's stream",
        None,
        only_streams=True,
        streams=[
            chunk({"role": "assistant", "content": ""}, usage=usage(completion_tokens=0)),
            chunk({"reasoning_content": "Let me see."}, usage=usage(completion_tokens=4)),
            chunk({"content": TEXT}, usage=usage(completion_tokens=9)),
            chunk({"content": ""}, "stop", usage=CHAT_USAGE, stop_reason=None),
        ],
        says=("Let me see.",),
    ),
    # llama.cpp/tools/server: choices take turns, and the last piece tells times.
    Kind(
        "llama.cpp's stream of two choices",
        None,
        only_streams=True,
        streams=[
            chunk({"role": "assistant", "content": None}),
            chunk({"content": "one "}, index=0),
            chunk({"content": "uno "}, index=1),
            chunk({"content": "two"}, index=0),
            chunk({"content": "dos"}, index=1),
            chunk({}, "stop", index=0),
            chunk({}, "stop", index=1),
            usage_chunk(CHAT_USAGE, timings={"prompt_n": 19, "predicted_per_second": 40.1}),
        ],
        texts=("one two", "uno dos"),
        reasons=("stop", "stop"),
    ),
    # ollama/openai/openai.go: the calls of tools are whole, all with one number.
    Kind(
        "Ollama's stream of a tool call",
        None,
        only_streams=True,
        streams=[
            chunk({"role": "assistant", "content": "", "tool_calls": [{"index": 0, **CALLS[0]}]}),
            chunk({"role": "assistant", "content": ""}, "tool_calls"),
            usage_chunk({"prompt_tokens": 19, "completion_tokens": 10, "total_tokens": 29}),
        ],
        texts=("",),
        reasons=("tool_calls",),
        usage=counts(19, 10),
        says=('{\\"c\\": 7}',),
    ),
    # https://docs.databricks.com/machine-learning/foundation-model-apis/api-reference#contentitem
    Kind(
        "Databricks' stream of content items",
        None,
        only_streams=True,
        streams=[
            chunk({"role": "assistant", "content": [{"type": "reasoning", "summary": []}]}),
            chunk({"content": [{"type": "text", "text": "half "}]}),
            chunk({"content": [{"type": "text", "text": "an answer"}]}, "stop", usage=CHAT_USAGE),
        ],
    ),
    Kind(
        "a piece without a delta",
        None,
        only_streams=True,
        streams=[chunk(None), chunk({"content": TEXT}, "stop"), usage_chunk(CHAT_USAGE)],
    ),
    Kind(
        "a broken stream",
        None,
        only_streams=True,
        streams=[chunk({"content": TEXT}), None],
        usage=None,
        reasons=None,
        status="ERROR",
    ),
    Kind(
        "an error in the stream",
        None,
        only_streams=True,
        streams=[chunk({"content": TEXT}), {"error": {"message": "too hot", "code": 500}}],
        usage=None,
        reasons=None,
        status="ERROR",
    ),
]

RESPONSE_KINDS = [
    Kind("complete", response(output(TEXT))),
    Kind(
        "cut off",
        response(
            output(TEXT, "incomplete"),
            status="incomplete",
            incomplete_details={"reason": "max_output_tokens"},
        ),
        reasons=("length",),
    ),
    Kind(
        "failed",
        response(
            output(TEXT),
            status="failed",
            usage=None,
            error={"code": "server_error", "message": "kaboom"},
        ),
        usage=None,
        has_usage=False,
        reasons=None,
        status="ERROR",
        says=("kaboom",),
    ),
    Kind("refused", response(canned.refusal("No.")), texts=(None,), says=("No.",), reasons=None),
    Kind("without usage", response(output(TEXT), usage=None), usage=None),
    Kind(
        "cached and reasoning tokens",
        response(
            output(TEXT),
            usage={
                **canned.RESPONSE_USAGE,
                "input_tokens_details": {"cached_tokens": 16},
                "output_tokens_details": {"reasoning_tokens": 8},
            },
        ),
        usage=counts(19, 10, cache_read_input_tokens=16),
    ),
    Kind(
        "a tool call",
        response(
            {
                "type": "function_call",
                "id": "fc_1",
                "call_id": "call_1",
                "name": "look_up",
                "arguments": '{"c": 7}',
                "status": "completed",
            }
        ),
        texts=(None,),
        reasons=None,
        says=('{\\"c\\": 7}', "look_up"),
    ),
]

MODES = ("sync", "async")
WAYS = ("plain", "stream", "raw", "streaming response")
CASES = [
    pytest.param(api, kind, mode, way, id=f"{api}, {kind.name}, {mode}, {way}")
    for api, kinds in (("chat", CHAT_KINDS), ("responses", RESPONSE_KINDS if HAS_RESPONSES else []))
    for kind in kinds
    for mode in MODES
    for way in WAYS
    if not (kind.only_streams and way != "stream")
]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Canned]:
    with canned.canned() as running:
        yield running


def ask(api: str, mode: str, way: str, url: str, **more: Any) -> Any:
    """Make a call and read all of its answer; return the error that it raises, if it does."""
    asked: dict[str, Any] = {"model": "m", **more}
    asked.setdefault(*(("input", "hi") if api == "responses" else ("messages", MESSAGES)))
    if way == "stream":
        asked["stream"] = True

    def part(client: Any) -> Any:
        part = client.responses if api == "responses" else client.chat.completions
        if way == "raw":
            return part.with_raw_response
        return part.with_streaming_response if way == "streaming response" else part

    def sync() -> Any:
        with openai.OpenAI(base_url=url, api_key="not-a-key", max_retries=0) as client:
            result = part(client).create(**asked)
            if way == "streaming response":
                with result as opened:
                    return opened.parse()
            return list(result) if way == "stream" else result

    async def asynchronous() -> Any:
        async with openai.AsyncOpenAI(base_url=url, api_key="not-a-key", max_retries=0) as client:
            created = part(client).create(**asked)
            if way == "streaming response":
                async with created as opened:
                    return await opened.parse()
            result = await created
            return [each async for each in result] if way == "stream" else result

    try:
        return asyncio.run(asynchronous()) if mode == "async" else sync()
    except Exception as error:
        return error


MESSAGES = [{"role": "user", "content": "hi"}]


def texts(outputs: Any) -> list[str | None]:
    """Return the text of each choice."""
    if not isinstance(outputs, dict):
        return []
    if "choices" in outputs:
        return [each["message"]["content"] for each in outputs["choices"] or ()]
    parts = [part for item in outputs.get("output") or () for part in item.get("content") or ()]
    return ["".join(part["text"] for part in parts if "text" in part) or None]


@pytest.mark.parametrize(("api", "kind", "mode", "way"), CASES)
def test_an_answer_is_recorded_as_the_server_has_sent_it(
    api: str, kind: Kind, mode: str, way: str, endpoint: Canned, keeper: Keeper
) -> None:
    """Tokens, status, finish reasons and texts, whichever way the answer is read."""
    pieces = kind.streams
    if pieces is None:
        pieces = (chunks if api == "chat" else canned.events)(kind.sends) if kind.sends else None
    endpoint.sends = pieces if way == "stream" else kind.sends
    ask(api, mode, way, endpoint.url)

    (span,) = keeper.spans
    assert span.status == kind.status
    assert span.get("mlflow.chat.tokenUsage") == kind.usage
    is_unknown = kind.has_usage and in_and_out(kind.usage or {}) is None
    assert (span.get("llm.usage.unknown") is True) == is_unknown
    if span.get("mlflow.spanOutputs") is not None or kind.texts:
        found = texts(span.get("mlflow.spanOutputs"))
        assert found == list(kind.texts)
    events = [dict(event.attributes) for event in span.events]
    everything = json.dumps([span.get("mlflow.spanOutputs"), events])
    for said in kind.says:
        assert said in everything
    if kind.reasons is not None:
        assert span.get("gen_ai.response.finish_reasons") == list(kind.reasons)
    assert len(span.get("llm.request.fingerprint")) == 32


REJECTED = [
    pytest.param("chat", chat(choice('{"numb', "length")), "LengthFinishReasonError", id="cut off"),
    pytest.param("chat", chat(choice("not JSON")), "ValidationError", id="no JSON"),
    pytest.param(
        "responses",
        response(output("not JSON")),
        "ValidationError",
        id="no JSON, responses",
        marks=pytest.mark.skipif(not HAS_RESPONSES, reason="of a release without responses"),
    ),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("api", "document", "error"), REJECTED)
def test_what_parse_rejects_was_paid_for(
    api: str, document: Any, error: str, mode: str, endpoint: Canned, keeper: Keeper
) -> None:
    """Tokens and text of an answer are in its span, although the client raises an error."""
    endpoint.sends = document

    def parse(client: Any) -> Any:
        if api == "responses":
            return client.responses.parse(model="m", input="hi", text_format=Clause)
        chats = client.chat.completions
        chats = chats if hasattr(chats, "parse") else client.beta.chat.completions
        return chats.parse(model="m", messages=MESSAGES, response_format=Clause)

    async def parse_async() -> None:
        async with openai.AsyncOpenAI(base_url=endpoint.url, api_key="k") as client:
            await parse(client)

    raised = None
    try:
        if mode == "async":
            asyncio.run(parse_async())
        else:
            parse(openai.OpenAI(base_url=endpoint.url, api_key="k"))
    except Exception as rejected:
        raised = type(rejected).__name__

    assert raised == error
    (span,) = keeper.spans
    assert span.status == "ERROR"
    assert span.get("mlflow.chat.tokenUsage") == PLAIN
    assert texts(span.get("mlflow.spanOutputs")) == texts(document)
    assert span.get("llm.answer.rejected") is True
    assert [event.attributes["exception.type"] for event in span.events] == [error]


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_that_nobody_reads_on_ends_when_it_is_dropped(
    mode: str, endpoint: Canned, keeper: Keeper
) -> None:
    """It has the text that had come, and nobody knows what it costs."""
    endpoint.sends = chunks(chat(choice(TEXT)))

    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=endpoint.url, api_key="k") as client:
            stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
            for _ in range(2):
                await stream.__anext__()

    if mode == "async":
        asyncio.run(leave())
    else:
        client = openai.OpenAI(base_url=endpoint.url, api_key="k")
        stream = client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        for _ in range(2):
            next(stream)
        del stream
    gc.collect()
    assert keeper.spans == []
    # The collector leaves a note, which the next call finds.
    endpoint.sends = chat(choice(TEXT))
    ask("chat", "sync", "plain", endpoint.url)

    left, _ = keeper.spans
    assert left.get("llm.stream.outcome") == "closed early"
    assert texts(left.get("mlflow.spanOutputs")) == ["half an answer"[:7]]
    assert left.get("llm.usage.unknown") is True


def test_other_calls_say_what_they_cost(endpoint: Canned, keeper: Keeper) -> None:
    """Embeddings, images and completions of a text have tokens as well."""
    client = openai.OpenAI(base_url=endpoint.url, api_key="k")
    spent = {"prompt_tokens": 8, "total_tokens": 8}
    vectors = [{"object": "embedding", "index": 0, "embedding": [0.5]}]
    endpoint.sends = {"object": "list", "data": vectors, "model": "e", "usage": spent}
    client.embeddings.create(model="m", input=["a"], encoding_format="float")
    endpoint.sends = {
        "created": 1,
        "data": [{"b64_json": "AA=="}],
        "usage": {"input_tokens": 4, "output_tokens": 100, "total_tokens": 104},
    }
    client.images.generate(model="m", prompt="a")
    endpoint.sends = [
        {"id": "c", "object": "text_completion", "created": 1, "model": "t", "choices": [piece]}
        for piece in (
            {"index": 0, "text": "half ", "finish_reason": None, "logprobs": None},
            {"index": 0, "text": "an answer", "finish_reason": "length", "logprobs": None},
        )
    ]
    endpoint.sends.append({**endpoint.sends[0], "choices": [], "usage": CHAT_USAGE})
    list(client.completions.create(model="m", prompt="a", stream=True))

    vector, image, completion = keeper.spans
    assert vector.get("mlflow.chat.tokenUsage") == {"input_tokens": 8, "total_tokens": 8}
    assert vector.get("mlflow.llm.model") == "e"
    assert "llm.usage.unknown" not in vector.attributes
    assert image.get("mlflow.chat.tokenUsage") == counts(4, 100)
    assert completion.get("mlflow.chat.tokenUsage") == PLAIN
    assert completion.get("mlflow.spanOutputs")["choices"][0]["text"] == "half an answer"
    assert completion.get("gen_ai.response.finish_reasons") == ["length"]


@pytest.mark.parametrize("mode", MODES)
def test_a_call_that_is_not_sent_says_so(mode: str, endpoint: Canned, keeper: Keeper) -> None:
    """A request that the budget does not admit does not go out; the caller gets the error."""
    keeper.refusal = BudgetExceeded("enough")
    before = len(endpoint.asked)
    assert ask("chat", mode, "plain", endpoint.url) is keeper.refusal

    (span,) = keeper.spans
    assert len(endpoint.asked) == before
    assert span.get("llm.request.not_sent") is True
    assert "llm.usage.unknown" not in span.attributes


def test_a_cancelled_call_ends_with_its_error(endpoint: Canned, keeper: Keeper) -> None:
    """What is no error of the call's own, such as a cancelled task, ends its span as well."""

    async def cancel() -> None:
        async with openai.AsyncOpenAI(base_url=endpoint.url, api_key="k") as client:
            call = client.chat.completions.create(model="m", messages=MESSAGES)
            task = asyncio.ensure_future(call)
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancel())
    (span,) = keeper.spans
    assert span.status == "ERROR"
    assert span.events[0].attributes["exception.type"] == "CancelledError"
