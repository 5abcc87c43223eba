"""What a worker does with a function, without Spark."""

from __future__ import annotations

import json
import logging
import multiprocessing
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import mlflow
import pandas as pd
import pyarrow as pa
import pytest
from mlflow.entities import Span
from pyspark import cloudpickle
from submitted import arrived
from workload import StoredTrace, stored_trace, stored_traces

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog import exceptions
from mlflow_ctx_autolog.delivery.receipts import TaskReceipt
from mlflow_ctx_autolog.delivery.spool import Destination, Record
from mlflow_ctx_autolog.driver.submitted import SubmittedFunction
from mlflow_ctx_autolog.exceptions import CarrierError
from mlflow_ctx_autolog.stores.tracking_store import read_trace, spans_of
from mlflow_ctx_autolog.worker import attempt, spark_task
from mlflow_ctx_autolog.worker.process import worker_process


@pytest.fixture
def carrier(experiment_id: str) -> tuple[str, str]:
    """A carrier of another process, and the id of its trace."""
    with mlflow.start_span("driver") as span:
        document = json.loads(ctx_autolog.capture().to_json())
    return json.dumps({**document, "process_id": "another"}), span.trace_id


def _run(function: Callable[..., Any], carrier: str, *args: Any, required: bool = False) -> Any:
    return arrived(function, carrier, required=required)(*args)


def _only_task(trace_id: str) -> Any:
    (task,) = stored_trace(trace_id).tasks
    return task


def _numbers() -> Iterator[int]:
    return iter([1, 2, 3])


def test_a_generator_is_one_task_from_its_first_to_its_last_item(
    carrier: tuple[str, str],
) -> None:
    """Rows are counted as they pass, and the task ends with the last one."""

    def double(items: Iterator[int]) -> Iterator[int]:
        for item in items:
            yield item
            yield item

    text, trace_id = carrier
    assert list(_run(double, text, _numbers())) == [1, 1, 2, 2, 3, 3]
    facts = _only_task(trace_id).attributes
    assert (facts["spark.rows.in"], facts["spark.rows.out"]) == (3, 6)
    assert facts["spark.task.outcome"] == "completed"


@pytest.mark.parametrize(
    ("result", "rows"), [(None, 0), ([1, 2], 2), (range(4), 1), ("text", 1), ({"a": 1}, 1)]
)
def test_what_is_not_an_iterator_is_returned_as_it_is(
    carrier: tuple[str, str], result: object, rows: int
) -> None:
    """A finished result passes through untouched, and ends the task."""
    text, trace_id = carrier
    assert _run(lambda items: result, text, _numbers()) is result
    assert _only_task(trace_id).attributes["spark.rows.out"] == rows


def test_parameters_of_the_function_may_have_any_name(carrier: tuple[str, str]) -> None:
    """Keyword arguments reach the function whatever they are called."""

    def extract(**named: int) -> dict[str, int]:
        return named

    names = dict.fromkeys(("self", "function", "begin", "task", "name", "args", "carrier"), 1)
    for repeated in (False, True):
        function = arrived(extract, carrier[0], required=False, repeated=repeated)
        assert function(**names) == names


@pytest.mark.parametrize("repeated", [True, False])
def test_a_function_that_was_called_on_the_driver_still_pickles(
    carrier: tuple[str, str], repeated: bool
) -> None:
    """Trying a function out first does not keep it from being handed to Spark."""
    options = {"name": "extract", "repeated": repeated}
    function = SubmittedFunction(lambda item: [item], options, carrier[0])
    assert function(1) == [1]
    assert cloudpickle.loads(cloudpickle.dumps(function))(2) == [2]


def test_a_lazy_iterable_is_traced_while_it_is_read(carrier: tuple[str, str]) -> None:
    """An object that is iterated later is part of the task as well."""

    class Lazy:
        def __iter__(self) -> Iterator[int]:
            with mlflow.start_span("inside"):
                yield 1

    text, trace_id = carrier
    assert list(_run(lambda items: Lazy(), text, _numbers())) == [1]
    trace = stored_trace(trace_id)
    assert [span.name for span in trace.children_of(trace.tasks[0])] == ["inside"]


def test_an_exception_is_the_same_object(carrier: tuple[str, str]) -> None:
    """What the function raises is what the caller gets, not a copy and not wrapped."""
    error = KeyError("clause")

    def fail(items: Iterator[int]) -> Iterator[int]:
        yield next(items)
        raise error

    text, trace_id = carrier
    with pytest.raises(KeyError) as caught:
        list(_run(fail, text, _numbers()))
    assert caught.value is error
    assert caught.value.__cause__ is None
    assert _only_task(trace_id).status.status_code == "ERROR"


def test_a_function_closed_early_may_clean_up(carrier: tuple[str, str]) -> None:
    """Closing the result closes the user's generator, within the task."""
    closed = []

    def careful(items: Iterator[int]) -> Iterator[int]:
        try:
            yield from items
        finally:
            with mlflow.start_span("clean-up"):
                closed.append(True)

    text, trace_id = carrier
    result = _run(careful, text, _numbers())
    next(result)
    result.close()
    assert closed == [True]
    trace = stored_trace(trace_id)
    assert trace.tasks[0].attributes["spark.task.outcome"] == "closed early"
    assert [span.name for span in trace.children_of(trace.tasks[0])] == ["clean-up"]


def test_context_variables_do_not_leak_between_function_and_spark(
    carrier: tuple[str, str],
) -> None:
    """A span that the function leaves open over a yield is not active outside of it."""

    def spanning(items: Iterator[int]) -> Iterator[str]:
        with mlflow.start_span("open"):
            for _ in items:
                active = mlflow.get_current_active_span()
                yield active.name if active else ""

    text, _ = carrier
    outside = []
    inside = []
    for name in _run(spanning, text, _numbers()):
        inside.append(name)
        outside.append(mlflow.get_current_active_span())
    assert inside == ["open"] * 3
    # What is not the function's is below the task.
    assert [span.name for span in outside if span is not None] == ["spanning"] * 3
    assert mlflow.get_current_active_span() is None


@pytest.mark.parametrize("text", ["{", '{"version": 99}', "[]"])
def test_a_carrier_that_cannot_be_read_does_not_stop_the_function(
    text: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function runs untraced with one warning; where it was asked for, it raises instead."""
    monkeypatch.setattr(exceptions, "_warned", set())
    with caplog.at_level(logging.WARNING, logger="mlflow_ctx_autolog"):
        for _ in range(3):
            assert list(_run(lambda items: items, text, _numbers())) == [1, 2, 3]
    ours = [record for record in caplog.records if record.name.startswith("mlflow_ctx_autolog")]
    assert len(ours) == 1
    assert "not traced" in ours[0].getMessage()
    with pytest.raises(CarrierError):
        _run(lambda items: items, text, _numbers(), required=True)


def test_a_failure_of_ours_does_not_stop_the_function(
    carrier: tuple[str, str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If tracing cannot begin for any reason, the function runs untraced with one warning."""
    monkeypatch.setattr(exceptions, "_warned", set())

    def broken() -> Any:
        raise RuntimeError("no tracing today")

    monkeypatch.setattr(attempt, "worker_process", broken)
    assert list(_run(lambda items: items, carrier[0], _numbers())) == [1, 2, 3]
    assert "no tracing today" in caplog.text


@pytest.mark.parametrize("nonsense", [None, 1, object(), b"{}"])
def test_what_is_no_carrier_is_refused(nonsense: object) -> None:
    """attach() of anything else names what it was given."""
    with pytest.raises(CarrierError, match=type(nonsense).__name__):
        ctx_autolog.attach(nonsense)


def test_without_a_drivers_span_the_task_is_a_trace(experiment_id: str) -> None:
    """attach() of a context without a parent makes one trace, in the context's session."""
    context = ctx_autolog.DriverContext(
        tracking_uri=mlflow.get_tracking_uri(), experiment_id=experiment_id, session_id="session-1"
    )
    with ctx_autolog.attach(context, "lonely"), mlflow.start_span("inside"):
        pass

    (trace,) = stored_traces(experiment_id)
    assert trace.root.name == "lonely"
    assert [span.name for span in trace.children_of(trace.root)] == ["inside"]
    # Older servers keep it as JSON.
    session = trace.metadata["mlflow.trace.session"]
    assert session.strip('"') == "session-1"
    filtered = mlflow.search_traces(
        locations=[experiment_id],
        filter_string=f"metadata.`mlflow.trace.session` = '{session}'",
        return_type="list",
    )
    assert [StoredTrace(found).root.name for found in filtered] == ["lonely"]


@pytest.mark.parametrize("of_driver", [{}, {"build": "driver"}])
def test_what_a_task_says_is_known_of_its_own_trace(
    experiment_id: str, of_driver: dict[str, str]
) -> None:
    """Beside what the driver has declared, whose word holds."""
    context = ctx_autolog.DriverContext(
        tracking_uri=mlflow.get_tracking_uri(),
        experiment_id=experiment_id,
        metadata=of_driver,
        tags={"fruit": "pear"},
    )
    with ctx_autolog.attach(context, "lonely"), mlflow.start_span("inside"):
        mlflow.update_current_trace(
            tags={"fruit": "apple", "who": "task"},
            metadata={"build": "task"},
            client_request_id="req-1",
            response_preview="short",
            state="ERROR",
        )

    (trace,) = stored_traces(experiment_id)
    info = trace.trace.info
    # Older servers keep it as JSON.
    assert info.tags["fruit"].strip('"') == "pear"
    assert info.tags["who"] == "task"
    assert trace.metadata["build"] == (of_driver or {"build": "task"})["build"]
    assert (info.client_request_id, info.response_preview) == ("req-1", "short")
    assert info.state == "ERROR"
    assert trace.root.name == "lonely"
    assert info.tags["mlflow.traceName"] == "lonely"


def test_what_this_process_knows_of_a_trace_of_its_own_stays(experiment_id: str) -> None:
    """A task that runs beside its driver takes nothing away from it."""
    with mlflow.start_span("driver") as span:
        mlflow.update_current_trace(tags={"fruit": "pear"}, metadata={"build": "driver"})
        carrier = ctx_autolog.capture()
        with ctx_autolog.attach(carrier, "beside"), mlflow.start_span("inside"):
            mlflow.update_current_trace(tags={"who": "task"})
    mlflow.flush_trace_async_logging()
    info = stored_trace(span.trace_id).trace.info
    assert info.tags["fruit"] == "pear"
    assert info.tags["who"] == "task"
    assert info.trace_metadata["build"] == "driver"


class Home(list[Any]):
    """What tasks add to a Spark accumulator."""

    def add(self, arrivals: list[Any]) -> None:
        self.extend(arrivals)

    @property
    def receipts(self) -> list[TaskReceipt]:
        return [TaskReceipt.from_json(arrival[0]) for arrival in self if arrival[0] is not None]

    @property
    def spans(self) -> list[str]:
        """Return the names of the spans that came home."""
        records = [Record(*fields) for arrival in self for fields in arrival[3]]
        return sorted(str(span.name) for span in spans_of(records))


def _context(tracking_uri: str | None, **settings: Any) -> ctx_autolog.DriverContext:
    """Return the context of a driver that is elsewhere."""
    return ctx_autolog.DriverContext(
        tracking_uri=tracking_uri,
        experiment_id="0",
        traceparent=f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01",
        process_id="another",
        config=ctx_autolog.Config.from_env(**settings),
    )


def _trace_id(context: ctx_autolog.DriverContext) -> str:
    return f"tr-{str(context.traceparent).split('-')[1]}"


def _stored(database: Destination, context: ctx_autolog.DriverContext) -> dict[str, Span]:
    _, spans = read_trace(database, _trace_id(context))
    return {span.name: span for span in spans}


def _call(*_: object) -> list[str]:
    """Do what a user's function does, with two model calls."""
    for number in (1, 2):
        with mlflow.start_span(f"call-{number}") as span:
            usage = {"input_tokens": 10, "output_tokens": number, "total_tokens": 10 + number}
            span.set_attribute("mlflow.chat.tokenUsage", usage)
            span.set_attribute("mlflow.llm.cost", {"total_cost": 0.25})
    return ["done"]


def _run_to(home: Home, function: Callable[..., Any], context: ctx_autolog.DriverContext) -> Any:
    carried = arrived(function, context.to_json(), required=True, relay=home)
    return carried(_numbers())


def test_a_task_hands_back_a_receipt(
    database: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the store takes all spans in time, the receipt goes home alone, and says so."""
    monkeypatch.setattr(attempt, "_PATIENCE", 60.0)
    home, context = Home(), _context(database.tracking_uri, transport="direct")
    assert _run_to(home, _call, context) == ["done"]

    ((_, tracking_uri, experiment_id, records, _),) = home
    assert (tracking_uri, experiment_id, list(records)) == (database.tracking_uri, "0", [])
    (receipt,) = home.receipts
    stored = _stored(database, context)
    assert sorted(stored) == ["_call", "call-1", "call-2"]
    assert (receipt.trace_id, receipt.task_span_id) == (
        _trace_id(context),
        stored["_call"].span_id,
    )
    assert (receipt.made, receipt.delivered, receipt.waiting, receipt.lost) == (3, 3, 0, 0)
    assert receipt.usage == {"input_tokens": 20, "output_tokens": 3, "total_tokens": 23}
    assert receipt.cost == {"total_cost": 0.5}
    assert receipt.first_error is None


def test_the_tasks_span_is_a_receipt_of_its_own(database: Destination) -> None:
    """What a task has made and used is read from its span where no receipt comes home."""
    context = _context(database.tracking_uri, transport="direct")
    with ctx_autolog.attach(context, "task"):
        _call()

    task = _stored(database, context)["task"]
    found = TaskReceipt.from_attributes(task.trace_id, task.span_id, task.attributes)
    assert found is not None
    assert (found.made, found.usage["total_tokens"], found.cost["total_cost"]) == (3, 23, 0.5)


def test_a_tasks_span_is_announced(database: Destination) -> None:
    """While the task runs, its span is in the store, so that what lies beneath has a parent."""
    context = _context(database.tracking_uri, transport="direct")
    with ctx_autolog.attach(context, "task"):
        assert worker_process().deliveries.to(database).flush(60)
        task = _stored(database, context)["task"]
        assert task.attributes["spark.task.outcome"] == "running"
        assert TaskReceipt.from_attributes("", task.span_id, task.attributes) is None
    assert _stored(database, context)["task"].attributes["spark.task.outcome"] == "completed"


def _tell_of_a_patient() -> None:
    with mlflow.start_span("child") as span:
        span.set_inputs({"text": "John Doe"})


def test_what_attach_redacts_is_withheld_in_child_processes(database: Destination) -> None:
    """Where its function is not to be had."""
    context = _context(database.tracking_uri)
    with ctx_autolog.attach(context, "task", redact=lambda _: "[redacted]"):
        child = multiprocessing.get_context("fork").Process(target=_tell_of_a_patient)
        child.start()
        child.join(60)

    (span,) = [each for each in _stored(database, context).values() if each.name == "child"]
    assert "John" not in json.dumps(span.to_dict())
    assert span.inputs is None


def test_spans_that_only_the_driver_can_store_come_home(database: Destination) -> None:
    """Without a store of its own, a worker hands back all spans, each with its own task."""
    context = _context(None)
    for _ in range(2):
        home = Home()
        _run_to(home, _call, context)
        assert home.spans == ["_call", "call-1", "call-2"]
        (receipt,) = home.receipts
        assert (receipt.made, receipt.delivered, receipt.waiting) == (3, 0, 3)
        assert [arrival[1] for arrival in home] == [None]


def test_spans_that_the_store_does_not_take_come_home(database: Destination) -> None:
    """Where the store is gone, spans go home with the address they were for, and the reason."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nowhere = f"http://127.0.0.1:{taken.getsockname()[1]}"
    home = Home()
    _run_to(home, _call, _context(nowhere))

    assert home.spans == ["_call", "call-1", "call-2"]
    (receipt,) = home.receipts
    assert (receipt.made, receipt.delivered, receipt.waiting) == (3, 0, 3)
    assert "cannot be reached" in str(receipt.first_error)
    assert [arrival[1] for arrival in home] == [nowhere]


def test_what_goes_home_is_plain_data(database: Destination) -> None:
    """Spark pickles it, and the driver may have another release of the library."""
    home = Home()
    _run_to(home, _call, _context(None))
    ((receipt, _, experiment_id, records, _),) = home
    assert (type(receipt), type(experiment_id), type(records)) == (str, str, list)
    assert {tuple(map(type, record)) for record in records} == {(str, str, bytes)}
    assert {type(record) for record in records} == {tuple}


@pytest.mark.parametrize("is_closed", [True, False])
def test_from_a_task_that_does_not_succeed_nothing_goes_home(
    database: Destination, is_closed: bool
) -> None:
    """Spark takes nothing home from it, so that its spans must reach the store, with a receipt."""

    def steps(items: Iterator[int]) -> Iterator[int]:
        _call()
        yield from items
        raise KeyError("clause")

    home, context = Home(), _context(database.tracking_uri, transport="direct")
    result = _run_to(home, steps, context)
    if is_closed:
        next(result)
        result.close()
    else:
        with pytest.raises(KeyError, match="clause"):
            list(result)

    assert home == []
    task = _stored(database, context)["steps"]
    assert task.attributes["spans.made"] == 3
    assert task.attributes["spark.task.outcome"] == ("closed early" if is_closed else "failed")


def test_a_receipt_counts_its_own_task_only(database: Destination) -> None:
    """Of several tasks that one process runs, each has its own numbers."""
    homes, context = [Home(), Home()], _context(database.tracking_uri, transport="direct")
    _run_to(homes[0], _call, context)
    _run_to(homes[1], lambda items: list(items), context)

    assert [home.receipts[0].made for home in homes] == [3, 1]
    assert homes[1].receipts[0].usage == {}


def test_a_function_keeps_its_looks() -> None:
    """To inspect, a function that carries a context is the user's: name, text and parameters."""
    import inspect

    def extract(key: int, group: str = "x", *, flag: bool = False) -> None:
        """Read contracts."""

    carried = arrived(extract, "{}", required=False)
    assert (carried.__name__, carried.__doc__) == ("extract", "Read contracts.")
    specification = inspect.getfullargspec(carried)
    assert (specification.args, specification.kwonlyargs) == (["key", "group"], ["flag"])


def test_a_function_travels_without_the_library() -> None:
    """Where the library is missing, loading the function says what to install."""
    from pyspark import cloudpickle

    def extract(items: Iterator[int]) -> Iterator[int]:
        return items

    pickled = cloudpickle.dumps(SubmittedFunction(extract, {"name": "extract"}, "{}"))
    script = """
import pickle, sys
sys.modules["mlflow_ctx_autolog"] = None
try:
    pickle.load(sys.stdin.buffer)
except ImportError as error:
    print(error)
"""
    finished = subprocess.run(
        [sys.executable, "-c", script], input=pickled, capture_output=True, check=True
    )
    assert b"cannot be imported on the Spark worker" in finished.stdout
    assert b"pip install mlflow-ctx-autolog" in finished.stdout


@pytest.mark.parametrize(
    ("item", "rows"),
    [
        (pd.DataFrame({"a": [1, 2, 3]}), 3),
        (pd.Series([1, 2]), 2),
        (pd.Timestamp("2026-01-01"), 1),
        (pd.NaT, 1),
        (pa.table({"a": [1, 2]}), 2),
        (pa.RecordBatch.from_pydict({"a": [1]}), 1),
        (pa.array([1, 2, 3, 4]), 4),
        (pa.scalar("text"), 1),
        ((1, 2), 1),
        ("text", 1),
        (None, 1),
    ],
)
def test_rows_of_batches_are_counted(item: object, rows: int) -> None:
    """A batch or column counts its rows, anything else is one row."""
    assert spark_task.row_count(item) == rows
