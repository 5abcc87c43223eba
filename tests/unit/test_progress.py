"""What is shown of a job while it runs, without Spark."""

from __future__ import annotations

import io
import re
import sys
from types import SimpleNamespace

import pytest

from mlflow_ctx_autolog.delivery.receipts import TaskReceipt
from mlflow_ctx_autolog.driver import progress as progress_module
from mlflow_ctx_autolog.driver import screens
from mlflow_ctx_autolog.driver.progress import Progress


class Terminal(io.StringIO):
    """Standard error that somebody looks at."""

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        """What can be read there in the end."""
        whole = re.split("\n", self.getvalue())
        return [re.split("\r\x1b\\[2K", line)[-1] for line in whole if line]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    terminal = Terminal()
    # pytest sets its own anew before the test begins.
    monkeypatch.setattr(screens, "sys", SimpleNamespace(stderr=terminal, modules={}))
    return terminal


def receipt(trace: str, task: str, **told: object) -> TaskReceipt:
    usage = {"total_tokens": 1000}
    return TaskReceipt(trace, task, 1, calls=2, usage=usage, **told)  # type: ignore[arg-type]


def test_a_job_has_numbers_of_its_own(terminal: Terminal) -> None:
    """Each has a line, its repeats are those within it, and a task counts once."""
    progress = Progress(lambda task: (task.spent, 0))
    progress.switch(True)
    progress.add(receipt("tr-1", "a", requests=("x", "y"), spent=0.5))
    progress.add(receipt("tr-1", "a", requests=("x", "y"), spent=0.5))
    progress.add(receipt("tr-1", "b", requests=("x", "z"), spent=0.25, errors=1))
    progress.add(receipt("tr-2", "c", requests=("x",)))
    # Settings that change meanwhile do not concern it.
    progress.switch(True)
    progress.add(receipt("tr-2", "d", requests=("y",)))
    progress.switch(False)

    assert terminal.lines == [
        "model calls: 4 calls, 2,000 tokens, $0.7500, 1 error, 1 repeat",
        "model calls: 4 calls, 2,000 tokens, 0 errors, 0 repeats",
    ]


def test_repeats_that_nobody_can_know_are_not_denied(terminal: Terminal) -> None:
    """Of requests beyond those that a task keeps, it is not known whether they were made before."""
    progress = Progress(lambda task: (task.spent, 0))
    progress.switch(True)
    progress.add(receipt("tr-1", "a", requests=("x",), repeats=2))
    progress.add(receipt("tr-1", "b", requests=("x",), requests_untold=5))
    progress.switch(False)
    assert terminal.lines == ["model calls: 4 calls, 2,000 tokens, 0 errors, at least 3 repeats"]


def test_what_is_no_job_is_left_out(terminal: Terminal) -> None:
    """As doctor()'s call, and what comes when it is switched off."""
    progress = Progress(lambda task: (task.spent, 0))
    progress.add(receipt("tr-1", "a"))
    progress.switch(True)
    progress.ignore("tr-2")
    progress.add(receipt("tr-2", "b"))
    progress.switch(False)
    progress.add(receipt("tr-1", "c"))

    assert terminal.getvalue() == ""


def test_it_is_drawn_once_in_a_while(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """And then as it is by then, also where no other task tells anything."""
    monkeypatch.setattr(progress_module, "_INTERVAL", 2.0)
    progress = Progress(lambda task: (task.spent, 0))
    progress.switch(True)
    for number in range(100):
        progress.add(receipt("tr-1", str(number)))
    assert terminal.getvalue().count("\r") == 1
    timer = progress._timer
    assert timer is not None
    timer.join(30)
    assert terminal.lines == ["model calls: 200 calls, 100,000 tokens, 0 errors, 0 repeats"]
    progress.finish("tr-1")
    assert terminal.getvalue().endswith("repeats\n")


def test_nothing_is_kept_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard error is a file, say."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress = Progress(lambda task: (task.spent, 0))
    progress.switch(True)
    progress.add(receipt("tr-1", "a"))

    assert progress._jobs == {}
