"""A span as a plain record, and one that has not ended yet."""

from __future__ import annotations

import json
import os
import re
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mlflow_ctx_autolog.spans.attributes import (
    ERROR,
    EXCEPTION_EVENT,
    EXCEPTION_MESSAGE,
    EXCEPTION_STACKTRACE,
    EXCEPTION_TYPE,
    LOG_LEVEL,
    SPAN_TYPE,
)
from mlflow_ctx_autolog.spans.values import dump

__all__ = [
    "MLFLOW_PREFIX",
    "OpenSpan",
    "SpanContext",
    "SpanEvent",
    "SpanLink",
    "SpanRecord",
    "new_span_id",
    "new_trace_id",
]

# Of MLflow's id of a trace.
MLFLOW_PREFIX = "tr-"
# https://www.w3.org/TR/trace-context/#traceparent-header
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-((?!0{32})[0-9a-f]{32})-((?!0{16})[0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?"
)
_SAMPLED = 1


def new_trace_id() -> str:
    """Return 32 random hexadecimal digits, not from a generator that the user may have seeded."""
    return os.urandom(16).hex()


def new_span_id() -> str:
    """Return 16 random hexadecimal digits."""
    return os.urandom(8).hex()


class SpanContext(NamedTuple):
    """What is known of a span where others are put below it, as W3C has it.

    Args:
        trace_id: 32 hexadecimal digits.
        span_id: 16 hexadecimal digits.
        is_sampled: Whether it is recorded; else what is below it is not, either.
        tracestate: W3C ``tracestate``, if any.
    """

    trace_id: str
    span_id: str
    is_sampled: bool = True
    tracestate: str | None = None

    @property
    def mlflow_trace_id(self) -> str:
        """MLflow's id of its trace."""
        return MLFLOW_PREFIX + self.trace_id

    @property
    def headers(self) -> dict[str, str]:
        """W3C ``traceparent``, and ``tracestate`` if there is any."""
        headers = {"traceparent": f"00-{self.trace_id}-{self.span_id}-{int(self.is_sampled):02x}"}
        if self.tracestate:
            headers["tracestate"] = self.tracestate
        return headers

    @classmethod
    def from_headers(cls, traceparent: str | None, tracestate: str | None) -> SpanContext | None:
        """Return what W3C headers say; None where they say nothing that can be read."""
        found = _TRACEPARENT.fullmatch(traceparent or "")
        if found is None:
            return None
        trace_id, span_id, flags = found.groups()
        return cls(trace_id, span_id, bool(int(flags, 16) & _SAMPLED), tracestate)


@dataclass(frozen=True, slots=True)
class SpanEvent:
    """Something that happened at one moment of a span.

    Args:
        name: What it is.
        time: Nanoseconds since the epoch.
        attributes: Texts, numbers or truth values, as they are.
    """

    name: str
    time: int
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_exception(cls, error: BaseException) -> SpanEvent:
        """Return the event of an error, as MLflow has it."""
        try:
            message = str(error)
        except Exception:
            message = ""
        try:
            stacktrace = "".join(traceback.format_exception(error)).strip()
        except Exception:
            stacktrace = type(error).__name__
        attributes = {
            EXCEPTION_MESSAGE: message,
            EXCEPTION_TYPE: type(error).__name__,
            EXCEPTION_STACKTRACE: stacktrace,
        }
        return cls(EXCEPTION_EVENT, time.time_ns(), attributes)


class SpanLink(NamedTuple):
    """Another span that a span has to do with: ids in hexadecimal digits."""

    trace_id: str
    span_id: str


@dataclass(frozen=True, slots=True)
class SpanRecord:
    """One span, as it is stored. ``dataclasses.replace`` makes another one of it.

    Args:
        trace_id: 32 hexadecimal digits.
        span_id: 16 hexadecimal digits.
        parent_id: Those of the span above it; None for a root.
        name: Its name.
        start: Nanoseconds since the epoch.
        end: The same; None while it runs.
        attributes: Each value as a JSON text, as MLflow keeps them.
        status: ``UNSET``, ``OK`` or ``ERROR``.
        message: What is said of the status, if anything.
        events: What happened meanwhile, oldest first.
        links: Other spans.
        kind: OTLP's number of the kind of span; 0 where it is not told.
    """

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    start: int
    end: int | None
    attributes: Mapping[str, str]
    status: str = "UNSET"
    message: str | None = None
    events: tuple[SpanEvent, ...] = ()
    links: tuple[SpanLink, ...] = ()
    kind: int = 0

    @property
    def mlflow_trace_id(self) -> str:
        """MLflow's id of its trace."""
        return MLFLOW_PREFIX + self.trace_id

    @property
    def context(self) -> SpanContext:
        """What is known of it where others are put below it."""
        return SpanContext(self.trace_id, self.span_id)

    @property
    def seconds(self) -> float:
        """How long it took; 0 while it runs."""
        return 0.0 if self.end is None else (self.end - self.start) / 1e9

    @property
    def has_failed(self) -> bool:
        """Whether it has ended with an error."""
        return self.status == "ERROR"

    def get(self, name: str) -> Any:
        """Return the value of an attribute; None where it has none that can be read."""
        text = self.attributes.get(name)
        if text is None:
            return None
        try:
            return json.loads(text)
        except ValueError:
            return None


class OpenSpan:
    """A span that has not ended. Thread-safe; what comes after its end is left out.

    Args:
        name: Its name.
        span_type: MLflow's type of it, such as ``CHAT_MODEL``.
        parent: What it is below; None for the root of a trace of its own.
        attributes: What is known of it so far, each as a JSON text.
    """

    def __init__(
        self,
        name: str,
        span_type: str,
        parent: SpanContext | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> None:
        trace_id = new_trace_id() if parent is None else parent.trace_id
        self.context = SpanContext(
            trace_id, new_span_id(), tracestate=None if parent is None else parent.tracestate
        )
        self.parent_id = None if parent is None else parent.span_id
        self.name = name
        self.start = time.time_ns()
        self._lock = threading.Lock()
        self._end: int | None = None
        self._status = "UNSET"
        self._message: str | None = None
        self._events: list[SpanEvent] = []
        self._links: list[SpanLink] = []
        self._attributes: dict[str, str] = {
            SPAN_TYPE: dump(span_type),
            **(attributes or {}),
        }

    @property
    def mlflow_trace_id(self) -> str:
        """MLflow's id of its trace."""
        return MLFLOW_PREFIX + self.context.trace_id

    @property
    def is_open(self) -> bool:
        """Whether it has not ended."""
        return self._end is None

    def get(self, name: str) -> str | None:
        """Return an attribute's JSON text; None where it has none of that name."""
        return self._attributes.get(name)

    def set(self, **attributes: Any) -> None:
        """Set attributes whose names are Python's; see :meth:`update`."""
        self.update(attributes)

    def update(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes to values, which are kept as JSON."""
        self.update_json({name: dump(value) for name, value in attributes.items()})

    def update_json(self, attributes: Mapping[str, str]) -> None:
        """Set attributes to what is JSON already."""
        with self._lock:
            if self._end is None:
                self._attributes.update(attributes)

    def add_event(self, event: SpanEvent) -> None:
        """Add what happened."""
        with self._lock:
            if self._end is None:
                self._events.append(event)

    def add_link(self, link: SpanLink) -> None:
        """Add another span that it has to do with."""
        with self._lock:
            if self._end is None:
                self._links.append(link)

    def record_error(self, error: BaseException, *, message: str | None = None) -> None:
        """Add an error as an event, and make it the span's status."""
        self.add_event(SpanEvent.of_exception(error))
        self.fail(message)

    def fail(self, message: str | None = None) -> None:
        """Make its status an error."""
        with self._lock:
            if self._end is None:
                self._status, self._message = "ERROR", message
                # As MLflow does, lest it be hidden among what is of no interest.
                self._attributes[LOG_LEVEL] = str(ERROR)

    def snapshot(self) -> SpanRecord:
        """Return it as if it ended now, without a status."""
        with self._lock:
            return self._record(time.time_ns())

    def finish(self, *, end: int | None = None, level: int | None = None) -> SpanRecord | None:
        """End it; return None where it has ended before.

        Args:
            end: When, in nanoseconds since the epoch; by default now.
            level: Its log level, unless it has one.
        """
        with self._lock:
            if self._end is not None:
                return None
            self._end = end or time.time_ns()
            if self._status == "UNSET":
                self._status = "OK"
            if level is not None:
                self._attributes.setdefault(LOG_LEVEL, str(level))
            return self._record(self._end)

    def _record(self, end: int) -> SpanRecord:
        return SpanRecord(
            trace_id=self.context.trace_id,
            span_id=self.context.span_id,
            parent_id=self.parent_id,
            name=self.name,
            start=self.start,
            end=end,
            attributes=dict(self._attributes),
            status=self._status,
            message=self._message,
            events=tuple(self._events),
            links=tuple(self._links),
        )
