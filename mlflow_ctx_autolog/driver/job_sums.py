"""What the driver writes with a trace for a history of jobs, which reads no spans."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mlflow_ctx_autolog.delivery.receipts import TaskReceipt
from mlflow_ctx_autolog.driver.mlflow_traces import has_failed, is_client_call
from mlflow_ctx_autolog.prices import is_unknown
from mlflow_ctx_autolog.spans.amounts import parse_amounts
from mlflow_ctx_autolog.spans.attributes import USAGE, USAGE_UNKNOWN
from mlflow_ctx_autolog.spans.call_sums import CALL_SUMS, SUMMED, CallSums
from mlflow_ctx_autolog.stores.stored_trace import split_metadata

__all__ = ["job_sums", "sums_of"]

# Characters at most: of jobs whose calls are as unlike as can be, it is less.
_LONGEST = 8000


def job_sums(own: CallSums, tasks: Sequence[TaskReceipt]) -> dict[str, str]:
    """Return metadata of a trace with the sums over all its calls; none where there are none.

    Args:
        own: Those of the driver's own calls.
        tasks: What its task attempts have told.
    """
    sums = CallSums()
    sums.merge(own)
    for task in tasks:
        sums.merge(CallSums.from_dict(task.sums))
    # Of some, such as all on Spark Connect, there is no more than what their spans say.
    silent = [task for task in tasks if task.calls and not task.sums]
    sums.calls += sum(task.calls for task in silent)
    numbers = {
        "tasks": len(tasks),
        "tasks_without_sums": len(silent),
        "rows": sum(task.rows for task in tasks),
    }
    summary = {**sums.to_dict(), **{name: number for name, number in numbers.items() if number}}
    text = json.dumps(summary, separators=(",", ":"))
    return split_metadata(CALL_SUMS, text) if summary and len(text) <= _LONGEST else {}


def sums_of(spans: Sequence[Any]) -> CallSums:
    """Return what the model calls among the driver's own spans come to."""
    sums = CallSums()
    for span in spans:
        if is_client_call(span) and span.end_time_ns is not None:
            attributes = {name: span.get_attribute(name) for name in SUMMED}
            failed, usage = has_failed(span), parse_amounts(span.get_attribute(USAGE))
            said = attributes[USAGE_UNKNOWN]
            attributes[USAGE_UNKNOWN] = is_unknown(said, usage, failed=failed)
            seconds = (span.end_time_ns - span.start_time_ns) / 1e9
            sums.add(attributes, seconds, failed=failed)
    return sums
