"""What jobs came to over time, without reading a span."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import TraceInfo, TraceLocation, TraceState
from mlflow.tracing.client import TracingClient

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.cli import main
from mlflow_ctx_autolog.delivery.spool import Destination
from mlflow_ctx_autolog.exceptions import StoreError
from mlflow_ctx_autolog.spans.call_sums import CallSums

HOUR = 3_600_000
SCRIPT = "</script><script>alert(1)</script>\x1b[31m"


def sums(**more: Any) -> str:
    found = CallSums()
    for number in range(100):
        attributes = {"llm.answer.chars": 9}
        if number < 5:
            attributes["gen_ai.response.finish_reasons"] = ["length"]
        found.add(attributes, 1.0 + (number >= 90), failed=number < 2)
    return json.dumps({**found.to_dict(), "rows": 50, "tasks": 4, **more})


def store(database: Destination, number: int, *, hours: float, name: str = "nightly", **more: Any):
    trace_id = f"tr-{number:032x}"
    metadata = {
        "mlflow_ctx_autolog.trace_id": trace_id,
        "mlflow_ctx_autolog.call_sums": sums(),
        "mlflow.trace.tokenUsage": json.dumps({"input_tokens": 900, "output_tokens": 100}),
        "mlflow.trace.cost": json.dumps({"total_cost": 0.5 * number}),
        **more,
    }
    info = TraceInfo(
        trace_id=trace_id,
        trace_location=TraceLocation.from_experiment_id("0"),
        request_time=int(time.time() * 1000 - hours * HOUR),
        execution_duration=60_000,
        state=TraceState.OK,
        trace_metadata={key: value for key, value in metadata.items() if value is not None},
        tags={"mlflow.traceName": name},
    )
    TracingClient(database.tracking_uri).store.start_trace(info)
    return trace_id


@pytest.fixture
def jobs(database: Destination) -> Destination:
    """Three jobs, one of them older than a day; a linked trace, and one of other origin."""
    first = store(database, 1, hours=30)
    store(database, 2, hours=20)
    store(database, 3, hours=10, name=f"weekly {SCRIPT}")
    linked = {"mlflow_ctx_autolog.trace_id": first, "mlflow_ctx_autolog.call_sums": None}
    store(database, 4, hours=5, **linked)
    store(database, 5, hours=5, **{"mlflow_ctx_autolog.trace_id": None})
    return database


def test_one_line_a_job(jobs: Destination) -> None:
    """The earliest first, with what its driver has written; nothing else counts as a job."""
    found = ctx_autolog.history()

    assert [job.cost for job in found.jobs] == [0.5, 1.0, 1.5]
    job = found.jobs[0]
    assert (job.calls, job.errors, job.rows, job.tokens_per_row) == (100, 2, 50, 20.0)
    assert job.p50 == pytest.approx(1.0, rel=0.023)
    assert job.p95 == pytest.approx(2.0, rel=0.023)
    assert (job.answered, job.odd, job.signals) == (100, 5, {"cut_off": 5})
    assert repr(found) == "<History of experiment 0: 3 jobs>"
    assert str(found).startswith("3 jobs, 300 calls, $3.00.")
    assert len(ctx_autolog.history(days=1).jobs) == 2
    assert len(ctx_autolog.history("Default", name="nightly").jobs) == 2
    assert list(found.to_pandas()["cost"]) == [0.5, 1.0, 1.5]


def test_nothing_from_outside_is_obeyed(jobs: Destination, tmp_path: Path) -> None:
    """A job's name is a text, in a terminal, a notebook and on the page."""
    found = ctx_autolog.history()

    assert "\x1b" not in str(found)
    assert "<script>alert" not in found._repr_html_()
    page = found.to_html(tmp_path / "history.html")
    assert page.stat().st_mode & 0o777 == 0o600
    assert "<script>alert" not in page.read_text(encoding="utf-8")


def test_what_is_not_known_is_left_out_and_said_once(database: Destination) -> None:
    """Of tasks that brought no sums home, of jobs without any, and of what is no JSON."""
    store(database, 1, hours=1, **{"mlflow_ctx_autolog.call_sums": None})
    store(database, 2, hours=1, **{"mlflow_ctx_autolog.call_sums": "{"})
    partly = json.dumps({"calls": 7, "tasks": 2, "tasks_without_sums": 2})
    store(database, 3, hours=1, **{"mlflow_ctx_autolog.call_sums": partly})
    found = ctx_autolog.history()

    assert [(job.calls, job.p95, job.errors) for job in found.jobs][-1] == (7, None, None)
    assert [note.partition(" ")[0] for note in found.notes] == ["1", "Of"]
    assert str(found).count("that brought no receipt home") == 1


def test_numbers_are_metrics_of_a_run(jobs: Destination) -> None:
    """On request, so that MLflow's comparison of runs shows them."""
    with pytest.raises(RuntimeError, match="No MLflow run is active"):
        ctx_autolog.history(log_metrics=True)
    with mlflow.start_run() as run:
        ctx_autolog.history(log_metrics=True, name="nightly")
    metrics = mlflow.get_run(run.info.run_id).data.metrics

    assert metrics["ctx_autolog.cost"] == 1.0
    assert metrics["ctx_autolog.signals.cut_off"] == 0.05
    assert metrics["ctx_autolog.tokens_per_row"] == 20.0
    with mlflow.start_run(), pytest.raises(RuntimeError, match="no job whose numbers"):
        ctx_autolog.history(log_metrics=True, name="other")


def test_command(jobs: Destination, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The table, JSON, a page; and what is wrong, with status 2."""
    page = tmp_path / "history.html"
    assert main(["history", "Default", "--days", "2", "--html", str(page)]) == 0
    assert "nightly" in capsys.readouterr().out
    assert page.exists()
    assert main(["history", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["jobs"]) == 3
    assert main(["history", "nowhere"]) == 2
    assert "there is no experiment 'nowhere'" in capsys.readouterr().err
    assert main(["history", "--days", "0"]) == 2
    assert "days=0.0 is out of range" in capsys.readouterr().err


def test_command_that_compares(
    jobs: Destination, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It says what cannot be compared, and what is no condition, before it reads."""
    assert main(["compare", "tr-0", "tr-1"]) == 2
    assert "there is no trace tr-0" in capsys.readouterr().err
    assert main(["compare", "--fail-if", "cots>1%"]) == 2
    assert "is no condition" in capsys.readouterr().err
    assert main(["compare", "tr-0"]) == 2
    assert "name both jobs" in capsys.readouterr().err


def test_unknown_experiment(database: Destination) -> None:
    with pytest.raises(StoreError, match="there is no experiment 'nowhere' in sqlite"):
        ctx_autolog.history("nowhere")
    with pytest.raises(ValueError, match="days=-1 is out of range"):
        ctx_autolog.history(days=-1)
