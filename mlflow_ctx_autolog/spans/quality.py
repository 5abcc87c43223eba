"""What can be told of an answer without a judge: was it cut off, refused, empty, no JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mlflow_ctx_autolog.spans.attributes import FINISH_REASONS, REJECTED

__all__ = [
    "ANSWER_CHARS",
    "ANSWER_HASH",
    "FLAGS",
    "REQUEST_SHAPE",
    "answer_attributes",
    "answer_text",
    "quality_attributes",
    "request_shape",
    "signals_of",
]

ANSWER_CHARS, ANSWER_HASH = "llm.answer.chars", "llm.answer.hash"
REQUEST_SHAPE = "llm.request.shape"

# Attributes that are there where they are true, and what reports call them.
FLAGS = {
    "llm.answer.empty": "empty",
    "llm.answer.refused": "refused",
    "llm.answer.invalid_json": "invalid_json",
    REJECTED: "rejected",
    "llm.tool_calls.invalid_json": "invalid_tool_calls",
}
# Finish reasons that are signals, by the signal.
_STOPPED = {
    "cut_off": frozenset({"length", "max_tokens", "max_output_tokens", "incomplete"}),
    "content_filter": frozenset({"content_filter", "safety"}),
    "refused": frozenset({"refusal"}),
}
# What asks for JSON, in the request or in what is sent along with it: vLLM's and Ollama's ways.
_ASKS_FOR_JSON = ("guided_json", "structured_outputs")
_JSON_TYPES = frozenset({"json_object", "json_schema"})

# How something is sent, or who asks: no part of what a prompt looks like.
_NO_SHAPE = frozenset(
    {"model", "messages", "input", "prompt", "instructions", "tools", "functions", "user"}
    | {"response_format", "text", "text_format", "extra_headers", "extra_query", "extra_body"}
    | {"timeout", "stream_options", "metadata", "safety_identifier", "prompt_cache_key"}
)


@dataclass
class _Answer:
    """What an answer says, choice by choice: texts, refusals, tool calls as name and arguments."""

    finish_reasons: list[str]
    texts: list[str]
    refusals: list[str]
    tool_calls: list[tuple[str, Any]]
    # Whatever else is an answer: audio, images, searches.
    has_more: bool = False


def quality_attributes(
    request: Mapping[str, Any],
    answer: Any,
    *,
    key: str | None = None,
    rejected: bool = False,
) -> dict[str, Any]:
    """Return the attributes of a call's span that say how good its answer was.

    Never raises: what cannot be read is left out.

    Args:
        request: The call's keyword arguments.
        answer: The answer as the server has sent it, as a dictionary: of chat, completions or
            responses. A text stands for the one choice of completions. Anything else, such as an
            embedding or None for a call that was not answered, has no quality.
        key: The job's secret, for the answer's hash; None for no hash.
        rejected: Whether ``parse()`` did not take the answer.

    Returns:
        ``llm.request.shape``, and of an answer ``gen_ai.response.finish_reasons``,
        ``llm.answer.chars`` (of all choices together) and ``llm.answer.hash``, and the names of
        :data:`FLAGS` that are true.
    """
    found: dict[str, Any] = {}
    asked: str | None = None
    with suppress(Exception):
        asked = _json_asked(request)
        found[REQUEST_SHAPE] = _shape(request, asked)
    found.update(_answer_attributes(asked is not None, answer, key))
    if rejected:
        found[REJECTED] = True
    return found


def answer_attributes(
    request: Mapping[str, Any], answer: Any, *, key: str | None = None
) -> dict[str, Any]:
    """Return those of :func:`quality_attributes` that are about the answer. Never raises."""
    asked: str | None = None
    with suppress(Exception):
        asked = _json_asked(request)
    return _answer_attributes(asked is not None, answer, key)


def _answer_attributes(wants_json: bool, answer: Any, key: str | None) -> dict[str, Any]:
    try:
        read = _read(answer)
        return {} if read is None else _attributes(wants_json, read, key)
    except Exception:
        # What a server sends may be anything.
        return {}


def answer_text(answer: Any) -> str:
    """Return what an answer says, as a text: its choices, or the tool calls it makes instead."""
    read = _read(answer)
    if read is None:
        return ""
    texts = [text for text in (*read.texts, *read.refusals) if text]
    return "\n\n".join(texts or [f"{name}({_json(given)})" for name, given in read.tool_calls])


def signals_of(attributes: Mapping[str, Any]) -> frozenset[str]:
    """Return the signals that a span's attributes carry.

    ``cut_off``, ``content_filter``, ``refused``, ``empty``, ``invalid_json``, ``rejected`` and
    ``invalid_tool_calls``.

    Args:
        attributes: By name, with values as they were before they were JSON.
    """
    found = {signal for name, signal in FLAGS.items() if attributes.get(name) is True}
    reasons = attributes.get(FINISH_REASONS)
    if isinstance(reasons, (list, tuple)):
        for signal, stopped in _STOPPED.items():
            if any(str(reason).lower() in stopped for reason in reasons):
                found.add(signal)
    return frozenset(found)


def request_shape(request: Mapping[str, Any]) -> str:
    """Return what a request looks like, whatever it says: who speaks, and what it is given.

    Such as ``"system, user; json_schema; 2 tools; temperature"``. Turns that repeat are one.
    """
    return _shape(request, _json_asked(request))


def _shape(request: Mapping[str, Any], asked: str | None) -> str:
    parts = [", ".join(_roles(request))]
    if asked is not None:
        parts.append(asked)
    tools = request.get("tools") or request.get("functions")
    if isinstance(tools, (list, tuple)):
        parts.append(f"{len(tools)} tool{'s' if len(tools) > 1 else ''}")
    parts += sorted(
        str(name)
        for name, value in request.items()
        if name not in _NO_SHAPE and _is_given(value) and value is not False
    )
    return "; ".join(part for part in parts if part)


def _roles(request: Mapping[str, Any]) -> list[str]:
    found = ["instructions"] if _is_given(request.get("instructions")) else []
    for name in ("messages", "input", "prompt"):
        asked = request.get(name)
        if isinstance(asked, str):
            found.append("text")
        elif isinstance(asked, (list, tuple)):
            said = [_role(each) for each in asked]
            found += [role for place, role in enumerate(said) if role not in said[:place]]
            if len(said) > len(set(said)):
                found.append("...")
    return found


def _role(message: Any) -> str:
    said = _mapping(message)
    if said is None:
        return "text" if isinstance(message, str) else "data"
    role = str(said.get("role") or said.get("type") or "data")
    content = said.get("content")
    kinds = {
        str(part.get("type")).removeprefix("input_")
        for part in (content if isinstance(content, (list, tuple)) else ())
        if isinstance(part, Mapping)
    } - {"text", "None", "output_text"}
    return f"{role} with {' and '.join(sorted(kinds))}" if kinds else role


def _is_given(value: Any) -> bool:
    # openai's "not given", under its several names, has nothing to say.
    return value is not None and type(value).__name__ not in ("NotGiven", "Omit")


def _json_asked(request: Mapping[str, Any]) -> str | None:
    """Return in which way JSON was asked for; None where it was not."""
    extra = request.get("extra_body")
    for asked in (request, extra) if isinstance(extra, Mapping) else (request,):
        text = asked.get("text")
        wanted = (
            asked.get("response_format"),
            asked.get("text_format"),
            text.get("format") if isinstance(text, Mapping) else None,
        )
        for each in wanted:
            if each is None:
                continue
            if isinstance(each, type) or str(each).startswith("<class "):
                return "json_schema"
            kind = each.get("type") if isinstance(each, Mapping) else None
            if kind in _JSON_TYPES:
                return str(kind)
        if asked.get("format") == "json" or isinstance(asked.get("format"), Mapping):
            return "json_object"
        if any(_is_given(asked.get(name)) for name in _ASKS_FOR_JSON):
            return "json_schema"
    return None


def _attributes(wants_json: bool, read: _Answer, key: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {ANSWER_CHARS: sum(map(len, read.texts))}
    if read.finish_reasons:
        found[FINISH_REASONS] = read.finish_reasons
    is_refused = any(read.refusals)
    says_nothing = not any(text.strip() for text in read.texts)
    if is_refused:
        found["llm.answer.refused"] = True
    elif says_nothing and not read.tool_calls and not read.has_more:
        found["llm.answer.empty"] = True
    says_all = bool(read.tool_calls) and says_nothing
    says_text = not (is_refused or says_all or read.has_more)
    if says_text and wants_json and not all(map(_is_json, read.texts or [""])):
        found["llm.answer.invalid_json"] = True
    # Of a tool without parameters, some servers send nothing.
    if any(not (given in (None, "") or _is_arguments(given)) for _, given in read.tool_calls):
        found["llm.tool_calls.invalid_json"] = True
    said = [[text.strip() for text in read.texts], read.refusals, read.tool_calls]
    if key is not None and (not says_nothing or is_refused or read.tool_calls):
        secret = key.encode()[: hashlib.blake2b.MAX_KEY_SIZE]
        found[ANSWER_HASH] = hashlib.blake2b(
            _json(said).encode("utf-8", "surrogatepass"), key=secret, digest_size=16
        ).hexdigest()
    return found


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (RecursionError, ValueError):
        return False
    return True


def _is_arguments(given: Any) -> bool:
    if not isinstance(given, str):
        return isinstance(given, Mapping)
    try:
        return isinstance(json.loads(given), dict)
    except (RecursionError, ValueError):
        return False


def _mapping(value: Any) -> Mapping[str, Any] | None:
    if isinstance(value, Mapping):
        return value
    dump = getattr(value, "model_dump", None)
    if dump is None or isinstance(value, type):
        return None
    dumped = dump()
    return dumped if isinstance(dumped, Mapping) else None


def _read(answer: Any) -> _Answer | None:
    if isinstance(answer, str):
        return _Answer([], [answer], [], [])
    if not isinstance(answer, Mapping):
        return None
    choices, output = answer.get("choices"), answer.get("output")
    if isinstance(choices, Sequence) and not isinstance(choices, str) and choices:
        return _of_choices([each for each in choices if isinstance(each, Mapping)])
    if isinstance(output, Sequence) and not isinstance(output, str):
        return _of_responses(answer, [each for each in output if isinstance(each, Mapping)])
    return None


def _of_choices(choices: list[Mapping[str, Any]]) -> _Answer:
    read = _Answer([], [], [], [])
    for choice in choices:
        if choice.get("finish_reason") is not None:
            read.finish_reasons.append(str(choice["finish_reason"]))
        message = choice.get("message")
        if not isinstance(message, Mapping):
            read.texts.append(str(choice.get("text") or ""))
            continue
        read.texts.append("".join(_texts(message.get("content"))))
        if message.get("refusal"):
            read.refusals.append(str(message["refusal"]))
        read.has_more |= bool(message.get("audio") or message.get("images"))
        calls = [*(message.get("tool_calls") or ()), {"function": message.get("function_call")}]
        for call in calls:
            function = call.get("function") if isinstance(call, Mapping) else None
            if isinstance(function, Mapping):
                read.tool_calls.append((str(function.get("name")), function.get("arguments")))
            elif isinstance(call, Mapping) and isinstance(custom := call.get("custom"), Mapping):
                # The input of such a tool is any text.
                read.tool_calls.append((str(custom.get("name")), {"input": custom.get("input")}))
    return read


def _of_responses(answer: Mapping[str, Any], output: list[Mapping[str, Any]]) -> _Answer:
    read = _Answer([], [], [], [])
    details = answer.get("incomplete_details")
    reason = details.get("reason") if isinstance(details, Mapping) else None
    status = reason or answer.get("status")
    if status is not None:
        read.finish_reasons.append(
            {"completed": "stop", "max_output_tokens": "length"}.get(str(status), str(status))
        )
    for item in output:
        kind = item.get("type")
        if kind == "function_call":
            read.tool_calls.append((str(item.get("name")), item.get("arguments")))
        elif kind == "message":
            parts = item.get("content")
            read.texts.append("".join(_texts(parts)))
            read.refusals += [
                str(part["refusal"])
                for part in (parts if isinstance(parts, Sequence) else ())
                if isinstance(part, Mapping) and part.get("refusal")
            ]
        elif kind != "reasoning":
            read.has_more = True
    return read


def _texts(content: Any) -> Iterator[str]:
    """Yield the texts of a message's content, which may be a list of parts."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, Sequence):
        for part in content:
            if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                yield part["text"]
