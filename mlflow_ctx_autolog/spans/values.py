"""Values of attributes as JSON, the way MLflow writes them."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import ItemsView, Iterator, KeysView, Mapping, Set, ValuesView
from dataclasses import fields, is_dataclass
from typing import Any

__all__ = ["OneShotError", "dump", "dump_or_raise", "storable"]

# What can be read again and again, and json does not know.
_READABLE = (Set, KeysView, ValuesView, ItemsView, deque, range)


# In JSON: backslashes that stand for themselves, a pair of surrogates, which are one character, and
# what no store takes.
_ESCAPES = re.compile(
    r"((?:\\\\)+|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    r"|\\u(?:0000|[dD][89a-fA-F][0-9a-fA-F]{2})"
)


class OneShotError(Exception):
    """A value holds an iterator, which gives its items once."""


def dump(value: Any) -> str:
    """Return a value as JSON text; what JSON does not know as its own text. Never raises."""
    try:
        return dump_or_raise(value)
    except Exception:
        return _dump_text(value)


def dump_or_raise(value: Any) -> str:
    """Return a value as JSON text.

    Raises:
        OneShotError: There is an iterator in it.
        Exception: It refers to itself, is nested too deeply, or raises when it is read.
    """
    return _encode(value)


def storable(text: str) -> str:
    """Return a text, which may be JSON, as every store takes it.

    Without NUL, which PostgreSQL has in no text, and halves of surrogate pairs, which are no
    characters: texts that were taken from documents have them.
    """
    if "\0" in text:
        text = text.replace("\0", "\ufffd")
    if "\\u" in text:
        text = _ESCAPES.sub(lambda found: found[1] or r"\ufffd", text)
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text


def _dump_text(value: Any) -> str:
    try:
        return json.dumps(repr(value), ensure_ascii=False)
    except Exception:
        return json.dumps(f"<{type(value).__qualname__}>")


def _plain(value: Any) -> Any:
    if not isinstance(value, type) and hasattr(value, "model_dump"):
        return value.model_dump()
    if is_dataclass(value):
        try:
            return {field.name: getattr(value, field.name) for field in fields(value)}
        except AttributeError:
            # Of a class, whose fields have no values.
            return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, _READABLE):
        return list(value)
    if isinstance(value, Iterator) and not hasattr(value, "read"):
        raise OneShotError
    return str(value)


_encode = json.JSONEncoder(ensure_ascii=False, default=_plain).encode
