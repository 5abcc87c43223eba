"""What a worker does with a function, without Spark."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import mlflow
import pandas as pd
import pyarrow as pa
import pytest
from workload import StoredTrace, stored_trace, stored_traces

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog import spark, spark_task, worker
from mlflow_ctx_autolog.exceptions import CarrierError


@pytest.fixture
def carrier(experiment_id: str) -> tuple[str, str]:
    """A carrier of another process, and the id of its trace."""
    with mlflow.start_span("driver") as span:
        document = json.loads(ctx_autolog.capture().to_json())
    return json.dumps({**document, "process_id": "another"}), span.trace_id


def _run(function: Callable[..., Any], carrier: str, *args: Any, required: bool = False) -> Any:
    return spark.carrying(function, carrier, required=required)(*args)


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
        function = spark.carrying(extract, carrier[0], required=False, repeated=repeated)
        assert function(**names) == names


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
    assert outside == [None] * 3


@pytest.mark.parametrize("text", ["{", '{"version": 99}', "[]"])
def test_a_carrier_that_cannot_be_read_does_not_stop_the_function(
    text: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function runs untraced with one warning; where it was asked for, it raises instead."""
    monkeypatch.setattr(worker, "_warned", set())
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
    monkeypatch.setattr(worker, "_warned", set())

    def broken() -> Any:
        raise RuntimeError("no tracing today")

    monkeypatch.setattr(worker, "worker_process", broken)
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


def test_a_function_keeps_its_looks() -> None:
    """To inspect, a function that carries a context is the user's: name, text and parameters."""
    import inspect

    def extract(key: int, group: str = "x", *, flag: bool = False) -> None:
        """Read contracts."""

    carried = spark.carrying(extract, "{}", required=False)
    assert (carried.__name__, carried.__doc__) == ("extract", "Read contracts.")
    specification = inspect.getfullargspec(carried)
    assert (specification.args, specification.kwonlyargs) == (["key", "group"], ["flag"])


def test_a_function_travels_without_the_library() -> None:
    """Where the library is missing, the function can be loaded, and says what to install."""
    from pyspark import cloudpickle

    def extract(items: Iterator[int]) -> Iterator[int]:
        return items

    pickled = cloudpickle.dumps(spark.carrying(extract, "{}", required=False))
    script = """
import pickle, sys
sys.modules["mlflow_ctx_autolog"] = None
function = pickle.load(sys.stdin.buffer)
try:
    function(iter([]))
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
