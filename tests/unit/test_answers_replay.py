"""Answers that are given again: what the OpenAI client makes of them, by a real endpoint."""

from __future__ import annotations

import asyncio
import gzip
import inspect
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest
from openai import _base_client
from openai.resources.chat.completions import Completions
from reuse import Attempts, new_store

from mlflow_ctx_autolog.answers.replay import REUSED_FROM
from mlflow_ctx_autolog.testing import Answer, EndpointError, OpenAIEndpoint, Request, ToolCall

# From openai 3 on, httpx.
httpx: Any = getattr(_base_client, "httpx2", None) or _base_client.httpx  # type: ignore[attr-defined]
# Not in all releases, or elsewhere.
HAS_RESPONSES = find_spec("openai.resources.responses") is not None
HAS_PARSE = hasattr(Completions, "parse")
NEEDED = {"responses": HAS_RESPONSES, "parse": HAS_PARSE, "helper": HAS_PARSE}
MESSAGES: Any = [{"role": "user", "content": "Which clause?"}]
CHAT: dict[str, Any] = {"model": "m", "messages": MESSAGES}
numbers = itertools.count()


def numbered(request: Request) -> Any:
    """Answer each request otherwise, so that an answer that is given again can be told."""
    if request.schema is not None:
        return {"clause": next(numbers)}
    return f"Clause {next(numbers)}, and\nmore ünder it."


class Clause(pydantic.BaseModel):
    clause: int


@pytest.fixture
def endpoint() -> Iterator[OpenAIEndpoint]:
    with OpenAIEndpoint(numbered) as found:
        yield found


@pytest.fixture
def client(endpoint: OpenAIEndpoint) -> openai.OpenAI:
    return openai.OpenAI(base_url=endpoint.base_url, api_key="not-a-key", max_retries=0)


@pytest.fixture
def async_client(endpoint: OpenAIEndpoint) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=endpoint.base_url, api_key="not-a-key", max_retries=0)


@pytest.fixture(params=["local", "remote"])
def attempts(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Attempts]:
    """Attempts whose answers are in a directory that is quick to ask, and in one that is slow."""
    found = Attempts(new_store(tmp_path / "answers", lists=request.param == "remote"))
    with found.watching():
        yield found


def dumped(result: Any) -> Any:
    return result.model_dump() if hasattr(result, "model_dump") else result


def streamed(stream: Any) -> list[Any]:
    with stream:
        return [type(stream), *map(dumped, stream)]


def helped(manager: Any) -> list[Any]:
    """Read what the client's stream() gives, to its end."""
    with manager as stream:
        events = [(type(event), str(event)) for event in stream]
        final = getattr(stream, "get_final_completion", None) or stream.get_final_response
        return [*events, final().model_dump()]


def raw(response: Any) -> list[Any]:
    headers = {name: value for name, value in response.headers.items() if name != REUSED_FROM}
    headers.pop("connection", None)
    return [response.status_code, response.text, headers, dumped(response.parse())]


def read_at_once(manager: Any) -> list[Any]:
    with manager as response:
        return [response.status_code, list(response.iter_lines())]


def there(names: Iterable[str]) -> list[str]:
    """Return the ways that this release of the client has."""
    return [name for name in names if all(has or word not in name for word, has in NEEDED.items())]


WAYS: dict[str, Callable[[openai.OpenAI], Any]] = {
    "chat": lambda client: client.chat.completions.create(**CHAT),
    "chat stream": lambda client: streamed(client.chat.completions.create(**CHAT, stream=True)),
    "chat helper": lambda client: helped(client.chat.completions.stream(**CHAT)),
    "chat parse": lambda client: client.chat.completions.parse(**CHAT, response_format=Clause),
    "chat raw": lambda client: raw(client.chat.completions.with_raw_response.create(**CHAT)),
    "chat read later": lambda client: read_at_once(
        client.chat.completions.with_streaming_response.create(**CHAT)
    ),
    "responses": lambda client: client.responses.create(model="m", input="Which?"),
    "responses stream": lambda client: streamed(
        client.responses.create(model="m", input="Which?", stream=True)
    ),
    "responses helper": lambda client: helped(client.responses.stream(model="m", input="Which?")),
    "responses parse": lambda client: client.responses.parse(
        model="m", input="Which?", text_format=Clause
    ),
    "completions": lambda client: client.completions.create(model="m", prompt="Which?"),
    "completions stream": lambda client: streamed(
        client.completions.create(model="m", prompt="Which?", stream=True)
    ),
}


@pytest.mark.parametrize("way", there(WAYS))
def test_answer_is_as_it_was(
    attempts: Attempts, client: openai.OpenAI, endpoint: OpenAIEndpoint, way: str
) -> None:
    """In each way of the client, what another attempt gets is what was paid for, type and all."""
    first = attempts.begin()
    paid = WAYS[way](client)
    second = attempts.begin()
    reused = WAYS[way](client)

    assert type(reused) is type(paid)
    assert dumped(reused) == dumped(paid)
    assert (first.sent, first.reused_from) == (1, [])
    assert (second.sent, second.reused_from) == (0, [first.name])
    assert len(endpoint.requests) == 1


def test_embeddings(attempts: Attempts, client: openai.OpenAI, endpoint: OpenAIEndpoint) -> None:
    """Numbers are the same, whether the client asked for texts or numbers."""
    attempts.begin()
    paid = client.embeddings.create(model="m", input=["one", "two"])
    attempts.begin()
    assert client.embeddings.create(model="m", input=["one", "two"]) == paid
    assert len(endpoint.requests) == 1


ASYNC_WAYS: dict[str, Callable[[openai.AsyncOpenAI], Any]] = {
    "chat": lambda client: client.chat.completions.create(**CHAT),
    "chat stream": lambda client: client.chat.completions.create(**CHAT, stream=True),
    "chat parse": lambda client: client.chat.completions.parse(**CHAT, response_format=Clause),
    "responses": lambda client: client.responses.create(model="m", input="Which?"),
    "responses stream": lambda client: client.responses.create(
        model="m", input="Which?", stream=True
    ),
    "completions": lambda client: client.completions.create(model="m", prompt="Which?"),
    "embeddings": lambda client: client.embeddings.create(model="m", input="Which?"),
}


@pytest.mark.parametrize("way", there(ASYNC_WAYS))
def test_async_answer_is_as_it_was(
    attempts: Attempts, async_client: openai.AsyncOpenAI, endpoint: OpenAIEndpoint, way: str
) -> None:
    """The same for the async client."""

    async def ask() -> Any:
        result = await ASYNC_WAYS[way](async_client)
        if hasattr(result, "__aiter__"):
            return [type(result), *[dumped(chunk) async for chunk in result]]
        return dumped(result)

    async def ask_twice() -> list[Any]:
        attempts.begin()
        paid = await ask()
        attempts.begin()
        reused = await ask()
        await async_client.close()
        return [paid, reused]

    paid, reused = asyncio.run(ask_twice())
    assert reused == paid
    assert attempts.call.reused_from == ["tr-0a/0b"]
    assert len(endpoint.requests) == 1


def test_response_says_that_it_was_given_before(attempts: Attempts, client: openai.OpenAI) -> None:
    """A raw response has one header more than the first."""
    attempts.begin().name = "tr-0123/4567"
    paid = client.chat.completions.with_raw_response.create(**CHAT)
    attempts.begin()
    reused = client.chat.completions.with_raw_response.create(**CHAT)

    assert REUSED_FROM not in paid.headers
    assert reused.headers[REUSED_FROM] == "tr-0123/4567"
    assert reused.elapsed.total_seconds() >= 0


def test_samples_stay_samples(
    attempts: Attempts, client: openai.OpenAI, endpoint: OpenAIEndpoint
) -> None:
    """Five samples in a row are five, another attempt gets those five in order, then new ones."""

    def sample(count: int) -> list[str | None]:
        replies = [client.chat.completions.create(**CHAT) for _ in range(count)]
        return [reply.choices[0].message.content for reply in replies]

    attempts.begin()
    five = sample(5)
    attempts.begin()
    assert sample(7)[:5] == five
    attempts.begin()
    seven = sample(7)
    assert seven[:5] == five
    assert len(set(seven)) == 7
    assert len(endpoint.requests) == 7


def test_partitions_and_jobs_share_nothing(
    attempts: Attempts, client: openai.OpenAI, endpoint: OpenAIEndpoint
) -> None:
    """Another partition, and another job, ask again."""
    for partition, job in [("0", "one"), ("1", "one"), ("0", "two")]:
        attempts.begin(partition, job)
        client.chat.completions.create(**CHAT)
    assert len(endpoint.requests) == 3


def test_same_request_is_one_answer(
    tmp_path: Path, client: openai.OpenAI, endpoint: OpenAIEndpoint
) -> None:
    """Where the request alone decides, partitions share an answer, and so do calls of one."""
    attempts = Attempts(new_store(tmp_path / "answers"), match="request")
    with attempts.watching():
        replies = set()
        for partition in "01":
            attempts.begin(partition)
            for _ in range(3):
                replies.add(client.chat.completions.create(**CHAT).choices[0].message.content)
                attempts.store.flush(10)
    assert len(replies) == len(endpoint.requests) == 1


def test_threads_of_one_attempt_get_one_answer_each(
    attempts: Attempts, client: openai.OpenAI, endpoint: OpenAIEndpoint
) -> None:
    """Equal requests of one partition at once get answers of their own, and the same ones again."""

    def ask(_: int) -> str | None:
        return client.chat.completions.create(**CHAT).choices[0].message.content

    found = []
    for _ in range(2):
        attempts.begin()
        with ThreadPoolExecutor(8) as pool:
            found.append(sorted(map(str, pool.map(ask, range(32)))))
    assert found[0] == found[1]
    assert len(set(found[0])) == len(endpoint.requests) == 32


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{"role": "user", "content": "Another"}]},
        {"temperature": 0.5},
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        {"extra_headers": {"OpenAI-Organization": "other"}},
        {"extra_headers": {"X-Tenant": "other"}},
        {"extra_query": {"api-version": "other"}},
        {"extra_body": {"provider": "other"}},
    ],
)
def test_another_request_is_asked(
    attempts: Attempts, client: openai.OpenAI, endpoint: OpenAIEndpoint, change: Any
) -> None:
    """Whatever decides the answer makes it another request."""
    attempts.begin()
    client.chat.completions.create(**CHAT)
    attempts.begin()
    client.chat.completions.create(**{**CHAT, **change})
    assert len(endpoint.requests) == 2


def test_endpoints_and_keys_do_not_exchange_answers(
    attempts: Attempts, client: openai.OpenAI, endpoint: OpenAIEndpoint
) -> None:
    """Another address or log-in asks anew; another client, time-out or trace header does not."""
    with OpenAIEndpoint(numbered) as other:
        attempts.begin()
        client.chat.completions.create(**CHAT)
        for changed in [client.copy(base_url=other.base_url), client.copy(api_key="another")]:
            attempts.begin()
            changed.chat.completions.create(**CHAT)
            assert attempts.call.sent == 1
        attempts.begin()
        again = client.copy(timeout=30, max_retries=5, default_headers={"traceparent": "00-1"})
        again.chat.completions.create(**CHAT)
        assert attempts.call.sent == 0


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.chat.completions.create(**CHAT, extra_body={"store": True}),
        lambda client: client.chat.completions.create(**CHAT, tools=[{"type": "web_search"}]),
        lambda client: client.chat.completions.create(**CHAT, extra_body={"background": True}),
        lambda client: client.chat.completions.create(
            model="m",
            messages=[
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "https://a/b.png"}}],
                }
            ],
        ),
    ],
)
def test_what_depends_on_more_is_asked_again(
    attempts: Attempts, client: openai.OpenAI, endpoint: OpenAIEndpoint, ask: Any
) -> None:
    """Requests whose answer depends on more than they say are neither kept nor given again."""
    for _ in range(2):
        attempts.begin()
        ask(client)
        assert attempts.call.sent == 1
    attempts.store.flush(10)
    assert [path for path in attempts.store.root.rglob("*.*") if path.name != ".swept"] == []


def failing_first(error: Any) -> Callable[[Request], Any]:
    calls = itertools.count()

    def answer(request: Request) -> Any:
        if next(calls) == 0:
            if isinstance(error, Exception):
                raise error
            return error
        return numbered(request)

    return answer


def test_errors_are_not_kept_and_do_not_count(
    attempts: Attempts, client: openai.OpenAI, endpoint: OpenAIEndpoint
) -> None:
    """A call that failed is made again, and the one after it gets what was paid for."""
    endpoint.answer = failing_first(EndpointError(500, "not now"))
    attempts.begin()
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(**CHAT)
    paid = client.chat.completions.create(**CHAT)
    attempts.begin()
    assert client.chat.completions.create(**CHAT) == paid
    assert len(endpoint.requests) == 2


def test_a_retry_of_the_client_is_the_same_time(
    attempts: Attempts, client: openai.OpenAI, endpoint: OpenAIEndpoint
) -> None:
    """What the client sends again itself is one time, and admitted each time."""
    endpoint.answer = failing_first(EndpointError(503, "not now", {"Retry-After-Ms": "1"}))
    attempts.begin()
    patient = client.copy(max_retries=2)
    paid = patient.chat.completions.create(**CHAT)
    assert attempts.call.sent == 2
    attempts.begin()
    assert patient.chat.completions.create(**CHAT) == paid
    assert attempts.call.sent == 0


@pytest.mark.parametrize(
    "broken",
    [
        Answer("one two three", breaks_after=1),
        Answer("a b", breaks_after=1, break_with=EndpointError(500, "no")),
    ],
)
@pytest.mark.parametrize("api", there(["chat", "responses"]))
def test_broken_streams_are_not_kept(
    attempts: Attempts, client: openai.OpenAI, endpoint: OpenAIEndpoint, broken: Answer, api: str
) -> None:
    """A stream that breaks, or brings an error, is asked for again."""

    def ask() -> list[Any]:
        if api == "chat":
            return streamed(client.chat.completions.create(**CHAT, stream=True))
        return streamed(client.responses.create(model="m", input="a", stream=True))

    endpoint.answer = failing_first(broken)
    attempts.begin()
    try:
        ask()
    except openai.APIError:
        pass
    except Exception as error:
        assert type(error).__module__.startswith(("httpx", "httpcore")), error  # noqa: PT017
    attempts.begin()
    paid = ask()
    assert attempts.call.sent == 1
    attempts.begin()
    assert ask() == paid
    assert attempts.call.sent == 0


def test_an_abandoned_stream_is_not_kept(
    attempts: Attempts, client: openai.OpenAI, endpoint: OpenAIEndpoint
) -> None:
    """One that is closed before its end was not given whole."""
    for _ in range(2):
        attempts.begin()
        with client.chat.completions.create(**CHAT, stream=True) as stream:
            next(iter(stream))
        assert attempts.call.sent == 1


@pytest.mark.parametrize(
    "body", [b"<html>", b'{"error": {"message": "quota"}}', b'{"object": "response"}', b"[]"]
)
def test_what_is_no_answer_is_not_kept(
    attempts: Attempts, client: openai.OpenAI, endpoint: OpenAIEndpoint, body: bytes
) -> None:
    """A body with status 200 that is no successful answer is asked for again."""
    sent = []

    def respond(request: Any) -> Any:
        sent.append(request)
        return httpx.Response(200, content=body, headers={"content-type": "application/json"})

    mocked = client.copy(http_client=httpx.Client(transport=httpx.MockTransport(respond)))
    for _ in range(2):
        attempts.begin()
        mocked.chat.completions.with_raw_response.create(**CHAT)
    assert len(sent) == 2


def test_compressed_answers_and_cookies(attempts: Attempts, client: openai.OpenAI) -> None:
    """A compressed body is kept as it came; cookies, and limits of the moment, are not."""
    document = {"id": "c", "object": "chat.completion", "choices": [], "model": "m", "created": 1}
    headers = {
        "content-type": "application/json",
        "content-encoding": "gzip",
        "set-cookie": "session=secret",
        "x-ratelimit-remaining-requests": "1",
        "openai-processing-ms": "17",
        "x-request-id": "req-1",
    }
    sent = []

    class Body(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            body = gzip.compress(json.dumps(document).encode())
            yield body[:10]
            yield body[10:]

    def respond(request: Any) -> Any:
        sent.append(request)
        return httpx.Response(200, stream=Body(), headers=headers)

    mocked = client.copy(http_client=httpx.Client(transport=httpx.MockTransport(respond)))
    attempts.begin()
    paid = mocked.chat.completions.with_raw_response.create(**CHAT)
    attempts.begin()
    reused = mocked.chat.completions.with_raw_response.create(**CHAT)
    assert len(sent) == 1
    assert reused.parse() == paid.parse()
    assert reused.headers["openai-processing-ms"] == "17"
    assert reused.headers["x-request-id"] == "req-1"
    assert "set-cookie" not in reused.headers
    assert "x-ratelimit-remaining-requests" not in reused.headers
    # A client that cannot decompress it is not given it.
    attempts.begin()
    mocked.chat.completions.create(**CHAT, extra_headers={"Accept-Encoding": "identity"})
    assert len(sent) == 2


def test_the_budget_has_its_say_before_a_request_is_sent(
    attempts: Attempts, client: openai.OpenAI, endpoint: OpenAIEndpoint
) -> None:
    """What refuses a call is raised as it is, and a call that is reused is not refused."""
    attempts.begin()
    paid = client.chat.completions.create(**CHAT)
    refusal = ValueError("nothing left")
    attempts.begin().refusal = refusal
    assert client.chat.completions.create(**CHAT) == paid
    with pytest.raises(ValueError, match="nothing left") as raised:
        client.chat.completions.create(**CHAT)
    assert raised.value is refusal
    assert len(endpoint.requests) == 1


@pytest.mark.skipif(not HAS_PARSE, reason="this release has parse() elsewhere")
def test_what_parse_rejects_is_given_again(
    attempts: Attempts, client: openai.OpenAI, endpoint: OpenAIEndpoint
) -> None:
    """An answer that the user's schema rejects was paid for: it is rejected again, at no cost."""
    answers = iter(["no JSON", '{"clause": 7}'])
    endpoint.answer = lambda request: next(answers)

    def ask_until_it_fits() -> int:
        for _ in range(2):
            try:
                reply = client.chat.completions.parse(**CHAT, response_format=Clause)
                return reply.choices[0].message.parsed.clause  # type: ignore[union-attr]
            except pydantic.ValidationError:
                continue
        raise AssertionError

    for _ in range(2):
        attempts.begin()
        assert ask_until_it_fits() == 7
    assert len(endpoint.requests) == 2


def test_tools_of_the_client(
    attempts: Attempts, client: openai.OpenAI, endpoint: OpenAIEndpoint
) -> None:
    """A call of a function of the user's is an answer like any other, also in a stream."""
    tool: Any = {"type": "function", "function": {"name": "look", "parameters": {}}}
    endpoint.answer = lambda request: Answer(tool_calls=[ToolCall("look", {"n": next(numbers)})])
    found = []
    for _ in range(2):
        attempts.begin()
        stream = client.chat.completions.create(**CHAT, tools=[tool], stream=True)
        found.append(streamed(stream))
    assert found[0] == found[1]
    assert len(endpoint.requests) == 1


def test_without_tasks_nothing_is_kept(
    attempts: Attempts, client: openai.OpenAI, endpoint: OpenAIEndpoint
) -> None:
    """A call of no task is made, and leaves httpx as it was."""
    attempts.call.answers = None
    for _ in range(2):
        client.chat.completions.create(**CHAT)
    assert len(endpoint.requests) == 2


@pytest.mark.skipif(
    "content" not in inspect.signature(openai.OpenAI.post).parameters,
    reason="this release sends no such bodies",
)
def test_a_body_that_is_read_as_it_is_sent(attempts: Attempts, client: openai.OpenAI) -> None:
    """What cannot be read twice is sent as ever."""
    sent = []

    def respond(request: Any) -> Any:
        sent.append(request.read())
        return httpx.Response(200, json={"choices": []})

    mocked = client.copy(http_client=httpx.Client(transport=httpx.MockTransport(respond)))
    for _ in range(2):
        attempts.begin()
        mocked.post("/chat/completions", cast_to=object, content=iter([b'{"model":', b'"m"}']))
    assert sent == [b'{"model":"m"}'] * 2


def test_many_at_once_from_one_event_loop(
    attempts: Attempts, async_client: openai.AsyncOpenAI, endpoint: OpenAIEndpoint
) -> None:
    """Tasks of an event loop each get an answer of their own, and the same ones again."""

    async def ask_all() -> list[str]:
        calls = (async_client.chat.completions.create(**CHAT) for _ in range(20))
        replies = await asyncio.gather(*calls)
        return sorted(str(reply.choices[0].message.content) for reply in replies)

    async def twice() -> list[list[str]]:
        found = []
        for _ in range(2):
            attempts.begin()
            found.append(await ask_all())
        await async_client.close()
        return found

    first, second = asyncio.run(twice())
    assert first == second
    assert len(set(first)) == len(endpoint.requests) == 20
