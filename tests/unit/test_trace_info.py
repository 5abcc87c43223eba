"""What is known of a trace, as MLflow's server takes it."""

from __future__ import annotations

import json

from mlflow.entities import TraceInfo, TraceLocation, TraceState

from mlflow_ctx_autolog.spans.trace_info import trace_document, without_totals


def test_the_document_is_mlflows() -> None:
    """It is what MLflow writes of the same trace, and reads as one."""
    document = json.loads(
        trace_document(
            "tr-1",
            "7",
            began=1_700_000_000_123_456_789,
            ended=1_700_000_001_623_456_789,
            state="OK",
            metadata={"a": "b", **without_totals()},
            tags={"mlflow.traceName": "work"},
            preview="Further calls",
        )
    )
    info = TraceInfo(
        trace_id="tr-1",
        trace_location=TraceLocation.from_experiment_id("7"),
        request_time=1_700_000_000_123,
        execution_duration=1500,
        state=TraceState.OK,
        request_preview="Further calls",
        trace_metadata={"a": "b", **without_totals()},
        tags={"mlflow.traceName": "work"},
    )
    assert TraceInfo.from_dict(document).to_dict() == info.to_dict()


def test_a_trace_that_runs_has_no_duration() -> None:
    """Its state says that it is in progress."""
    info = TraceInfo.from_dict(json.loads(trace_document("tr-1", "7", began=10**18, metadata={})))
    assert (info.state, info.execution_duration) == (TraceState.IN_PROGRESS, None)
