"""What answers of servers are found to be, without a judge."""

from __future__ import annotations

from typing import Any

import pytest

from mlflow_ctx_autolog.spans.quality import (
    answer_text,
    quality_attributes,
    request_shape,
    signals_of,
)

JSON_ASKED = {"response_format": {"type": "json_object"}}
SCHEMA_ASKED = {"text": {"format": {"type": "json_schema"}}}


def chat(content: Any = "yes", finish: str | None = "stop", **message: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, **message}
    return {"choices": [{"index": 0, "finish_reason": finish, "message": message}]}


def tool(arguments: Any) -> dict[str, Any]:
    return {"id": "call-1", "type": "function", "function": {"name": "f", "arguments": arguments}}


def responses(*output: Any, **more: Any) -> dict[str, Any]:
    return {"status": "completed", "output": list(output), **more}


def message(text: str) -> dict[str, Any]:
    return {"type": "message", "content": [{"type": "output_text", "text": text}]}


REFUSAL = {"type": "message", "content": [{"type": "refusal", "refusal": "I cannot."}]}
CALLED = {"type": "function_call", "name": "f", "arguments": '{"a": 1'}
CUT_OFF = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}


class Schema:
    """Stands for a model of pydantic."""


@pytest.mark.parametrize(
    ("request_", "answer", "signals", "chars"),
    [
        ({}, chat("yes"), set(), 3),
        ({}, chat("ye", "length"), {"cut_off"}, 2),
        ({}, chat("", "content_filter"), {"content_filter", "empty"}, 0),
        ({}, chat(None), {"empty"}, 0),
        ({}, chat(" \n"), {"empty"}, 2),
        ({}, chat(None, refusal="I cannot."), {"refused"}, 0),
        ({}, chat("", "refusal"), {"refused", "empty"}, 0),
        ({}, chat([{"type": "text", "text": "ab"}, {"type": "reasoning"}]), set(), 2),
        ({}, chat(None, audio={"id": "a"}), set(), 0),
        ({}, chat(None, "tool_calls", tool_calls=[tool("{}")]), set(), 0),
        ({}, chat(None, "tool_calls", tool_calls=[tool("")]), set(), 0),
        ({}, chat(None, "tool_calls", tool_calls=[tool({"a": 1})]), set(), 0),
        ({}, chat(None, "tool_calls", tool_calls=[tool("{'a'")]), {"invalid_tool_calls"}, 0),
        ({}, chat(None, "tool_calls", tool_calls=[tool("3")]), {"invalid_tool_calls"}, 0),
        ({}, chat(None, function_call={"name": "f", "arguments": "{"}), {"invalid_tool_calls"}, 0),
        (JSON_ASKED, chat('{"a": 1}'), set(), 8),
        (JSON_ASKED, chat("```json\n{}\n```"), {"invalid_json"}, 14),
        (JSON_ASKED, chat('{"a": ', "length"), {"invalid_json", "cut_off"}, 6),
        (JSON_ASKED, chat(""), {"invalid_json", "empty"}, 0),
        (JSON_ASKED, chat(None, refusal="I cannot."), {"refused"}, 0),
        (JSON_ASKED, chat(None, "tool_calls", tool_calls=[tool("{}")]), set(), 0),
        (JSON_ASKED, chat("[" * 100_000), {"invalid_json"}, 100_000),
        ({"response_format": {"type": "text"}}, chat("no"), set(), 2),
        ({"response_format": Schema}, chat("no"), {"invalid_json"}, 2),
        ({"response_format": str(Schema)}, chat("no"), {"invalid_json"}, 2),
        ({"extra_body": {"guided_json": {}}}, chat("no"), {"invalid_json"}, 2),
        ({"extra_body": {"format": "json"}}, chat("no"), {"invalid_json"}, 2),
        ({}, responses(message("yes")), set(), 3),
        ({}, responses(message("y"), **CUT_OFF), {"cut_off"}, 1),
        ({}, responses(REFUSAL), {"refused"}, 0),
        ({}, responses(), {"empty"}, 0),
        ({}, responses({"type": "reasoning"}), {"empty"}, 0),
        ({}, responses({"type": "image_generation_call"}), set(), 0),
        ({}, responses(CALLED), {"invalid_tool_calls"}, 0),
        (SCHEMA_ASKED, responses(message("n")), {"invalid_json"}, 1),
        ({"text_format": Schema}, responses(message("{}")), set(), 2),
        ({}, {"choices": [{"text": "abc", "finish_reason": "length"}]}, {"cut_off"}, 3),
        ({}, "a stream of completions", set(), 23),
    ],
)
def test_answers(request_: Any, answer: Any, signals: set[str], chars: int) -> None:
    """Each kind of answer has the signals that it shows, and no others."""
    found = quality_attributes(request_, answer, key="secret")

    assert signals_of(found) == signals
    assert found["llm.answer.chars"] == chars


def test_choices_are_judged_together() -> None:
    """Of several choices, one that was cut off counts, and all have their reason."""
    answer = {"choices": [*chat("yes")["choices"], *chat("n", "length")["choices"]]}
    found = quality_attributes({"n": 2}, answer)

    assert found["gen_ai.response.finish_reasons"] == ["stop", "length"]
    assert found["llm.answer.chars"] == 4
    assert "llm.answer.hash" not in found


def test_rejected_by_parse() -> None:
    """What parse() did not take is a signal, with or without the rest."""
    assert signals_of(quality_attributes({}, chat(), rejected=True)) == {"rejected"}
    assert signals_of(quality_attributes({}, None, rejected=True)) == {"rejected"}


@pytest.mark.parametrize(
    "answer",
    [
        *(None, 7, [], {}, {"choices": []}, {"choices": "no"}, {"error": {"message": "no"}}),
        {"data": [{"embedding": [1.0]}]},
        {"choices": [{"message": {"tool_calls": 7}}]},
    ],
)
def test_what_is_no_answer_has_no_quality(answer: Any) -> None:
    """Neither embeddings nor nonsense are empty answers, and nothing raises."""
    assert signals_of(quality_attributes({}, answer, key="secret")) == set()


def test_hash_is_of_what_is_said() -> None:
    """Equal answers have equal hashes under one key, whatever their ids; an empty one has none."""

    def hash_of(answer: Any, key: str = "secret") -> Any:
        return quality_attributes({}, answer, key=key).get("llm.answer.hash")

    assert hash_of(chat("yes")) == hash_of({**chat(" yes\n"), "id": "other", "created": 2})
    assert len(hash_of(chat("yes"))) == 32
    assert hash_of(chat("yes")) != hash_of(chat("no"))
    assert hash_of(chat("yes")) != hash_of(chat("yes"), key="another")
    assert hash_of(chat("")) is None
    first, second = (tool('{"a": 1}') | {"id": name} for name in ("one", "two"))
    assert hash_of(chat(None, tool_calls=[first])) == hash_of(chat(None, tool_calls=[second]))
    assert hash_of(chat("\ud800")) is not None
    assert hash_of(chat("yes"), key="k" * 100) is not None


def test_shape_of_requests() -> None:
    """A shape says who speaks and what is asked for, nothing of what is said."""
    system, user = ({"role": role, "content": "secret"} for role in ("system", "user"))
    image = {"role": "user", "content": [{"type": "text"}, {"type": "image_url"}]}
    more = {"model": "m", "temperature": 0, "stream": False, "user": "me", "timeout": 3}

    assert request_shape({"messages": [system, user], **more}) == "system, user; temperature"
    assert request_shape({"messages": [system, user, user]}) == "system, user, ..."
    assert request_shape({"messages": [image], **JSON_ASKED}) == "user with image_url; json_object"
    assert request_shape({"input": "secret", "instructions": "secret"}) == "instructions, text"
    assert request_shape({"prompt": "x", "tools": [{}, {}]}) == "text; 2 tools"
    assert "secret" not in str(quality_attributes({"messages": [system]}, chat("secret")))
    assert quality_attributes({"messages": 7}, None) == {"llm.request.shape": ""}


def test_text_of_answers() -> None:
    """What is said; where nothing is, the tools that are called."""
    assert answer_text(chat("yes")) == "yes"
    assert answer_text(chat(None, tool_calls=[tool('{"a": 1}')])) == 'f({"a": 1})'
    assert answer_text(responses(message("a"), REFUSAL)) == "a\n\nI cannot."
    assert answer_text(None) == ""
