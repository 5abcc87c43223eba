"""The line that a job leaves when it is over, without Spark."""

from __future__ import annotations

import io
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from mlflow_ctx_autolog.delivery.receipts import Receipt, TaskReceipt
from mlflow_ctx_autolog.delivery.records import Destination
from mlflow_ctx_autolog.driver import screens
from mlflow_ctx_autolog.driver.books import Book
from mlflow_ctx_autolog.driver.job_lines import cost_of_task, job_line, show_job


class Terminal(io.StringIO):
    """Standard error that somebody looks at."""

    def isatty(self) -> bool:
        return True


PRICES = {"model": (1.0, 10.0)}


def book(uri: str = "sqlite:///mlflow.db", **task: Any) -> Book:
    info = SimpleNamespace(trace_id="tr-1", experiment_id="7", tags={"mlflow.traceName": "job"})
    found = Book(Destination(uri, "7"), info, delivers=True, spans=1)
    usage = {"total_tokens": 3_000_000}
    found.receipts["a"] = TaskReceipt("tr-1", "a", 3, calls=2, usage=usage, **task)
    return found


def line(of: Book, **receipt: Any) -> str:
    return job_line(of, Receipt("tr-1", 1, **{"made": 4, "stored": 4, **receipt}), PRICES)


def test_a_job_says_what_it_came_to() -> None:
    """Calls, tokens, cost where it is known, and that all is stored."""
    assert line(book()) == "job: 2 calls, 3,000,000 tokens, 4 spans stored"
    priced = line(book(models={"model": (2_000_000, 1_000_000, 2)}))
    assert priced == "job: 2 calls, 3,000,000 tokens, $12.0000, 4 spans stored"
    assert "$0.5000" in line(book(spent=0.5, models={"model": (1, 1, 1)}))


def test_it_says_what_is_missing() -> None:
    """As the receipt does."""
    found = line(book(), stored=3, lost=1)
    assert found == "job: 2 calls, 3,000,000 tokens, 4 spans made, 3 stored, 1 lost"


def test_it_links_to_the_trace_on_a_server() -> None:
    """Without a log-in that the address may hold."""
    found = line(book("http://user:secret@mlflow:5000/"))
    address = "http://mlflow:5000/#/experiments/7/traces?selectedEvaluationId=tr-1"
    assert found.endswith(f". {address}")


def test_of_a_model_without_a_price_nothing_is_said() -> None:
    """Nor is it taken for free."""
    unknown = TaskReceipt("tr-1", "a", 1, models={"nobody-knows": (1, 1, 3)})
    assert cost_of_task(unknown, PRICES) == (0.0, 3)
    assert cost_of_task(TaskReceipt("tr-1", "a", 1, cost={"total_cost": 2.0}), PRICES) == (2.0, 0)


@pytest.mark.parametrize(
    ("told", "amounts"),
    [
        ({"sums": {"unknown": 2}}, "at least 3,000,000 tokens (not known of 2 calls)"),
        (
            {"sums": {"unknown": 1}, "models": {"model": (1_000_000, 0, 1)}},
            "at least 3,000,000 tokens, at least $1.0000 (not known of 1 call)",
        ),
        (
            # Which a budget has estimated.
            {"sums": {"unknown": 1}, "models": {"model": (1_000_000, 0, 1)}, "spent": 9.0},
            "at least 3,000,000 tokens, at least $1.0000 (not known of 1 call)",
        ),
        (
            {"models": {"model": (1_000_000, 0, 1), "nobody-knows": (1, 1, 1)}},
            "3,000,000 tokens, at least $1.0000 (not known of 1 call)",
        ),
        (
            {"cost": {"total_cost": 0.5}, "models": {"model": (1_000_000, 0, 1)}},
            "3,000,000 tokens, $1.5000",
        ),
    ],
)
def test_what_is_known_in_part_is_at_least(told: dict[str, Any], amounts: str) -> None:
    """With of how many calls it is not known; what the user has priced is not all of it."""
    assert line(book(**told)) == f"job: 2 calls, {amounts}, 4 spans stored"


def test_a_terminal_is_shown_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On standard error, as a line of its own."""
    terminal = Terminal()
    monkeypatch.setattr(screens, "sys", SimpleNamespace(stderr=terminal, modules={}))
    show_job("job: 2 calls")
    assert terminal.getvalue() == "\r\x1b[2Kjob: 2 calls\n"


def test_elsewhere_the_log_has_it(caplog: pytest.LogCaptureFixture) -> None:
    """At INFO, where nobody looks at standard error."""
    with caplog.at_level(logging.INFO, "mlflow_ctx_autolog.driver.job_lines"):
        show_job("job: 2 calls")
    assert caplog.messages == ["job: 2 calls"]
