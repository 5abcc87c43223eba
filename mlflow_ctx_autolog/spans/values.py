"""Values of attributes as JSON, the way MLflow writes them."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import ItemsView, Iterator, KeysView, Mapping, Set, ValuesView
from dataclasses import fields, is_dataclass
from typing import Any

__all__ = ["OneShotError", "dump", "dump_or_raise"]

# What can be read again and again, and json does not know.
_READABLE = (Set, KeysView, ValuesView, ItemsView, deque, range)


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
