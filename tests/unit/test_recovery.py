"""Recovery: what processes that are gone have left is delivered, also from a damaged file."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from mlflow_ctx_autolog.delivery.recovery import Recovered, Recovery, recover
from mlflow_ctx_autolog.delivery.spool import (
    Destination,
    Record,
    SpoolFile,
    spool_files,
)
from mlflow_ctx_autolog.exceptions import StoreError

DESTINATION = Destination("http://a", "1")
PAGE = 4096
LONG = 30.0


class Store:
    """Records what it is sent, and can be told to take no more, or not everything."""

    def __init__(self) -> None:
        self.requests: list[tuple[Destination, list[Record]]] = []
        self.takes: float = float("inf")
        self.refuses: set[str] = set()

    def __call__(self, destination: Destination, records: Sequence[Record], /) -> None:
        if len(self.requests) >= self.takes:
            raise StoreError("it answered 503")
        if self.refuses & {record.key for record in records}:
            raise StoreError("it answered 400", refused=True)
        self.requests.append((destination, list(records)))

    @property
    def keys(self) -> list[str]:
        return [record.key for _, records in self.requests for record in records]


@pytest.fixture
def store() -> Store:
    return Store()


def span(number: int, size: int = 0) -> Record:
    return Record("span", f"{number:04}", f"<{number:04}>".encode().ljust(size, b"x"), "task")


def left_behind(
    folder: Path, records: Sequence[Record], destination: Destination = DESTINATION
) -> Path:
    """Return a file as its process has left it."""
    file = SpoolFile.create(destination, folder, 1 << 30)
    file.add(list(enumerate(records, start=1)))
    file.close()
    return file.path


def names(*ranges: range) -> list[str]:
    return [f"{number:04}" for numbers in ranges for number in numbers]


def damage(path: Path, marker: bytes) -> list[str]:
    """Overwrite the page of a file that has a record in it; return the keys of all it held."""
    content = path.read_bytes()
    start = content.index(marker) // PAGE * PAGE
    page = content[start : start + PAGE]
    path.write_bytes(content[:start] + b"\xff" * PAGE + content[start + PAGE :])
    # Payloads start with their number in angle brackets.
    return [part[:4].decode() for part in page.split(b"<")[1:] if part[4:5] == b">"]


def test_records_are_delivered_and_the_file_deleted(store: Store, tmp_path: Path) -> None:
    """All that a dead process has left is sent where it belongs, in order; nothing stays."""
    records = [span(number) for number in range(3)]
    path = left_behind(tmp_path, records)

    assert recover(path, store) == Recovered(stored=3, left=0, problem=None)
    assert store.requests == [(DESTINATION, records)]
    assert list(tmp_path.iterdir()) == []


def test_empty_file_is_deleted(store: Store, tmp_path: Path) -> None:
    """A file that holds nothing is removed, without asking anything of the store."""
    path = left_behind(tmp_path, [])

    assert recover(path, store) == Recovered()
    assert store.requests == []
    assert list(tmp_path.iterdir()) == []


def test_file_without_tables_is_deleted(store: Store, tmp_path: Path) -> None:
    """A file whose process was killed just as it made it holds nothing, and is removed."""
    path = tmp_path / "x.spool"
    path.touch()
    os.utime(path, (0, 0))

    assert recover(path, store) == Recovered()
    assert list(tmp_path.iterdir()) == []


def test_file_that_is_being_made_is_left_alone(store: Store, tmp_path: Path) -> None:
    """A file that its process has just made, and not locked yet, is not taken from it."""
    path = tmp_path / "x.spool"
    path.touch()

    with suppress(BlockingIOError):
        recover(path, store)
    assert path.exists()


def test_many_records_go_in_several_requests(store: Store, tmp_path: Path) -> None:
    """A large file is sent in batches of a size that a store takes, each record once."""
    path = left_behind(tmp_path, [span(number) for number in range(450)])

    assert recover(path, store).stored == 450
    assert store.keys == names(range(450))
    assert [len(records) for _, records in store.requests] == [200, 200, 50]


def test_large_records_go_in_small_requests(store: Store, tmp_path: Path) -> None:
    """Few records go together where they are large, and one too large for any batch goes alone."""
    path = left_behind(tmp_path, [span(n, 1_900_000 if n else 5_000_000) for n in range(4)])

    assert recover(path, store).stored == 4
    assert [len(records) for _, records in store.requests] == [1, 2, 1]


def test_what_cannot_be_sent_is_left(store: Store, tmp_path: Path) -> None:
    """What the store took is gone from the file; the rest stays, is counted, and can be sent."""
    path = left_behind(tmp_path, [span(number) for number in range(450)])
    store.takes = 1

    assert recover(path, store) == Recovered(stored=200, left=250, problem="it answered 503")
    assert spool_files(tmp_path) == [path]

    store.takes = float("inf")
    assert recover(path, store) == Recovered(stored=250)
    assert store.keys == names(range(450))


def test_failure_of_any_kind_leaves_the_records(tmp_path: Path) -> None:
    """Also where sending fails unexpectedly nothing is lost, and the file is not kept open."""

    def send(_: Destination, __: Sequence[Record]) -> None:
        raise KeyError("no such thing")

    path = left_behind(tmp_path, [span(0)])

    for _ in range(2):
        found = recover(path, send)
        assert (found.stored, found.left) == (0, 1)
        assert "no such thing" in str(found.problem)


def test_record_that_is_refused_holds_up_no_others(store: Store, tmp_path: Path) -> None:
    """Where the store refuses one record for good, all others are delivered."""
    path = left_behind(tmp_path, [span(number) for number in range(10)])
    store.refuses = {"0004"}

    found = recover(path, store)
    assert sorted(store.keys) == names(range(4), range(5, 10))
    assert (found.stored, found.left) == (9, 1)


def test_file_in_use_is_left_alone(store: Store, tmp_path: Path) -> None:
    """A file whose process is alive is not touched."""
    file = SpoolFile.create(DESTINATION, tmp_path, 1 << 30)
    file.add([(1, span(1))])

    with pytest.raises(BlockingIOError):
        recover(file.path, store)
    assert store.requests == []
    assert [record for _, record in file.records()] == [span(1)]
    file.close()


def test_file_is_locked_while_it_is_recovered(tmp_path: Path) -> None:
    """Two processes that find a file at once do not send it twice."""
    path = left_behind(tmp_path, [span(1)])
    meanwhile: list[BaseException] = []

    def send(_: Destination, __: Sequence[Record]) -> None:
        try:
            recover(path, send)
        except BlockingIOError as error:
            meanwhile.append(error)

    assert recover(path, send).stored == 1
    assert len(meanwhile) == 1


def test_damage_in_the_middle_of_a_large_file(store: Store, tmp_path: Path) -> None:
    """Whole batches before and after a damaged page are delivered; the file is set aside."""
    path = left_behind(tmp_path, [span(number, 1000) for number in range(1000)])
    lost = damage(path, b"<0500>")

    found = recover(path, store)

    assert set(names(range(400), range(600, 1000))) <= set(store.keys)
    assert not set(lost) & set(store.keys)
    assert found.stored == len(store.keys) == len(set(store.keys))
    aside = path.with_suffix(".damaged")
    assert list(tmp_path.iterdir()) == [aside]
    assert "damaged" in str(found.problem)
    assert str(aside) in str(found.problem)


@pytest.mark.parametrize("count", [60, 1000])
def test_all_around_the_damage_is_delivered(store: Store, tmp_path: Path, count: int) -> None:
    """All records are delivered but those on the damaged page."""
    path = left_behind(tmp_path, [span(number, 1000) for number in range(count)])
    lost = damage(path, b"<%04d>" % (count // 2))
    assert 0 < len(lost) < 5

    recover(path, store)

    assert sorted(store.keys) == [name for name in names(range(count)) if name not in lost]


@pytest.mark.parametrize("requests", [1, 4], ids=["before the damage", "after it"])
def test_damaged_file_that_cannot_be_sent_is_kept(
    store: Store, tmp_path: Path, requests: int
) -> None:
    """A damaged file is set aside only when all that it still has was delivered."""
    path = left_behind(tmp_path, [span(number, 1000) for number in range(1000)])
    damage(path, b"<0500>")
    store.takes = requests

    found = recover(path, store)
    assert found.stored == len(store.keys) > 0
    assert "it answered 503" in str(found.problem)
    assert spool_files(tmp_path) == [path]

    store.takes = float("inf")
    recover(path, store)
    assert spool_files(tmp_path) == []
    assert set(names(range(400), range(600, 1000))) <= set(store.keys)


def test_failure_after_a_refusal_counts_each_record_once(store: Store, tmp_path: Path) -> None:
    """What is left is counted once, also where a refused record was sent alone before."""
    path = left_behind(tmp_path, [span(number) for number in range(10)])
    store.refuses = {"0002"}
    store.takes = 5

    found = recover(path, store)
    assert found.stored + found.left == 10
    store.takes = float("inf")
    assert (recover(path, store).left, spool_files(tmp_path)) == (1, [path])


def test_log_that_was_cut_off_gives_what_came_before(store: Store, tmp_path: Path) -> None:
    """Where the host went down while a record was written, those before it are delivered."""
    file = SpoolFile.create(DESTINATION, tmp_path / "live", 1 << 30)
    for number in range(10):
        file.add([(number + 1, span(number, 1000))])
    # As they are on the disk while the process lives, or after it was killed.
    copy = shutil.copytree(tmp_path / "live", tmp_path / "dead")
    file.close()
    [log] = copy.glob("*-wal")
    log.write_bytes(log.read_bytes()[:-100])
    [path] = spool_files(copy)

    assert recover(path, store).problem is None
    assert store.keys == names(range(9))
    assert list(copy.iterdir()) == []


def test_truncated_file_is_said_to_be_damaged(store: Store, tmp_path: Path) -> None:
    """A file whose end is missing is no crash of another kind, and is not deleted."""
    path = left_behind(tmp_path, [span(number, 1000) for number in range(1000)])
    path.write_bytes(path.read_bytes()[: 50 * PAGE])

    with pytest.raises(sqlite3.DatabaseError, match="malformed"):
        recover(path, store)
    assert path.stat().st_size == 50 * PAGE


@pytest.mark.parametrize("content", [b"no database" * 1000, b"\0" * 8192])
def test_file_that_is_no_database_is_left(store: Store, tmp_path: Path, content: bytes) -> None:
    """Something else under a spool's name is refused, and stays as it was."""
    path = tmp_path / "x.spool"
    path.write_bytes(content)

    with pytest.raises(sqlite3.Error):
        recover(path, store)
    assert path.read_bytes() == content
    assert store.requests == []


def test_missing_file_is_refused(store: Store, tmp_path: Path) -> None:
    """A file that is not there, as when another process was faster, is not made."""
    with pytest.raises((OSError, sqlite3.Error)):
        recover(tmp_path / "x.spool", store)
    assert list(tmp_path.iterdir()) == []


def adopt(recovery: Recovery, folder: Path | None) -> None:
    """Start an adoption, and wait for its end."""
    recovery.start(None if folder is None else str(folder))
    wait_for_adoptions()


def wait_for_adoptions() -> None:
    for thread in threading.enumerate():
        if thread.name == "mlflow-ctx-autolog-recovery":
            assert thread.daemon
            thread.join(LONG)
            assert not thread.is_alive()


Warned = Callable[[], list[str]]


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Warned:
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_adoption_delivers_what_dead_processes_left(
    store: Store, tmp_path: Path, warned: Warned
) -> None:
    """A worker sends what others have left, each to where it belongs, and says so."""
    other = Destination(None, "2")
    first = left_behind(tmp_path, [span(1), span(2)])
    second = left_behind(tmp_path, [span(3)], other)

    adopt(Recovery(store), tmp_path)

    requests = [(DESTINATION, [span(1), span(2)]), (other, [span(3)])]
    assert sorted(store.requests, key=repr) == sorted(requests, key=repr)
    assert spool_files(tmp_path) == []
    assert len(warned()) == 2
    for path, count in ((first, 2), (second, 1)):
        assert any(f"{count} finished spans" in text and str(path) in text for text in warned())


def test_adoption_does_not_wait_for_the_store(tmp_path: Path) -> None:
    """Looking for what was left is left to a thread: the task begins while the store hangs."""
    called, answer = threading.Event(), threading.Event()

    def send(_: Destination, __: Sequence[Record]) -> None:
        called.set()
        answer.wait(LONG)

    left_behind(tmp_path, [span(1)])
    Recovery(send).start(str(tmp_path))

    assert called.wait(LONG)
    assert not answer.is_set()
    answer.set()
    wait_for_adoptions()


def test_adoption_leaves_what_it_cannot_have(store: Store, tmp_path: Path, warned: Warned) -> None:
    """Files in use and such that are no spools do not keep it from the others."""
    (tmp_path / "0.spool").write_bytes(b"no database" * 1000)
    file = SpoolFile.create(DESTINATION, tmp_path, 1 << 30)
    file.add([(1, span(1))])
    left_behind(tmp_path, [span(2)])

    adopt(Recovery(store), tmp_path)

    assert store.keys == names(range(2, 3))
    assert spool_files(tmp_path) == [tmp_path / "0.spool", file.path]
    assert len(warned()) == 1
    file.close()


def test_adoption_keeps_what_the_store_does_not_take(
    store: Store, tmp_path: Path, warned: Warned
) -> None:
    """While the store is down the files stay, and nobody is told of it for each task."""
    store.takes = 0
    path = left_behind(tmp_path, [span(1)])

    adopt(Recovery(store), tmp_path)

    assert spool_files(tmp_path) == [path]
    assert warned() == []


def test_adoption_is_not_repeated_for_each_task(store: Store, tmp_path: Path) -> None:
    """Short tasks one after the other do not look into the directory each time."""
    recovery = Recovery(store)
    left_behind(tmp_path, [span(1)])
    adopt(recovery, tmp_path)
    later = left_behind(tmp_path, [span(2)])
    adopt(recovery, tmp_path)

    assert store.keys == names(range(1, 2))
    assert spool_files(tmp_path) == [later]


def test_adoption_is_repeated_after_a_while(store: Store, tmp_path: Path) -> None:
    """A worker that lives long looks again."""

    class Hasty(Recovery):
        _interval = 0.0

    recovery = Hasty(store)
    for number in (1, 2):
        left_behind(tmp_path, [span(number)])
        adopt(recovery, tmp_path)

    assert store.keys == names(range(1, 3))


def test_adoption_without_a_directory_is_no_error(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warned: Warned
) -> None:
    """Where no process has ever kept anything, there is nothing to do."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    adopt(Recovery(store), tmp_path / "missing")
    adopt(Recovery(store), None)

    assert store.requests == []
    assert warned() == []


def test_adoption_trusts_nobody_else(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that somebody else has put there does not say where to send this user's log-in."""
    path = left_behind(tmp_path, [span(1)])
    monkeypatch.setattr(os, "getuid", lambda: 4242)

    adopt(Recovery(store), tmp_path)
    assert store.requests == []
    assert path.exists()


def test_adoption_says_that_a_file_was_damaged(
    store: Store, tmp_path: Path, warned: Warned
) -> None:
    """That spans were lost with a damaged file is said, not only that others were stored."""
    path = left_behind(tmp_path, [span(number, 1000) for number in range(1000)])
    damage(path, b"<0500>")

    adopt(Recovery(store), tmp_path)

    assert any("damaged" in text for text in warned())
