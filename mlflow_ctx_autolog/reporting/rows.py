"""Rows of tables: one for each call, one for each task attempt."""

from __future__ import annotations

from typing import Any

from mlflow_ctx_autolog.reporting.calls import Attempt
from mlflow_ctx_autolog.reporting.causes import Judged
from mlflow_ctx_autolog.spans.quality import answer_text

__all__ = ["call_row", "for_evaluation", "task_row"]


def task_row(attempt: Attempt) -> dict[str, Any]:
    """Return what a task attempt was, for JSON."""
    return {
        "trace_id": attempt.trace_id,
        "span_id": attempt.span_id,
        "function": attempt.function,
        "stage": attempt.stage,
        "partition": attempt.partition,
        "attempt": attempt.number,
        "host": attempt.host,
        "process": attempt.process,
        "outcome": attempt.outcome,
        "started": attempt.started,
        "ended": attempt.last_seen,
    }


def call_row(each: Judged) -> dict[str, Any]:
    """Return what a call was, for JSON; the user's keys as ``annotation.KEY``."""
    call, attempt = each.call, each.call.attempt
    return {
        "trace_id": call.trace_id,
        "span_id": call.span_id,
        "function": call.function,
        "interface": call.interface,
        "model": call.model,
        "stage": None if attempt is None else attempt.stage,
        "partition": None if attempt is None else attempt.partition,
        "attempt": None if attempt is None else attempt.number,
        "task": None if attempt is None else attempt.span_id,
        "experiment_id": call.experiment_id,
        "started": call.started,
        "seconds": call.seconds,
        "first_token": call.first_token,
        "input_tokens": call.usage.get("input_tokens"),
        "output_tokens": call.usage.get("output_tokens"),
        "tokens": call.tokens,
        "usage_unknown": call.usage_unknown,
        "cost": call.cost,
        "resends": call.resends,
        "reused_from": call.reused_from,
        "error": call.error if call.failed else None,
        "cause": None if each.cause is None else each.cause.key,
        "repeats": None if each.repeats is None else each.repeats.span_id,
        "signals": sorted(call.signals),
        "finish_reasons": list(call.finish_reasons),
        "answer_chars": call.chars,
        "shape": call.shape,
        "prompt": call.prompt,
        "answer": call.answer,
        **{f"annotation.{key}": value for key, value in call.annotations.items()},
    }


def for_evaluation(each: Judged, request: Any, answer: Any) -> dict[str, Any]:
    """Return a call as :func:`mlflow.genai.evaluate` takes it, and what else is known of it.

    ``inputs``, a dictionary, are the arguments of the call; ``outputs``, a text, what the answer
    says; ``response`` is the answer as it came; ``tags`` are the user's keys.
    """
    return {
        "request_id": each.call.span_id,
        "inputs": request if isinstance(request, dict) else {"input": request},
        "outputs": answer_text(answer) or None,
        "response": answer,
        "tags": {key: str(value) for key, value in each.call.annotations.items()},
        **call_row(each),
    }
