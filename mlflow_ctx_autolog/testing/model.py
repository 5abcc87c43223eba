"""What the model of the local endpoint is asked, and what it answers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class EndpointError(Exception):
    """Raised by an answer function to make the endpoint reply with an HTTP error.

    Args:
        status: The HTTP status.
        message: What the client is told.
        headers: Headers of the reply, such as ``{"Retry-After": "1"}``.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = dict(headers or {})


@dataclass(frozen=True)
class Request:
    """One request to a model, as the server received it."""

    path: str
    headers: dict[str, str]
    """Header values by lower-case name."""
    body: dict[str, Any]
    api: str = "chat.completions"
    """What was called, by the client's name of it: "chat.completions", "responses",
    "completions", "embeddings" or "images"."""
    deployment: str = ""
    """The deployment in an Azure address, else ""."""

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation, oldest message first; a bare prompt or input is a user's message."""
        if self.api == "chat.completions":
            messages: list[dict[str, Any]] = self.body["messages"]
            return messages
        asked = self.body["input" if self.api in ("responses", "embeddings") else "prompt"]
        items = asked if isinstance(asked, list) else [asked]
        instructions = self.body.get("instructions")
        first = [{"role": "system", "content": instructions}] if instructions else []
        return first + [
            item if isinstance(item, dict) else {"role": "user", "content": str(item)}
            for item in items
        ]

    @property
    def model(self) -> str:
        """The name of the model asked for."""
        return str(self.body.get("model") or self.deployment)

    @property
    def prompt(self) -> str:
        """The text of the last user message, or "" when there is none."""
        for message in reversed(self.messages):
            if message.get("role") == "user":
                return message_text(message)
        return ""

    @property
    def schema(self) -> dict[str, Any] | None:
        """The JSON schema that the answer must follow, None for free text."""
        if self.api == "responses":
            wanted = (self.body.get("text") or {}).get("format") or {}
        else:
            wanted = (self.body.get("response_format") or {}).get("json_schema") or {}
        schema: dict[str, Any] | None = wanted.get("schema")
        return schema


@dataclass(frozen=True)
class ToolCall:
    """A call of one of the request's tools, which the model asks for."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What the model answers, where a text does not say it.

    Args:
        text: The assistant's text.
        tool_calls: The tools that it asks for.
        breaks_after: Break a streamed answer after so many pieces of it, a piece being a word.
        break_with: The error that the server reports then; by default it drops the connection
            without a word.
    """

    text: str = ""
    tool_calls: Sequence[ToolCall] = ()
    breaks_after: int | None = None
    break_with: EndpointError | None = None

    @property
    def tokens(self) -> int:
        """The length of the answer, in tokens."""
        texts = (self.text, *(json.dumps(dict(call.arguments)) for call in self.tool_calls))
        return sum(map(count_tokens, texts))


# A mapping is an answer in JSON: for structured output.
Answers = str | Mapping[str, Any] | Answer
AnswerFunction = Callable[[Request], Answers]


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


def prompt_tokens(request: Request) -> int:
    """Return the length of all messages of a request, in tokens."""
    return sum(count_tokens(message_text(message)) for message in request.messages)


def default_answer(request: Request) -> str:
    """Echo the first 40 characters of the prompt in a sentence.

    Raises:
        EndpointError: An answer by a schema is wanted, of which only the user knows what it is.
    """
    if request.schema is not None:
        raise EndpointError(
            400,
            "The request asks for structured output. Give OpenAIEndpoint an answer function "
            "that returns a dict which follows the schema.",
        )
    return f'You asked: "{request.prompt[:40]}".'


def as_answer(given: Answers) -> Answer:
    """Return what an answer function returned as an `Answer`.

    Raises:
        EndpointError: It is none of what it may return.
    """
    if isinstance(given, Answer):
        return given
    if isinstance(given, Mapping):
        return Answer(json.dumps(dict(given)))
    if isinstance(given, str):
        return Answer(given)
    raise EndpointError(
        500,
        f"The answer function returned {type(given).__name__!r}; it must return a text, a dict "
        "or an Answer.",
    )


def script(*steps: Answers | EndpointError) -> AnswerFunction:
    """Return an answer function that gives each step in turn, and the last one ever after.

    An `EndpointError` among the steps is raised. Requests take their steps in the order of their
    arrival::

        OpenAIEndpoint(script(EndpointError(429, "Slow down.", {"Retry-After": "1"}), "Yes."))

    Raises:
        ValueError: There is no step.
    """
    if not steps:
        raise ValueError("script() needs at least one step: a text, a dict, an Answer or an error")
    # Whose next() is atomic, other than that of a generator.
    turns: Iterator[Answers | EndpointError] = itertools.chain(steps, itertools.repeat(steps[-1]))

    def answer(request: Request) -> Answers:  # noqa: ARG001
        step = next(turns)
        if isinstance(step, EndpointError):
            raise EndpointError(step.status, step.message, step.headers)
        return step

    return answer
