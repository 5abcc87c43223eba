"""What MLflow's list of traces shows of a job, without Spark."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mlflow_ctx_autolog.delivery.receipts import TaskReceipt
from mlflow_ctx_autolog.delivery.records import Destination
from mlflow_ctx_autolog.driver.books import Book
from mlflow_ctx_autolog.driver.previews import write_previews
from mlflow_ctx_autolog.spans.call_sums import CallSums

TASKS: tuple[dict[str, Any], ...] = (
    {"function": "extract", "rows": 1500, "calls": 3, "errors": 1, "sums": {"models": {"big": 3}}},
    {"function": "extract", "rows": 500, "calls": 1, "sums": {"models": {"small": 1}}},
    {"function": "embed", "rows": 0, "calls": 0},
)


def book(*tasks: dict[str, Any], **previews: str | None) -> Book:
    info = SimpleNamespace(
        trace_id="tr-1", **{"request_preview": None, "response_preview": None, **previews}
    )
    found = Book(Destination("sqlite:///mlflow.db", "7"), info, delivers=True, spans=1)
    for number, task in enumerate(tasks):
        found.receipts[str(number)] = TaskReceipt("tr-1", str(number), 1, **task)
    return found


def shown(of: Book) -> tuple[str | None, str | None]:
    write_previews(of)
    return of.info.request_preview, of.info.response_preview


def test_a_job_says_what_ran_and_what_came_of_it() -> None:
    """Functions with their rows, tasks and models; calls, errors, tokens and cost."""
    paid = {"usage": {"total_tokens": 12_000.0}, "cost": {"total_cost": 0.25}}
    assert shown(book({**TASKS[0], **paid}, *TASKS[1:])) == (
        "embed, extract on 2,000 rows; 3 tasks; big, small",
        "4 calls, 1 error, 12,000 tokens, $0.2500",
    )
    untold = {**TASKS[0], **paid, "sums": {"unknown": 1}}
    assert shown(book(untold))[1] == (
        "3 calls, 1 error, at least 12,000 tokens, at least $0.2500 (not known of 1 call)"
    )


def test_calls_of_the_driver_count() -> None:
    """Beside those of its tasks."""
    of = book(TASKS[0])
    of.sums = CallSums(calls=2, errors=1)
    assert str(shown(of)[1]).startswith("5 calls, 2 errors, ")


def test_of_many_names_the_first_are_shown() -> None:
    """And how many others there are."""
    found, _ = shown(book(*({"function": name} for name in "edcba")))
    assert found == "a, b, c and 2 more; 5 tasks"


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ([{"calls": 3, "requests": ("a",), "repeats": 2}], "2 repeats"),
        ([{"calls": 3, "requests": ("a",), "repeats": 2, "requests_untold": 1}], None),
        # Whether one task asks what another has asked is known by their requests alone.
        ([{"calls": 3, "requests": ("a",), "repeats": 2}, {"calls": 1}], None),
        ([{"calls": 3}, {"calls": 1}], None),
        # One of three was made by a child process, which tells nothing of its requests.
        ([{"calls": 3, "requests": ("a", "b")}], None),
        ([{"calls": 2, "requests": ("a", "b")}, {"calls": 1, "requests": ("a",)}], "1 repeat"),
        ([{"calls": 2, "requests": ("a", "b")}, {"calls": 0}], "0 repeats"),
    ],
)
def test_repeats_are_said_as_they_are_known(tasks: list[dict[str, Any]], said: str | None) -> None:
    """All, or nothing of them."""
    parts = str(shown(book(*tasks))[1]).split(", ")
    assert [part for part in parts if "repeat" in part] == ([] if said is None else [said])


@pytest.mark.parametrize("name", ["request_preview", "response_preview"])
def test_what_the_user_has_said_stays(name: str) -> None:
    """Each of the two for itself, whatever tasks tell later."""
    of = book(TASKS[0], **{name: "mine"})
    shown(of)
    first = of.info.request_preview, of.info.response_preview
    of.receipts["late"] = TaskReceipt("tr-1", "late", 1, **TASKS[1])
    second = shown(of)
    assert getattr(of.info, name) == "mine"
    assert [one == two for one, two in zip(first, second, strict=True)].count(True) == 1


def test_of_a_trace_without_tasks_nothing_is_said() -> None:
    """It is MLflow's business."""
    assert shown(book()) == (None, None)
