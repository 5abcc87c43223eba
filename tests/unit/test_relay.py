"""How the driver gets what its workers cannot store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.delivery.handed_over import Acknowledgements
from mlflow_ctx_autolog.delivery.outbox import Outbox
from mlflow_ctx_autolog.delivery.records import Destination, Record
from mlflow_ctx_autolog.delivery.relay import (
    Collected,
    announce_driver,
    collect,
    driver_is_here,
    relay_bytes,
)
from mlflow_ctx_autolog.delivery.segments import Segment, spool_files
from mlflow_ctx_autolog.delivery.sender import Delivery
from mlflow_ctx_autolog.driver import spark as spark_api
from mlflow_ctx_autolog.exceptions import StoreError

HOME = Destination(None, "1", "driver 1")


@pytest.mark.parametrize("limit", [1 << 30, 8 << 20])
@pytest.mark.parametrize("tasks", [1, 40, 200, 10_000, 200_000])
def test_what_goes_home_leaves_room_for_the_users_results(limit: int, tasks: int) -> None:
    """However many tasks the stage has, of which none knows the number."""
    in_all = sum(relay_bytes(limit, partition) for partition in range(tasks))
    assert in_all < 0.65 * limit
    if tasks == 200:
        assert in_all > 0.15 * limit


def test_without_a_limit_more_goes_home() -> None:
    assert relay_bytes(0, 0) > relay_bytes(None, 0) == relay_bytes(1 << 30, 0) == (1 << 30) // 640


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1g", 1 << 30),
        ("8m", 8 << 20),
        ("8MiB", 8 << 20),
        ("512k", 512 << 10),
        ("2t", 2 << 40),
        ("0", 0),
        ("1000", 1000),
        ("much", None),
    ],
)
def test_the_limit_is_read_as_spark_reads_it(text: str, size: int | None) -> None:
    session = SimpleNamespace(conf={"spark.driver.maxResultSize": text})
    assert spark_api.max_result_bytes(session) == size


def _span(key: str, size: int = 0) -> Record:
    return Record("span", key, key.encode().ljust(size), "task")


def _outbox(folder: Path, **settings: Any) -> Outbox:
    return Outbox(HOME, Config(spool_directory=str(folder), **settings))


def _is_of(driver_id: str) -> Callable[[Destination], bool]:
    return lambda destination: destination.driver_id == driver_id


def _keys(records: Sequence[Record]) -> str:
    return "".join(record.key for record in records)


def test_no_more_is_handed_over_than_that(spools: Path) -> None:
    """The oldest first; what is larger than all of it stays, and is left to the driver."""
    outbox = _outbox(spools)
    for record in [_span("a", 400), _span("b", 400), _span("c", 5000), _span("d", 400)]:
        outbox.submit(record)

    token, number, records = outbox.hand_over(1000)
    assert (number, _keys(records)) == (1, "ab")
    assert outbox.hand_over(1000) == (token, 0, [])
    outbox.acknowledge({"another": 1})
    assert outbox.waiting == 4
    outbox.acknowledge({token: 1})
    assert outbox.release() == 2
    assert outbox.waiting == 0
    outbox.submit(_span("e"))

    got: list[Record] = []
    # The one that the worker has still is left to it.
    assert collect(spools, _is_of("driver 1"), lambda _, records: got.extend(records)) == (
        Collected(records=2, held=1)
    )
    assert _keys(got) == "cd"
    assert len(spool_files(spools)) == 1
    assert _keys(outbox.take()) == "e"


def test_what_was_handed_over_is_kept_until_it_is_acknowledged(spools: Path) -> None:
    """It is not handed over again; and of a process that is killed before, it is recovered."""
    outbox = _outbox(spools)
    handed = []
    for key in "abc":
        outbox.submit(_span(key))
        _, number, records = outbox.hand_over(1000)
        handed.append((number, _keys(records)))
    assert handed == [(1, "a"), (2, "b"), (3, "c")]
    assert outbox.hand_over(1000)[1:] == (0, [])

    outbox.acknowledge({outbox.hand_over(0)[0]: 2})
    outbox.release()
    got: list[Record] = []
    collect(spools, _is_of("driver 1"), lambda _, records: got.extend(records))
    assert _keys(got) == "c"


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("is_taken", [True, False])
def test_what_ends_while_it_is_on_its_way_as_begun_is_handed_over(
    spools: Path, is_taken: bool
) -> None:
    """The store may never answer. Where it has taken the begin, it gets the end once more."""
    answer = threading.Event()
    states: list[bytes] = []

    def hang(_: Destination, records: Sequence[Record]) -> None:
        states.extend(record.payload for record in records)
        if len(states) == 1:
            answer.wait(60)
        if not is_taken:
            raise StoreError("it answered 401")

    delivery = Delivery(HOME, hang, Config(spool_directory=str(spools), send_interval=0.01))
    delivery.submit_all([Record("span", "task", b"begun")], at_once=True)
    _until(lambda: len(states) == 1)
    delivery.submit_all([Record("span", "task", b"ended")])
    token, number, records = delivery.hand_over(1000)
    assert [record.payload for record in records] == [b"ended"]

    delivery.acknowledge({token: number})
    answer.set()
    if not is_taken:
        _until(lambda: delivery.first_error is not None)
        # As the driver does with each task that it gives to the worker.
        delivery.acknowledge({token: number})
    _until(lambda: delivery.waiting == 0)
    assert states == [b"begun", b"ended"][: 2 if is_taken else 1]


def test_what_is_kept_for_the_driver_does_not_fill_the_spool(spools: Path) -> None:
    """During a job of many tasks nothing is acknowledged: what Spark had first goes first."""
    outbox = _outbox(spools, spool_max_bytes=4000)
    for number in range(20):
        outbox.submit(_span(f"{number:02}", 300))
        assert outbox.hand_over(10_000)[1] == number + 1
    assert (outbox.lost, outbox.waiting) == (0, 4)


def test_the_driver_acknowledges_up_to_what_is_missing() -> None:
    """What Spark did not bring is not acknowledged by what it brought after it."""
    acknowledgements = Acknowledgements()
    for number in (1, 2, 4):
        acknowledgements.note("a", number)
    acknowledgements.note("b", 2)
    assert acknowledgements.told() == {"a": 2}
    acknowledgements.note("a", 3)
    acknowledgements.note("b", 1)
    assert acknowledgements.told() == {"a": 4, "b": 2}


def test_the_driver_acknowledges_those_that_it_has_heard_from_last() -> None:
    """What it says of an action has few words, however many workers there were."""
    acknowledgements = Acknowledgements()
    for number in range(1000):
        acknowledgements.note(f"worker {number}", 1)
    acknowledgements.note("worker 940", 2)
    told = acknowledgements.told()
    assert len(told) == 64
    assert (told["worker 940"], told["worker 999"], "worker 935" in told) == (2, 1, False)


def test_nobody_collects_what_belongs_to_others(spools: Path) -> None:
    """Neither to another driver, nor to a store."""
    for destination in (Destination(None, "1", "driver 2"), Destination("http://a", "1")):
        segment = Segment.create(destination, spools)
        segment.add([(1, _span("a"))])
        segment.close()

    got: list[Record] = []

    def take(_: Destination, records: Sequence[Record]) -> None:
        got.extend(records)

    assert collect(spools, _is_of("driver 1"), take) == Collected()
    assert (got, len(spool_files(spools))) == ([], 2)
    assert collect(spools, _is_of("driver 2"), take) == Collected(records=1)


def test_what_came_first_is_collected_first(spools: Path) -> None:
    """Of a process' files, the later one holds later states of what is in the earlier."""
    for number in range(20):
        segment = Segment.create(Destination(None, "1", "driver 1"), spools)
        segment.add([(1, _span(str(number)))])
        segment.close()
    got: list[str] = []

    def take(_: Destination, records: Sequence[Record]) -> None:
        got.extend(record.key for record in records)

    assert collect(spools, _is_of("driver 1"), take) == Collected(records=20)
    assert got == [str(number) for number in range(20)]


DRIVER = """
import sys
from pathlib import Path
from mlflow_ctx_autolog.delivery.relay import announce_driver

announce_driver(Path(sys.argv[1]), "driver 1")
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_worker_knows_whether_its_driver_sees_the_directory(spools: Path) -> None:
    """As long as that lives, however it ends; what it leaves is removed by the next one."""
    assert not driver_is_here(spools, "driver 1")
    for end in ("killed", "over"):
        command = [sys.executable, "-c", DRIVER, str(spools)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as driver:
            assert driver.stdout is not None
            assert driver.stdin is not None
            assert driver.stdout.readline() == b"ready\n"
            assert driver_is_here(spools, "driver 1")
            assert not driver_is_here(spools, "driver 2")
            assert not driver_is_here(spools.parent, "driver 1")
            if end == "killed":
                driver.send_signal(signal.SIGKILL)
            else:
                driver.stdin.close()
            driver.wait()
        assert not driver_is_here(spools, "driver 1")
        assert len(list(spools.glob("*.driver"))) == (1 if end == "killed" else 0)

    (spools / f"mlflow-ctx-autolog-{'0' * 32}.driver").touch()
    (spools / "mine.driver").touch()
    announce_driver(spools, f"driver of {os.getpid()}")
    assert driver_is_here(spools, f"driver of {os.getpid()}")
    left = {path.name for path in spools.glob("*.driver")}
    assert len(left) == 2
    assert "mine.driver" in left
