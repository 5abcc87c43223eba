"""The content of a report's calls, read anew from the store: a report itself does not keep it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from mlflow_ctx_autolog.reporting.calls import CONTENT
from mlflow_ctx_autolog.reporting.jobs import read_job

__all__ = ["read_contents"]


def read_contents(uri: str, trace_ids: Sequence[str]) -> Iterator[tuple[str, str, Any, Any]]:
    """Yield trace id, span id, request and answer of each span that has content.

    One trace of the store at a time is in memory.

    Args:
        uri: Where the traces are stored.
        trace_ids: Those of the jobs.

    Raises:
        StoreError: The store does not answer, or has no such trace.
    """
    inputs, outputs = CONTENT
    for trace_id in trace_ids:
        trace = read_job(uri, trace_id, CONTENT.__contains__, lambda _: None)
        for span in trace.spans:
            if inputs in span.attributes or outputs in span.attributes:
                yield span.trace_id, span.span_id, _value(span, inputs), _value(span, outputs)


def _value(span: Any, name: str) -> Any:
    text = span.attributes.get(name)
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text
