"""What a run of the job left in the tracking store."""

from __future__ import annotations

from dataclasses import dataclass

import mlflow
from mlflow.entities import Span, SpanType, Trace


@dataclass(frozen=True)
class Outcome:
    """One run of the job, as the tracking server knows it afterwards."""

    title: str
    calls: int
    """Calls made to the model."""
    traces: int
    call_spans: int
    """Call spans stored, in whatever trace."""
    call_spans_under_driver: int
    tokens: int
    """Tokens shown on the driver's trace."""
    tokens_billed: int | None
    """Tokens the endpoint counted; None when it is not ours to ask."""
    seconds: float
    experiment_id: str
    trace: Trace | None
    """The driver's trace."""
    rows: list[tuple[str, str, str, str]]
    """What the job returned: name, who, may, terms."""


def read_outcome(
    title: str,
    experiment_id: str,
    trace_id: str,
    calls: int,
    tokens_billed: int | None,
    seconds: float,
    rows: list[tuple[str, str, str, str]],
) -> Outcome:
    """Read an experiment back from the tracking server; ``trace_id`` is the driver's trace."""
    mlflow.flush_trace_async_logging()
    traces = mlflow.search_traces(locations=[experiment_id], return_type="list")
    trace = next((trace for trace in traces if trace.info.trace_id == trace_id), None)
    usage = (trace.info.token_usage if trace else None) or {}
    return Outcome(
        title=title,
        calls=calls,
        traces=len(traces),
        call_spans=sum(len(call_spans(trace)) for trace in traces),
        call_spans_under_driver=len(call_spans(trace)) if trace else 0,
        tokens=usage.get("total_tokens", 0),
        tokens_billed=tokens_billed,
        seconds=seconds,
        experiment_id=experiment_id,
        trace=trace,
        rows=rows,
    )


def call_spans(trace: Trace) -> list[Span]:
    """Return the spans of calls to a chat model."""
    return [span for span in trace.data.spans if span.span_type == SpanType.CHAT_MODEL]
