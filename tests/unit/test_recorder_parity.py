"""The same calls, recorded by MLflow's own autolog and by the recorder."""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import calls
import mlflow
import pytest
from calls import Call
from differences import DIFFERENCES, PAGE, Compared, page
from mlflow.entities import LiveSpan
from packaging.version import Version
from recording import Keeper

from mlflow_ctx_autolog.recorder.openai_calls import OpenAIRecorder
from mlflow_ctx_autolog.spans.record import SpanRecord
from mlflow_ctx_autolog.testing import OpenAIEndpoint, TrackingStore

autolog_module = importlib.import_module("mlflow.openai.autolog")

# What the endpoint makes up anew for each answer, and what differs from object to object.
_MADE_UP = (
    (re.compile(r"\b(chatcmpl-|resp_|msg_|fc_|call_|cmpl-)[0-9a-f]{32}"), "ID"),
    (re.compile(r'"(created|created_at)": [\d.]+'), '"created": 0'),
    (re.compile(r" at 0x[0-9a-f]+"), ""),
)
USED: set[str] = set()


def _is_missing(call: Call) -> bool:
    if call.needs == "images":
        return Version(mlflow.__version__) < Version("3.12")
    return call.needs == "responses" and find_spec("openai.resources.responses") is None


CASES = [
    pytest.param(call, mode, id=f"{call.row}, {mode}".replace("`", ""))
    for call in calls.CALLS
    for mode in ("sync", "async")
    if not _is_missing(call)
]


def alike(value: Any) -> Any:
    """Return a value without what is made up."""
    text = json.dumps(value, sort_keys=True)
    for pattern, instead in _MADE_UP:
        text = pattern.sub(instead, text)
    return json.loads(text)


def make(call: Call, mode: str, url: str) -> None:
    """Make a call, and drop all that it has left unread."""
    prompt = calls.prompt_of("OpenAI", mode, call.row)

    async def make_async() -> None:
        async with calls.client_of("OpenAI", "async", url) as client:
            await call.asynchronous(client, prompt)

    if mode == "async":
        asyncio.run(make_async())
    else:
        call.sync(calls.client_of("OpenAI", "sync", url), prompt)
    gc.collect()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[OpenAIEndpoint]:
    with OpenAIEndpoint(calls.answer()) as running:
        yield running


@pytest.fixture
def started(
    ctx_autolog_store: TrackingStore,
    monkeypatch: pytest.MonkeyPatch,
) -> list[LiveSpan]:
    """The spans that MLflow's autolog starts, whether it ends them or not."""
    # As in a worker, where MLflow has nowhere to upload them to.
    monkeypatch.setenv("MLFLOW_TRACE_EXTRACT_ATTACHMENTS", "false")
    found: list[LiveSpan] = []
    start = autolog_module.start_span_no_context

    def start_span(*args: Any, **kwargs: Any) -> LiveSpan:
        found.append(start(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(autolog_module, "start_span_no_context", start_span)
    return found


def said_by_us(span: SpanRecord) -> dict[str, Any]:
    return {
        **{name: json.loads(text) for name, text in span.attributes.items()},
        "name": span.name,
        "status": span.status,
        "message": span.message or "",
        "events": [(event.name, said_by_event(event.attributes)) for event in span.events],
    }


def said_by_mlflow(span: LiveSpan) -> dict[str, Any]:
    attributes = dict(span.attributes)
    del attributes["mlflow.traceRequestId"]
    return {
        **attributes,
        "name": span.name,
        "status": span.status.status_code.value,
        "message": span.status.description or "",
        "events": [(event.name, said_by_event(event.attributes)) for event in span.events],
    }


def said_by_event(attributes: Any) -> dict[str, Any]:
    # Stack traces lead through other frames.
    return {
        name: json.loads(value) if name == "mlflow.chunk.value" else value
        for name, value in attributes.items()
        if name != "exception.stacktrace"
    }


@pytest.mark.parametrize(("call", "mode"), CASES)
def test_a_call_looks_as_it_does_to_mlflow(
    call: Call, mode: str, endpoint: OpenAIEndpoint, started: list[LiveSpan]
) -> None:
    """Name, type, status, inputs, outputs, events and attributes are MLflow's, or listed."""
    keeper = Keeper()
    recorder = OpenAIRecorder(lambda: keeper)
    recorder.install()
    try:
        make(call, mode, endpoint.url)
    finally:
        recorder.uninstall()
    mlflow.openai.autolog(silent=True)
    try:
        make(call, mode, endpoint.url)
    finally:
        mlflow.openai.autolog(disable=True, silent=True)

    # Before openai 1.92 MLflow has a second one, of the create() that parse() is made of.
    (ours,), theirs = keeper.spans, started[0]
    assert len(started) == 1 or "parse" in call.row
    assert ours.end is not None
    assert ours.end >= ours.start
    us, mlflows = alike(said_by_us(ours)), alike(said_by_mlflow(theirs))
    for name in sorted(us.keys() | mlflows.keys()):
        if us.get(name) != mlflows.get(name):
            compared = Compared(name, us.get(name), mlflows.get(name), mlflows["status"])
            ways = [each.what for each in DIFFERENCES if each.covers(compared)]
            assert ways, compared
            USED.update(ways)


def test_the_page_says_how_they_differ() -> None:
    """The docs are made of the list that the comparison goes by."""
    assert PAGE.read_text(encoding="utf-8") == page()
