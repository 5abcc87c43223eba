"""The user's own keys on calls."""

from __future__ import annotations

import contextvars
from typing import Any

import mlflow
import numpy
import openai
import pytest
from workload import ask, stored_trace

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.context import DriverContext
from mlflow_ctx_autolog.recorder.annotations import current_annotations, labelled
from mlflow_ctx_autolog.testing import OpenAIEndpoint


@pytest.fixture(autouse=True)
def context() -> Any:
    """Annotations of a test end with it."""
    before = current_annotations()
    yield
    ctx_autolog.annotate(**dict.fromkeys(current_annotations()))
    assert current_annotations() == before


def test_keys_hold_until_they_are_set_again() -> None:
    """Each key has its last value; None takes it back."""
    ctx_autolog.annotate(doc_id=1, step="read")
    ctx_autolog.annotate(doc_id=numpy.int64(2))
    assert current_annotations() == {"doc_id": 2, "step": "read"}
    ctx_autolog.annotate(step=None)
    assert current_annotations() == {"doc_id": 2}


def test_block_takes_its_keys_back() -> None:
    """After the block it is as before, also where it ends in an exception."""
    ctx_autolog.annotate(doc_id=1)

    def read() -> None:
        with ctx_autolog.annotate(doc_id=2, step="read"):
            assert current_annotations() == {"doc_id": 2, "step": "read"}
            raise KeyError

    with pytest.raises(KeyError):
        read()
    assert current_annotations() == {"doc_id": 1}


def test_keys_stay_in_their_context() -> None:
    """Another context does not see them, and a copy does."""
    ctx_autolog.annotate(doc_id=1)
    assert contextvars.Context().run(current_annotations) == {}
    assert contextvars.copy_context().run(current_annotations) == {"doc_id": 1}


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"doc": [1]}, TypeError),
        ({"doc": b"1"}, TypeError),
        ({"doc": "x" * 1001}, ValueError),
        ({"a b": 1}, ValueError),
        ({"": 1}, ValueError),
    ],
)
def test_nonsense_is_refused(keys: dict[str, Any], error: type[Exception]) -> None:
    """What cannot be stored is refused by name, and changes nothing."""
    with pytest.raises(error, match=next(iter(keys)) or "''"):
        ctx_autolog.annotate(good=1, **keys)
    assert current_annotations() == {}


def test_calls_carry_the_keys_and_rows_find_their_call(
    endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """A call's span has the keys and a fingerprint, and last_call() names the span."""
    client = openai.OpenAI(base_url=endpoint.base_url, api_key="not-a-key", max_retries=0)
    with mlflow.start_span("driver") as span:
        text = ctx_autolog.capture().to_json()
    context = DriverContext.from_json(text)
    other = DriverContext.from_json(text.replace(str(context.process_id), "another"))
    found = []
    with ctx_autolog.attach(other, "task"):
        for number in (1, 2, 1):
            with ctx_autolog.annotate(doc_id=number):
                ask(client, number)
            found.append(ctx_autolog.last_call())

    calls = {call.span_id: call for call in stored_trace(span.trace_id).calls}
    assert [ids.trace_id for ids in found if ids] == [span.trace_id] * 3
    one, two, again = [calls[ids.span_id] for ids in found if ids]
    assert [call.attributes["annotation.doc_id"] for call in (one, two, again)] == [1, 2, 1]
    prints = [call.attributes["llm.request.fingerprint"] for call in (one, two, again)]
    assert prints[0] == prints[2] != prints[1]
    report = ctx_autolog.report(span.trace_id)
    assert len(report.filter(doc_id=1).calls) == 2
    assert [cause.key for cause in report.filter(doc_id=1).by_cause()] == ["duplicate_row"]


def test_the_driver_and_workers_name_calls_alike(
    endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """By the same setting, which travels; what tells equal requests heeds no name."""
    client = openai.OpenAI(base_url=endpoint.base_url, api_key="not-a-key", max_retries=0)
    with ctx_autolog.enable(name_calls_by="doc_id"), mlflow.start_span("driver") as span:
        text = ctx_autolog.capture().to_json()
        context = DriverContext.from_json(text)
        other = DriverContext.from_json(text.replace(str(context.process_id), "another"))
        with ctx_autolog.annotate(doc_id="doc-17"):
            ask(client, 1)
    with ctx_autolog.attach(other, "task"), ctx_autolog.annotate(doc_id="doc-18"):
        ask(client, 1)

    calls = stored_trace(span.trace_id).calls
    assert {call.name for call in calls} == {"Completions (doc-17)", "Completions (doc-18)"}
    assert len({call.attributes["llm.request.fingerprint"] for call in calls}) == 1
    report = ctx_autolog.report(span.trace_id)
    assert {each.call.interface for each in report.calls} == {"Completions"}


def test_a_value_stands_behind_a_name_on_request() -> None:
    """As a text, the beginning of a long one; where the key has no value, the name stands alone."""
    assert labelled("Completions", "doc_id") == "Completions"
    with ctx_autolog.annotate(doc_id="doc-17", page=3, text="x" * 500):
        assert labelled("Completions", None) == "Completions"
        assert labelled("Completions", "doc_id") == "Completions (doc-17)"
        assert labelled("Completions", "page") == "Completions (3)"
        assert labelled("Completions", "text") == f"Completions ({'x' * 80})"
