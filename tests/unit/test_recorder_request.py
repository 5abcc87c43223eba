"""What is recorded of a request, and that the client gets it as it was given."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import canned
import openai
import pytest
from canned import Canned, chat, choice
from pydantic import create_model
from recording import Keeper

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.recorder.openai_calls import OpenAIRecorder
from mlflow_ctx_autolog.recorder.request import fingerprint, request_attributes

MESSAGES = [{"role": "user", "content": "hi"}]
MINE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Canned]:
    with canned.canned() as running:
        running.sends = chat(choice("yes"))
        yield running


def client_of(endpoint: Canned, **more: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=endpoint.url, api_key="k", max_retries=0, **more)


def once(items: list[Any]) -> Iterator[Any]:
    yield from items


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param(lambda: once(MESSAGES), id="a generator"),
        pytest.param(lambda: dict(enumerate(MESSAGES)).values(), id="a view"),
        pytest.param(lambda: map(dict, MESSAGES), id="a map"),
        pytest.param(
            lambda: [{"role": "user", "content": once([{"type": "text", "text": "hi"}])}],
            id="a generator in a message",
        ),
    ],
)
def test_an_iterable_is_read_once_and_given_on(
    messages: Any, endpoint: Canned, keeper: Keeper
) -> None:
    """The server gets what it gets untraced, and the span has it too."""
    client_of(endpoint).chat.completions.create(model="m", messages=messages())
    sent, _ = endpoint.asked[-1]
    (span,) = keeper.spans
    asked = span.get("mlflow.spanInputs")["messages"]
    assert sent["messages"] == asked
    assert json.dumps(asked).count("hi") == 1


def test_an_iterable_that_raises_raises_as_it_does(endpoint: Canned, keeper: Keeper) -> None:
    """The error is the user's, and comes from where it comes untraced."""

    def messages() -> Iterator[Any]:
        yield MESSAGES[0]
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        client_of(endpoint).chat.completions.create(model="m", messages=messages())
    (span,) = keeper.spans
    assert span.status == "ERROR"
    assert "llm.request.fingerprint" not in span.attributes


def test_different_requests_never_have_one_fingerprint(endpoint: Canned, keeper: Keeper) -> None:
    """Neither those of generators, nor of formats that have only their name in common."""
    client = client_of(endpoint)
    for number in (1, 2, 1):
        messages = once([{"role": "user", "content": f"row {number}"}])
        client.chat.completions.create(model="m", messages=messages)
    first, second, again = (span.get("llm.request.fingerprint") for span in keeper.spans)
    assert first == again != second

    formats = [create_model("Clause", **{name: (int, ...)}) for name in ("number", "page", "page")]
    one, other, same = (fingerprint("k", "Completions", {"text_format": each}) for each in formats)
    assert one != other == same


@pytest.mark.parametrize("odd", [object(), io.BytesIO(b"audio"), lambda: 1])
def test_what_cannot_be_read_is_unknown(odd: Any) -> None:
    """A request with a file or an object in it is recognised as no other."""
    assert fingerprint("k", "Completions", {"model": "m", "input": odd}) is None


def test_what_was_not_given_is_left_out() -> None:
    """The client's marks for it are no arguments."""
    given = {"model": "m", "temperature": openai.NOT_GIVEN}
    _, attributes = request_attributes(given, None)
    assert json.loads(attributes["mlflow.spanInputs"]) == {"model": "m"}
    assert fingerprint("k", "C", given) == fingerprint("k", "C", {"model": "m"})


def test_later_changes_of_the_messages_are_not_recorded(endpoint: Canned, keeper: Keeper) -> None:
    """The span says what was asked, although the user goes on with the same list."""
    endpoint.sends = canned.chunks(chat(choice("yes")))
    messages = list(MESSAGES)
    stream = client_of(endpoint).chat.completions.create(model="m", messages=messages, stream=True)
    messages.append({"role": "assistant", "content": "later"})
    list(stream)
    endpoint.sends = chat(choice("yes"))
    (span,) = keeper.spans
    assert span.get("mlflow.spanInputs")["messages"] == MESSAGES


def test_a_call_takes_its_span_along(endpoint: Canned, keeper: Keeper) -> None:
    """The server gets a `traceparent` with the ids of the call's span, if that is wanted."""
    client_of(endpoint).chat.completions.create(model="m", messages=MESSAGES)
    _, headers = endpoint.asked[-1]
    (span,) = keeper.spans
    assert headers["traceparent"] == f"00-{span.trace_id}-{span.span_id}-01"
    assert (span.trace_id, span.parent_id) == keeper.above[:2]

    keeper.propagates_headers = False
    client_of(endpoint).chat.completions.create(model="m", messages=MESSAGES)
    assert "traceparent" not in endpoint.asked[-1][1]


@pytest.mark.parametrize(
    ("of_client", "of_call"),
    [
        ({"default_headers": {"traceparent": MINE}}, {}),
        ({"default_headers": {"Traceparent": MINE}}, {}),
        ({}, {"extra_headers": {"traceparent": MINE}}),
        ({}, {"extra_headers": {"TraceParent": MINE}}),
    ],
)
@pytest.mark.usefixtures("keeper")
def test_a_traceparent_of_the_users_stays(of_client: Any, of_call: Any, endpoint: Canned) -> None:
    """What a user's own tracing or gateway sends is theirs."""
    client = client_of(endpoint, **of_client)
    client.chat.completions.create(model="m", messages=MESSAGES, **of_call)
    assert endpoint.asked[-1][1]["traceparent"] == MINE


def test_annotations_and_the_last_call(endpoint: Canned, keeper: Keeper) -> None:
    """The user's keys are on the span, whose ids the user can ask for."""
    with ctx_autolog.annotate(document=7):
        client_of(endpoint).chat.completions.create(model="m", messages=MESSAGES)
    (span,) = keeper.spans
    assert span.get("annotation.document") == 7
    assert ctx_autolog.last_call() == (f"tr-{span.trace_id}", span.span_id)


def test_a_subclass_is_recorded_by_its_own_name(endpoint: Canned, keeper: Keeper) -> None:
    """As of clients derived from OpenAI's, which call what they override."""
    from openai.resources.chat.completions import Completions

    class GatewayCompletions(Completions):
        def create(self, **kwargs: Any) -> Any:
            return super().create(**kwargs)

    GatewayCompletions(client_of(endpoint)).create(model="m", messages=MESSAGES)
    (span,) = keeper.spans
    assert span.name == "GatewayCompletions"
    assert span.get("mlflow.spanType") == "CHAT_MODEL"


def test_nothing_is_recorded_for_nobody(endpoint: Canned) -> None:
    """A call that belongs to no task is made as if the recorder were not there."""
    recorder = OpenAIRecorder(lambda: None)
    recorder.install()
    try:
        reply = client_of(endpoint).chat.completions.create(model="m", messages=MESSAGES)
    finally:
        recorder.uninstall()
    assert reply.choices[0].message.content == "yes"
    assert "traceparent" not in endpoint.asked[-1][1]


def test_a_call_that_is_only_counted_has_no_span(endpoint: Canned, keeper: Keeper) -> None:
    """Below a span that sampling has dropped, a call is counted and admitted, not recorded."""
    keeper.above = keeper.above._replace(is_sampled=False)
    client_of(endpoint).chat.completions.create(model="m", messages=MESSAGES)
    assert (keeper.begun, keeper.spans) == (1, [])
    ((model, found, is_first),) = keeper.sent
    assert (model, is_first) == ("m", True)
    assert found is not None
    assert "traceparent" not in endpoint.asked[-1][1]
