"""How the driver gets what its workers cannot store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.delivery.records import Destination, Record
from mlflow_ctx_autolog.delivery.relay import (
    announce_driver,
    collect,
    driver_is_here,
    relay_bytes,
)
from mlflow_ctx_autolog.delivery.segments import Segment, spool_files
from mlflow_ctx_autolog.delivery.sender import Delivery
from mlflow_ctx_autolog.driver import spark as spark_api

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


def _delivery(folder: Path, destination: Destination = HOME) -> Delivery:
    def send(_: Destination, __: Sequence[Record]) -> None:
        raise AssertionError("nobody sends it from here")

    return Delivery(destination, send, Config(spool_directory=str(folder)))


def test_no_more_is_given_up_than_that(spools: Path) -> None:
    """The oldest first; what is larger than all of it stays, and is left to the driver."""
    delivery = _delivery(spools)
    for record in [_span("a", 400), _span("b", 400), _span("c", 5000), _span("d", 400)]:
        delivery.submit(record)

    assert [record.key for record in delivery.take(1000)] == ["a", "b"]
    assert delivery.take(1000) == []
    assert delivery.waiting == 2
    assert delivery.release() == 2
    assert delivery.waiting == 0
    delivery.submit(_span("e"))

    got: list[Record] = []
    assert collect(spools, "driver 1", lambda _, records: got.extend(records)) == 2
    assert [record.key for record in got] == ["c", "d"]
    # This one the worker has still.
    assert len(spool_files(spools)) == 1
    assert [record.key for record in delivery.take()] == ["e"]


def test_nobody_collects_what_belongs_to_others(spools: Path) -> None:
    """Neither to another driver, nor to a store."""
    for destination in (Destination(None, "1", "driver 2"), Destination("http://a", "1")):
        segment = Segment.create(destination, spools)
        segment.add([(1, _span("a"))])
        segment.close()

    got: list[Record] = []
    assert collect(spools, "driver 1", lambda _, records: got.extend(records)) == 0
    assert (got, len(spool_files(spools))) == ([], 2)
    assert collect(spools, "driver 2", lambda _, records: got.extend(records)) == 1


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
