"""What the OpenAI client does with a request and its answer, seen in the spans; without Spark."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import mlflow
import openai
import pytest
from canned import canned, chat, choice
from mlflow.entities import Span
from openai import _base_client
from workload import ask, stored_trace

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.context import DriverContext
from mlflow_ctx_autolog.delivery.spool import Destination
from mlflow_ctx_autolog.driver.openai_autolog import OpenAIAutolog
from mlflow_ctx_autolog.stores.tracking_store import read_trace
from mlflow_ctx_autolog.task import current_task
from mlflow_ctx_autolog.testing import EndpointError, OpenAIEndpoint, Request, script

pytestmark = pytest.mark.usefixtures("database")

BUSY = EndpointError(503, "Not today.", {"Retry-After-Ms": "1"})
ASKED: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Which clause?"}]}


@pytest.fixture
def client(endpoint: OpenAIEndpoint) -> openai.OpenAI:
    return openai.OpenAI(base_url=endpoint.base_url, api_key="not-a-key", max_retries=2)


@pytest.fixture
def context() -> DriverContext:
    """The context of a driver's span, as another process sends it."""
    with mlflow.start_span("driver"):
        captured = ctx_autolog.capture()
    text = captured.to_json().replace(str(captured.process_id), "another")
    return DriverContext.from_json(text)


def _calls(context: DriverContext) -> list[Span]:
    """Return the calls of a trace that are stored by now, oldest first."""
    calls = [span for span in _spans(context) if span.span_type == "CHAT_MODEL"]
    return sorted(calls, key=lambda call: call.start_time_ns)


def _spans(context: DriverContext) -> list[Span]:
    ctx_autolog.flush()
    trace_id = "tr-" + str(context.traceparent).split("-")[1]
    # In a task, mlflow.get_trace() would look among the traces of this process first.
    _, spans = read_trace(Destination(context.tracking_uri, context.experiment_id), trace_id)
    return list(spans)


@pytest.mark.parametrize("failures", [0, 1, 2, 3])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_requests_sent_again_are_counted(
    client: openai.OpenAI,
    endpoint: OpenAIEndpoint,
    context: DriverContext,
    failures: int,
    mode: str,
) -> None:
    """The span has the number of requests sent again, if any, also when all were in vain."""
    endpoint.answer = script(*[BUSY] * failures, "at last")

    async def ask_async() -> None:
        async with openai.AsyncOpenAI(
            base_url=endpoint.base_url, api_key="not-a-key", max_retries=2
        ) as async_client:
            await async_client.chat.completions.create(**ASKED)

    with ctx_autolog.attach(context, "task"):
        try:
            client.chat.completions.create(**ASKED) if mode == "sync" else asyncio.run(ask_async())
        except openai.InternalServerError:
            assert failures == 3
    (call,) = _calls(context)
    resent = len(endpoint.requests) - 1
    assert resent == min(failures, 2)
    assert call.attributes.get("http.request.resend_count", 0) == resent
    assert ("http.request.resend_count" in call.attributes) == (resent > 0)
    assert call.status.status_code.value == ("ERROR" if failures == 3 else "OK")


def test_requests_of_other_apis_are_not_counted(
    client: openai.OpenAI, endpoint: OpenAIEndpoint, context: DriverContext
) -> None:
    """What the client sends again while a stream is read is not the stream's."""
    with ctx_autolog.attach(context, "task"):
        stream = client.chat.completions.create(**ASKED, stream=True)
        next(stream)
        with pytest.raises(openai.APIConnectionError):
            client.with_options(base_url="http://127.0.0.1:9/v1").models.list()
        list(stream)
    (call,) = _calls(context)
    assert "http.request.resend_count" not in call.attributes


def test_a_cancelled_call_is_an_error(endpoint: OpenAIEndpoint, context: DriverContext) -> None:
    """The span of an async call that is given up ends there and then, with the reason."""
    endpoint.latency = 0.5

    async def give_up() -> None:
        async with openai.AsyncOpenAI(base_url=endpoint.base_url, api_key="no-key") as client:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.chat.completions.create(**ASKED), 0.1)
            (call,) = _calls(context)
            assert call.status.status_code.value == "ERROR"
            assert call.events[0].attributes["exception.type"] == "CancelledError"

    with ctx_autolog.attach(context, "task"):
        asyncio.run(give_up())


def test_a_stream_ends_when_it_is_closed(client: openai.OpenAI, context: DriverContext) -> None:
    """Leaving the with block of a stream ends its span, with what was read, as closed early."""
    with ctx_autolog.attach(context, "task"):
        with client.chat.completions.create(**ASKED, stream=True) as stream:
            next(stream), next(stream)
        (call,) = _calls(context)
    assert call.attributes["llm.stream.outcome"] == "closed early"
    assert call.status.status_code.value == "OK"
    assert call.outputs["choices"][0]["message"]["content"] == "You "


def test_a_stream_that_nobody_can_read_ends_before_the_next_call(
    client: openai.OpenAI, context: DriverContext
) -> None:
    """A stream that was dropped does not wait for the end of the task."""
    with ctx_autolog.attach(context, "task"):
        for _ in client.chat.completions.create(**ASKED, stream=True):
            break
        gc.collect()
        ask(client, 2)
        dropped, other = _calls(context)
    assert dropped.attributes["llm.stream.outcome"] == "closed early"
    assert "llm.stream.outcome" not in other.attributes


def test_a_stream_that_is_left_ends_with_the_task_as_of_its_last_chunk(
    client: openai.OpenAI, context: DriverContext
) -> None:
    """Its span lasts until the last chunk that was read, and reading on is still possible."""
    with ctx_autolog.attach(context, "task"):
        stream = client.chat.completions.create(**ASKED, stream=True)
        next(stream), next(stream)
        read_until = time.time_ns()
        ask(client, 2)
    left, _ = _calls(context)
    assert left.end_time_ns is not None
    assert left.end_time_ns <= read_until
    assert left.attributes["llm.stream.outcome"] == "closed early"
    rest = [chunk.choices[0].delta.content for chunk in stream]
    assert rest[-2:] == ['clause?".', None]


@pytest.mark.parametrize("read", ["parse", "json", "text", "lines", "stream", "nothing"])
def test_a_streaming_response_is_a_call_until_it_is_closed(
    client: openai.OpenAI, context: DriverContext, read: str
) -> None:
    """However the body of a response is read, its span has what can be known of the answer."""
    asked = {**ASKED, "stream": True} if read in ("lines", "stream") else ASKED
    with ctx_autolog.attach(context, "task"):
        completions = client.chat.completions.with_streaming_response
        with completions.create(**asked) as response:
            assert _calls(context) == []
            if read == "lines":
                assert "data: [DONE]" in list(response.iter_lines())
            elif read == "stream":
                assert len(list(response.parse())) > 3
            elif read != "nothing":
                assert getattr(response, read)()
        (call,) = _calls(context)
    assert call.status.status_code.value == "OK"
    knows_answer = read not in ("lines", "nothing")
    assert ("Which clause?" in str(call.outputs)) == knows_answer
    is_whole = read in ("parse", "json", "text")
    assert ("mlflow.chat.tokenUsage" in call.attributes) == is_whole
    outcome = call.attributes.get("llm.stream.outcome")
    assert outcome == ("closed early" if read == "nothing" else None)


@pytest.mark.parametrize("has_processor", [False, True])
def test_a_call_that_outlasts_its_task_is_stored_then_and_again_when_it_ends(
    client: openai.OpenAI, endpoint: OpenAIEndpoint, context: DriverContext, has_processor: bool
) -> None:
    """At the end of the task the call is stored as it is, unfinished; later, as it was.

    Without its content, where the driver's span processors would have to see that first.
    """
    arrived, go = threading.Event(), threading.Event()

    def wait(request: Request) -> str:
        arrived.set()
        go.wait(30)
        return "at last"

    endpoint.answer = wait
    with ctx_autolog.attach(context, "task"):
        task = current_task()
        assert task is not None
        task.span_processors = [lambda span: None] if has_processor else []
        thread = threading.Thread(target=ask, args=(client, 1))
        thread.start()
        assert arrived.wait(30)
    (unfinished,) = _calls(context)
    go.set()
    thread.join()
    (finished,) = _calls(context)

    assert unfinished.status.status_code.value == "UNSET"
    assert unfinished.outputs is None
    assert finished.status.status_code.value == "OK"
    assert (unfinished.inputs is None) == has_processor
    assert ("at last" in str(finished.outputs)) == (not has_processor)
    assert finished.span_id == unfinished.span_id


def test_usage_that_mlflow_leaves_out_is_recorded(
    client: openai.OpenAI, context: DriverContext
) -> None:
    """The tokens of embeddings and old completions are recorded, by MLflow's names."""
    with ctx_autolog.attach(context, "task"):
        client.embeddings.create(model="m", input="a b")
        client.completions.create(model="m", prompt="a b")
    spans = _spans(context)
    usage = {span.span_type: span.attributes.get("mlflow.chat.tokenUsage") for span in spans}
    assert usage["EMBEDDING"] == {"input_tokens": 2, "total_tokens": 2}
    assert usage["LLM"] == {"input_tokens": 2, "output_tokens": 4, "total_tokens": 6}


@pytest.mark.parametrize(
    ("told", "usage"),
    [
        ({"prompt_tokens": 7, "completion_tokens": None}, {"input_tokens": 7}),
        ({"prompt_tokens": 7, "completion_tokens": None, "total_tokens": 7}, {"input_tokens": 7}),
        ({"total_tokens": 12}, {"total_tokens": 12}),
        (
            {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 99},
            {"input_tokens": 7, "output_tokens": 5, "total_tokens": 12},
        ),
    ],
)
def test_usage_of_the_drivers_calls_is_that_of_workers(
    openai_calls: OpenAIAutolog,
    told: dict[str, int | None],
    usage: dict[str, int],
) -> None:
    """MLflow takes nulls as they are, and cannot store the trace then."""
    openai_calls.install()
    with canned() as endpoint:
        endpoint.sends = chat(choice("an answer"), usage=told)
        client = openai.OpenAI(base_url=endpoint.url, api_key="k", max_retries=0)
        with mlflow.start_span("driver") as root:
            client.chat.completions.create(**ASKED)
    (call,) = stored_trace(root.trace_id).calls
    assert call.get_attribute("mlflow.chat.tokenUsage") == usage


class DerivedCompletions(openai.resources.chat.Completions):
    """As DatabricksOpenAI has it."""


def test_a_client_derived_from_openais_is_traced_as_openais(
    client: openai.OpenAI, context: DriverContext
) -> None:
    """Whatever its name, a chat completion is a CHAT_MODEL's span."""
    with ctx_autolog.attach(context, "task"):
        DerivedCompletions(client).create(**ASKED)
    assert [call.name for call in _calls(context)] == ["DerivedCompletions"]


@pytest.fixture
def openai_calls() -> Iterator[OpenAIAutolog]:
    calls = OpenAIAutolog()
    yield calls
    calls.uninstall()


def test_the_client_is_given_back_as_it_was(openai_calls: OpenAIAutolog) -> None:
    """Uninstalling leaves no layer of ours in the client's classes."""
    places = [
        (_base_client.BaseClient, "_calculate_retry_timeout"),
        (_base_client.SyncAPIClient, "request"),
        (_base_client.AsyncAPIClient, "request"),
        (openai.Stream, "close"),
        (openai.AsyncStream, "close"),
    ]
    before = [vars(owner)[name] for owner, name in places]
    openai_calls.install()
    during = [vars(owner)[name] for owner, name in places]
    openai_calls.uninstall()
    assert [vars(owner)[name] for owner, name in places] == before
    assert all(ours is not theirs for ours, theirs in zip(during, before, strict=True))


def test_a_client_that_has_changed_is_traced_nevertheless(
    openai_calls: OpenAIAutolog,
    endpoint: OpenAIEndpoint,
    client: openai.OpenAI,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where a release of the client has no such function, one warning says what is missing."""
    monkeypatch.delattr(openai.Stream, "close")
    with caplog.at_level(logging.WARNING, "mlflow_ctx_autolog"):
        openai_calls.install()
        openai_calls.install()
    (warning,) = [
        record.getMessage() for record in caplog.records if record.name.startswith("mlflow_ctx")
    ]
    assert "Stream has no close; this release of openai" in warning
    endpoint.answer = script(BUSY, "fine")
    with mlflow.start_span("driver") as span:
        ask(client, 1)
    (call,) = stored_trace(span.trace_id).calls
    assert call.attributes["http.request.resend_count"] == 1
