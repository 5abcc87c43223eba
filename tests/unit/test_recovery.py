"""Recovery: what processes that are gone have left is delivered, also from a damaged file."""

from __future__ import annotations

import logging
import os
import random
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path

import pytest

from mlflow_ctx_autolog.delivery.recovery import Recovered, Recovery, recover
from mlflow_ctx_autolog.delivery.segments import DamagedError, Segment
from mlflow_ctx_autolog.delivery.spool import Destination, Record, spool_files
from mlflow_ctx_autolog.exceptions import StoreError

DESTINATION = Destination("http://a", "1")
NAME = f"mlflow-ctx-autolog-{'0' * 32}.spool"
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
    segment = Segment.create(destination, folder)
    if records:
        segment.add(list(enumerate(records, start=1)))
    segment.close()
    return segment.path


def names(*ranges: range) -> list[str]:
    return [f"{number:04}" for numbers in ranges for number in numbers]


def damage(path: Path, marker: bytes) -> None:
    """Overwrite some of what a record of a file holds."""
    content = bytearray(path.read_bytes())
    start = content.index(marker)
    content[start : start + 4] = b"\xff" * 4
    path.write_bytes(content)


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
    path = tmp_path / NAME
    path.touch()
    os.utime(path, (0, 0))

    assert recover(path, store) == Recovered()
    assert list(tmp_path.iterdir()) == []


def test_file_that_is_being_made_is_left_alone(store: Store, tmp_path: Path) -> None:
    """A file that its process has just made, and not locked yet, is not taken from it."""
    path = tmp_path / NAME
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
    [aside] = spool_files(tmp_path, refused=True)
    assert aside.name.endswith(".refused.spool")
    assert str(found.problem) == f"it answered 400; it is in {aside} now"
    assert recover(aside, store).left == 1
    assert aside.exists()
    store.refuses = set()
    assert recover(aside, store) == Recovered(stored=1)
    assert list(tmp_path.iterdir()) == []


def test_record_that_the_store_fails_over_holds_up_no_others(tmp_path: Path) -> None:
    """It is set aside where the store takes the others; where it takes none, nothing is."""
    stored: list[str] = []
    poisoned = {"0005", "0250"}

    def send(_: Destination, records: Sequence[Record]) -> None:
        keys = [record.key for record in records]
        if poisoned & set(keys):
            raise StoreError("it answered 500", failed=True)
        stored.extend(keys)

    path = left_behind(tmp_path, [span(number) for number in range(300)])
    everything = set(names(range(300)))
    poisoned_before, poisoned = poisoned, everything
    found = recover(path, send)
    assert (found.stored, found.left, spool_files(tmp_path)) == (0, 300, [path])

    poisoned = poisoned_before
    found = recover(path, send)
    assert set(stored) == everything - poisoned
    assert (found.stored, found.left) == (298, 2)
    [aside] = spool_files(tmp_path, refused=True)
    poisoned = set()
    assert recover(aside, send).stored == 2


def test_records_that_were_rejected_are_not_sent_again(tmp_path: Path) -> None:
    """Where a collector has taken the others and does not say which."""
    requests: list[int] = []

    def send(_: Destination, records: Sequence[Record]) -> None:
        requests.append(len(records))
        raise StoreError("it rejected 2 spans", rejected=2)

    path = left_behind(tmp_path, [span(number) for number in range(5)])
    found = recover(path, send)
    assert (found.stored, found.left, found.problem) == (3, 0, "it rejected 2 spans")
    assert requests == [5]
    assert list(tmp_path.iterdir()) == []


def test_file_in_use_is_left_alone(store: Store, tmp_path: Path) -> None:
    """A file whose process is alive is not touched."""
    file = Segment.create(DESTINATION, tmp_path)
    file.add([(1, span(1))])

    with pytest.raises(BlockingIOError):
        recover(file.path, store)
    assert store.requests == []
    assert file.read(1) == span(1)
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


@pytest.mark.parametrize("count", [60, 1000])
def test_all_around_the_damage_is_delivered(store: Store, tmp_path: Path, count: int) -> None:
    """All but the damaged record; the file is set aside, and it is said how much could be read."""
    path = left_behind(tmp_path, [span(number, 1000) for number in range(count)])
    damage(path, b"<%04d>" % (count // 2))

    found = recover(path, store)

    assert store.keys == names(range(count // 2), range(count // 2 + 1, count))
    assert found.stored == count - 1
    assert found.is_damaged
    aside = path.with_suffix(".damaged")
    assert list(tmp_path.iterdir()) == [aside]
    assert f"{count - 1} records could be read, and 1,0" in str(found.problem)
    assert str(aside) in str(found.problem)


@pytest.mark.parametrize("seed", range(30))
def test_damage_anywhere_costs_what_it_hits(store: Store, tmp_path: Path, seed: int) -> None:
    """Bytes at random, also in what stands between the records, cost a record each at most."""
    path = left_behind(tmp_path, [span(number, 300) for number in range(60)])
    chance = random.Random(seed)
    content = bytearray(path.read_bytes())
    head = content.index(b"\nrec")
    for _ in range(5):
        content[chance.randrange(head, len(content))] ^= 1 + chance.randrange(255)
    path.write_bytes(content)

    recover(path, store)
    assert 55 <= len(store.keys) == len(set(store.keys)) <= 60
    assert all(
        record.payload == span(int(record.key), 300).payload
        for _, records in store.requests
        for record in records
    )


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
    assert len(set(store.keys)) == 999


def test_failure_after_a_refusal_counts_each_record_once(store: Store, tmp_path: Path) -> None:
    """What is left is counted once, also where a refused record was sent alone before."""
    path = left_behind(tmp_path, [span(number) for number in range(10)])
    store.refuses = {"0002"}
    store.takes = 5

    found = recover(path, store)
    assert found.stored + found.left == 10
    store.takes = float("inf")
    found = recover(path, store) if path.exists() else found
    assert sorted(store.keys) == names(range(2), range(3, 10))
    assert spool_files(tmp_path) == []
    assert len(spool_files(tmp_path, refused=True)) == 1


@pytest.mark.parametrize("missing", [1, 100, 1020])
def test_file_that_was_cut_off_gives_what_came_before(
    store: Store, tmp_path: Path, missing: int
) -> None:
    """Where the host went down while a record was written, those before it are delivered."""
    path = left_behind(tmp_path, [span(number, 1000) for number in range(10)])
    path.write_bytes(path.read_bytes()[:-missing])

    assert recover(path, store).problem is None
    assert store.keys == names(range(9))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"no spool" * 1000, b"\0" * 8192])
def test_file_that_is_no_spool_is_left(store: Store, tmp_path: Path, content: bytes) -> None:
    """Something else under a spool's name is refused, and stays as it was."""
    path = tmp_path / NAME
    path.write_bytes(content)

    with pytest.raises(DamagedError):
        recover(path, store)
    assert path.read_bytes() == content
    assert store.requests == []


def test_missing_file_is_refused(store: Store, tmp_path: Path) -> None:
    """A file that is not there, as when another process was faster, is not made."""
    with pytest.raises(FileNotFoundError):
        recover(tmp_path / NAME, store)
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
    (tmp_path / NAME).write_bytes(b"no spool" * 1000)
    older = tmp_path / f"{'1' * 32}.spool"
    with closing(sqlite3.connect(older)) as database:
        database.executescript("create table destination(a); insert into destination values (1);")
    os.utime(older, (1, 1))
    file = Segment.create(DESTINATION, tmp_path)
    file.add([(1, span(1))])
    left_behind(tmp_path, [span(2)])

    adopt(Recovery(store), tmp_path)

    assert store.keys == names(range(2, 3))
    assert set(spool_files(tmp_path)) == {tmp_path / NAME, older, file.path}
    assert len(warned()) == 3
    assert any("older release" in text and str(older) in text for text in warned())
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
