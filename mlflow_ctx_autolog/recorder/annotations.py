"""What users say of the calls that follow, and which call was the last."""

from __future__ import annotations

import contextvars
import functools
import re
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

__all__ = [
    "Annotations",
    "SpanIds",
    "annotate",
    "current_annotations",
    "labelled",
    "last_call",
    "note_annotations",
    "set_last_call",
    "with_annotations",
]

Value = str | int | float | bool

_KEY = re.compile(r"[A-Za-z_][\w.-]{0,99}")
_LONGEST = 1000
# Characters of a value in the name of a span.
_LONGEST_LABEL = 80


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
# What threads begin with, which have a context of their own.
_of_threads: weakref.WeakKeyDictionary[threading.Thread, dict[str, Value]] = (
    weakref.WeakKeyDictionary()
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
    again; in ``with annotate(doc_id=7):`` until it is left. Other tasks do not see them. In a task,
    a thread that is started under them has them, and so has what is handed to a pool of threads;
    what either of them sets is its own.

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
    own = _annotations.get(None)
    return _of_threads.get(threading.current_thread(), {}) if own is None else own


def labelled(name: str, key: str | None) -> str:
    """Return the name of a call's span, with the value that the key has here and now behind it."""
    value = None if key is None else current_annotations().get(key)
    return name if value is None else f"{name} ({str(value)[:_LONGEST_LABEL]})"


def note_annotations(thread: threading.Thread) -> None:
    """Have a thread that is about to be started begin with the keys of this moment."""
    if found := current_annotations():
        _of_threads[thread] = found


def with_annotations(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs with the keys of this moment, in another thread."""
    return functools.partial(_run_with, current_annotations(), function)


def _run_with(
    annotations: dict[str, Value], function: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    token = _annotations.set(annotations)
    try:
        return function(*args, **kwargs)
    finally:
        _annotations.reset(token)


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
