"""What a report says of traces made for the purpose, good and bad."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import mlflow
import pytest

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog import CallReport
from mlflow_ctx_autolog import report as report_function
from mlflow_ctx_autolog.cli import main
from mlflow_ctx_autolog.delivery.spool import Destination
from mlflow_ctx_autolog.exceptions import StoreError
from mlflow_ctx_autolog.stores import reading
from mlflow_ctx_autolog.stores.stored_trace import StoredSpan, StoredTrace

SECOND = 1_000_000_000
SCRIPT = "</script><script>alert(1)</script>"


def span(span_id: str, parent: str | None, kind: str, start: float, end: float, **more: Any) -> Any:
    attributes = {name: json.dumps(value) for name, value in more.pop("attributes", {}).items()}
    status = more.pop("status", "OK")
    times = int(start * SECOND), int(end * SECOND)
    return StoredSpan(
        "tr-1", span_id, parent, more.pop("name", "x"), kind, *times, status, attributes, **more
    )


def task(span_id: str, **attributes: Any) -> Any:
    facts = {
        "spark.task.outcome": "completed",
        "spark.application.id": "app-1",
        "spark.sql.execution.id": "0",
        "spark.stage.id": 0,
        "spark.partition.id": 0,
        "spark.task.attempt_number": 0,
        "spark.task.attempt_id": 0,
        "spark.handover.id": "one",
        "host.name": "worker",
        **attributes,
    }
    return span(span_id, "root", "TASK", 1, 9, name="extract", attributes=facts)


def call(span_id: str, parent: str, start: float, seconds: float = 1, **attributes: Any) -> Any:
    facts = {
        "model": "gpt-test",
        "llm.request.fingerprint": span_id,
        "mlflow.chat.tokenUsage": {"input_tokens": 100, "output_tokens": 10, "total_tokens": 110},
        "mlflow.spanInputs": {"messages": [{"role": "user", "content": f"of {span_id} {SCRIPT}"}]},
        **attributes,
    }
    return span(span_id, parent, "CHAT_MODEL", start, start + seconds, attributes=facts)


def reported(
    monkeypatch: pytest.MonkeyPatch, spans: list[Any], state: str = "OK", **arguments: Any
) -> CallReport:
    root = span("root", None, "UNKNOWN", arguments.pop("opened", 0), 10)
    trace = StoredTrace("tr-1", "7", state, arguments.pop("metadata", {}), [root, *spans])
    monkeypatch.setattr(reading, "read_stored_trace", lambda *_: trace)
    return report_function("tr-1", tracking_uri="http://mlflow", **arguments)


def test_what_was_repeated_and_what_it_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Useful and repeated calls add up, at the price the user gives, and each cause has its fix."""
    spans = [task("t"), call("a", "t", 1), call("b", "t", 2, **{"llm.request.fingerprint": "a"})]
    found = reported(monkeypatch, spans, prices={"gpt-test": (2.0, 10.0)})

    assert (len(found.calls), found.distinct, found.multiplier) == (2, 1, 2.0)
    assert found.useful.cost == found.repeated.cost == pytest.approx(0.0003)
    (cause,) = found.to_dict()["causes"].values()
    assert (cause["name"], cause["calls"]) == ("duplicate row", 1)
    assert "dropDuplicates()" in cause["fix"]
    assert "2 calls made for 1 distinct requests: 2.00 for each." in str(found)
    assert found.notes == []


def test_recorded_cost_goes_before_the_price_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """What MLflow has recorded is the cost; the table is for what has none."""
    spans = [task("t"), call("a", "t", 1, **{"mlflow.llm.cost": {"total_cost": 0.5}})]
    found = reported(monkeypatch, spans, prices={"gpt-test": (2.0, 10.0)})

    assert found.made.cost == 0.5


def test_no_price_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a price there is no cost, and the report says how to give one."""
    found = reported(monkeypatch, [task("t"), call("a", "t", 1)])

    assert found.made.money == "-"
    assert found.to_dict()["made"]["cost"] is None
    assert "No price is known of 1 calls to gpt-test" in found.notes[0]


def test_clients_own_retries_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the client has sent again within one call is a cause of its own."""
    spans = [task("t"), call("a", "t", 1, **{"http.request.resend_count": 2})]
    found = reported(monkeypatch, spans)

    assert {cause.key: sums.requests for cause, sums in found.by_cause().items()} == {
        "client_retry": 2
    }


def test_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Percentiles, the first token of streams, and how many calls were under way at a time."""
    spans = [task("t"), *(call(f"c{n}", "t", 1, n / 10) for n in range(1, 21))]
    spans.append(call("s", "t", 1, 1, **{"gen_ai.response.time_to_first_chunk": 0.25}))
    found = reported(monkeypatch, spans)

    assert found.latency() == {"p50": 1.0, "p95": 1.9, "p99": 2.0}
    assert found.time_to_first_token() == {"p50": 0.25, "p95": 0.25, "p99": 0.25}
    moments = found.concurrency()
    assert moments[0] == (0.0, 21.0)
    width = moments[1][0] - moments[0][0]
    assert sum(number * width for _, number in moments) == pytest.approx(22, rel=0.01)


def test_bad_traces_are_reported_on_as_far_as_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running, killed, half-written, skewed: each is said, and what is there is counted."""
    spans = [
        task("t", **{"llm.calls": 3}),
        task("k", **{"spark.task.outcome": "running", "spark.task.attempt_id": 1}),
        call("a", "t", 1),
        call("lost", "nobody", 2),
        call("nameless", "t", 3, **{"llm.request.fingerprint": None, "mlflow.spanInputs": None}),
    ]
    del spans[-1].attributes["llm.request.fingerprint"], spans[-1].attributes["mlflow.spanInputs"]
    notes = "\n".join(reported(monkeypatch, spans, opened=2).notes)

    assert "1 task attempts of trace tr-1 were killed" in notes
    assert "The store lacks 1 calls" in notes
    assert "1 calls of trace tr-1 are below spans that the store does not have" in notes
    assert "1 calls say nothing to recognise" in notes
    assert "The clock of worker is at least 1.000 s behind" in notes
    running = reported(monkeypatch, [task("t")], state="IN_PROGRESS")
    assert "is still running" in running.notes[0]
    assert "has no model calls" in running.notes[1]
    assert str(running).startswith("No model calls.")


def test_library_around_the_client_is_no_second_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat model's span of another library, with the client's below it, is one call."""
    outer = span("outer", "t", "CHAT_MODEL", 1, 3, name="ChatOpenAI")
    found = reported(monkeypatch, [task("t"), outer, call("a", "outer", 1)])

    assert [each.call.span_id for each in found.calls] == ["a"]
    assert found.calls[0].call.function == "extract"


def test_page_is_private_and_escapes_prompts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The file has mode 0600, loads nothing, and a prompt that holds a script stays text."""
    key = {"annotation.doc_id": SCRIPT}
    failed = call("b", "t", 3)
    failed.status, failed.error = "ERROR", f"Error: {SCRIPT}"
    found = reported(monkeypatch, [task("t"), call("a", "t", 1, **key), failed])
    path = found.to_html(tmp_path / "report.html")

    text = path.read_text(encoding="utf-8")
    assert path.stat().st_mode & 0o777 == 0o600
    assert "<script>alert" not in text
    assert r"\u003cscript\u003ealert(1)" in text
    assert '<script src="' not in text
    assert "<script>alert" not in found._repr_html_()


def test_rows_for_pandas_and_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each call, with the user's keys, by which a report is narrowed."""
    spans = [task("t"), *(call(f"{n}", "t", n, **{"annotation.doc_id": n}) for n in range(1, 4))]
    found = reported(monkeypatch, spans)

    rows = found.to_pandas()
    assert list(rows["annotation.doc_id"]) == [1, 2, 3]
    assert [each.call.span_id for each in found.filter(doc_id=2).calls] == ["2"]
    assert found.filter(doc_id=9).calls == []


def test_users_request_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """By an annotation, calls with other prompts are the same request."""
    spans = [task("t"), *(call(f"{n}", "t", n, **{"annotation.doc_id": 5}) for n in range(1, 4))]

    assert reported(monkeypatch, spans).distinct == 3
    assert reported(monkeypatch, spans, request_key="doc_id").distinct == 1
    by_function = reported(monkeypatch, spans, request_key=lambda each: each.span_id == "1")
    assert by_function.distinct == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of"),
        ({"traces": "tr-1", "run_id": "r"}, "exactly one of"),
        ({"traces": 7}, "neither a trace nor the id"),
        ({"traces": "tr-1", "prices": {"m": 3}}, "the price of 'm' is 3"),
        ({"traces": "tr-1", "prices": {"m": (-1, 2)}}, "at least 0"),
        ({"experiment_id": "0", "start": "today"}, "is not a datetime"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, Any], message: str) -> None:
    """What cannot be meant is refused before anything is read."""
    with pytest.raises(ValueError, match=message):
        report_function(**arguments)


def test_store_is_read(database: Destination, tmp_path: Path) -> None:
    """By trace, run, and experiment and time; the command prints it; what is unknown is said."""
    with (
        mlflow.start_run() as run,
        mlflow.start_span("job") as root,
        mlflow.start_span("Completions", span_type="CHAT_MODEL") as made,
    ):
        made.set_inputs({"model": "m", "messages": []})
    mlflow.flush_trace_async_logging()

    for source in (
        {"traces": root.trace_id},
        {"traces": [root.trace_id]},
        {"run_id": run.info.run_id},
        {"experiment_id": "0", "start": datetime(2020, 1, 1)},
    ):
        found = report_function(**source)
        assert [each.call.span_id for each in found.calls] == [made.span_id]
    nothing = report_function(experiment_id="0", end=datetime(2020, 1, 1))
    assert "There are no traces" in nothing.notes[0]
    with pytest.raises(StoreError, match="tr-0"):
        report_function("tr-0")
    with mlflow.start_run() as other:
        found.log("report.json")
    client = mlflow.MlflowClient()
    assert [each.path for each in client.list_artifacts(other.info.run_id)] == ["report.json"]
    with pytest.raises(RuntimeError, match="No MLflow run is active"):
        found.log()


def test_command(database: Destination, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The command prints the report, as JSON on request, and fails on an unknown trace."""
    with mlflow.start_span("Completions", span_type="CHAT_MODEL") as made:
        pass
    mlflow.flush_trace_async_logging()

    assert main(["report", made.trace_id, "--html", str(tmp_path / "r.html")]) == 0
    assert "1 calls made" in capsys.readouterr().out
    assert (tmp_path / "r.html").exists()
    assert main(["report", made.trace_id, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["calls"] == 1
    assert main(["report", "tr-0"]) == 2
    assert "tr-0" in capsys.readouterr().err
    assert ctx_autolog.report is report_function
