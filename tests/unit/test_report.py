"""What a report says of traces made for the purpose, good and bad."""

from __future__ import annotations

import json
import re
from dataclasses import replace
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
from mlflow_ctx_autolog.reporting.jobs import last_jobs
from mlflow_ctx_autolog.reporting.sums import dollars
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
        "spark.function.id": "one",
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
    uri = arguments.pop("uri", "http://mlflow")
    return report_function("tr-1", tracking_uri=uri, **arguments)


def test_what_was_repeated_and_what_it_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Useful and repeated calls add up, at the price the user gives, and each cause has its fix."""
    spans = [task("t"), call("a", "t", 1), call("b", "t", 2, **{"llm.request.fingerprint": "a"})]
    found = reported(monkeypatch, spans, prices={"gpt-test": (2.0, 10.0)})

    assert (len(found.calls), found.distinct, found.multiplier) == (2, 1, 2.0)
    assert found.useful.cost == found.repeated.cost == pytest.approx(0.0003)
    (cause,) = found.to_dict()["causes"].values()
    assert (cause["name"], cause["calls"]) == ("duplicate row", 1)
    assert "dropDuplicates()" in cause["fix"]
    assert "2 calls made 2 requests, of which 1 was a repeat: 2.00 for each of 1" in str(found)
    assert found.notes == []


def test_calls_are_told_by_their_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of spans also say which partition, and what the user wants to see there."""
    named = replace(task("t", **{"spark.function.name": "extract"}), name="extract [7]")
    asked = replace(call("a", "t", 1), name="Images (doc-17)", kind="UNKNOWN")
    found = reported(monkeypatch, [named, asked])
    (judged,) = found.calls
    assert (judged.call.function, judged.call.interface) == ("extract", "Images")


def test_users_price_goes_before_mlflows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user gives is the price: of an alias, or one of his own; else what is recorded."""
    spans = [task("t"), call("a", "t", 1, **{"mlflow.llm.cost": {"total_cost": 0.5}})]

    assert reported(
        monkeypatch, spans, prices={"gpt-test": (2.0, 10.0)}
    ).made.cost == pytest.approx(0.0003)
    assert reported(monkeypatch, spans, prices={"other": (2.0, 10.0)}).made.cost == 0.5


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


def test_headline_agrees_with_what_is_below(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls, requests and repeats are three numbers, and causes and tables add up to them."""
    spans = [
        task("t"),
        call("a", "t", 1, **{"http.request.resend_count": 1}),
        call("b", "t", 2),
        call("c", "t", 3, **{"llm.request.fingerprint": "b"}),
    ]
    found = reported(monkeypatch, spans)

    assert (found.made.calls, found.requests, found.repeats, found.distinct) == (3, 4, 2, 2)
    assert "3 calls made 4 requests, of which 2 were repeats: 2.00 for each of 2" in str(found)
    assert sum(sums.requests for sums in found.by_cause().values()) == found.repeats
    assert found.useful.requests + found.repeated.requests == found.requests
    assert repr(found) == "<CallReport of tr-1: 3 calls, 4 requests, 2 repeats, ->"


def test_reused_answers_sent_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call answered by what an earlier one has paid for is a call, and no request."""
    again = {"llm.request.fingerprint": "a", "llm.reused_from": "tr-1/a"}
    spans = [task("t"), call("a", "t", 1), call("b", "t", 2, **again)]
    found = reported(monkeypatch, spans, prices={"gpt-test": (2.0, 10.0)})

    assert (found.made.calls, found.requests, found.repeats) == (2, 1, 0)
    assert (found.made.cost, found.made.tokens, found.made.reused) == (pytest.approx(3e-4), 110, 1)
    assert "used again" in str(found)


def test_what_is_not_known_is_not_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls without usage or price make the cost "at least", with how many; errors are free."""
    unmetered, failed = call("b", "t", 2), call("c", "t", 3)
    del unmetered.attributes["mlflow.chat.tokenUsage"], failed.attributes["mlflow.chat.tokenUsage"]
    failed.status = "ERROR"
    paid = call("d", "t", 4, **{"llm.usage.unknown": True})
    spans = [task("t"), call("a", "t", 1), unmetered, failed]
    found = reported(monkeypatch, spans, prices={"gpt-test": (2.0, 10.0)})

    assert (found.made.unmetered, found.made.unpriced) == (1, 0)
    assert found.made.money == "at least $0.0003"
    assert "at least $0.0003 (that of 1 of 3 calls is not known)" in str(found)
    assert "1 calls to gpt-test were answered without usage" in "\n".join(found.notes)
    partly = call("e", "t", 5, **{"mlflow.chat.tokenUsage": {"input_tokens": 100}})
    found = reported(monkeypatch, [task("t"), partly], prices={"gpt-test": (2.0, 10.0)})
    assert (found.made.cost, found.made.unmetered, found.made.unpriced) == (0, 1, 0)
    assert "not known (that of 1 of 1 calls is not known); at least 100 tokens" in str(found)
    assert "100+ tokens" in str(found)
    # As MLflow has priced it.
    partly = call(
        "e",
        "t",
        5,
        **{"mlflow.chat.tokenUsage": {"input_tokens": 100}, "mlflow.llm.cost": {"total_cost": 0.5}},
    )
    found = reported(monkeypatch, [task("t"), partly])
    assert found.made.money == "at least $0.50"
    total = call("f", "t", 5, **{"mlflow.chat.tokenUsage": {"total_tokens": 70}})
    found = reported(monkeypatch, [task("t"), total])
    assert (found.made.tokens, found.made.unmetered, found.made.unpriced) == (70, 1, 0)
    found = reported(monkeypatch, [task("t"), call("a", "t", 1), paid])
    assert (found.made.unmetered, found.made.unpriced, found.made.unknown) == (1, 1, 2)


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        *((0, "$0"), (0.00005, "$0.00005"), (0.0375, "$0.0375"), (0.000123456, "$0.000123")),
        *((0.5, "$0.50"), (1.5, "$1.50"), (1204.5, "$1,204.50"), (-0.02, "-$0.02")),
        (0.1234, "$0.12"),
    ],
)
def test_money_as_people_write_it(amount: float, text: str) -> None:
    """Cents at least, and below ten of them three digits that count."""
    assert dollars(amount) == text


def test_wrong_totals_of_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In and out count, whatever the server has added up."""
    usage = {"input_tokens": 5, "output_tokens": 2, "total_tokens": 70}
    spans = [task("t"), call("a", "t", 1, **{"mlflow.chat.tokenUsage": usage})]

    assert reported(monkeypatch, spans).made.tokens == 7


def answered(span_id: str, text: str, finish: str = "stop", **attributes: Any) -> Any:
    choice = {"finish_reason": finish, "message": {"role": "assistant", "content": text}}
    return call(span_id, "t", 1, **{"mlflow.spanOutputs": {"choices": [choice]}, **attributes})


def test_signals_of_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the worker's attributes, or from the answer where there are none; by part of the job."""
    attributes = {"gen_ai.response.finish_reasons": ["length"], "llm.answer.chars": 4}
    spans = [
        task("t"),
        answered("a", "yes"),
        answered("b", "", "length"),
        call("c", "t", 1, **attributes, **{"llm.answer.rejected": True, "model": "other"}),
        call("d", "t", 1, **{"mlflow.spanInputs": {"input": "x"}}),
    ]
    found = reported(monkeypatch, spans)

    assert found.quality.signals == {"cut_off": 2, "empty": 1, "rejected": 1}
    assert (found.quality.answered, found.quality.odd) == (3, 2)
    assert found.quality_by("model")["other"].share("rejected") == 1.0
    assert found.quality_by("function")["extract"].signals["cut_off"] == 2
    assert "33.3 % of 3 show nothing odd; 2 cut off, 1 empty, 1 rejected by parse()" in str(found)
    assert [each.call.answer for each in found.calls][:2] == ["yes", ""]


def test_canned_replies_and_lengths_far_from_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same long answer to many prompts, and one much longer than all others; no labels."""
    canned = "I am sorry, but I cannot help you with this question."
    spans = [task("t")]
    spans += [answered(f"c{number}", canned) for number in range(6)]
    spans += [answered(f"l{number}", '{"kind": "invoice"}') for number in range(20)]
    spans += [answered(f"n{number}", f"{number} " * (8 + number % 5)) for number in range(30)]
    spans += [answered("long", "word " * 2000)]
    found = reported(monkeypatch, spans)

    assert {e.call.span_id for e in found.calls if "canned" in e.call.signals} == {
        *(f"c{number}" for number in range(6)),
    }
    assert [e.call.span_id for e in found.calls if "odd_length" in e.call.signals] == ["long"]
    same = {"llm.request.fingerprint": "one"}
    again = reported(
        monkeypatch, [task("t"), *(answered(f"{n}", canned, **same) for n in range(9))]
    )
    assert again.quality.signals == {}


def test_terminal_is_not_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Escape sequences of a prompt, a function's name or an error are no escape sequences."""
    asked = {"messages": [{"role": "user", "content": "\x1b]0;owned\x07 \x9b31m \u202e x\r\n"}]}
    failed = call("a", "t", 1, **{"mlflow.spanInputs": asked, "model": "m\x1b[2J"})
    failed.status, failed.error = "ERROR", "\x1b[31mError: x"
    found = reported(monkeypatch, [task("t"), failed])

    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", f"{found}{found!r}")


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


def test_password_of_the_store_is_not_in_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is sent around, and logged to runs; its links go to the store all the same."""
    uri = "http://bob:hunter2@mlflow.example/base?api=hunter2"
    found = reported(monkeypatch, [task("t"), call("a", "t", 1)], uri=uri)
    for text in (found._page(), found._repr_html_(), repr(found), str(found)):
        assert "hunter2" not in text
    assert "http://mlflow.example/base" in found._page()


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


def test_page_says_first_what_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Job, date, length and model; then how much, how good, how fast, what was wasted."""
    name = "{{data}} of {{plotly}}"
    spans = [
        task("t"),
        answered("a", "yes"),
        answered("b", "no", **{"llm.request.fingerprint": "a"}),
        call("c", "t", 3, model=name),
    ]
    found = reported(monkeypatch, spans, prices={"gpt-test": (0.3, 0.3), name: (0.3, 0.3)})
    text = found.to_html(tmp_path / "report.html").read_text(encoding="utf-8")

    above = text.partition("<section>")[0]
    cards = re.findall(r"class='word'>(.*?)<.*?class='number'>(.*?)<", above)
    assert [word for word, _ in cards] == ["How much", "How good", "How fast", "Wasted"]
    assert [number for _, number in cards] == ["$0.000099", "100 %", "1.00 s", "$0.000033"]
    assert "Thu 01 Jan 1970, 00:00 UTC &middot; took 10.0 s" in above
    assert "dropDuplicates() the input" in text
    assert "href='http://mlflow/#/experiments/7/traces?selectedEvaluationId=tr-1" in above
    # What comes from outside is not looked through for places to fill in.
    assert text.count("{{data}} of {{plotly}}") >= 2
    assert text.count('id="data"') == 1


def test_table_of_a_large_job_has_the_calls_that_matter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A thousand of them: dearest, slowest, failed, repeated, and with a signal; all are summed."""
    spans = [task("t"), *(answered(f"c{number}", f"answer {number}") for number in range(3000))]
    spans[17].status = "ERROR"
    spans[1900] = call("slow", "t", 1, 99)
    spans[2100] = answered("odd", "", "length")
    spans[2500] = answered("again", "answer 5", **{"llm.request.fingerprint": "c4"})
    found = reported(monkeypatch, spans)
    text = found.to_html(tmp_path / "report.html").read_text(encoding="utf-8")

    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    listed = {cells[15] for cells in data["calls"]}
    assert len(listed) == 1000
    assert {"c16", "slow", "odd", "again"} <= listed
    assert "The 1,000 of 3,000 calls that matter" in text


def test_page_is_private_wherever_it_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Over a file that others may read, and where a link points to one."""
    found = reported(monkeypatch, [task("t"), call("a", "t", 1)])
    readable, link = tmp_path / "there.html", tmp_path / "link.html"
    readable.write_text("theirs")
    readable.chmod(0o644)
    link.symlink_to(readable)

    found.to_html(link)
    assert readable.read_text() == "theirs"
    assert (link.is_symlink(), link.stat().st_mode & 0o777) == (False, 0o600)
    found.to_html(readable)
    assert readable.stat().st_mode & 0o777 == 0o600
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link.html", "there.html"]


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
        ({"traces": "tr-1", "run_id": "r"}, "traces and run_id are named: take one"),
        ({"start": datetime(2020, 1, 1)}, "go with experiment_id"),
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
    (row,) = report_function(root.trace_id).to_pandas(content=True).to_dict("records")
    assert row["inputs"] == {"model": "m", "messages": []}
    assert (row["outputs"], row["tags"], row["span_id"]) == (None, {}, made.span_id)
    with pytest.raises(ValueError, match="rows=0"):
        next(found.frames(rows=0))
    nothing = report_function(experiment_id="0", end=datetime(2020, 1, 1))
    assert "There are no traces" in nothing.notes[0]
    with pytest.raises(StoreError, match=r"^there is no trace tr-0 in sqlite:.*mlflow\.db$"):
        report_function("tr-0")
    with mlflow.start_run() as other:
        found.log("report.json")
    client = mlflow.MlflowClient()
    assert [each.path for each in client.list_artifacts(other.info.run_id)] == ["report.json"]
    with pytest.raises(RuntimeError, match="No MLflow run is active"):
        found.log()


def test_last_job_is_the_default(database: Destination) -> None:
    """The latest job of the current experiment: neither a linked trace nor one of other origin."""

    def trace(name: str, job: str | None = "") -> str:
        with mlflow.start_span(name) as root:
            if job is not None:
                metadata = {"mlflow_ctx_autolog.trace_id": job or root.trace_id}
                mlflow.update_current_trace(metadata=metadata)
        mlflow.flush_trace_async_logging()
        return str(root.trace_id)

    with pytest.raises(StoreError, match="there is no job in the experiment 0"):
        report_function()
    first = trace("job")
    trace("other", None)
    assert report_function().trace_ids == [first]
    second = trace("job")
    trace("linked", second)
    assert report_function().trace_ids == [second]
    assert last_jobs(database.tracking_uri or "", 2) == [second, first]
    trace("other")
    with pytest.raises(StoreError, match="only one job named 'other'"):
        last_jobs(database.tracking_uri or "", 2)


def test_command(database: Destination, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The command prints the report, as JSON on request, and fails on an unknown trace."""
    with mlflow.start_span("Completions", span_type="CHAT_MODEL") as made:
        pass
    mlflow.flush_trace_async_logging()

    assert main(["report", made.trace_id, "--html", str(tmp_path / "r.html")]) == 0
    assert "1 call made 1 request" in capsys.readouterr().out
    assert (tmp_path / "r.html").exists()
    assert main(["report", made.trace_id, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["calls"] == 1
    assert main(["report", "tr-0"]) == 2
    assert "tr-0" in capsys.readouterr().err
    assert main(["report", "last"]) == 2
    assert "has no trace of a Spark job" in capsys.readouterr().err
    ctx_autolog.enable()
    with mlflow.start_span("job") as job:
        ctx_autolog.capture()
    mlflow.flush_trace_async_logging()
    ctx_autolog.disable()
    prices = ["--prices", '{"gpt-x": [2.5, 10]}']
    assert main(["report", "last", "--json", *prices]) == 0
    assert json.loads(capsys.readouterr().out)["trace_ids"] == [job.trace_id]
    assert ctx_autolog.report is report_function
