"""What MLflow's spans say, and what it keeps of a trace besides them."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import mlflow.tracing.utils as mlflow_utils
from mlflow.entities import LiveSpan, Span, SpanType, TraceInfo, TraceLocation, TraceState
from mlflow.entities.span_status import SpanStatusCode
from mlflow.tracing.trace_manager import InMemoryTraceManager
from mlflow.tracing.utils import aggregate_usage_from_spans

from mlflow_ctx_autolog.spans.amounts import Amounts, parse_amounts
from mlflow_ctx_autolog.spans.attributes import FINGERPRINT, OUTCOME
from mlflow_ctx_autolog.spans.trace_update import LINKED_PROMPTS, joined_prompts
from mlflow_ctx_autolog.spans.usage import usage_of_answer

__all__ = [
    "USAGE_OF_TRACE",
    "end_info",
    "has_failed",
    "info_of_json",
    "info_of_trace",
    "is_client_call",
    "is_in_progress",
    "is_task",
    "list_price",
    "own_words",
    "record_no_totals",
    "record_totals",
    "record_unknown_totals",
    "record_update",
    "record_usage",
    "said",
    "said_fields",
    "totals_of",
    "with_attributes",
]

# Not in all releases, which then know of no cost.
_sum_of_costs = getattr(mlflow_utils, "aggregate_cost_from_spans", None)

TASK_TYPE = "TASK"

# By MLflow's names; not all releases have constants for them.
_USAGE_OF_SPAN, _COST_OF_SPAN = "mlflow.chat.tokenUsage", "mlflow.llm.cost"
USAGE_OF_TRACE, _COST_OF_TRACE = "mlflow.trace.tokenUsage", "mlflow.trace.cost"
_TOKENS = ("input_tokens", "output_tokens", "total_tokens")


def is_task(span: Span) -> bool:
    """Whether a span is that of a task attempt."""
    return span.span_type == TASK_TYPE and span.get_attribute(OUTCOME) is not None


def is_client_call(span: Span) -> bool:
    """Whether a span is that of a call of the OpenAI client."""
    return span.get_attribute(FINGERPRINT) is not None


def has_failed(span: Span) -> bool:
    """Whether a span has ended with an error."""
    return bool(span.status.status_code == SpanStatusCode.ERROR)


def record_usage(span: LiveSpan, usage: Any) -> None:
    """Write the tokens that the server has counted, unless MLflow has written the same.

    A null among them keeps MLflow from storing the trace.

    Args:
        span: The span of a call.
        usage: The ``usage`` of the client's reply, by the names of any of its APIs; or None.
    """
    if usage is None:
        return
    has_output = span.span_type != SpanType.EMBEDDING
    counts = usage_of_answer(usage.model_dump(warnings=False), has_output=has_output)
    told = span.get_attribute(_USAGE_OF_SPAN)
    more = {name: n for name, n in parse_amounts(told).items() if name not in _TOKENS}
    if (found := {**more, **counts}) != (told or {}):
        span.set_attribute(_USAGE_OF_SPAN, found)


@functools.lru_cache(maxsize=256)
def list_price(model: str) -> tuple[float, float] | None:
    """Return US dollars for a million input and output tokens of a model, if MLflow knows."""
    calculate = getattr(mlflow_utils, "calculate_cost_by_model_and_token_usage", None)
    million = {"input_tokens": 1_000_000, "output_tokens": 1_000_000}
    cost = None if calculate is None else calculate(model, million)
    return None if not cost else (float(cost["input_cost"]), float(cost["output_cost"]))


def totals_of(spans: Sequence[Span]) -> tuple[Amounts, Amounts]:
    """Return token usage and cost of the spans of one tree, as MLflow adds them up."""
    return (
        parse_amounts(aggregate_usage_from_spans(list(spans))),
        {} if _sum_of_costs is None else parse_amounts(_sum_of_costs(list(spans))),
    )


def record_totals(info: TraceInfo, usage: Amounts, cost: Amounts) -> None:
    """Write the token usage and the cost of a whole trace where MLflow keeps them."""
    if usage:
        info.trace_metadata[USAGE_OF_TRACE] = json.dumps(usage)
    if cost:
        info.trace_metadata[_COST_OF_TRACE] = json.dumps(cost)


def record_no_totals(info: TraceInfo) -> None:
    """Write that a trace has come to nothing yet.

    Else the store would add up all its spans anew with each that comes. Of the cost it is just a
    part, lest a price be shown where none is known.
    """
    record_totals(info, dict.fromkeys(_TOKENS, 0), {"input_cost": 0.0})


def record_unknown_totals(info: TraceInfo, usage: Amounts, cost: Amounts) -> None:
    """Take back that a trace has come to nothing yet, of what is not known when it is over.

    A store keeps what it was told, unless it is told otherwise.
    """
    if not usage:
        info.trace_metadata[USAGE_OF_TRACE] = json.dumps(dict.fromkeys(_TOKENS))
    if not cost:
        info.trace_metadata[_COST_OF_TRACE] = json.dumps({"input_cost": None})


def said_fields(trace_id: str) -> frozenset[str]:
    """Return which fields of an open trace of this process the user has set, by their names."""
    with InMemoryTraceManager.get_instance().get_trace(trace_id) as trace:
        if trace is None:
            return frozenset()
        names = ("client_request_id", "request_preview", "response_preview")
        found = {name for name in names if getattr(trace.info, name) is not None}
        if trace.info.state != TraceState.IN_PROGRESS:
            # Before MLflow has written one itself, as the root ends.
            found.add("state")
        return frozenset(found)


def own_words(info: TraceInfo, fields: Iterable[str] = ()) -> frozenset[str]:
    """Return what was said of a trace on the driver, by the names of an update.

    Args:
        info: What is known of it there, without what tasks say.
        fields: Those of its fields that the user has set; MLflow fills in the others.
    """
    tags = (f"tags.{name}" for name in info.tags)
    metadata = (f"trace_metadata.{name}" for name in info.trace_metadata)
    failed = ["state"] if info.state == TraceState.ERROR else []
    return frozenset([*tags, *metadata, *fields, *failed])


def said(info: TraceInfo, name: str) -> str:
    """Return what is known of a trace by the name of an update."""
    kind, _, key = name.partition(".")
    found = getattr(info, kind)
    found = found.get(key) if key else found
    return str(getattr(found, "value", found))


def record_update(info: TraceInfo, update: Mapping[str, str], own: Collection[str]) -> None:
    """Write what tasks say of a trace, where nothing else was said of it on the driver.

    Args:
        info: What is known of it.
        update: What they say, see :mod:`~mlflow_ctx_autolog.spans.trace_update`.
        own: What was said on the driver, by the names of an update.
    """
    for name, value in update.items():
        kind, _, key = name.partition(".")
        if name == LINKED_PROMPTS:
            info.tags[key] = joined_prompts(info.tags.get(key), value)
        elif name in own:
            continue
        elif key:
            getattr(info, kind)[key] = value
        else:
            setattr(info, kind, TraceState(value) if kind == "state" else value)


def info_of_trace(
    trace_id: str, experiment_id: str, began: int, metadata: dict[str, str], tags: dict[str, str]
) -> TraceInfo:
    """Return the info of a trace that this process did not make.

    Args:
        trace_id: MLflow's id of it.
        experiment_id: Where it is kept.
        began: Nanoseconds since the epoch.
        metadata: What is fixed of it.
        tags: What may be changed.
    """
    return TraceInfo(
        trace_id=trace_id,
        trace_location=TraceLocation.from_experiment_id(experiment_id),
        request_time=began // 1_000_000,
        state=TraceState.OK,
        trace_metadata=metadata,
        tags=tags,
    )


def info_of_json(text: bytes) -> TraceInfo:
    """Return the info of a trace as :func:`json.dumps` has written it."""
    return TraceInfo.from_dict(json.loads(text))


def is_in_progress(info: TraceInfo) -> bool:
    """Whether nobody has ended a trace yet."""
    return bool(info.state == TraceState.IN_PROGRESS)


def end_info(info: TraceInfo, began: int, ended: int, *, failed: bool = False) -> None:
    """Write how long a trace took, from times in nanoseconds since the epoch."""
    info.execution_duration = max(0, ended - began) // 1_000_000
    info.state = TraceState.ERROR if failed else TraceState.OK


def with_attributes(span: Span, attributes: Mapping[str, Any]) -> Span:
    """Return a span with further attributes."""
    changed = copy.copy(span._span)
    said = {name: json.dumps(value) for name, value in attributes.items()}
    changed._attributes = {**(changed._attributes or {}), **said}
    return Span(changed)
