"""What users say of the calls that follow, and which call was the last."""

from __future__ import annotations

import contextvars
import re
from types import TracebackType
from typing import NamedTuple

__all__ = [
    "Annotations",
    "SpanIds",
    "annotate",
    "current_annotations",
    "last_call",
    "set_last_call",
]

Value = str | int | float | bool

_KEY = re.compile(r"[A-Za-z_][\w.-]{0,99}")
_LONGEST = 1000


class SpanIds(NamedTuple):
    """The ids by which a span is found in MLflow.

    Args:
        trace_id: MLflow's id of the trace, ``tr-`` and 32 hexadecimal digits.
        span_id: Of the span in it, 16 hexadecimal digits.
    """

    trace_id: str
    span_id: str


_annotations: contextvars.ContextVar[dict[str, Value]] = contextvars.ContextVar(
    "ctx_autolog_annotations"
)
_last_call: contextvars.ContextVar[SpanIds | None] = contextvars.ContextVar(
    "ctx_autolog_last_call", default=None
)


class Annotations:
    """What :func:`annotate` returns. As a context manager, it takes the keys back on leaving."""

    def __init__(self, before: dict[str, Value]) -> None:
        self._before = before

    def __enter__(self) -> Annotations:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Not by a token: a generator may be left in another context than it was entered in.
        _annotations.set(self._before)


def annotate(**keys: Value | None) -> Annotations:
    """Put keys of your own on the model calls that follow, as ``annotation.KEY`` on their spans.

    They hold in this execution context: from here on in this task attempt, until they are set
    again; in ``with annotate(doc_id=7):`` until it is left. Other tasks do not see them. A thread
    sees them where it is given the context (``asyncio.to_thread``, ``contextvars.copy_context``),
    as a plain thread pool does not: call it in the function that the pool runs.

    Args:
        **keys: Texts of at most 1000 characters, numbers, or true and false; they are stored
            with the trace as they are, whatever the settings say of content. None takes a key
            back.

    Raises:
        TypeError: A value is of another type.
        ValueError: A key or a text is too long, or a key has characters other than letters,
            digits and ``_``, ``.``, ``-``.
    """
    before = current_annotations()
    after = dict(before)
    for key, value in keys.items():
        if not _KEY.fullmatch(key):
            raise ValueError(
                f"the key {key[:100]!r} cannot be used; it must be at most 100 letters, digits, "
                "'_', '.' and '-', and begin with a letter or '_'"
            )
        # A number of numpy, as rows of pandas hold them, is one of Python's.
        plain = getattr(value, "item", lambda value=value: value)()
        if not isinstance(plain, (str, int, float, bool)) and plain is not None:
            raise TypeError(
                f"{key}={type(value).__name__} is neither a text, a number, True nor False"
            )
        if isinstance(plain, str) and len(plain) > _LONGEST:
            raise ValueError(f"{key} has {len(plain)} characters; it must be at most {_LONGEST}")
        after.pop(key, None)
        if plain is not None:
            after[key] = plain
    _annotations.set(after)
    return Annotations(before)


def current_annotations() -> dict[str, Value]:
    """Return the keys that a call made here and now gets."""
    return _annotations.get({})


def last_call() -> SpanIds | None:
    """Return the ids of the model call that was made last in this execution context.

    For a column of the output, by which a row finds its call::

        answer = ask(row.text)
        ids = ctx_autolog.last_call()

    None where no call was made yet, or it is not recorded.
    """
    return _last_call.get()


def set_last_call(trace_id: str, span_id: str) -> None:
    """Remember a call that has begun."""
    _last_call.set(SpanIds(trace_id, span_id))
