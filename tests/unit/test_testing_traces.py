"""What can be asserted of a stored trace, and that each assertion can fail."""

from __future__ import annotations

import mlflow
import pytest

from mlflow_ctx_autolog.testing import StoredTrace, TrackingStore, stored_trace


def job(*calls: tuple[int, str], beside: str | None = None, between: bool = False) -> StoredTrace:
    """Store a trace with calls, each a partition and a prompt."""
    with mlflow.start_span("job") as root:
        for partition in sorted({partition for partition, _ in calls}, reverse=True):
            facts = {"spark.partition.id": partition, "spark.task.attempt_number": 0}
            with mlflow.start_span("extract", span_type="TASK", attributes=facts):
                for where, prompt in calls:
                    if where == partition and between:
                        with mlflow.start_span("chapter"):
                            call(prompt)
                    elif where == partition:
                        call(prompt)
        if beside is not None:
            call(beside)
    return stored_trace(root.trace_id)


def call(prompt: str) -> None:
    with mlflow.start_span("Completions", span_type="CHAT_MODEL") as span:
        span.set_inputs({"prompt": prompt})


def test_a_trace_as_it_should_be_passes(ctx_autolog_store: TrackingStore) -> None:
    """Calls below tasks, directly or below spans of the user's, are nested, and each is there."""
    trace = job((0, "a"), (1, "b"), (1, "c"), between=True)

    trace.assert_nested()
    trace.assert_nested(calls=3)
    trace.assert_no_repeats()
    assert trace.calls_per_task == [1, 2]
    assert trace.path_to(trace.calls[0]) == ["job", "extract", "chapter", "Completions"]
    assert ctx_autolog_store.trace().trace.info.trace_id == trace.trace.info.trace_id


def test_a_call_beside_the_tasks_is_named(ctx_autolog_store: TrackingStore) -> None:
    """A call that is below the driver's span and no task is not nested."""
    trace = job((0, "a"), beside="b")

    assert sorted(trace.is_nested(each) for each in trace.calls) == [False, True]
    with pytest.raises(AssertionError, match=r"1 of 2 calls .* 'job': job > Completions"):
        trace.assert_nested()


@pytest.mark.parametrize(("calls", "wanted"), [(None, "at least one"), (2, "2")])
def test_missing_calls_are_counted(
    ctx_autolog_store: TrackingStore, calls: int | None, wanted: str
) -> None:
    """Too few calls are as wrong as calls in the wrong place."""
    with pytest.raises(AssertionError, match=f"the trace has 0 calls, not {wanted}"):
        job().assert_nested(calls=calls)


def test_a_repeated_call_is_named_with_its_tasks(ctx_autolog_store: TrackingStore) -> None:
    """The same inputs in two tasks are a repeat."""
    trace = job((0, "a"), (1, "a"), (1, "b"))

    with pytest.raises(
        AssertionError, match=r"1 calls .* more than once: .*'a'.*partition 1.*partition 0"
    ):
        trace.assert_no_repeats()


def test_a_store_with_several_traces_has_no_only_one(ctx_autolog_store: TrackingStore) -> None:
    """trace() does not pick one of several, or of none."""
    with pytest.raises(AssertionError, match="0 traces, not one"):
        ctx_autolog_store.trace()
    job()
    job()
    with pytest.raises(AssertionError, match="2 traces, not one"):
        ctx_autolog_store.trace()
    assert len(ctx_autolog_store.traces()) == 2
    with pytest.raises(AssertionError, match="tr-0 is not in the store"):
        ctx_autolog_store.trace("tr-0")
