"""Which trace a finished span goes to."""

from __future__ import annotations

import io
import os
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event
from typing import Any, cast
from unittest.mock import MagicMock, Mock

import pytest

from mlflow_ctx_autolog import Config, DriverContext
from mlflow_ctx_autolog.delivery.host_account import HostAccount
from mlflow_ctx_autolog.driver import handover, routes
from mlflow_ctx_autolog.worker.open_spans import Branch
from mlflow_ctx_autolog.worker.placement import (
    Jobs,
    Place,
    Placement,
    Quota,
    Slowest,
    open_placement,
)

TRACEPARENT = f"00-{'1' * 32}-{'2' * 16}-01"

Open = Callable[..., Placement]


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """Opens what decides for a task of a trace, as each task does for itself."""

    def opened(
        limit: int | None = None,
        sampling: str | None = None,
        trace: str = "tr-1",
        traceparent: str | None = TRACEPARENT,
    ) -> Placement:
        config = Config(spool_directory=str(tmp_path / "spools"), sampling=sampling)
        context = DriverContext("1", traceparent=traceparent, spans_per_host=limit, config=config)
        placement = open_placement(context, trace)
        assert placement is not None
        return placement

    return opened


def place(
    placement: Placement,
    number: int = 0,
    *,
    failed: bool = False,
    seconds: float = 1.0,
    branch: Branch | None = None,
) -> Place:
    span_id = f"{number:016x}"
    found = branch or Branch(span_id, "task")
    return placement.place(found, span_id, failed=failed, seconds=seconds)


def places(placement: Placement, count: int, **how: Any) -> Counter[Place]:
    return Counter(place(placement, **how) for _ in range(count))


def test_without_limit_and_sampling_nothing_is_decided(tmp_path: Path) -> None:
    config = Config(spool_directory=str(tmp_path / "spools"))
    assert open_placement(DriverContext("1", config=config), "tr-1") is None
    assert not (tmp_path / "spools").exists()


def test_what_a_trace_has_room_for_stays_in_it(opened: Open) -> None:
    """Tasks share it, one after the other and all at once."""
    for _ in range(3):
        task = opened(100)
        assert places(task, 20, seconds=0.0) == {Place.MAIN: 20}
        task.close()

    def run(_: int) -> Counter[Place]:
        task = opened(100)
        found = places(task, 5, seconds=0.0)
        task.close()
        return found

    with ThreadPoolExecutor(4) as pool:
        found = sum(pool.map(run, range(8)), Counter[Place]())
    # Four at once may each hold what another would need.
    assert found[Place.MAIN] + found[Place.LINKED] == 40
    found += places(opened(100), 40, seconds=0.0)
    assert 40 <= found[Place.MAIN] <= 40 + 25


def test_errors_and_the_slowest_are_preferred(opened: Open) -> None:
    """Each have another eighth, and no more than that."""
    task = opened(40)
    assert places(task, 40) == {Place.MAIN: 40}
    assert place(task, seconds=1.0) is Place.MAIN
    assert place(task, seconds=0.9) is Place.LINKED
    assert [place(task, seconds=float(n)) for n in (2, 3, 4, 5)] == [Place.MAIN] * 4
    assert place(task, seconds=6.0) is Place.LINKED
    assert places(task, 5, failed=True, seconds=0.0) == {Place.MAIN: 5}
    assert place(task, failed=True, seconds=0.0) is Place.LINKED


def test_traces_do_not_share(opened: Open) -> None:
    assert places(opened(10), 10, seconds=0.0) == {Place.MAIN: 10}
    assert places(opened(10, trace="tr-2"), 10, seconds=0.0) == {Place.MAIN: 10}


def test_tasks_that_are_traces_of_their_own_do_not_share(opened: Open, tmp_path: Path) -> None:
    for _ in range(2):
        assert places(opened(10, traceparent=None), 10, seconds=0.0) == {Place.MAIN: 10}
    assert not (tmp_path / "spools").exists()


def test_a_branch_stays_together(opened: Open) -> None:
    """Where its first span goes that ends; one that has begun in the trace may go beyond it."""
    task = opened(10)
    first = Branch("top", "task")
    assert {place(task, n, branch=first) for n in range(30)} == {Place.MAIN}
    assert places(task, 9, seconds=0.0) == {Place.MAIN: 9}
    second = Branch("other", "task")
    # After this one it is not the slowest.
    assert place(task, seconds=1.0) is Place.MAIN
    assert place(task, seconds=0.0, branch=second) is Place.LINKED
    assert place(task, failed=True, seconds=99.0, branch=second) is Place.LINKED


def test_threads_that_end_spans_of_a_branch_at_once_place_them_alike() -> None:
    """Also where the trace is full before the second has decided."""
    is_deciding, may_decide = Event(), Event()

    class LastOne:
        def take(self, kind: str) -> bool:
            is_first = not is_deciding.is_set()
            is_deciding.set()
            return is_first and may_decide.wait(10)

    placement = Placement(cast(Quota, LastOne()), Mock(includes=lambda _: False), None)
    branch = Branch("top", "task")
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(place, placement, 1, branch=branch)
        assert is_deciding.wait(10)
        second = threads.submit(place, placement, 2, branch=branch)
        # Long enough to decide, if it does not wait for the first.
        wait([second], timeout=0.1)
        may_decide.set()
        assert (first.result(), second.result()) == (Place.MAIN, Place.MAIN)
        assert place(placement, 3, branch=branch) is Place.MAIN


def test_the_slowest_are_all_told_and_few_others() -> None:
    """Two processes that share an account, of which each knows an older state than there is."""
    account = HostAccount(None, Jobs, 0.0)
    processes = [Slowest(20, account, "tr-1") for _ in range(2)]
    order = random.Random(7).sample(range(10_000), 10_000)
    told = {n for n in order if processes[n % 2].includes(float(n))}
    assert told >= set(range(9_980, 10_000))
    # 20 times the logarithm of 10,000 / 20, and the first 20.
    assert len(told) < 220
    assert not processes[0].includes(5.0)


def test_calls_that_take_equally_long_are_not_all_the_slowest() -> None:
    slowest = Slowest(20, HostAccount(None, Jobs, 0.0), "tr-1")
    assert sum(slowest.includes(1.0) for _ in range(1000)) <= 20


def test_sampling_keeps_what_it_says(opened: Open) -> None:
    """A share of ordinary calls, by their random ids; errors and the slowest besides."""
    ids = [random.Random(n).getrandbits(64) for n in range(2000)]
    task = opened(sampling="errors+5%")
    kept = [place(task, number) for number in ids].count(Place.MAIN)
    assert 60 < kept < 140
    assert {place(task, number, failed=True) for number in ids} == {Place.MAIN}

    slow = opened(sampling="slow")
    found = [place(slow, number, seconds=float(n)) for n, number in enumerate(reversed(ids[:50]))]
    assert found == [Place.MAIN] * 50
    assert place(slow, seconds=3.0) is Place.NOWHERE
    assert {place(opened(sampling="100%"), number) for number in ids} == {Place.MAIN}
    assert {place(opened(sampling="0%"), number) for number in ids} == {Place.NOWHERE}


def test_an_error_is_kept_where_its_branch_is_not(opened: Open) -> None:
    """As of the user's span around a call that went well, whose answer could not be used."""
    task = opened(sampling="errors")
    branch = Branch("top", "task")
    assert place(task, 1, branch=branch) is Place.NOWHERE
    assert place(task, 2, failed=True, branch=branch) is Place.MAIN
    assert place(task, 3, branch=branch) is Place.NOWHERE


def test_sampling_comes_before_the_limit(opened: Open) -> None:
    """What is left out takes no room."""
    task = opened(10, sampling="errors")
    assert places(task, 50) == {Place.NOWHERE: 50}
    # One of them is the slowest, and one fails.
    assert places(task, 14, failed=True) == {Place.MAIN: 12, Place.LINKED: 2}


def test_a_disk_that_fails_costs_no_span(
    opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Then a trace gets larger than it should, which is said."""
    task = opened(10)

    def fail(_: object) -> None:
        raise OSError("disk I/O error")

    monkeypatch.setattr(HostAccount, "changing", fail)
    assert places(task, 200) == {Place.MAIN: 200}
    task.close()
    assert "A trace may get larger than it should, since disk I/O error" in caplog.text


def test_jobs_of_long_ago_are_forgotten(
    opened: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each batch of a stream may be a job, and one file is for all of them."""
    assert places(opened(10), 10, seconds=0.0) == {Place.MAIN: 10}
    monkeypatch.setattr("mlflow_ctx_autolog.worker.placement._JOBS", 3)
    for number in range(4):
        places(opened(10, trace=f"tr-other-{number}"), 10, seconds=0.0)
    assert places(opened(10), 10, seconds=0.0) == {Place.MAIN: 10}
    assert len(list((tmp_path / "spools").iterdir())) == 1


def test_a_file_that_has_grown_is_written_anew(tmp_path: Path) -> None:
    """In few lines, and those who had read the old ones read the new ones."""

    class Small(HostAccount[Jobs]):
        _longest = 2000

    def opened() -> Small:
        path = tmp_path / "account"
        return Small(io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT), "r+"), Jobs, 0.0)

    quota, other = (Quota({"any": 5000}, opened(), "tr-1") for _ in range(2))
    assert sum(each.take("any") for _ in range(2000) for each in (quota, other)) == 4000
    assert (tmp_path / "account").stat().st_size < 2500
    other.give_back()
    last = Quota({"any": 5000}, opened(), "tr-1")
    assert sum(last.take("any") for _ in range(2000)) == 1000


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path: Path) -> None:
    """As a process leaves it that is killed while it writes."""
    path = tmp_path / "account"

    def opened() -> HostAccount[Jobs]:
        return HostAccount(io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT), "r+"), Jobs, 0.0)

    quota = Quota({"any": 100}, opened(), "tr-1")
    assert sum(quota.take("any") for _ in range(40)) == 40
    path.write_bytes(path.read_bytes() + b'\n["taken", "tr-')
    assert sum(quota.take("any") for _ in range(8)) == 8
    later = Quota({"any": 100}, opened(), "tr-1")
    # But for what the first has in stock.
    assert sum(later.take("any") for _ in range(100)) == 52


@pytest.mark.parametrize(
    ("hosts", "share"),
    [(1, 2000), (3, 666), (10, 200), (20, 200), (100, 40), (100_000, 1), (None, 100)],
)
def test_hosts_share_a_trace(
    experiment_id: str, monkeypatch: pytest.MonkeyPatch, hosts: int | None, share: int
) -> None:
    """Each has a tenth at least, unless the whole came to too much, or nobody knows of how many."""
    monkeypatch.setattr(handover.spark_api, "most_hosts", lambda _: hosts)
    assert routes.spans_per_host(handover.settings(), object()) == share


def test_the_hosts_of_executors_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the driver, unless it has an executor, too."""

    def found(*names: str, **settings: str) -> int | None:
        executors = [Mock(**{"host.return_value": name}) for name in names]
        context = MagicMock()
        context._conf.get.return_value = "driver"
        context._jsc.sc().statusTracker().getExecutorInfos.return_value = executors
        monkeypatch.setattr(handover.spark_api, "spark_context", lambda _: context)
        told = {"spark.master": "spark://master:7077"}
        told |= {f"spark.dynamicAllocation.{name}": value for name, value in settings.items()}
        monkeypatch.setattr(
            handover.spark_api,
            "settings_of",
            lambda _, names: {name: told.get(name) for name in names},
        )
        return handover.spark_api.most_hosts(object())

    assert found("driver") is None
    assert found("driver", "driver") == 1
    assert found("driver", "one", "one", "two") == 2
    # Of a cluster that grows, those that there are now say nothing.
    assert found("driver", "one", enabled="true", maxExecutors="30") == 30
    assert found("driver", "one", enabled="true", maxExecutors=str(2**31 - 1)) is None
    assert found("driver", "one", enabled="true") is None


@pytest.mark.parametrize(("master", "hosts"), [("local[2]", 1), ("spark://one:7077", None)])
def test_where_spark_does_not_tell_of_executors(
    monkeypatch: pytest.MonkeyPatch, master: str, hosts: int | None
) -> None:
    """As on Spark Connect, whose settings can be read."""
    monkeypatch.setattr(handover.spark_api, "spark_context", lambda _: None)
    told = {"spark.master": master}
    monkeypatch.setattr(handover.spark_api, "settings_of", lambda *_: told)
    assert handover.spark_api.most_hosts(object()) == hosts
