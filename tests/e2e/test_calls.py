"""Every client of OpenAI's API and every kind of call, in Spark workers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import calls
import mlflow
import pandas as pd
import pytest
from calls import Call
from coverage_table import CALLS, CLIENTS, case
from mlflow.entities import Span
from packaging.version import Version
from pyspark.sql import SparkSession
from workload import StoredTrace, ask, stored_trace

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint, Request, TrackingServer

IS_PRELOADED = True

ROWS = {call.row: call for call in calls.CALLS}
OF_EACH_CLIENT = [
    calls.CREATE,
    f"{calls.CREATE}, `stream=True`",
    "`embeddings.create`",
]
DATABRICKS: dict[str, Any] = {
    # Which brings another Spark along, so that it is not among the packages for development.
    "note": "where `databricks-openai` is installed",
    "skip": pytest.mark.skipif(
        find_spec("databricks_openai") is None, reason="databricks-openai is not installed"
    ),
}


# By what a call needs and not all releases have: what the table says, and whether it is missing.
LACKS = {
    "responses": ("with openai from 1.66", find_spec("openai.resources.responses") is None),
    "images": ("with MLflow from 3.12", Version(mlflow.__version__) < Version("3.12")),
}


def _marks(call: Call) -> dict[str, Any]:
    if call.needs not in LACKS:
        return {}
    note, is_lacking = LACKS[call.needs]
    return {"note": note, "skip": pytest.mark.skipif(is_lacking, reason=f"only {note}")}


def _plan() -> list[tuple[str, str, str]]:
    """Return client, mode and row of each call to make."""
    clients = ["OpenAI", "AzureOpenAI"]
    if find_spec("databricks_openai"):
        clients.append("DatabricksOpenAI")
    return [
        (client, mode, row)
        for client in clients
        for mode in ("sync", "async")
        for row in (ROWS if client == "OpenAI" else OF_EACH_CLIENT)
        if not LACKS.get(ROWS[row].needs, ("", False))[1]
    ]


@dataclass(frozen=True)
class Outcome:
    """What became of all calls, made once with tracing and once without."""

    trace: StoredTrace
    traced: dict[tuple[str, str, str], str]
    untraced: dict[tuple[str, str, str], str]

    def span(self, client: str, mode: str, row: str) -> Span:
        """Return the one span of a call."""
        prompt = json.dumps(calls.prompt_of(client, mode, row))
        (found,) = [
            span
            for span in self.trace.spans
            if span.span_type != "TASK" and prompt in json.dumps(span.inputs)
        ]
        return found


@pytest.fixture(scope="module")
def outcome(
    spark: SparkSession, server: TrackingServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Outcome]:
    mlflow.set_tracking_uri(server.uri)
    mlflow.set_experiment("calls")
    spool = str(tmp_path_factory.mktemp("spools"))
    frame = spark.createDataFrame(_plan(), "kind string, mode string, row string").repartition(2)
    schema = "kind string, mode string, row string, got string"
    with OpenAIEndpoint(calls.answer()) as endpoint:
        job = calls.caller(endpoint.url)
        with ctx_autolog.enable(spool_directory=spool), mlflow.start_span("job") as span:
            traced = frame.mapInPandas(job, schema).collect()
        untraced = frame.mapInPandas(job, schema).collect()
    yield Outcome(
        stored_trace(span.trace_id),
        *({(row.kind, row.mode, row.row): row.got for row in rows} for rows in (traced, untraced)),
    )
    mlflow.flush_trace_async_logging()


def _check(outcome: Outcome, client: str, mode: str, call: Call) -> None:
    key = client, mode, call.row
    assert outcome.traced[key] == outcome.untraced[key]
    span = outcome.span(*key)
    assert outcome.trace.is_nested(span)
    assert span.span_type == call.span_type
    assert span.status.status_code.value == call.status
    attributes = span.attributes
    assert ("mlflow.chat.tokenUsage" in attributes) == call.usage
    assert attributes.get("http.request.resend_count") == call.resends
    assert attributes.get("llm.stream.outcome") == ("closed early" if call.left_early else None)
    seconds = (span.end_time_ns - span.start_time_ns) / 1e9
    first_chunk = attributes.get("gen_ai.response.time_to_first_chunk")
    assert (first_chunk is not None) == call.streamed
    assert 0 < (first_chunk or seconds) <= seconds


SYNC_CALLS = [case(call, CALLS, call.row, "sync", **_marks(call)) for call in calls.CALLS]
ASYNC_CALLS = [case(call, CALLS, call.row, "async", **_marks(call)) for call in calls.CALLS]


@pytest.mark.parametrize("call", SYNC_CALLS)
def test_a_sync_call_is_one_span_and_its_result_unchanged(outcome: Outcome, call: Call) -> None:
    """The span says how the call went, and the caller gets what it gets without tracing."""
    _check(outcome, "OpenAI", "sync", call)


@pytest.mark.parametrize("call", ASYNC_CALLS)
def test_an_async_call_is_one_span_and_its_result_unchanged(outcome: Outcome, call: Call) -> None:
    """The same of an async client, in an event loop inside the worker's function."""
    _check(outcome, "OpenAI", "async", call)


CLIENT_CASES = [
    case(
        (client, mode),
        CLIENTS,
        f"`{client}`, `Async{client}`",
        mode,
        **(DATABRICKS if client == "DatabricksOpenAI" else {}),
    )
    for client in ("OpenAI", "AzureOpenAI", "DatabricksOpenAI")
    for mode in ("sync", "async")
]


@pytest.mark.parametrize("client", CLIENT_CASES)
def test_every_client_is_traced(outcome: Outcome, client: tuple[str, str]) -> None:
    """A chat completion, its stream and an embedding of each client are one span each."""
    for row in OF_EACH_CLIENT:
        _check(outcome, *client, ROWS[row])


def test_what_was_read_of_a_broken_stream_is_in_its_span(outcome: Outcome) -> None:
    """The span of a stream that broke or was left has the text that had come, and the error."""
    for row, content in (
        (f"{calls.CREATE}, `stream=True`, left half-way", "seven "),
        (f"{calls.CREATE}, `stream=True`, cut half-way", "seven years "),
    ):
        for mode in ("sync", "async"):
            span = outcome.span("OpenAI", mode, row)
            assert span.outputs["choices"][0]["message"]["content"] == content
            has_error = any(event.name == "exception" for event in span.events)
            assert has_error == ("cut" in row)


def test_each_call_is_counted_once(outcome: Outcome) -> None:
    """The tasks' counts of calls and spans add up to the calls made, repeated requests apart."""
    made = [task.attributes["llm.calls"] for task in outcome.trace.tasks]
    assert sum(made) == len(_plan())
    assert len(outcome.trace.spans) == len(_plan()) + len(made) + 1


def test_a_call_that_outlasts_its_task_is_stored_as_it_is_and_later_as_it_was(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """A call whose task does not wait for it is in the trace at once, and ends when it ends."""
    arrived, go = threading.Event(), threading.Event()

    def answer(request: Request) -> str:
        if "Has it arrived?" in request.prompt:
            return "yes" if arrived.is_set() else "no"
        arrived.set()
        go.wait(60)
        return "at last"

    endpoint.answer = answer
    url = endpoint.base_url

    def leave_behind(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        from openai import OpenAI

        client = OpenAI(base_url=url, api_key="not-a-key", max_retries=0)
        for batch in batches:
            threading.Thread(target=ask, args=(client, 1), daemon=True).start()
            while ask(client, 2, question=lambda number: "Has it arrived?") == "no":
                time.sleep(0.05)
            yield batch

    def left_behind() -> Span:
        (call,) = [
            call
            for call in stored_trace(span.trace_id).calls
            if "document 1" in json.dumps(call.inputs)
        ]
        return call

    with ctx_autolog.enable(), mlflow.start_span("job") as span:
        assert len(spark.range(0, 1, 1, 1).mapInPandas(leave_behind, "id long").collect()) == 1
    unfinished = left_behind()
    assert unfinished.status.status_code.value == "UNSET"
    go.set()
    deadline = time.monotonic() + 60
    while left_behind().status.status_code.value == "UNSET" and time.monotonic() < deadline:
        time.sleep(0.5)
    finished = left_behind()
    assert finished.status.status_code.value == "OK"
    assert finished.span_id == unfinished.span_id
    assert finished.outputs["choices"][0]["message"]["content"] == "at last"
