"""What MLflow keeps of a trace besides its spans, as the JSON that its server takes."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from typing import Any

from mlflow_ctx_autolog.spans.trace_update import fields_of
from mlflow_ctx_autolog.spans.values import storable

__all__ = ["trace_document", "without_totals"]


def trace_document(
    trace_id: str,
    experiment_id: str,
    *,
    began: int,
    ended: int | None = None,
    state: str = "IN_PROGRESS",
    metadata: Mapping[str, str],
    tags: Mapping[str, str] | None = None,
    preview: str | None = None,
    update: Mapping[str, str] | None = None,
) -> bytes:
    """Return what ``json.dumps(TraceInfo.to_dict())`` of MLflow is for a trace.

    Args:
        trace_id: MLflow's id of it.
        experiment_id: Where it is kept.
        began: Nanoseconds since the epoch.
        ended: The same; None while it runs.
        state: ``OK``, ``ERROR`` or ``IN_PROGRESS``.
        metadata: What is fixed of it.
        tags: What may be changed.
        preview: What is shown of its request.
        update: What a task has said of it, which holds where nothing else here says otherwise; see
            :mod:`~mlflow_ctx_autolog.spans.trace_update`.
    """
    said = fields_of(update or {})
    moment = datetime.datetime.fromtimestamp(began // 1_000_000 / 1000, datetime.timezone.utc)
    document: dict[str, Any] = {
        **said,
        "trace_id": trace_id,
        "trace_location": {
            "type": "MLFLOW_EXPERIMENT",
            "mlflow_experiment": {"experiment_id": experiment_id},
        },
        "request_time": f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z",
        "state": said.get("state", state) if state == "OK" else state,
        "trace_metadata": {**said["trace_metadata"], **metadata},
        "tags": {**said["tags"], **(tags or {})},
    }
    if preview is not None:
        document["request_preview"] = preview
    if ended is not None:
        document["execution_duration_ms"] = (ended - began) // 1_000_000
    return storable(json.dumps(document)).encode()


def without_totals() -> dict[str, str]:
    """Return the metadata of a trace that has come to nothing yet.

    Else the store would add up all its spans anew with each that comes. Of the cost it is just a
    part, lest a price be shown where none is known.
    """
    tokens = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    return {
        "mlflow.trace.tokenUsage": json.dumps(tokens),
        "mlflow.trace.cost": json.dumps({"input_cost": 0.0}),
    }
