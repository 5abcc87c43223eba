"""A trace as a store has it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "ANY_FUNCTION",
    "DRIVER",
    "JOB_TAG",
    "LINKED_SPAN",
    "LINKED_TRACE",
    "RECEIPT",
    "SPARK_FACTS",
    "TRACE_KEY",
    "StoredSpan",
    "StoredTrace",
    "joined_metadata",
    "split_metadata",
]

# Metadata of a trace by which its spans, and those of traces linked to it, can be counted without
# reading them: the driver's trace's id.
TRACE_KEY = "mlflow_ctx_autolog.trace_id"
# The same as a tag of linked traces, by which users find them.
JOB_TAG = "mlflow_ctx_autolog.job_trace"
# Attributes by which a task's span and the root of its linked trace name each other.
LINKED_TRACE, LINKED_SPAN = "linked.trace.id", "linked.span.id"

# Metadata of a trace: host and process id of its driver, which alone ends it while it lives.
DRIVER = "mlflow_ctx_autolog.driver"
# Metadata of a trace: what the driver knew of its spans when it last asked the store, as JSON:
# the numbers of ``Receipt.summary()``.
RECEIPT = "mlflow_ctx_autolog.receipt"

# Metadata of a trace: what the driver has learnt from Spark of its jobs, as JSON.
SPARK_FACTS = "mlflow_ctx_autolog.spark"
# Stands in its plans for whichever functions nodes run, where Spark does not name them.
ANY_FUNCTION = "*"

# Characters of a piece of metadata that come through MLflow's REST API: it cuts off the rest, of
# what is written and of what is read.
_PIECE = 250
_PIECES = re.compile(r"(\d+)\|")


def split_metadata(key: str, text: str) -> dict[str, str]:
    """Return metadata of a trace that holds a text of any length, in as many pieces as it takes."""
    if len(text) <= _PIECE and not _PIECES.match(text):
        return {key: text}
    # With how many there are, since those of an earlier, longer text may still be there.
    room = _PIECE - len("999|")
    pieces = [text[start : start + room] for start in range(0, len(text), room)]
    first = {key: f"{len(pieces)}|{pieces[0]}"}
    return first | {f"{key}.{place}": each for place, each in enumerate(pieces[1:], 1)}


def joined_metadata(metadata: Mapping[str, str], key: str) -> str | None:
    """Return the text that :func:`split_metadata` has split; None where a piece is missing."""
    text = metadata.get(key)
    if text is None or (found := _PIECES.match(text)) is None:
        return text
    more = [metadata.get(f"{key}.{place}") for place in range(1, int(found[1]))]
    known = [piece for piece in more if piece is not None]
    return text[found.end() :] + "".join(known) if len(known) == len(more) else None


@dataclass(slots=True)
class StoredSpan:
    """What is needed of a span, as the store has it.

    Args:
        trace_id: MLflow's id of the trace that it is in.
        span_id: Its id.
        parent_id: That of the span above it; None for the root.
        name: Its name.
        kind: MLflow's span type, such as ``CHAT_MODEL``.
        started: Nanoseconds since the epoch.
        ended: The same; None while it runs.
        status: ``OK``, ``ERROR`` or ``UNSET``.
        attributes: The wanted ones, with values as JSON text.
        error: Type and message of an exception that ended it.
        first_chunk: When a stream's first piece came, in nanoseconds since the epoch.
    """

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    kind: str
    started: int
    ended: int | None
    status: str
    attributes: Mapping[str, str]
    error: str | None = None
    first_chunk: int | None = None

    def get(self, name: str) -> Any:
        """Return the value of an attribute; None where it has none that can be read."""
        text = self.attributes.get(name)
        if text is None:
            return None
        try:
            return json.loads(text)
        except ValueError:
            return text

    def number(self, name: str) -> int | None:
        """Return the whole number that an attribute holds, also as a text; None for all else."""
        try:
            return int(self.get(name))
        except (TypeError, ValueError):
            return None

    def text(self, name: str) -> str | None:
        """Return an attribute as a text; None where there is none."""
        value = self.get(name)
        return None if value is None else str(value)


@dataclass(slots=True)
class StoredTrace:
    """A trace as the store has it.

    Args:
        trace_id: MLflow's id.
        experiment_id: Of the experiment that it is kept in.
        state: ``OK``, ``ERROR`` or ``IN_PROGRESS``.
        metadata: What MLflow and the driver say of it.
        spans: In any order.
    """

    trace_id: str
    experiment_id: str
    state: str
    metadata: Mapping[str, str]
    spans: Iterable[StoredSpan]
