"""What tasks say of their trace: what may be said, and which word of several holds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from mlflow.entities import TraceInfo, TraceLocation, TraceState

from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.context import DriverContext
from mlflow_ctx_autolog.delivery.receipts import TaskReceipt
from mlflow_ctx_autolog.driver.mlflow_traces import own_words, record_update
from mlflow_ctx_autolog.spans.content import ContentPolicy
from mlflow_ctx_autolog.spans.trace_info import trace_document
from mlflow_ctx_autolog.spans.trace_update import (
    LINKED_PROMPTS,
    ROOM,
    bounded,
    differing,
    latest,
    parse_update,
    trace_update,
)
from mlflow_ctx_autolog.task import Task


def prompts(*versions: str) -> str:
    return json.dumps([{"name": "p", "version": version} for version in versions])


def test_what_is_for_users_to_say() -> None:
    """Names of MLflow's and of ours that the store or the driver writes are not."""
    update = trace_update(
        {"mine": 1, "mlflow.traceName": "x", "mlflow.linkedPrompts": prompts("1")},
        {
            "mlflow.traceInputs": "a prompt",
            "mlflow.trace.tokenUsage": "{}",
            "mlflow.trace.user": "u",
            "mlflow.source.name": "job.py",
            "mlflow_ctx_autolog.receipt": "{}",
            "mlflowish": "y",
        },
        client_request_id="r",
        state=None,
    )
    assert update == {
        "tags.mine": "1",
        LINKED_PROMPTS: prompts("1"),
        "trace_metadata.mlflow.trace.user": "u",
        "trace_metadata.mlflow.source.name": "job.py",
        "trace_metadata.mlflowish": "y",
        "client_request_id": "r",
    }
    assert parse_update(json.loads(json.dumps(update))) == update


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        "tags.a",
        {"tags.a": 1, "trace_id": "tr-1", "assessments": "x", "tags": "a"},
        {"state": "IN_PROGRESS", "trace_metadata.mlflow.trace.cost": "{}"},
    ],
)
def test_what_is_no_update_is_ignored(document: Any) -> None:
    """What arrives may have been changed on its way."""
    assert parse_update(document) == {}


def test_the_last_word_holds() -> None:
    """But for a failure, which is not taken back, and for prompts, which are all told."""
    updates = [
        {"tags.a": "1", "state": "ERROR", LINKED_PROMPTS: prompts("1", "2")},
        {"tags.a": "2", "tags.b": "1", "state": "OK", LINKED_PROMPTS: prompts("2", "3")},
    ]
    assert latest(updates) == {
        "tags.a": "2",
        "tags.b": "1",
        "state": "ERROR",
        LINKED_PROMPTS: prompts("1", "2", "3"),
    }
    assert differing(updates) == {"tags.a": ("1", "2")}
    assert differing([updates[1], updates[1]]) == {}


def test_what_is_no_list_of_prompts_is_none() -> None:
    """Such as a tag that the user has set."""
    assert latest([{LINKED_PROMPTS: "?"}, {LINKED_PROMPTS: prompts("1")}]) == {
        LINKED_PROMPTS: prompts("1")
    }


def test_a_receipt_stays_small() -> None:
    """What has no room is named, and what comes after it may have some."""
    kept, rest = bounded({"tags.a": "1", "tags.long": "x" * ROOM, "tags.b": "2"})
    assert (kept, rest) == ({"tags.a": "1", "tags.b": "2"}, ["tags.long"])


def test_it_travels_with_the_receipt_and_on_the_span() -> None:
    """The same either way."""
    update = {"tags.a": "1", "state": "ERROR"}
    receipt = TaskReceipt("tr-1", "a" * 16, 1, trace_update=update)
    assert TaskReceipt.from_json(receipt.to_json()).trace_update == update
    attributes = TaskReceipt.attributes(1, {}, {}, trace_update=update)
    found = TaskReceipt.from_attributes("tr-1", "a" * 16, attributes)
    assert found is not None
    assert found.trace_update == update
    nothing = TaskReceipt.from_attributes("tr-1", "a" * 16, TaskReceipt.attributes(1, {}, {}))
    assert nothing is not None
    assert nothing.trace_update == {}


@pytest.mark.parametrize(
    ("settings", "preview"),
    [
        ({}, "call 555-1234"),
        ({"capture_content": False}, None),
        ({"max_content_chars": 4}, "call... [9 more characters]"),
        ({"redact": lambda value: value.replace("555-1234", "***")}, "call ***"),
    ],
)
def test_previews_are_content(settings: dict[str, Any], preview: str | None) -> None:
    """They go through what content goes through; what users want to see of a trace does not."""
    config = Config().updated(settings)
    task = Task(DriverContext("1", config=config), ContentPolicy(config))
    task.say_of_trace({"tags.a": "call 555-1234", "request_preview": "call 555-1234"})
    assert task.trace_update["tags.a"] == "call 555-1234"
    assert task.trace_update.get("request_preview") == preview


def info(state: TraceState = TraceState.OK, **more: Any) -> TraceInfo:
    location = TraceLocation.from_experiment_id("1")
    return TraceInfo("tr-1", location, 0, state, tags={"a": "driver"}, **more)


def test_the_drivers_word_holds() -> None:
    """Of what it has not said, that of tasks; a later one of theirs takes the place of theirs."""
    found = info(request_preview="made by MLflow")
    own = own_words(found)
    for word in ("first", "second"):
        record_update(
            found,
            {"tags.a": word, "tags.b": word, "request_preview": word, "trace_metadata.c": word},
            own,
        )
    assert found.tags == {"a": "driver", "b": "second"}
    assert found.trace_metadata == {"c": "second"}
    assert found.request_preview == "second"


@pytest.mark.parametrize(
    ("of_driver", "said", "of_task", "holds"),
    [
        ("OK", (), "ERROR", "ERROR"),
        ("OK", ("state",), "ERROR", "OK"),
        ("ERROR", (), "OK", "ERROR"),
        ("OK", (), "OK", "OK"),
    ],
)
def test_a_state(of_driver: str, said: tuple[str, ...], of_task: str, holds: str) -> None:
    """That of the driver's root is no word, unless it has failed."""
    found = info(TraceState(of_driver))
    record_update(found, {"state": of_task}, own_words(found, said))
    assert found.state == TraceState(holds)


def test_prompts_of_both_are_told() -> None:
    """As often as it is written."""
    found = info()
    found.tags["mlflow.linkedPrompts"] = prompts("1")
    own = own_words(found)
    for _ in range(2):
        record_update(found, {LINKED_PROMPTS: prompts("2")}, own)
    assert found.tags["mlflow.linkedPrompts"] == prompts("1", "2")


@pytest.mark.parametrize(
    ("state", "holds"), [("OK", "ERROR"), ("ERROR", "ERROR"), ("IN_PROGRESS", "IN_PROGRESS")]
)
def test_a_task_that_writes_its_trace_itself(state: str, holds: str) -> None:
    """It is MLflow's document, and what came from the driver holds."""
    document = trace_document(
        "tr-1",
        "1",
        began=10**18,
        state=state,
        metadata={"m": "driver"},
        tags={"t": "driver"},
        update={
            "tags.t": "task",
            "tags.u": "task",
            "trace_metadata.m": "task",
            "client_request_id": "r",
            "response_preview": "p",
            "state": "ERROR",
        },
    )
    found = TraceInfo.from_dict(json.loads(document))
    assert found.tags == {"t": "driver", "u": "task"}
    assert found.trace_metadata == {"m": "driver"}
    assert (found.client_request_id, found.response_preview) == ("r", "p")
    assert found.state == TraceState(holds)
