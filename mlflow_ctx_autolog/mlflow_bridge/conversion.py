"""MLflow's spans as records, and records as MLflow's spans. The one place that knows both."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import mlflow.tracing.utils as mlflow_utils
from mlflow.entities import LiveSpan
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, _Span
from opentelemetry.trace import Link, Status, StatusCode, TraceFlags
from opentelemetry.trace import SpanContext as OTelContext

from mlflow_ctx_autolog.spans.amounts import Amounts, parse_amounts
from mlflow_ctx_autolog.spans.attributes import MODEL, SPAN_TYPE, TRACE_ID, USAGE
from mlflow_ctx_autolog.spans.record import SpanContext, SpanEvent, SpanLink, SpanRecord
from mlflow_ctx_autolog.spans.values import dump

__all__ = [
    "by_genai_conventions",
    "context_of",
    "live_span",
    "otel_context",
    "price_of",
    "priced",
    "processed",
    "record_of",
]

_PROVIDER = "mlflow.llm.provider"


def record_of(span: ReadableSpan) -> SpanRecord:
    """Return a span of OpenTelemetry's SDK, as MLflow uses it, as a record."""
    context, parent = span.context, span.parent
    return SpanRecord(
        trace_id=f"{context.trace_id:032x}",
        span_id=f"{context.span_id:016x}",
        parent_id=None if parent is None else f"{parent.span_id:016x}",
        name=span.name,
        start=span.start_time or 0,
        end=span.end_time,
        attributes=_texts(span.attributes or {}),
        status=span.status.status_code.name,
        message=span.status.description or None,
        events=tuple(
            SpanEvent(event.name, event.timestamp, dict(event.attributes or {}))
            for event in span.events
        ),
        links=tuple(
            SpanLink(f"{link.context.trace_id:032x}", f"{link.context.span_id:016x}")
            for link in span.links
        ),
    )


def _texts(attributes: Mapping[str, Any]) -> dict[str, str]:
    return {name: _json(value) for name, value in attributes.items() if name != TRACE_ID}


def _json(value: Any) -> str:
    # What is set by OpenTelemetry's own interface is no JSON.
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            pass
        else:
            return value
    return dump(value)


def context_of(context: OTelContext) -> SpanContext:
    """Return what is known of a span where others are put below it."""
    return SpanContext(
        f"{context.trace_id:032x}",
        f"{context.span_id:016x}",
        bool(context.trace_flags & TraceFlags.SAMPLED),
        context.trace_state.to_header() or None,
    )


def otel_context(context: SpanContext, *, is_remote: bool = True) -> OTelContext:
    """Return the same as OpenTelemetry has it."""
    flags = TraceFlags(TraceFlags.SAMPLED if context.is_sampled else TraceFlags.DEFAULT)
    return OTelContext(int(context.trace_id, 16), int(context.span_id, 16), is_remote, flags)


def live_span(span: SpanRecord) -> LiveSpan:
    """Return a record as a span of MLflow's that is open."""
    context = SpanContext(span.trace_id, span.span_id)
    parent = None
    if span.parent_id is not None:
        parent = otel_context(SpanContext(span.trace_id, span.parent_id))
    inner = _Span(
        span.name,
        otel_context(context, is_remote=False),
        parent=parent,
        resource=Resource.get_empty(),
        attributes=dict(span.attributes),
        links=[Link(otel_context(SpanContext(*link))) for link in span.links],
        # Which nobody is told of.
        span_processor=SpanProcessor(),
    )
    inner.start(start_time=span.start)
    for event in span.events:
        inner.add_event(event.name, dict(event.attributes), event.time)
    if span.status != "UNSET":
        inner.set_status(Status(StatusCode[span.status], span.message))
    return LiveSpan(inner, span.mlflow_trace_id, span.get(SPAN_TYPE))


def processed(span: SpanRecord, processors: Iterable[Callable[[Any], None]]) -> SpanRecord:
    """Return a span as MLflow's span processors leave it. What they raise, this raises."""
    live = live_span(span)
    for processor in processors:
        processor(live)
    live._span.end(end_time=span.end)
    return record_of(live._span._readable_span())


def priced(span: SpanRecord) -> Amounts:
    """Return what a call cost, as the store would find it; empty where nobody knows."""
    # Not in older releases.
    calculate = getattr(mlflow_utils, "calculate_cost_by_model_and_token_usage", None)
    if calculate is None:
        return {}
    return parse_amounts(calculate(span.get(MODEL), span.get(USAGE), span.get(_PROVIDER)))


def price_of(model: str) -> tuple[float, float] | None:
    """Return US dollars for a million input and output tokens of a model, if MLflow knows."""
    calculate = getattr(mlflow_utils, "calculate_cost_by_model_and_token_usage", None)
    million = {"input_tokens": 1_000_000, "output_tokens": 1_000_000}
    cost = None if calculate is None else calculate(model, million)
    return None if not cost else (float(cost["input_cost"]), float(cost["output_cost"]))


def by_genai_conventions(span: SpanRecord) -> SpanRecord:
    """Return a span with the attributes of OpenTelemetry's conventions on generative AI."""
    from mlflow.tracing.export.genai_semconv.translator import translate_span_to_genai

    live = live_span(span)
    live._span.end(end_time=span.end)
    translated = translate_span_to_genai(live._span._readable_span())
    attributes = {name: dump(value) for name, value in (translated.attributes or {}).items()}
    # OTLP counts kinds from one on, as it has one for those that are not told.
    kind = translated.kind.value + 1
    return replace(record_of(translated), attributes=attributes, kind=kind)
