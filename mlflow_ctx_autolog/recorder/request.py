"""What a call asks: its arguments, read once, and by what the same request is recognised."""

from __future__ import annotations

import datetime
import decimal
import enum
import functools
import hashlib
import json
import secrets
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from mlflow_ctx_autolog.spans.attributes import INPUTS, MESSAGE_FORMAT, TOOLS
from mlflow_ctx_autolog.spans.values import OneShotError, dump, dump_or_raise

__all__ = ["fingerprint", "new_key", "readable", "request_attributes", "tools_attribute"]

# Arguments that the client takes as any iterable, and walks through once.
_ITERABLE = ("messages", "tools", "functions")
# Arguments that are no attributes of their own, since they are what is asked.
_ASKED = ("messages", "input")
# What says how a request is sent, rather than what is asked.
_NOT_ASKED = frozenset({"extra_headers", "timeout", "stream_options"})
_TEXTS = (datetime.date, datetime.time, decimal.Decimal, uuid.UUID)
# Of the client's own, which stand for arguments that are not given.
_NOT_GIVEN = frozenset({"NotGiven", "Omit"})


def new_key() -> str:
    """Return a random key. Without it, no content can be guessed from a fingerprint."""
    return secrets.token_hex(16)


def readable(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call so that they can be read and then given on.

    What gives its items only once becomes a list of them, at any depth; where it raises, something
    that gives what it gave and raises the same. All else is the same object.
    """
    changed = {
        name: _listed(value)
        for name, value in arguments.items()
        if isinstance(value, Iterator) or (name in _ITERABLE and _is_odd_iterable(value))
    }
    return {**arguments, **changed} if changed else arguments


def _is_not_given(value: Any) -> bool:
    kind = type(value)
    return kind.__name__ in _NOT_GIVEN and kind.__module__.partition(".")[0] == "openai"


def _is_odd_iterable(value: Any) -> bool:
    return (
        not isinstance(value, (list, tuple, str, bytes, Mapping, type))
        and isinstance(value, Iterable)
        and not hasattr(value, "model_dump")
        and not _is_not_given(value)
    )


def _listed(value: Iterable[Any]) -> Any:
    if hasattr(value, "read"):
        # A file, which the client uploads.
        return value
    items: list[Any] = []
    try:
        items.extend(value)
    except Exception as error:
        return chain(items, _raising(error))
    return items


def _raising(error: Exception) -> Iterator[Any]:
    raise error
    yield


def _deeply_listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _deeply_listed(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_deeply_listed(each) for each in value]
    if isinstance(value, Iterator):
        listed = _listed(value)
        return _deeply_listed(listed) if isinstance(listed, list) else listed
    return value


def request_attributes(
    arguments: dict[str, Any], message_format: str | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a call's arguments to be given on, and the attributes that say what they are.

    Args:
        arguments: As the user gave them.
        message_format: Where the call is one of a model that is asked in messages.

    Returns:
        The arguments, as :func:`readable` returns them; and attributes as JSON texts: the whole
        as MLflow's inputs, each argument but the messages, and the format.
    """
    arguments = readable(arguments)
    texts: dict[str, str] = {}
    for name, value in list(arguments.items()):
        if _is_not_given(value):
            continue
        try:
            texts[name] = dump_or_raise(value)
        except OneShotError:
            arguments = {**arguments, name: _deeply_listed(value)}
            texts[name] = dump(arguments[name])
        except Exception:
            texts[name] = dump(value)
    inputs = ", ".join(f"{dump(name)}: {text}" for name, text in texts.items())
    attributes = {INPUTS: f"{{{inputs}}}"}
    attributes.update((name, text) for name, text in texts.items() if name not in _ASKED)
    if message_format is not None:
        attributes[MESSAGE_FORMAT] = dump(message_format)
    return arguments, attributes


def tools_attribute(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Return the tools that a model may call, in the form that MLflow shows, as JSON."""
    tools = arguments.get("tools")
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        return {}
    found = [_tool(tool) for tool in tools if isinstance(tool, Mapping)]
    return {TOOLS: dump(found)} if found else {}


def _tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    kind = tool.get("type", "function")
    if kind != "function":
        # Built in, or a custom one.
        return {"type": "function", "function": {"name": str(tool.get("name") or kind)}}
    if "function" in tool:
        return tool
    definition = {name: value for name, value in tool.items() if name != "type"}
    return {"type": "function", "function": definition}


def fingerprint(key: str, interface: str, arguments: Mapping[str, Any]) -> str | None:
    """Return 32 hexadecimal digits that are the same for the same request under the same key.

    None where something in the request cannot be read: what is unknown equals nothing.

    Args:
        key: What :func:`new_key` returned.
        interface: What was called, such as ``Completions``.
        arguments: The keyword arguments of the call: model, messages and parameters.
    """
    asked = {
        name: value
        for name, value in arguments.items()
        if name not in _NOT_ASKED and not _is_not_given(value)
    }
    try:
        text = json.dumps([interface, asked], sort_keys=True, default=_plain, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), key=key.encode(), digest_size=16).hexdigest()
    except Exception:
        # What users put into a request is theirs, and need not have a text.
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, type):
        # As for a response's format. Two that have one name need not ask for the same.
        return [f"{value.__module__}.{value.__qualname__}", _schema(value)]
    if hasattr(value, "model_dump"):
        return value.model_dump()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, _TEXTS):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be read")


@functools.lru_cache(maxsize=256)
def _schema(of_class: type) -> Any:
    schema = getattr(of_class, "model_json_schema", None)
    return None if schema is None else schema()
