"""By what two requests are recognised as the same."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import chat
from pydantic import BaseModel

from mlflow_ctx_autolog.recorder.request import fingerprint, new_key

INPUTS = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}


class Answer(BaseModel):
    text: str


def test_same_request_has_the_same_fingerprint() -> None:
    """Neither the order of parameters nor how a request is sent makes another of it."""
    key = new_key()
    other = {**dict(reversed(INPUTS.items())), "extra_headers": {"a": "b"}, "timeout": 3}

    assert fingerprint(key, "Completions", INPUTS) == fingerprint(key, "Completions", other)


@pytest.mark.parametrize(
    "change", [{"model": "n"}, {"messages": []}, {"temperature": 1}, {"seed": 1}]
)
def test_other_requests_have_others(change: dict[str, Any]) -> None:
    """Model, messages and every parameter count."""
    assert fingerprint("k", "C", INPUTS) != fingerprint("k", "C", {**INPUTS, **change})


def test_fingerprint_depends_on_the_key() -> None:
    """Who guesses the content cannot verify the guess."""
    assert fingerprint(new_key(), "C", INPUTS) != fingerprint(new_key(), "C", INPUTS)


@pytest.mark.parametrize("make", [lambda: Answer, lambda: Answer(text="a"), lambda: {1, 2}, object])
def test_values_that_are_no_json(make: Any) -> None:
    """Classes, models and objects have a fingerprint that does not change from object to object."""
    one, two = ({**INPUTS, "response_format": make()} for _ in range(2))

    assert fingerprint("k", "C", one) == fingerprint("k", "C", two)
    assert fingerprint("k", "C", one) != fingerprint("k", "C", INPUTS)


def test_message_objects_are_their_content() -> None:
    """An answer that is sent back as an object is told apart by what it says."""
    hello, bye = (
        chat.ChatCompletionMessage(role="assistant", content=text) for text in ("hello", "bye")
    )
    one, two = ({**INPUTS, "messages": [message]} for message in (hello, bye))

    assert fingerprint("k", "C", one) != fingerprint("k", "C", two)


def test_iterators_are_not_consumed() -> None:
    """An argument that can be read but once is left to the client."""
    messages = iter([{"role": "user"}])
    fingerprint("k", "C", {**INPUTS, "messages": messages})

    assert list(messages) == [{"role": "user"}]
