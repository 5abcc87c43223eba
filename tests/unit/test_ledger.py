"""The driver's book of traces: announced, delivered, added up, and compared with the store."""

from __future__ import annotations

import atexit
import json
import logging
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlflow
import pytest
from mlflow.entities import LiveSpan, Span
from mlflow.entities.trace_location import MlflowExperimentLocation
from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage
from workload import StoredTrace, stored_trace

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog import tracing
from mlflow_ctx_autolog.delivery.receipts import Loss, TaskReceipt
from mlflow_ctx_autolog.delivery.spool import Destination, Record
from mlflow_ctx_autolog.driver import books, exports, ledger, settling, totals
from mlflow_ctx_autolog.driver import handover as driver
from mlflow_ctx_autolog.driver.ledger import Ledger
from mlflow_ctx_autolog.exceptions import StoreError
from mlflow_ctx_autolog.stores import tracking_store as store
from mlflow_ctx_autolog.stores.sending import send
from mlflow_ctx_autolog.stores.stored_trace import DRIVER, RECEIPT

USAGE = "mlflow.chat.tokenUsage"
COST = "mlflow.llm.cost"


def tokens(count: int) -> dict[str, float]:
    return {"input_tokens": 2 * count, "output_tokens": count, "total_tokens": 3 * count}


def price(amount: float) -> dict[str, float]:
    return {"input_cost": amount, "output_cost": amount, "total_cost": 2 * amount}


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch, database: Destination) -> Iterator[Ledger]:
    """The driver's ledger, fresh, with an empty store, and MLflow's export done where a span ends.

    MLflow's asynchronous export takes a second for each flush.
    """
    mlflow.flush_trace_async_logging(terminate=True)
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")
    mlflow.tracing.reset()
    fresh = Ledger(driver.settings)
    monkeypatch.setattr(driver.driver, "ledger", fresh)
    # Not another time at the end of all tests, when the stores are gone.
    monkeypatch.setattr(atexit, "register", lambda function: function)
    # The store is opened, so that the short timeouts of these tests are for its answers.
    assert store.count_spans(database, "none") == 0
    yield fresh
    ctx_autolog.disable()
    mlflow.flush_trace_async_logging(terminate=True)
    monkeypatch.undo()
    mlflow.tracing.reset()
    if fresh._timer is not None:
        fresh._timer.cancel()


@dataclass
class AtWork:
    """A task attempt as a worker has it when it ends."""

    spans: list[Span]
    receipt: TaskReceipt

    @property
    def records(self) -> list[Record]:
        return [store.span_record(span, self.receipt.task_span_id) for span in self.spans]

    def arrival(
        self, records: Sequence[Record] = (), uri: str | None = None, experiment_id: str = "0"
    ) -> Any:
        fields = [tuple(record[:3]) for record in records]
        return self.receipt.to_json(), uri, experiment_id, fields


_numbers = iter(range(1, 1_000_000))


def task_below(
    parent: LiveSpan, calls: int = 1, usage: dict[str, float] | None = None, **receipt: Any
) -> AtWork:
    """Return a task below a span of the driver, with some calls, as another process made it."""
    made = tokens(10) if usage is None else usage
    cost = receipt.get("cost", {})
    task_id, *call_ids = (next(_numbers) for _ in range(calls + 1))
    task = TaskReceipt(
        parent.trace_id, f"{task_id:016x}", calls + 1, usage=made, **{"cost": {}, **receipt}
    )
    facts = {
        "mlflow.spanType": "TASK",
        "spark.task.outcome": "completed",
        **TaskReceipt.attributes(task.made, made, cost),
    }
    spans = [_away(parent, call, parent_id=task_id, name="call") for call in call_ids]
    spans.append(_away(parent, task_id, name="task", attributes=facts))
    return AtWork(spans, task)


def _away(
    parent: LiveSpan,
    span_id: int,
    name: str,
    parent_id: int | None = None,
    attributes: dict[str, Any] | None = None,
) -> Span:
    snapshot = exports.snapshot(parent)
    assert snapshot is not None
    message: SpanMessage = snapshot.to_otel_proto()
    message.name = name
    message.parent_span_id = message.span_id if parent_id is None else parent_id.to_bytes(8, "big")
    message.span_id = span_id.to_bytes(8, "big")
    del message.attributes[:]
    span = Span.from_otel_proto(message)
    for key, value in (attributes or {}).items():
        span._span._attributes[key] = json.dumps(value)
    return Span.from_otel_proto(span.to_otel_proto())


def our_warnings(caplog: pytest.LogCaptureFixture, name: str = "driver.ledger") -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == f"mlflow_ctx_autolog.{name}" and record.levelno >= logging.WARNING
    ]


def names(trace: StoredTrace) -> list[str]:
    return sorted(span.name for span in trace.spans)


def usage_in_store(trace_id: str) -> Any:
    return stored_trace(trace_id).trace.info.token_usage


# What is announced, and who exports.


def test_a_trace_can_be_seen_while_it_runs(book: Ledger, database: Destination) -> None:
    """When its context is captured, a trace is in the store with all spans that are open."""
    with mlflow.start_span("driver") as root, mlflow.start_span("chapter"):
        ctx_autolog.capture()
        assert ctx_autolog.flush(60)
        _, spans = store.read_trace(database, root.trace_id)
        assert sorted(span.name for span in spans) == ["chapter", "driver"]
        (trace,) = mlflow.search_traces(locations=["0"], return_type="list")
        assert trace.info.state == "IN_PROGRESS"

    assert stored_trace(root.trace_id).trace.info.state == "OK"


def test_a_trace_is_announced_once(book: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a context is captured, its trace is announced the first time."""
    announced = []
    monkeypatch.setattr(
        ledger, "trace_record", lambda info: announced.append(info) or store.trace_record(info)
    )
    with mlflow.start_span("driver") as root:
        for _ in range(3):
            ctx_autolog.capture()
        assert [info.trace_id for info in announced] == [root.trace_id]


def test_spans_opened_since_are_announced_too(book: Ledger, database: Destination) -> None:
    """A later capture announces the span that its tasks will be below."""
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        with mlflow.start_span("chapter"):
            ctx_autolog.capture()
            assert ctx_autolog.flush(60)
            _, spans = store.read_trace(database, root.trace_id)
            assert sorted(span.name for span in spans) == ["chapter", "driver"]


def test_a_receipt_is_of_the_trace_that_was_handed_to_spark_last(
    book: Ledger, database: Destination
) -> None:
    """Also where another one was handed over in between; one that is forgotten counts no more."""
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        with tracing.new_trace("other") as other:
            ctx_autolog.capture()
        assert ctx_autolog.receipt().trace_id == other
        ctx_autolog.capture()
        assert ctx_autolog.receipt().trace_id == root.trace_id
    book.forget(root.trace_id)
    assert ctx_autolog.receipt().trace_id == other
    with pytest.raises(ValueError, match="is not known here"):
        ctx_autolog.receipt(root.trace_id)


def test_a_receipt_is_of_the_last_job_also_without_a_trace_in_the_book(book: Ledger) -> None:
    """Of tasks that came later than the last trace, rather than of the job before them."""
    with tracing.new_trace("elsewhere"):
        other = task_below(mlflow.get_current_active_span())
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
    book.receive([other.arrival()])
    assert ctx_autolog.receipt().trace_id is None
    assert ctx_autolog.receipt().tasks == 1
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
    assert ctx_autolog.receipt().trace_id == root.trace_id


def test_a_receipt_waits_for_what_is_on_its_way(book: Ledger, database: Destination) -> None:
    """Also while the span is open, right after an action."""
    with mlflow.start_span("driver"):
        ctx_autolog.capture()
        root = mlflow.get_current_active_span()
        assert root is not None
        task = task_below(root)
        book.receive([task.arrival()])
        late = threading.Timer(0.5, send, (database, task.records))
        late.start()
        found = ctx_autolog.receipt(timeout=30)
        late.join()
        assert (found.made, found.stored, found.complete) == (3, 3, True)


def test_a_report_waits_for_the_end_of_its_trace(
    book: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which comes by MLflow's export, and goes from a thread: nobody need ask for it before."""
    ctx_autolog.enable()
    waited_for: list[str] = []
    flush_exports, flush = ledger.flush_exports, book.flush
    monkeypatch.setattr(
        ledger, "flush_exports", lambda: waited_for.append("export") or flush_exports()
    )
    monkeypatch.setattr(
        book, "flush", lambda *args, **how: waited_for.append("store") or flush(*args, **how)
    )
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        ctx_autolog.report(root.trace_id)
        assert waited_for[:2] == ["export", "store"]
    waited_for.clear()
    ctx_autolog.report(root.trace_id)
    assert waited_for[-1] == "store"


def test_flush_says_so_where_a_worker_has_kept_something(
    book: Ledger, database: Destination
) -> None:
    """Nothing waits on the driver, and yet not all that has ended is stored."""
    ctx_autolog.enable(flush_timeout=0.2)
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        task = task_below(root)
        book.receive([task.arrival()])
    mlflow.flush_trace_async_logging()
    assert ctx_autolog.flush(0.2) is False

    send(database, task.records)
    assert ctx_autolog.flush(60) is True
    assert ctx_autolog.receipt().complete


@pytest.mark.parametrize("is_async", ["true", "false"])
def test_a_trace_is_stored_as_mlflow_would(
    book: Ledger, monkeypatch: pytest.MonkeyPatch, is_async: str
) -> None:
    """What MLflow says of a trace is the same with us, with its asynchronous export and without."""
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", is_async)
    mlflow.tracing.reset()
    captures = False

    def work() -> str:
        with mlflow.start_span("driver") as root:
            root.set_inputs({"of": "clause"})
            root.set_outputs("an answer")
            mlflow.update_current_trace(tags={"team": "blue"}, metadata={"own": "yes"})
            if captures:
                ctx_autolog.capture()
            with mlflow.start_span("call") as call:
                call.set_attribute(USAGE, tokens(1))
        return str(root.trace_id)

    plain = stored_trace(work()).trace
    captures = True
    ours = stored_trace(work()).trace

    ignored = {store.TRACE_KEY, RECEIPT, DRIVER, "mlflow.trace.cost", "mlflow.artifactLocation"}

    def facts(trace: Any) -> Any:
        info = trace.info
        sizes = ("mlflow.trace.sizeBytes", "mlflow.trace.sizeStats")
        return (
            {k: v for k, v in info.trace_metadata.items() if k not in {*ignored, *sizes}},
            {name for name in sizes if name in info.trace_metadata},
            {k: v for k, v in info.tags.items() if k not in ignored},
            (info.state, info.request_preview, info.response_preview, info.token_usage),
            [(span.name, span.inputs, span.outputs, span.status) for span in trace.data.spans],
        )

    assert facts(ours) == facts(plain)
    assert ours.info.token_usage == tokens(1)


def test_other_traces_are_mlflows(book: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace whose context was not captured is exported by MLflow as if we were not there."""
    sent: list[Any] = []
    monkeypatch.setattr(ledger, "send", lambda *args: sent.append(args))
    with mlflow.start_span("handed to Spark"):
        ctx_autolog.capture()
    book.flush(60)
    del sent[:]

    with mlflow.start_span("other") as other, mlflow.start_span("below"):
        pass

    trace = stored_trace(other.trace_id)
    assert names(trace) == ["below", "other"]
    assert store.TRACE_KEY not in trace.metadata
    assert sent == []


def test_without_a_span_nothing_is_patched(book: Ledger) -> None:
    """Where no span is active, capturing leaves MLflow's export as it is."""
    before = vars(MlflowV3SpanExporter)["_log_trace"]
    ctx_autolog.capture()
    assert vars(MlflowV3SpanExporter)["_log_trace"] is before


def test_mlflow_exports_what_we_fail_to(
    book: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If we fail at the end of a trace, MLflow exports it after all, and a warning says why."""

    def fail(_: Any) -> Any:
        raise RuntimeError("not today")

    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        assert ctx_autolog.flush(60)
        monkeypatch.setattr(ledger, "complete_info", fail)
    trace = stored_trace(root.trace_id)
    assert trace.trace.info.state == "OK"
    assert any("not today" in warning for warning in our_warnings(caplog, "driver.exports"))


def test_disabling_while_a_trace_is_open_completes_it(book: Ledger) -> None:
    """disable() leaves MLflow's export patched until the last trace that is open has ended."""
    before = vars(MlflowV3SpanExporter)["_log_trace"]
    ctx_autolog.enable()
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        task = task_below(root)
        book.receive([task.arrival(task.records)])
        ctx_autolog.disable()
        assert vars(MlflowV3SpanExporter)["_log_trace"] is not before
        with mlflow.start_span("afterwards"):
            pass

    trace = stored_trace(root.trace_id)
    assert names(trace) == ["afterwards", "call", "driver", "task"]
    assert trace.trace.info.token_usage == tokens(10)
    assert vars(MlflowV3SpanExporter)["_log_trace"] is before


# What a trace comes to in all.


def test_totals_of_workers_only(book: Ledger) -> None:
    """Where all model calls were made by workers, the trace has the sum of what tasks report."""
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        for count in (10, 20):
            task = task_below(root, usage=tokens(count), cost=price(count))
            book.receive([task.arrival(task.records)])

    trace = stored_trace(root.trace_id)
    assert names(trace) == ["call", "call", "driver", "task", "task"]
    assert trace.trace.info.token_usage == tokens(30)
    assert json.loads(trace.metadata["mlflow.trace.cost"]) == price(30)


def test_totals_with_calls_of_the_driver(book: Ledger) -> None:
    """The driver's own calls are added to those of tasks."""
    with mlflow.start_span("driver") as root:
        with mlflow.start_span("call") as call:
            call.set_attribute(USAGE, tokens(5))
            call.set_attribute(COST, price(5))
        ctx_autolog.capture()
        task = task_below(root, cost=price(10))
        book.receive([task.arrival(task.records)])

    trace = stored_trace(root.trace_id)
    assert trace.trace.info.token_usage == tokens(15)
    assert json.loads(trace.metadata["mlflow.trace.cost"]) == price(15)


def test_totals_where_the_root_has_usage_of_its_own(book: Ledger) -> None:
    """What the root reports stands for all below it on the driver, and for no task."""
    with mlflow.start_span("driver") as root:
        with mlflow.start_span("call") as call:
            call.set_attribute(USAGE, tokens(5))
        ctx_autolog.capture()
        task = task_below(root)
        book.receive([task.arrival(task.records)])
        root.set_attribute(USAGE, tokens(7))

    assert usage_in_store(root.trace_id) == tokens(17)


def test_a_receipt_counts_once(book: Ledger) -> None:
    """The same receipt again, as from a task that Spark reports twice, changes nothing."""
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        task = task_below(root)
        for _ in range(2):
            book.receive([task.arrival(task.records)])
    mlflow.flush_trace_async_logging()
    book.receive([task.arrival(task.records)])
    assert ctx_autolog.flush(60)

    assert usage_in_store(root.trace_id) == tokens(10)
    found = ctx_autolog.receipt(root.trace_id)
    assert (found.tasks, found.made, found.stored) == (1, 3, 3)


def test_tasks_that_end_after_the_root_are_added(book: Ledger) -> None:
    """The totals are written again when tasks finish later, without anybody asking."""
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        late = task_below(root, usage=tokens(20))
        early = task_below(root)
        book.receive([early.arrival(early.records)])
    assert usage_in_store(root.trace_id) == tokens(10)

    book.receive([late.arrival(late.records)])
    assert book._timer is not None
    book._timer.join(60)
    assert not book._timer.is_alive()

    trace = stored_trace(root.trace_id)
    assert trace.trace.info.token_usage == tokens(30)
    assert names(trace) == ["call", "call", "driver", "task", "task"]


def test_how_a_task_began_does_not_replace_how_it_ended(book: Ledger) -> None:
    """By another way it may come after it; with no end known, it is better than nothing."""
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        ended, killed = task_below(root, calls=0), task_below(root, calls=0)
        for task, has_ended in ((ended, True), (killed, False)):
            (end,) = task.spans
            began = Span.from_otel_proto(end.to_otel_proto())
            began._span._attributes["spark.task.outcome"] = json.dumps("running")
            early = AtWork([Span.from_otel_proto(began.to_otel_proto())], task.receipt)
            if has_ended:
                book.receive([task.arrival(task.records)])
            book.receive([early.arrival(early.records)])
    assert ctx_autolog.flush(60)

    found = {
        span.span_id: span.attributes["spark.task.outcome"]
        for span in stored_trace(root.trace_id).spans
        if span.name == "task"
    }
    assert found == {
        ended.receipt.task_span_id: "completed",
        killed.receipt.task_span_id: "running",
    }


def test_a_task_without_a_receipt_is_found_in_the_store(
    book: Ledger, database: Destination
) -> None:
    """Attempts that failed, or of Spark Connect, count by what they have stored themselves."""
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        task = task_below(root)
        send(database, task.records)

    assert usage_in_store(root.trace_id) == tokens(10)
    found = ctx_autolog.receipt(root.trace_id)
    assert (found.tasks, found.made, found.stored, found.complete) == (1, 3, 3, True)


def test_a_task_that_was_killed_counts_by_what_it_has_stored(
    book: Ledger, database: Destination
) -> None:
    """The calls that are stored are in the totals; whether these are all, nobody knows."""
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        running = {
            "mlflow.spanType": "TASK",
            "spark.task.outcome": "running",
            "host.name": "node2",
        }
        task = _away(root, 0xF0, "task", attributes=running)
        call = _away(root, 0xF1, "call", parent_id=0xF0, attributes={USAGE: tokens(4)})
        send(database, [store.span_record(task), store.span_record(call)])

    assert usage_in_store(root.trace_id) == tokens(4)
    found = ctx_autolog.receipt()
    assert (found.tasks, found.made, found.stored, found.complete) == (1, 3, 3, False)
    assert found.unknown == {"node2": 1}
    assert "unknown what 1 task attempt (1 on node2) made" in str(found)
    assert "mlflow-ctx-autolog recover on node2" in book.explain(found)


def test_a_receipt_counts_more_than_what_was_seen_before_it(
    book: Ledger, database: Destination
) -> None:
    """A task that is still running when the root ends counts in full once it has ended."""
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        task = task_below(root)
        running = {"mlflow.spanType": "TASK", "spark.task.outcome": "running"}
        announced = _away(root, int(task.receipt.task_span_id, 16), "task", attributes=running)
        send(database, [store.span_record(announced)])
    assert not any((usage_in_store(root.trace_id) or {}).values())

    book.receive([task.arrival(task.records)])
    assert ctx_autolog.flush(60)
    assert usage_in_store(root.trace_id) == tokens(10)
    found = ctx_autolog.receipt()
    assert (found.tasks, found.made, found.stored, found.complete) == (1, 3, 3, True)


def test_totals_of_a_trace_whose_driver_is_gone(book: Ledger, database: Destination) -> None:
    """From what the store has, a trace is added up as its driver would have done."""
    with mlflow.start_span("driver") as root:
        records = [store.span_record(exports.snapshot(root))]
        for number in (0xE0, 0xE2):
            running = {"mlflow.spanType": "TASK", "spark.task.outcome": "completed"}
            facts = {USAGE: tokens(4), COST: price(1)}
            task = _away(root, number, "task", attributes=running)
            call = _away(root, number + 1, "call", parent_id=number, attributes=facts)
            records += [store.span_record(task), store.span_record(call)]
        own = _away(root, 0xE4, "own", attributes={USAGE: tokens(2)})
        trace = store.trace_record(tracing.active_trace())
        send(database, [*records, store.span_record(own), trace])
        totals.write_stored_totals(database, root.trace_id)

        info, _ = store.read_trace(database, root.trace_id)
        assert info.token_usage == tokens(10)
        assert json.loads(info.trace_metadata["mlflow.trace.cost"]) == price(2)


def test_costs_that_the_store_has_found(book: Ledger, database: Destination) -> None:
    """Where no task knows what its calls have cost, the store's prices are added up."""
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        task = task_below(root)
        priced = _away(root, 0xABC, "priced", attributes={COST: price(3)})
        send(database, [*task.records, store.span_record(priced)])
        book.receive([task.arrival()])

    metadata = stored_trace(root.trace_id).metadata
    assert json.loads(metadata["mlflow.trace.cost"]) == price(3)


def test_costs_of_which_the_driver_knows_a_part(book: Ledger, database: Destination) -> None:
    """A price that a call of the driver states does not hide those that the store has found."""
    with mlflow.start_span("driver") as root:
        with mlflow.start_span("call") as call:
            call.set_attribute(COST, price(5))
        ctx_autolog.capture()
        task = task_below(root)
        priced = _away(root, 0xABD, "priced", attributes={COST: price(3)})
        send(database, [*task.records, store.span_record(priced)])
        book.receive([task.arrival()])

    metadata = stored_trace(root.trace_id).metadata
    assert json.loads(metadata["mlflow.trace.cost"]) == price(8)


def test_no_price_is_made_up(book: Ledger) -> None:
    """A trace whose calls have no known cost does not have one of 0 dollars in total."""
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
    trace = stored_trace(root.trace_id)
    cost = json.loads(trace.metadata.get("mlflow.trace.cost", "{}"))
    assert set(cost.values()) <= {None}
    # What is not known is not 0, though that was announced.
    assert set((trace.trace.info.token_usage or {}).values()) <= {None}


# What the user asks.


def test_a_receipt_says_what_became_of_the_spans(book: Ledger) -> None:
    """Made, stored, tasks and the time that their ends waited, having asked the store."""
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        for _ in range(2):
            task = task_below(root, calls=3, seconds_waiting=0.5)
            book.receive([task.arrival(task.records)])

    found = ctx_autolog.receipt()
    assert (found.trace_id, found.tasks, found.seconds_waiting) == (root.trace_id, 2, 1.0)
    assert (found.made, found.stored, found.waiting, found.lost) == (9, 9, 0, 0)
    assert found.complete
    assert found.first_error is None


def test_a_receipt_while_the_trace_is_open(book: Ledger) -> None:
    """What has come so far is complete, though the trace has not ended."""
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        task = task_below(root)
        book.receive([task.arrival(task.records)])
        found = ctx_autolog.receipt()
        assert (found.made, found.stored, found.complete) == (3, 3, True)


def test_a_receipt_of_a_trace_that_spark_never_had(book: Ledger) -> None:
    """Asking for another trace is an error that names it."""
    with mlflow.start_span("driver"):
        ctx_autolog.capture()
    with pytest.raises(ValueError, match="tr-other"):
        ctx_autolog.receipt("tr-other")


def test_tasks_that_are_traces_of_their_own(book: Ledger) -> None:
    """Without a driver's span, one receipt adds up what all tasks have told."""
    with mlflow.start_span("elsewhere") as root:
        tasks = [task_below(root, lost=n) for n in range(2)]
    book.receive([task.arrival() for task in tasks])

    found = ctx_autolog.receipt()
    assert (found.trace_id, found.tasks, found.made, found.lost) == (None, 2, 4, 1)
    assert not found.complete


def test_what_is_missing_is_said_once(book: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    """A receipt that promises more than the store has is one warning, with both numbers."""
    ctx_autolog.enable(flush_timeout=1)
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        task = task_below(root, calls=4)
        book.receive([task.arrival(task.records[1:])])
    mlflow.flush_trace_async_logging()
    assert ctx_autolog.flush(1) is False
    found = ctx_autolog.receipt(timeout=1)

    assert (found.made, found.stored, found.waiting, found.complete) == (6, 5, 1, False)
    (warning,) = our_warnings(caplog)
    assert root.trace_id in warning
    assert "6 spans made, 5 stored" in warning


def test_what_is_lost_is_said(book: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    """Spans that a worker had to drop are named as lost, with the worker's reason."""
    ctx_autolog.enable(flush_timeout=1)
    with mlflow.start_span("driver"):
        ctx_autolog.capture()
        root = mlflow.get_current_active_span()
        assert root is not None
        task = task_below(root, calls=2, lost=2, first_error="disk full")
        book.receive([task.arrival(task.records[2:])])
    mlflow.flush_trace_async_logging()

    (warning,) = our_warnings(caplog)
    assert "2 lost" in warning
    assert "disk full" in warning
    assert "waiting," not in warning


def _incomplete_trace(book: Ledger) -> None:
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        task = task_below(root)
        book.receive([task.arrival()])


def test_nobody_waits_again_for_what_is_known_to_be_missing(
    book: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the user was warned, later flushes ask once; who asks for a receipt waits for it."""
    ctx_autolog.enable(flush_timeout=1)
    _incomplete_trace(book)
    asked: list[str] = []
    count = settling.count_spans

    def counting(destination: Destination, trace_id: str) -> int:
        asked.append(trace_id)
        return count(destination, trace_id)

    monkeypatch.setattr(settling, "count_spans", counting)
    assert ctx_autolog.flush(30) is False
    assert len(asked) == 1
    assert not ctx_autolog.receipt(timeout=1).complete
    assert len(asked) > 2


def test_strict_raises_from_receipt(book: Ledger) -> None:
    """With strict, asking for a receipt that is not complete raises, with the receipt."""
    ctx_autolog.enable(strict=True, flush_timeout=1)
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        task = task_below(root)
        book.receive([task.arrival()])
        with pytest.raises(ctx_autolog.IncompleteTraceError, match="3 spans made, 1 stored") as e:
            ctx_autolog.receipt()
        assert e.value.receipt.stored == 1
        book.receive([task.arrival(task.records)])
        assert ctx_autolog.receipt().complete


def test_strict_raises_from_disable(book: Ledger) -> None:
    """With strict, disable() raises for a trace that is not complete, and undoes all the same."""
    before = vars(MlflowV3SpanExporter)["_log_trace"]
    ctx_autolog.enable(strict=True, flush_timeout=1)
    _incomplete_trace(book)
    with pytest.raises(ctx_autolog.IncompleteTraceError, match="not complete"):
        ctx_autolog.disable()

    assert driver.driver.config is None
    assert vars(MlflowV3SpanExporter)["_log_trace"] is before
    ctx_autolog.disable()


def test_strict_raises_on_leaving(book: Ledger) -> None:
    """With strict, leaving `with enable()` raises, but not instead of another exception."""
    with (
        pytest.raises(ctx_autolog.IncompleteTraceError),
        ctx_autolog.enable(strict=True, flush_timeout=1),
    ):
        _incomplete_trace(book)
    assert driver.driver.config is None

    def fail() -> None:
        with ctx_autolog.enable(strict=True, flush_timeout=1):
            _incomplete_trace(book)
            raise KeyError("the job's own")

    with pytest.raises(KeyError, match="the job's own"):
        fail()
    assert driver.driver.config is None


def test_strict_is_content_with_a_complete_trace(book: Ledger) -> None:
    """With strict, a trace that has all its spans raises nothing."""
    with ctx_autolog.enable(strict=True), mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        task = task_below(root)
        book.receive([task.arrival(task.records)])
    assert usage_in_store(root.trace_id) == tokens(10)


def test_strict_raises_for_a_trace_once(book: Ledger) -> None:
    """A job that is complete does not fail for one before it, of which its caller knows."""
    with (
        pytest.raises(ctx_autolog.IncompleteTraceError),
        ctx_autolog.enable(strict=True, flush_timeout=1),
    ):
        _incomplete_trace(book)

    with ctx_autolog.enable(strict=True, flush_timeout=1), mlflow.start_span("second"):
        ctx_autolog.capture()


def test_a_loss_is_that_of_its_trace(book: Ledger, database: Destination) -> None:
    """A span of one trace that had to be dropped does not make another trace incomplete."""
    with mlflow.start_span("driver"):
        ctx_autolog.capture()
    delivery = book.deliveries.to(database)
    delivery._lose([Record("span", "0123456789abcdef", b"of another trace")])

    assert ctx_autolog.receipt().complete


# What can go wrong.


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        (),
        ("{", None, "0", []),
        ("[]", None, "0", []),
        (None, None, "0", [("span",)]),
        (None, None, "0", None),
    ],
)
def test_damaged_arrivals_do_not_raise(
    book: Ledger, caplog: pytest.LogCaptureFixture, damaged: Any
) -> None:
    """What cannot be read is one warning: Spark, which hands it over, sees no exception."""
    for _ in range(2):
        book.receive([damaged])
    assert len(our_warnings(caplog)) == 1


def test_a_damaged_arrival_does_not_hide_the_next(book: Ledger) -> None:
    """Of several arrivals, those that can be read are taken."""
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        task = task_below(root)
        book.receive([("{", None, "0", []), task.arrival(task.records)])
    assert usage_in_store(root.trace_id) == tokens(10)


def test_a_damaged_span_does_not_hold_up_the_others(book: Ledger, database: Destination) -> None:
    """What the store can never take is set aside, and the receipt says where."""
    ctx_autolog.enable(flush_timeout=3)
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        task = task_below(root)
        garbage = Record("span", "0123456789abcdef", b"\xff garbage")
        book.receive([task.arrival([garbage, *task.records])])

    _, spans = store.read_trace(database, root.trace_id)
    assert sorted(span.name for span in spans) == ["call", "driver", "task"]
    receipt = book.receipt(root.trace_id, 3)
    assert receipt.set_aside == 1
    assert "this is no span" in str(receipt.first_error)
    assert ".refused.spool, for mlflow-ctx-autolog recover" in str(receipt.first_error)


def test_other_settings_lose_no_span(
    book: Ledger, database: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A span on its way to the disk while the settings change is stored all the same."""
    ctx_autolog.enable(batch_size=7)
    delivery = book.deliveries.to(database)
    spool, writing, written = delivery._spool, threading.Event(), threading.Event()
    add = spool.add

    def slow(records: Sequence[Record], patience: float) -> list[Record] | None:
        writing.set()
        assert written.wait(60)
        return add(records, patience)

    monkeypatch.setattr(spool, "add", slow)
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        assert writing.wait(60)
        ctx_autolog.enable(batch_size=9)
        delivery.configure(driver.settings())
        written.set()
        assert ctx_autolog.flush(60)
        _, spans = store.read_trace(database, root.trace_id)
        assert "driver" in [span.name for span in spans]


@pytest.fixture
def nowhere() -> str:
    """The address of a server that is not there."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def gone(book: Ledger, nowhere: str) -> Iterator[None]:
    """MLflow's tracking store is gone."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(nowhere)
    yield
    mlflow.flush_trace_async_logging()
    for delivery in book.deliveries.all():
        delivery.take()
    mlflow.set_tracking_uri(before)


@pytest.mark.usefixtures("gone")
def test_a_store_that_is_gone_is_waited_for_no_longer_than_set(
    book: Ledger, nowhere: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The trace is settled within the timeout, what it has waits, and the user is told once."""
    ctx_autolog.enable(flush_timeout=2)
    here = MlflowExperimentLocation("0")
    with mlflow.start_span("driver", trace_destination=here) as root:
        book.open(receipts_come_home=True)
        task = task_below(root)
        book.receive([task.arrival(task.records, uri=nowhere)])
    mlflow.flush_trace_async_logging()
    found = ctx_autolog.receipt(root.trace_id, timeout=2)

    assert (found.made, found.stored, found.complete) == (3, None, False)
    # The trace's own record waits as well, and is no span.
    assert found.waiting == 3
    assert found.first_error is not None
    assert "cannot be reached" in found.first_error
    incomplete = [text for text in our_warnings(caplog) if root.trace_id in text]
    assert len(incomplete) == 1
    assert "did not say how many it has" in incomplete[0]
    assert len(our_warnings(caplog, "delivery.sender")) == 1


@pytest.mark.usefixtures("gone")
def test_what_has_no_room_is_lost_while_the_store_is_gone(book: Ledger, nowhere: str) -> None:
    """A store that does not answer is no reason to leave out what was dropped here."""
    ctx_autolog.enable(flush_timeout=1, spool_max_bytes=0, max_waiting_bytes=1_000_000)
    here = MlflowExperimentLocation("0")
    with mlflow.start_span("driver", trace_destination=here) as root:
        book.open(receipts_come_home=True)
        task = task_below(root)
        large = [record._replace(payload=bytes(1_000_001)) for record in task.records[1:]]
        book.receive([task.arrival([task.records[0], *large], uri=nowhere)])
    mlflow.flush_trace_async_logging()
    found = ctx_autolog.receipt(root.trace_id, timeout=1)

    assert len(large) == 1
    assert (found.made, found.stored, found.waiting, found.lost) == (3, None, 2, 1)


@pytest.mark.usefixtures("gone")
def test_strict_raises_for_a_store_that_is_gone(book: Ledger) -> None:
    """A store that cannot be asked is none that has all spans."""
    here = MlflowExperimentLocation("0")
    with (
        pytest.raises(ctx_autolog.IncompleteTraceError, match="did not say"),
        ctx_autolog.enable(strict=True, flush_timeout=1),
        mlflow.start_span("driver", trace_destination=here),
    ):
        book.open(receipts_come_home=True)


def test_spans_that_missed_their_store_are_delivered(
    book: Ledger, database: Destination, caplog: pytest.LogCaptureFixture
) -> None:
    """The driver stores them, and one warning says why the workers could not."""
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        for _ in range(2):
            task = task_below(root, first_error="no route")
            book.receive([task.arrival(task.records, uri=database.tracking_uri)])

    assert names(stored_trace(root.trace_id)) == ["call", "call", "driver", "task", "task"]
    (warning,) = our_warnings(caplog)
    assert str(database.tracking_uri) in warning
    assert "no route" in warning


def test_spans_that_were_late_for_their_store_are_delivered(
    book: Ledger, database: Destination, caplog: pytest.LogCaptureFixture
) -> None:
    """A store that has refused nothing, and was not waited for, is not worth a word."""
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        task = task_below(root)
        book.receive([task.arrival(task.records, uri=database.tracking_uri)])

    assert names(stored_trace(root.trace_id)) == ["call", "driver", "task"]
    assert our_warnings(caplog) == []


def test_a_batch_is_acknowledged_when_it_is_on_the_drivers_disk(book: Ledger) -> None:
    """By the worker's name for it; a receipt without spans needs no word."""
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        first, second = task_below(root), task_below(root)
        book.receive([(*first.arrival(), ("", 0))])
        assert book.acknowledgements.told() == {}
        book.receive([(*second.arrival(second.records), ("outbox", 1))])
    assert book.acknowledgements.told() == {"outbox": 1}


def test_spans_for_the_driver_are_stored_quietly(
    book: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    """Spans without an address go to the driver's store, as was meant."""
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        task = task_below(root)
        book.receive([task.arrival(task.records)])

    assert names(stored_trace(root.trace_id)) == ["call", "driver", "task"]
    assert our_warnings(caplog) == []


def test_a_receipt_keeps_to_its_timeout(book: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for a receipt does not wait for another settlement that takes longer."""
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
    mlflow.flush_trace_async_logging()
    asked, answer = threading.Event(), threading.Event()

    def slow(*_: Any) -> int:
        asked.set()
        answer.wait(60)
        return 1

    monkeypatch.setattr(settling, "count_spans", slow)
    other = threading.Thread(target=book.receipt, args=(root.trace_id, 60))
    other.start()
    assert asked.wait(60)
    done = threading.Event()

    def ask() -> None:
        book.receipt(root.trace_id, 0.1)
        done.set()

    impatient = threading.Thread(target=ask)
    impatient.start()
    in_time = done.wait(5)
    answer.set()
    for thread in (other, impatient):
        thread.join(60)
    assert in_time


def test_without_threads_nothing_raises(book: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no thread can be started, as at the exit of Python 3.12, settling does not raise."""
    with mlflow.start_span("driver"):
        ctx_autolog.capture()
    mlflow.flush_trace_async_logging()

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    book.books.all()[0].is_complete = False
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        book._at_exit()


def test_a_complete_trace_is_not_doubted_at_exit(
    book: Ledger, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trace that the store was seen to have is not warned of when the store is gone at exit."""
    ctx_autolog.enable(flush_timeout=1)
    with mlflow.start_span("driver"):
        ctx_autolog.capture()
    assert ctx_autolog.receipt().complete

    def refuse(*_: Any) -> Any:
        raise StoreError("it cannot be reached")

    monkeypatch.setattr(ledger, "send", refuse)
    for name in ("count_spans", "read_trace", "sum_of_costs"):
        monkeypatch.setattr(settling, name, refuse)
    book._at_exit()
    assert not any("not complete" in warning for warning in our_warnings(caplog))


def test_a_trace_that_is_forgotten_is_mlflows(
    book: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more traces than are kept in the book, the oldest is exported by MLflow, and complete."""
    monkeypatch.setattr(books, "_TRACES", 1)
    ctx_autolog.enable(send_interval=60)
    with mlflow.start_span("first") as first:
        ctx_autolog.capture()
        with mlflow.start_span("call") as call:
            call.set_attribute(USAGE, tokens(5))
        in_thread(_captured)
    assert ctx_autolog.flush(60)

    trace = stored_trace(first.trace_id)
    assert names(trace) == ["call", "first"]
    assert trace.trace.info.state == "OK"
    assert trace.trace.info.token_usage == tokens(5)


def _captured() -> None:
    with tracing.new_trace("second"):
        ctx_autolog.capture()


def test_spans_without_an_address_go_to_the_store_of_their_trace(
    book: Ledger, database: Destination, empty_database: Path, tmp_path: Path
) -> None:
    """Where the driver has another store by then, what comes home goes to that of the capture."""
    ctx_autolog.enable(flush_timeout=1)
    other = shutil.copy(empty_database, tmp_path / "other.db")
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        task = task_below(root)
        mlflow.set_tracking_uri(f"sqlite:///{other}")
        book.receive([task.arrival(task.records)])
        assert ctx_autolog.flush(60)
        mlflow.set_tracking_uri(str(database.tracking_uri))

    _, spans = store.read_trace(database, root.trace_id)
    assert sorted(span.name for span in spans) == ["call", "driver", "task"]


# Where the store takes whole traces only.


@pytest.fixture
def files(book: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """MLflow's file store, and an experiment in it."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((tmp_path / "files").as_uri())
    yield str(mlflow.set_experiment("files").experiment_id)
    mlflow.flush_trace_async_logging()
    mlflow.set_tracking_uri(before)
    mlflow.set_experiment(experiment_id="0")


def in_thread(function: Callable[..., Any], *args: Any) -> None:
    thread = threading.Thread(target=function, args=args)
    thread.start()
    thread.join(60)


def test_where_spans_cannot_be_stored_singly_they_join_the_open_trace(
    book: Ledger, files: str
) -> None:
    """MLflow's file store gets them with the driver's own spans, from whichever thread."""
    with mlflow.start_span("driver") as root:
        book.open(receipts_come_home=True)
        with mlflow.start_span("call") as call:
            call.set_attribute(USAGE, tokens(5))
        task = task_below(root)
        receipt, uri, _, fields = task.arrival(task.records)
        in_thread(book.receive, [(receipt, uri, files, fields)])

    trace = stored_trace(root.trace_id)
    assert names(trace) == ["call", "call", "driver", "task"]
    assert trace.trace.info.token_usage == tokens(15)
    found = ctx_autolog.receipt()
    assert (found.made, found.stored, found.tasks, found.complete) == (4, 4, 1, True)


def test_spans_that_come_too_late_are_said_to_be_lost(
    book: Ledger, files: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning says what to do, where the store needs the trace to be open."""
    with mlflow.start_span("driver") as root:
        book.open(receipts_come_home=True)
        task = task_below(root)
    mlflow.flush_trace_async_logging()
    for _ in range(2):
        book.receive([task.arrival(task.records)])

    (warning,) = our_warnings(caplog)
    assert "2 spans" in warning
    assert "inside the span" in warning
    assert names(stored_trace(root.trace_id)) == ["driver"]
    found = ctx_autolog.receipt(timeout=5)
    assert (found.made, found.stored, found.complete) == (3, 1, False)


@pytest.mark.parametrize("first", [None, StoreError("it answered 503")], ids=["at once", "later"])
def test_a_server_that_takes_no_single_spans_gets_the_trace_in_one_piece(
    book: Ledger, files: str, monkeypatch: pytest.MonkeyPatch, first: StoreError | None
) -> None:
    """Also where that is known, and where spans arrive, only after the driver's span has ended."""
    answers = [error for error in (first,) if error is not None]

    def refuse(destination: Destination, records: Sequence[Record]) -> None:
        raise answers.pop() if answers else StoreError("it answered 501", unsupported=True)

    # As a server's address does not tell that it has but a folder of files.
    monkeypatch.setattr(ledger, "store_takes_spans", lambda: True)
    with mlflow.start_span("driver") as root:
        book.open(receipts_come_home=True)
        for delivery in book.deliveries.all():
            monkeypatch.setattr(delivery, "_send", refuse)
        task, late = task_below(root), task_below(root)
        book.receive([task.arrival(task.records, experiment_id=files)])
    found = ctx_autolog.receipt(timeout=20)
    assert (found.made, found.stored, found.complete) == (3, 3, True)

    # Once with its receipt, once more from what its worker has kept, as Spark may not deliver it.
    book.receive([late.arrival(late.records, experiment_id=files)])
    book.receive([(None, None, files, [tuple(record[:3]) for record in late.records], "", 0)])
    found = ctx_autolog.receipt(timeout=20)
    assert (found.made, found.stored, found.complete) == (5, 5, True)
    trace = stored_trace(root.trace_id)
    assert names(trace) == ["call", "call", "driver", "task", "task"]
    assert trace.trace.info.token_usage == tokens(20)
    assert trace.trace.info.state == "OK"


def test_spans_that_are_brought_again_are_not_late(book: Ledger, files: str) -> None:
    """A worker keeps what it has handed over until it knows that it has arrived."""
    with mlflow.start_span("driver") as root:
        book.open(receipts_come_home=True)
        task = task_below(root)
        in_thread(book.receive, [task.arrival(task.records)])
    book.receive([(None, None, files, [tuple(record[:3]) for record in task.records], "", 0)])
    found = ctx_autolog.receipt()
    assert (found.made, found.stored, found.lost, found.complete) == (3, 3, 0, True)


# Every way in which a span can be dropped.


def _configure(book: Ledger) -> None:
    for delivery in book.deliveries.all():
        delivery.configure(driver.settings())


def _no_room(book: Ledger, task: AtWork, patched: pytest.MonkeyPatch) -> list[Record]:
    ctx_autolog.enable(flush_timeout=5, spool_max_bytes=0, max_waiting_bytes=1_000_000)
    _configure(book)
    large = task.records[0]._replace(payload=bytes(1_000_001))
    return [large, *task.records[1:]]


def _refused(book: Ledger, task: AtWork, patched: pytest.MonkeyPatch) -> list[Record]:
    ctx_autolog.enable(flush_timeout=5, spool_max_bytes=0)
    _configure(book)
    return [task.records[0]._replace(payload=b"\xff garbage"), *task.records[1:]]


def _refused_unnamed(book: Ledger, task: AtWork, patched: pytest.MonkeyPatch) -> list[Record]:
    ctx_autolog.enable(flush_timeout=5)
    refused = task.records[0].key

    def send_some(destination: Destination, records: Sequence[Record]) -> None:
        # As a collector does, which has them in the order in which they come.
        kept = [record for record in records if record.key != refused]
        send(destination, kept)
        if len(kept) < len(records):
            raise StoreError("it rejected 1 span", rejected=len(records) - len(kept))

    for delivery in book.deliveries.all():
        patched.setattr(delivery, "_send", send_some)
    return task.records


def _too_late(book: Ledger, task: AtWork, patched: pytest.MonkeyPatch) -> list[Record]:
    return task.records


# Where it can happen: while the trace is open, or once a store for whole traces has it.
WAYS = {
    Loss.NO_ROOM: (_no_room, 1),
    Loss.REFUSED: (_refused, 1),
    Loss.REFUSED_UNNAMED: (_refused_unnamed, 1),
    Loss.TOO_LATE: (_too_late, 3),
}


def test_every_way_to_lose_a_span_is_tried() -> None:
    """Whoever adds one adds a job that loses spans so."""
    assert set(WAYS) == set(Loss)


@pytest.mark.parametrize("way", Loss)
def test_the_receipt_is_what_the_store_has(
    book: Ledger,
    way: Loss,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Receipt, warning, strict and the trace's metadata all have what was counted in the store."""
    make, lost = WAYS[way]
    if way is Loss.TOO_LATE:
        request.getfixturevalue("files")
    with mlflow.start_span("driver") as root:
        book.open(receipts_come_home=True)
        assert ctx_autolog.flush(60)
        task = task_below(root, calls=2)
        arrival = task.arrival(make(book, task, monkeypatch))
        if way is not Loss.TOO_LATE:
            book.receive([arrival])
    mlflow.flush_trace_async_logging()
    if way is Loss.TOO_LATE:
        book.receive([arrival])

    found = ctx_autolog.receipt(root.trace_id, timeout=10)
    trace = stored_trace(root.trace_id)
    assert (found.made, found.lost, found.waiting) == (4, lost, 0)
    assert found.stored == len(trace.spans) == 4 - lost
    assert found.losses == {way.value: lost}
    assert not found.complete
    assert f"{lost} lost" in book.explain(found)
    assert way.value in book.explain(found)
    ctx_autolog.enable(strict=True)
    with pytest.raises(ctx_autolog.IncompleteTraceError, match=f"{lost} lost"):
        ctx_autolog.receipt(root.trace_id, timeout=10)
    if way is not Loss.TOO_LATE:
        assert any(f"{lost} lost: {way.value}" in warning for warning in our_warnings(caplog))
        (note,) = [
            note for note in ctx_autolog.report(root.trace_id).notes if "asked the store" in note
        ]
        assert f"4 spans made, {4 - lost} stored" in note
        assert json.loads(trace.metadata[RECEIPT]) == {"made": 4, "stored": 4 - lost, "lost": lost}


def test_what_comes_too_late_without_a_trace_of_its_own_is_lost(
    book: Ledger, files: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A receipt of tasks whose trace nobody knows counts what was acknowledged, and no more."""
    with mlflow.start_span("elsewhere") as root:
        task = task_below(root)
    mlflow.flush_trace_async_logging()
    book.receive([task.arrival(task.records)])

    found = ctx_autolog.receipt()
    assert (found.made, found.stored, found.lost, found.complete) == (2, 0, 2, False)


# When a job is over.


def test_a_job_is_shown_once_it_is_over(
    book: Ledger, monkeypatch: pytest.MonkeyPatch, database: Destination
) -> None:
    """Where its span ends, and not again where what comes late is shown below something else."""
    shown: list[str] = []
    monkeypatch.setattr(book, "_show_job", lambda book, receipt: shown.append(str(receipt)))
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        early, late = task_below(root), task_below(root)
        book.receive([early.arrival(early.records)])
    mlflow.flush_trace_async_logging()
    assert ctx_autolog.flush(60)
    assert shown == ["3 spans made, 3 stored"]

    book.receive([late.arrival(late.records)])
    assert ctx_autolog.flush(60)
    assert shown == ["3 spans made, 3 stored"]
    assert str(ctx_autolog.receipt(root.trace_id)) == "5 spans made, 5 stored"


# After a driver that has died.


@pytest.mark.parametrize(("driver_id", "state"), [("elsewhere 1", "ERROR"), (None, "IN_PROGRESS")])
def test_a_trace_whose_driver_has_died_is_over(
    book: Ledger, database: Destination, driver_id: str | None, state: str
) -> None:
    """Recovery ends it, unless the driver is known to live, and corrects what was said of it."""
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        assert ctx_autolog.flush(60)
        info, _ = store.read_trace(database, root.trace_id)
        info.trace_metadata[RECEIPT] = json.dumps({"made": 2, "stored": 1, "waiting": 1})
        if driver_id is not None:
            info.trace_metadata[DRIVER] = driver_id
        running = {"mlflow.spanType": "TASK", "spark.task.outcome": "running"}
        gone = {"host.name": socket.gethostname(), "process.pid": 2**22 + 1}
        task = _away(root, 0xF8, "task", attributes={**running, **gone})
        call = _away(root, 0xF9, "call", parent_id=0xF8, attributes={USAGE: tokens(4)})
        records = [store.span_record(task), store.span_record(call), store.trace_record(info)]
        send(database, records)
        totals.write_stored_totals(database, root.trace_id)

        info, spans = store.read_trace(database, root.trace_id)
        assert str(info.state) == state
        assert info.token_usage == tokens(4)
        assert json.loads(info.trace_metadata[RECEIPT]) == {"made": 3, "stored": 3}
        told = {span.span_id: span.get_attribute("spans.made") for span in spans}
        assert told[task.span_id] == 2
    # Whose driver asks the store, and knows all of it now.
    assert ctx_autolog.receipt(root.trace_id).complete


# What arrives when the driver is gone.


def _left_behind(root: Any, number: int) -> list[Record]:
    """Return what a killed worker has left: a task that told nothing, and a call."""
    gone = {"host.name": "elsewhere", "process.pid": 1}
    running = {"mlflow.spanType": "TASK", "spark.task.outcome": "running", **gone}
    facts = {"mlflow.spanType": "CHAT_MODEL", USAGE: tokens(4)}
    task = _away(root, number, "task", attributes=running)
    call = _away(root, number + 1, "call", parent_id=number, attributes=facts)
    return [store.span_record(task), store.span_record(call)]


def test_a_report_corrects_totals(book: Ledger, database: Destination) -> None:
    """What a task of another application has brought is in them, though its driver knows no trace.

    And a second report has nothing to write.
    """
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        task = task_below(root)
        facts = {"mlflow.spanType": "CHAT_MODEL", USAGE: tokens(10)}
        above = int(task.receipt.task_span_id, 16)
        told = store.span_record(_away(root, 0xC4, "call", parent_id=above, attributes=facts))
        left = _left_behind(root, 0xC0)
        book.receive([task.arrival([*task.records, told])])
    assert ctx_autolog.flush(60)
    book.forget(root.trace_id)
    send(database, left)
    assert usage_in_store(root.trace_id) == tokens(10)

    assert ctx_autolog.report(root.trace_id).made.tokens == tokens(14)["total_tokens"]
    assert usage_in_store(root.trace_id) == tokens(14)
    with patch.object(totals, "send") as sending:
        ctx_autolog.report(root.trace_id)
    sending.assert_not_called()


def test_a_report_ends_a_trace_whose_driver_has_died(book: Ledger, database: Destination) -> None:
    """Where it ran on this host; nobody else can know."""
    states = {}
    for driver_id in (f"{socket.gethostname()} {2**22 + 1}", "elsewhere 1", None):
        with mlflow.start_span("driver") as root:
            ctx_autolog.capture()
            assert ctx_autolog.flush(60)
            info, _ = store.read_trace(database, root.trace_id)
            if driver_id is not None:
                info.trace_metadata[DRIVER] = driver_id
            send(database, [store.trace_record(info), *_left_behind(root, 0xC2)])
            ctx_autolog.report(root.trace_id)
            states[driver_id] = str(store.read_trace(database, root.trace_id)[0].state)
    assert list(states.values()) == ["ERROR", "IN_PROGRESS", "IN_PROGRESS"]


def test_two_who_correct_totals_lose_nothing(book: Ledger, database: Destination) -> None:
    """One who has written what another knows better by now adds up once more."""
    with mlflow.start_span("driver") as root:
        ctx_autolog.capture()
        left, left_later = _left_behind(root, 0xD0), _left_behind(root, 0xD2)
    assert ctx_autolog.flush(60)
    send(database, left)
    read = totals.read_trace
    has_read = False

    def read_slowly(*of: Any) -> Any:
        nonlocal has_read
        found = read(*of)
        if not has_read:
            has_read = True
            send(database, left_later)
            # The other one.
            totals.write_stored_totals(database, root.trace_id)
            assert usage_in_store(root.trace_id) == tokens(8)
        return found

    with patch.object(totals, "read_trace", read_slowly):
        totals.write_stored_totals(database, root.trace_id)
    assert usage_in_store(root.trace_id) == tokens(8)
