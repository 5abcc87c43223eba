"""Parents of the spans of OpenAI calls, without Spark."""

from __future__ import annotations

import asyncio
import contextvars
import importlib
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlflow
import openai
import pytest
from packaging.version import Version
from workload import StoredTrace, ask, stored_trace, stored_traces

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.context import DriverContext
from mlflow_ctx_autolog.testing import OpenAIEndpoint


@pytest.fixture
def client(endpoint: OpenAIEndpoint) -> openai.OpenAI:
    return openai.OpenAI(base_url=endpoint.base_url, api_key="not-a-key", max_retries=0)


def _from_another_process() -> DriverContext:
    context = ctx_autolog.capture()
    return DriverContext.from_json(context.to_json().replace(str(context.process_id), "another"))


def _shape(trace: StoredTrace) -> list[tuple[str, str]]:
    """Return each span's name with its parent's, which is "" for the root."""
    names = {span.span_id: span.name for span in trace.spans}
    return sorted((span.name, names.get(span.parent_id or "", "")) for span in trace.spans)


def _call_in_all_ways(client: openai.OpenAI) -> None:
    ask(client, 1)
    with mlflow.start_span("outer"), mlflow.start_span("inner"):
        ask(client, 2)
    thread = threading.Thread(target=ask, args=(client, 3))
    thread.start()
    thread.join()


def test_on_the_driver_it_behaves_as_mlflow_does(client: openai.OpenAI, experiment_id: str) -> None:
    """Without a task, traces have the same shape as with mlflow.openai.autolog() alone."""
    mlflow.openai.autolog()
    _call_in_all_ways(client)
    plain = sorted(_shape(trace) for trace in stored_traces(experiment_id))
    mlflow.openai.autolog(disable=True)

    other = mlflow.set_experiment("driver-with-ours").experiment_id
    ctx_autolog.enable()
    _call_in_all_ways(client)
    ours = sorted(_shape(trace) for trace in stored_traces(other))

    assert ours == plain
    assert len(ours) == 3


@pytest.mark.parametrize("user_first", [True, False])
def test_the_users_own_autolog_neither_doubles_nor_stops_us(
    client: openai.OpenAI, experiment_id: str, user_first: bool
) -> None:
    """mlflow.openai.autolog() before or after enable() gives one span a call, and outlives us."""
    if user_first:
        mlflow.openai.autolog()
    ctx_autolog.enable()
    if not user_first:
        mlflow.openai.autolog()

    ask(client, 1)
    assert len(stored_traces(experiment_id)) == 1
    context = _task_context()
    with ctx_autolog.attach(context, "task"):
        ask(client, 2)
    ctx_autolog.disable()
    ask(client, 3)

    traces = [trace for trace in stored_traces(experiment_id) if trace.calls]
    assert sorted(_shape(trace) for trace in traces) == [
        [("Completions", "")],
        [("Completions", "")],
        [("Completions", "task"), ("driver", ""), ("task", "driver")],
    ]


def _task_context() -> DriverContext:
    with mlflow.start_span("driver"):
        return _from_another_process()


def test_calls_of_other_threads_belong_to_the_task(
    client: openai.OpenAI, experiment_id: str
) -> None:
    """Pool threads, plain threads and event loops inside a task: all calls are below it."""
    with mlflow.start_span("driver") as span:
        context = _from_another_process()
    async_client = openai.AsyncOpenAI(base_url=client.base_url, api_key="not-a-key")

    async def ask_together() -> None:
        calls = (
            async_client.chat.completions.create(
                model="gpt-test", messages=[{"role": "user", "content": f"async {n}"}]
            )
            for n in range(4)
        )
        await asyncio.gather(*calls)
        await async_client.close()

    with ctx_autolog.attach(context, "task"):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda n: ask(client, n), range(16)))
        _in_thread(ask, client, 100)
        _in_thread(lambda: asyncio.run(ask_together()))
        contextvars.Context().run(ask, client, 101)

    trace = stored_trace(span.trace_id)
    assert len(trace.calls) == 22
    assert all(trace.is_nested(call) for call in trace.calls)
    assert trace.tasks[0].attributes["llm.calls"] == 22


def _in_thread(function: Any, *args: Any) -> None:
    thread = threading.Thread(target=function, args=args)
    thread.start()
    thread.join()


def test_an_active_span_comes_before_the_task(client: openai.OpenAI, experiment_id: str) -> None:
    """The span active where the call is made is its parent, not the task's."""
    with mlflow.start_span("driver") as span:
        context = _from_another_process()
    with ctx_autolog.attach(context, "task"), mlflow.start_span("chapter"):
        ask(client, 1)

    assert _shape(stored_trace(span.trace_id)) == [
        ("Completions", "chapter"),
        ("chapter", "task"),
        ("driver", ""),
        ("task", "driver"),
    ]


def test_between_tasks_a_worker_traces_nothing(client: openai.OpenAI, experiment_id: str) -> None:
    """When no task is open, calls of a process that was a worker leave no trace."""
    with ctx_autolog.attach(_task_context(), "task"):
        ask(client, 1)
    ask(client, 2)

    assert sum(len(trace.calls) for trace in stored_traces(experiment_id)) == 1


@pytest.mark.skipif(
    Version(mlflow.__version__) < Version("3.11"),
    reason="MLflow before 3.11 does not keep a span that sampling dropped",
)
def test_a_parent_that_sampling_dropped_drops_its_calls(
    client: openai.OpenAI, experiment_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below a driver's span that is not sampled nothing is stored, from any thread."""
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", "0")
    mlflow.tracing.reset()
    try:
        context = _task_context()
        flags = int(str(context.traceparent).rpartition("-")[2], 16)
        assert flags & 1 == 0, "the driver's span was sampled, so the test shows nothing"
        with ctx_autolog.attach(context, "task"):
            assert ask(client, 1)
            with mlflow.start_span("inner"):
                ask(client, 2)
            _in_thread(ask, client, 3)
    finally:
        monkeypatch.undo()
        mlflow.tracing.reset()

    assert stored_traces(experiment_id) == []


def test_an_error_of_the_client_passes_through(
    endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """The exception that the call raises is the client's, the same with tracing as without."""
    nobody = openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="not-a-key", max_retries=0)
    with mlflow.start_span("driver") as span:
        context = _from_another_process()
    with ctx_autolog.attach(context, "task"), pytest.raises(openai.APIConnectionError):
        ask(nobody, 1)

    (call,) = stored_trace(span.trace_id).calls
    assert call.status.status_code == "ERROR"


def test_images_stay_in_the_messages(client: openai.OpenAI, experiment_id: str) -> None:
    """An image in a worker's message is stored with the message, not as a dead reference."""
    image = "data:image/png;base64,iVBORw0KGgo="
    with mlflow.start_span("driver") as span:
        context = _from_another_process()
    with ctx_autolog.attach(context, "task"):
        content = [{"type": "image_url", "image_url": {"url": image}}]
        client.chat.completions.create(
            model="gpt-test",
            messages=[{"role": "user", "content": content}],  # type: ignore[list-item]
        )

    (call,) = stored_trace(span.trace_id).calls
    assert call.inputs["messages"][0]["content"][0]["image_url"]["url"] == image


def test_what_never_changes_is_asked_for_once(
    client: openai.OpenAI, experiment_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call's span has MLflow's type, and its method MLflow's signature, read once for all."""
    from openai.resources.chat.completions import Completions

    autolog = importlib.import_module("mlflow.openai.autolog")
    signature = inspect.signature(Completions.create)
    asked: list[type] = []
    # Not in older releases.
    if original := getattr(autolog, "_get_span_type", None):
        monkeypatch.setattr(
            autolog, "_get_span_type", lambda of_class: asked.append(of_class) or original(of_class)
        )
    ctx_autolog.enable()
    ask(client, 1)
    ask(client, 2)

    spans = [span for trace in stored_traces(experiment_id) for span in trace.spans]
    assert [span.attributes["mlflow.spanType"] for span in spans] == ["CHAT_MODEL"] * 2
    # Not even once where an earlier test has.
    assert asked in ([Completions], [])
    assert inspect.signature(Completions.create) == signature


def test_a_tool_that_mlflow_cannot_read_costs_no_tokens(
    client: openai.OpenAI, experiment_id: str
) -> None:
    """A tool without parameters, of which MLflow makes nothing, leaves the span its usage."""
    no_parameters: dict[str, object] = {"type": "object"}
    ctx_autolog.enable()
    client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "Which licence is it?"}],
        tools=[{"type": "function", "function": {"name": "look_up", "parameters": no_parameters}}],
    )

    (trace,) = stored_traces(experiment_id)
    (span,) = trace.spans
    assert span.attributes["mlflow.chat.tokenUsage"]["total_tokens"] > 0
