"""What the calls of a job may spend."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from spending import PRICES, admitted, spend

from mlflow_ctx_autolog import BudgetExceeded, Config
from mlflow_ctx_autolog.recorder.budget import Budget, open_budget

USAGE = {"input_tokens": 500_000, "output_tokens": 100_000, "total_tokens": 600_000}

Open = Callable[..., Budget]


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """Opens the budget of a job, by default of the same one, under the settings given."""

    def opened(
        job: str = "trace",
        handover: str = "first",
        calls: int = 0,
        cost: float = 0.0,
        **settings: Any,
    ) -> Budget:
        config = Config(spool_directory=str(tmp_path / "spools"), prices=PRICES, **settings)
        known = {"calls": calls, "cost": cost}
        budget = open_budget(config, job, handover, known, PRICES.get)
        assert budget is not None
        return budget

    return opened


def test_without_a_limit_there_is_no_budget_and_no_file(tmp_path: Path) -> None:
    config = Config(spool_directory=str(tmp_path / "spools"))
    assert open_budget(config, "trace", "first", {}, PRICES.get) is None
    assert not (tmp_path / "spools").exists()


def test_no_more_calls_than_that(opened: Open) -> None:
    """The error says which limit it was, what was spent on what, and what to do."""
    budget = opened(max_calls=3)
    assert admitted(budget, 3) == 3
    budget.paid("gpt-test", USAGE, None)
    with pytest.raises(BudgetExceeded) as caught:
        budget.admit("gpt-other", None)

    message = str(caught.value)
    assert "'gpt-other' was not made: max_calls=3 is reached" in message
    assert "gpt-test: 3 calls (0 repeated), 600,000 tokens, $2.0000" in message
    assert "enable()" in message
    assert caught.value.spent == {"calls": 3, "repeats": 0, "cost": 2.0}
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


def test_threads_share_what_is_left(opened: Open) -> None:
    budget = opened(max_calls=50)
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda _: admitted(budget, 20), range(8))) == 50


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_of_a_host_share_what_is_left(opened: Open, tmp_path: Path, method: str) -> None:
    """A forked one, too, which must not use its parent's connection."""
    own = admitted(opened(max_calls=50), 5)
    context = multiprocessing.get_context(method)
    numbers = context.Queue()
    arguments = (str(tmp_path / "spools"), 40, numbers)
    children = [context.Process(target=spend, args=arguments) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert own + sum(numbers.get(timeout=5) for _ in children) == 50


def test_processes_may_open_it_at_once(tmp_path: Path) -> None:
    """As the workers of a host do when a job begins: none is sent away to a budget of its own."""
    context = multiprocessing.get_context("fork")
    for job in range(15):
        numbers, start = context.Queue(), context.Barrier(4)
        arguments = (str(tmp_path / str(job)), 20, numbers, start)
        children = [context.Process(target=spend, args=arguments) for _ in range(4)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert sum(numbers.get(timeout=5) for _ in children) == 50


def test_jobs_do_not_share(opened: Open) -> None:
    assert admitted(opened("one", max_calls=3), 5) == 3
    assert admitted(opened("other", max_calls=3), 5) == 3


def test_repeats_are_counted_by_request(opened: Open) -> None:
    """The first of its kind is none, whatever the limit."""
    budget = opened(max_repeats=1)
    assert admitted(budget, 1, "a") == 1
    assert admitted(budget, 3, "a") == 1
    assert admitted(budget, 1, "b") == 1
    assert admitted(budget, 1, "b") == 0
    with pytest.raises(BudgetExceeded, match=r"max_repeats=1 is reached, and it was made before"):
        budget.admit("gpt-test", "a")
    assert admitted(opened(job="without", max_repeats=0), 2, "a") == 1


def test_no_more_money_than_that(opened: Open) -> None:
    """Of answers that have come: what a span says of its cost goes before the price."""
    budget = opened(max_cost=3.0)
    assert admitted(budget, 1) == 1
    assert budget.paid("gpt-test", USAGE, None) == 2.0
    assert admitted(budget, 1) == 1
    assert budget.paid("gpt-test", USAGE, 1.5) == 1.5
    with pytest.raises(BudgetExceeded, match=r"max_cost=3 is reached.*\$3\.5000"):
        budget.admit("gpt-test", None)


def test_answer_without_usage_is_estimated(opened: Open, caplog: pytest.LogCaptureFixture) -> None:
    """A budget in money is not passed in silence, and says how many calls it had to estimate."""
    budget = opened(max_cost=3.0)
    assert admitted(budget, 1) == 1
    assert budget.paid("gpt-test", {}, None, lambda: USAGE) == 2.0
    assert "max_cost=3 counts what some calls of 'gpt-test' cost by the length" in caplog.text
    # Of which only the total is told.
    assert admitted(budget, 1) == 1
    assert budget.paid("gpt-test", {"total_tokens": 9}, None, lambda: USAGE) == 2.0
    with pytest.raises(BudgetExceeded, match=r"\$4\.0000 \(not all tokens of 2 calls told\)"):
        budget.admit("gpt-test", None)


def test_answer_without_usage_is_not_estimated_where_money_has_no_limit(opened: Open) -> None:
    budget = opened(max_calls=1)
    assert admitted(budget, 1) == 1
    assert budget.paid("gpt-test", {}, None, lambda: USAGE) == 0.0
    with pytest.raises(BudgetExceeded, match=r"\$0\.0000 \(not all tokens of 1 calls told\)"):
        budget.admit("gpt-test", None)


def test_a_price_that_nobody_knows_is_said_before_anything_is_spent(opened: Open) -> None:
    with pytest.raises(BudgetExceeded, match=r"'gpt-unknown' was not made: .*prices=") as caught:
        opened(max_cost=3.0).admit("gpt-unknown", None)
    assert caught.value.spent["calls"] == 0
    opened(job="other", max_calls=3).admit("gpt-unknown", None)


def test_what_the_driver_knows_of_other_hosts_counts(opened: Open) -> None:
    """But not twice what this host has told it."""
    assert admitted(opened(max_calls=10), 4) == 4
    # Of 7 calls that the driver knows of, 4 were made here.
    second = opened(handover="second", calls=7, max_calls=10)
    assert admitted(second, 2) == 2
    # What is made here meanwhile is told neither to it nor twice.
    assert admitted(opened(handover="second", calls=7, max_calls=10), 5) == 1
    with pytest.raises(BudgetExceeded, match="on other hosts: 3 calls"):
        second.admit("gpt-test", None)


def test_nobody_else_may_read_it(opened: Open, tmp_path: Path) -> None:
    admitted(opened(max_calls=3), 1)
    files = list((tmp_path / "spools").iterdir())
    assert files
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_old_ones_are_removed(opened: Open, tmp_path: Path) -> None:
    admitted(opened("old", max_calls=3), 1)
    old = set((tmp_path / "spools").iterdir())
    for file in old:
        os.utime(file, (time.time(), time.time() - 8 * 24 * 3600))
    admitted(opened("new", max_calls=3), 1)
    assert not old & set((tmp_path / "spools").iterdir())


def test_a_disk_that_takes_nothing_leaves_a_budget_for_each_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    config = Config(spool_directory=str(tmp_path / "file"), max_calls=3)
    budget = open_budget(config, "trace", "first", {}, PRICES.get)
    assert budget is not None
    assert admitted(budget, 5) == 3
    assert "Each worker process keeps a budget of its own" in caplog.text
