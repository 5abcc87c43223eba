"""What the driver says where functions ran on workers and no spans of their calls arrived."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import mlflow
import pytest
from submitted import arrived

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog import exceptions
from mlflow_ctx_autolog.delivery.receipts import TaskReceipt
from mlflow_ctx_autolog.delivery.spool import Destination
from mlflow_ctx_autolog.diagnosis.checks import likely_causes
from mlflow_ctx_autolog.driver import exports
from mlflow_ctx_autolog.driver import handover as driver
from mlflow_ctx_autolog.driver.homecoming import Arrival
from mlflow_ctx_autolog.driver.ledger import Ledger
from mlflow_ctx_autolog.stores import tracking_store as store
from mlflow_ctx_autolog.stores.sending import send


@pytest.fixture
def book(
    monkeypatch: pytest.MonkeyPatch, database: Destination, caplog: pytest.LogCaptureFixture
) -> Iterator[Ledger]:
    """The driver's ledger, fresh, whose warnings are heard."""
    fresh = Ledger(driver.settings)
    fresh.likely_causes = likely_causes
    monkeypatch.setattr(driver.driver, "ledger", fresh)
    with caplog.at_level(logging.WARNING, logger="mlflow_ctx_autolog"):
        yield fresh
    ctx_autolog.disable()


def arrival(trace_id: str, silence: str | None, number: int = 1) -> Arrival:
    """Return what a task brings home that has left no span."""
    receipt = TaskReceipt(trace_id, f"{number:016x}", made=0, silence=silence)
    return receipt.to_json(), None, "0", []


def end_of(book: Ledger, arrivals: Sequence[str | None] = (), **handed_over: bool | int) -> str:
    """Let a trace end that was handed to Spark, and whose tasks brought home these silences."""
    with mlflow.start_span("job") as span:
        book.open(**{"receipts_come_home": True, "functions": 1, **handed_over})  # type: ignore[arg-type]
        for number, silence in enumerate(arrivals):
            book.receive([arrival(span.trace_id, silence, number)])
    mlflow.flush_trace_async_logging()
    return str(span.trace_id)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if "Most likely" in text]


def test_silence_is_told_once_at_the_end_of_the_trace(
    book: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    """However many tasks were silent, there is one warning: how many, why, and what to check."""
    trace_id = end_of(book, ["tracing is off", None, "tracing is off"])

    (text,) = told(caplog)
    assert f"2 of 3 tasks of trace {trace_id} ran on workers" in text
    assert "left no span: tracing is off." in text
    assert "Tracing is on" in text
    assert "ctx_autolog.doctor()" in text
    assert book.flush(10)
    assert len(told(caplog)) == 1


def test_tasks_that_are_not_silent(book: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    """Tasks that called no model, and functions that have not run yet, are nothing to speak of."""
    end_of(book, [None, None])
    end_of(book, [])

    assert told(caplog) == []


def test_silence_of_a_task_that_is_late(book: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    """A task that ends after the driver's span is heard, too."""
    trace_id = end_of(book)
    book.receive([arrival(trace_id, "tracing is off")])

    (text,) = told(caplog)
    assert trace_id in text


def test_silence_without_a_trace(book: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    """Where each task is a trace of its own, or its carrier could not be read, it is told once."""
    book.receive([arrival("", "the carrier has version 2", 1)])
    book.receive([arrival("", "the carrier has version 2", 2)])

    (text,) = told(caplog)
    assert "the carrier has version 2" in text


def test_no_task_is_in_the_store_where_none_can_tell(
    book: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    """On Spark Connect no receipt comes home: where the store has no task, that is said."""
    trace_id = end_of(book, receipts_come_home=False)

    (text,) = told(caplog)
    assert f"1 functions have run in trace {trace_id}" in text
    assert "The tracking store can be reached" in text


def test_capturing_a_context_is_no_silence(book: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    """Who captures a context, for whatever it is for, has not handed over a function."""
    end_of(book, receipts_come_home=False, functions=0)

    assert told(caplog) == []


@pytest.mark.parametrize("silence", ["tracing is off", None])
def test_a_stored_task_tells_of_its_silence(
    book: Ledger, database: Destination, caplog: pytest.LogCaptureFixture, silence: str | None
) -> None:
    """On Spark Connect a task's own span says why there are none below it."""
    with mlflow.start_span("job") as span:
        book.open(receipts_come_home=False, functions=1)
        attributes = TaskReceipt.attributes(1, {}, {}, silence)
        with mlflow.start_span("task", span_type="TASK") as task:
            task.set_attributes({"spark.task.outcome": "completed", **attributes})
            record = exports.snapshot(task)
        assert record is not None
        send(database, [store.span_record(record)])
    mlflow.flush_trace_async_logging()

    texts = told(caplog)
    assert len(texts) == (silence is not None)
    assert all(f"of trace {span.trace_id}" in text for text in texts)


class WayHome:
    """Stands in for a Spark accumulator."""

    def __init__(self) -> None:
        self.arrivals: list[Arrival] = []

    def add(self, arrivals: Sequence[Arrival]) -> None:
        self.arrivals.extend(arrivals)


def test_a_task_that_could_not_begin_says_so_at_home(
    monkeypatch: pytest.MonkeyPatch, database: Destination
) -> None:
    """A function that runs untraced on a worker is told of on the driver, where somebody reads."""
    monkeypatch.setattr(exceptions, "_warned", set())
    home = WayHome()
    run = arrived(len, '{"version": 99}', required=False, relay=home)

    assert run("abc") == 3
    ((text, _, _, records),) = home.arrivals
    assert "the carrier has version 99" in str(TaskReceipt.from_json(str(text)).silence)
    assert records == []
