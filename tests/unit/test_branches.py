"""That spans which lie in one another are stored together, or hang from what is stored."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import mlflow
import pytest
from pyspark import cloudpickle
from submitted import arrived
from workload import StoredTrace, stored_trace, stored_traces

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.spans.content import ContentPolicy
from mlflow_ctx_autolog.task import Task
from mlflow_ctx_autolog.worker.open_spans import Branch
from mlflow_ctx_autolog.worker.process import worker_process

cloudpickle.register_pickle_by_value(sys.modules[__name__])

Work = Callable[[], None]


def _run(
    work: Work, limit: int | None = 10, sampling: str | None = None
) -> tuple[StoredTrace, StoredTrace]:
    """Run it in a task as of another process; return the driver's trace, and the linked one."""
    with mlflow.start_span("driver") as span:
        document = json.loads(ctx_autolog.capture().to_json())
    document.update(process_id="another", spans_per_host=limit)
    document["config"]["sampling"] = sampling

    def task(_: Iterator[int]) -> None:
        work()

    arrived(task, json.dumps(document), required=False)(iter([1]))
    job = stored_trace(span.trace_id)
    others = stored_traces(job.trace.info.experiment_id)
    (*_, linked) = [job, *(each for each in others if each.trace.info.trace_id != span.trace_id)]
    return job, linked


def _span(name: str, *inside: str, fails: bool = False) -> None:
    with mlflow.start_span(name) as span:
        for each in inside:
            _span(each)
        if fails:
            span.set_status("ERROR")


def _paths(trace: StoredTrace, name: str) -> set[tuple[str, ...]]:
    return {tuple(trace.path_to(span)[:-1]) for span in trace.spans if span.name == name}


def test_what_lies_in_a_document_stays_with_it(experiment_id: str) -> None:
    """Also where the span around all documents becomes too large while it is open."""

    def work() -> None:
        with mlflow.start_span("partition"), mlflow.start_span("document"):
            # As in other threads.
            partition = mlflow.get_current_active_span().parent_id
            for _ in range(150):
                _other_document(partition)
            _span("call")

    def _other_document(parent_id: str) -> None:
        from mlflow.tracing.trace_manager import InMemoryTraceManager

        trace_id = mlflow.get_current_active_span().trace_id
        parent = InMemoryTraceManager.get_instance().get_span_from_id(trace_id, parent_id)
        mlflow.start_span_no_context("document", parent_span=parent).end()

    job, linked = _run(work)
    whole = ("driver", "task", "partition", "document")
    assert _paths(job, "call") == {whole}
    assert _paths(job, "document") == {whole[:-1]}
    # A hundred came with the span around them; of the others, the trace had room for few.
    documents = [len([s for s in each.spans if s.name == "document"]) for each in (job, linked)]
    assert sum(documents) == 151
    assert 100 < documents[0] < 120
    assert _paths(linked, "document") == {("task",)}


def test_what_is_linked_keeps_its_place(experiment_id: str) -> None:
    """Below a span that is linked as well; and what has begun there stays, though it fails."""

    def work() -> None:
        for _ in range(20):
            _span("early")
        with mlflow.start_span("partition"):
            for number in range(150):
                _span("document", "call", fails=number == 140)

    job, linked = _run(work)
    assert _paths(linked, "document") == {("task", "partition")}
    assert _paths(linked, "call") == {("task", "partition", "document")}
    assert _paths(job, "partition") == set()


def test_an_error_that_is_kept_hangs_from_what_is_kept(experiment_id: str) -> None:
    """Though the span that it lies in is left out."""

    def work() -> None:
        with mlflow.start_span("document"):
            _span("call")
            _span("answer", fails=True)

    job, _ = _run(work, limit=None, sampling="errors")
    assert _paths(job, "answer") == {("driver", "task")}
    assert {span.name for span in job.spans} == {"driver", "task", "answer"}


def test_an_error_in_a_large_branch_that_is_linked_hangs_from_the_task(experiment_id: str) -> None:
    def work() -> None:
        for _ in range(20):
            _span("early")
        with mlflow.start_span("partition"):
            for number in range(150):
                _span("document", fails=number == 140)

    job, linked = _run(work)
    assert _paths(job, "document") == {("driver", "task")}
    assert _paths(linked, "document") == {("task", "partition")}


def test_spans_that_end_at_once_in_a_child_process_are_in_one_branch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = threading.Barrier(2)

    def branch_below(top: str, above: str) -> Branch:
        both.wait(10)
        return Branch(top, above)

    process = worker_process()
    monkeypatch.setattr(process, "open_spans", Mock(branch_below=branch_below))
    context = ctx_autolog.DriverContext("1")
    task = Task(context, ContentPolicy(context.config), is_open=True)
    with ThreadPoolExecutor(2) as threads:
        asked = [
            threads.submit(process._branch_of_child, task, span, "top", "task", None)
            for span in ("first", "second")
        ]
    first, second = (each.result() for each in asked)
    assert first is second


@pytest.mark.parametrize("limit", [None, 10_000])
def test_without_need_nothing_changes(experiment_id: str, limit: int | None) -> None:
    def work() -> None:
        with mlflow.start_span("partition"):
            for _ in range(150):
                _span("document", "call")

    job, linked = _run(work, limit=limit)
    assert linked is job
    assert _paths(job, "call") == {("driver", "task", "partition", "document")}
    assert len(job.spans) == 2 + 1 + 300
