"""Answers on the disk: whole or not at all, whoever else writes, and whatever the disk does."""

from __future__ import annotations

import io
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from reuse import new_store

from mlflow_ctx_autolog.answers import directory, store
from mlflow_ctx_autolog.answers.directory import forget, problem, sweep
from mlflow_ctx_autolog.answers.entry import (
    DamagedEntryError,
    Entry,
    NewerEntryError,
    cipher,
    decode,
    encode,
)
from mlflow_ctx_autolog.answers.store import AnswerStore, Shelf
from mlflow_ctx_autolog.answers.task_answers import (
    CountedTurns,
    Place,
    Question,
    TaskAnswers,
    _Evaluation,
)
from mlflow_ctx_autolog.answers_settings import Answers

ENTRY = Entry((("content-type", "text/plain"), ("x", "ü")), (b"one\n", b"", b"two"), "tr-1/2")
NAME = f"{'a' * 32}.0"
JOB, PART = "0" * 32, "1" * 32


def shelf_of(kept: AnswerStore, job: str = JOB, part: str = PART) -> Shelf:
    return kept.shelf(job, part)


def keep(kept: AnswerStore, name: str = NAME, entry: Entry = ENTRY, job: str = JOB) -> None:
    kept.keep(shelf_of(kept, job), name, 100, lambda: entry)
    assert kept.flush(10)


def files(kept: AnswerStore) -> list[Path]:
    return [path for path in kept.root.rglob("*") if path.is_file() and path.parent != kept.root]


def answers(kept: AnswerStore) -> list[Path]:
    return [path for path in files(kept) if path.name != "job"]


@pytest.fixture
def kept(tmp_path: Path) -> AnswerStore:
    return new_store(tmp_path / "answers")


def test_an_entry_is_read_as_it_was_written() -> None:
    assert decode(encode(ENTRY, NAME), NAME) == ENTRY
    empty = Entry((), (), "")
    assert decode(encode(empty, NAME), NAME) == empty


def test_what_is_cut_off_or_changed_is_found_out() -> None:
    """Each beginning of an entry, each byte that is another, and another's name."""
    whole = encode(ENTRY, NAME)
    for length in range(len(whole)):
        with pytest.raises(DamagedEntryError):
            decode(whole[:length], NAME)
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        with pytest.raises((DamagedEntryError, NewerEntryError)):
            decode(bytes(changed), NAME)
    with pytest.raises(DamagedEntryError):
        decode(whole + b"more", NAME)
    with pytest.raises(DamagedEntryError):
        decode(whole, f"{'b' * 32}.0")


def test_an_entry_of_a_newer_version_says_so() -> None:
    newer = encode(ENTRY, NAME).replace(b" 1\n", b" 2\n", 1)
    with pytest.raises(NewerEntryError, match="version 2, and this release reads 1"):
        decode(newer, NAME)


def test_encryption() -> None:
    """Nothing can be read without the key, and what another key has encrypted is no answer."""
    fernet = pytest.importorskip("cryptography.fernet")
    one, other = (cipher(fernet.Fernet.generate_key().decode()) for _ in range(2))
    sealed = encode(ENTRY, NAME, one)
    assert b"content-type" not in sealed
    assert decode(sealed, NAME, one) == ENTRY
    for wrong in [(sealed, other), (sealed, None), (encode(ENTRY, NAME), one)]:
        with pytest.raises(DamagedEntryError):
            decode(wrong[0], NAME, wrong[1])


@pytest.mark.parametrize("lists", [False, True])
def test_what_is_kept_is_found(tmp_path: Path, lists: bool) -> None:
    kept = new_store(tmp_path / "answers", lists=lists)
    assert kept.find(shelf_of(kept), NAME) is None
    keep(kept)
    assert kept.find(shelf_of(kept), NAME) == ENTRY
    assert kept.find(shelf_of(kept), f"{'a' * 32}.1") is None
    assert kept.find(kept.shelf("2" * 32, PART), NAME) is None


def test_only_this_user_may_read_them(kept: AnswerStore) -> None:
    """Whatever the umask says."""
    before = os.umask(0)
    try:
        keep(kept)
    finally:
        os.umask(before)
    for path in [kept.root, *kept.root.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_the_first_one_stays(kept: AnswerStore) -> None:
    keep(kept)
    keep(kept, entry=Entry((), (b"later",), "tr-3/4"))
    assert kept.find(shelf_of(kept), NAME) == ENTRY
    assert len(answers(kept)) == 1


def test_without_links_the_first_one_stays(
    kept: AnswerStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems have none, as those in user space."""

    def link(*args: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    keep(kept)
    keep(kept, entry=Entry((), (b"later",), "tr-3/4"))
    assert kept.find(shelf_of(kept), NAME) == ENTRY
    assert len(answers(kept)) == 1


def test_a_damaged_file_makes_room_for_a_good_one(kept: AnswerStore) -> None:
    keep(kept)
    (path,) = answers(kept)
    path.write_bytes(path.read_bytes()[:-1])
    assert kept.find(shelf_of(kept), NAME) is None
    keep(kept)
    assert kept.find(shelf_of(kept), NAME) == ENTRY


def test_a_newer_file_is_left_alone_with_one_warning(
    kept: AnswerStore, caplog: pytest.LogCaptureFixture
) -> None:
    keep(kept)
    (path,) = answers(kept)
    newer = path.read_bytes().replace(b" 1\n", b" 9\n", 1)
    path.write_bytes(newer)
    store.warn_once.__globals__["_warned"].clear()
    for _ in range(3):
        assert kept.find(shelf_of(kept), NAME) is None
    assert kept.flush(10)
    assert path.read_bytes() == newer
    assert [record.message.count("version 9") for record in caplog.records] == [1]


def test_a_link_is_not_followed(kept: AnswerStore, tmp_path: Path) -> None:
    keep(kept)
    (path,) = answers(kept)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert kept.find(shelf_of(kept), NAME) is None


@pytest.mark.parametrize("failing", ["write", "close", "open", "link"])
def test_a_disk_that_is_full(
    kept: AnswerStore, monkeypatch: pytest.MonkeyPatch, failing: str, tmp_path: Path
) -> None:
    """Wherever it fails, nothing is kept, nothing is left, and nobody is told but the log."""
    keep(kept, name=f"{'b' * 32}.0")

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    if failing in ("write", "close"):
        real = open

        class Full:
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                self.file = real(*args, **kwargs)

            def __enter__(self) -> Any:
                return self

            def write(self, data: Any) -> int:
                if failing == "write":
                    self.file.write(bytes(data)[:10])
                    fail()
                return int(self.file.write(data))

            def __exit__(self, *args: Any) -> None:
                self.file.close()
                if failing == "close":
                    fail()

        monkeypatch.setattr(store, "open", Full, raising=False)
    elif failing == "open":
        monkeypatch.setattr(store, "_write_new", fail)
    else:
        monkeypatch.setattr(os, "link", fail)
        monkeypatch.setattr(os, "rename", fail)
    keep(kept)
    monkeypatch.undo()
    assert kept.find(shelf_of(kept), NAME) is None
    assert [path.name for path in answers(kept)] == [f"{'b' * 32}.0"]
    keep(kept)
    assert kept.find(shelf_of(kept), NAME) == ENTRY


@pytest.mark.parametrize("lists", [False, True])
def test_a_directory_that_goes_away_and_comes_back(tmp_path: Path, lists: bool) -> None:
    """It is not made anew by a worker that has seen it; where it comes back, it is used again."""
    kept = new_store(tmp_path / "answers", lists=lists)
    keep(kept)
    kept.root.rename(tmp_path / "away")
    keep(kept)
    assert kept.find(shelf_of(kept), NAME) is None
    assert kept.flush(10)
    assert not kept.root.exists()
    (tmp_path / "away").rename(kept.root)
    assert kept.find(kept.shelf(JOB, PART), NAME) == ENTRY


def test_a_killed_writer_leaves_no_half_answer(tmp_path: Path) -> None:
    """A process that is killed while it writes, at any moment, leaves whole answers only."""
    root = tmp_path / "answers"
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1] / "support")!r})
from pathlib import Path
from reuse import new_store
from mlflow_ctx_autolog.answers.entry import Entry
kept = new_store(Path({str(root)!r}))
shelf = kept.shelf({JOB!r}, {PART!r})
entry = Entry((), (bytes(1_000_000),), "tr-1/2")
number = 0
while True:
    kept.keep(shelf, f"{{number:032x}}.0", 1_000_000, lambda: entry)
    kept.flush(10)
    number += 1
    if number == 3:
        print("ready", flush=True)
"""
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
    kept = new_store(root)
    found = [path for path in answers(kept) if not path.name.startswith(".")]
    assert len(found) >= 3
    for path in found:
        assert kept.find(kept.shelf(JOB, PART), path.name) is not None
    # What it had put aside is removed when it is certain that nobody writes it any more.
    for path in answers(kept):
        os.utime(path, (0, 0)) if path.name.startswith(".") else None
    sweep(root, None)
    assert not [path for path in answers(kept) if path.name.startswith(".")]


def test_many_writers_and_readers_at_once(tmp_path: Path) -> None:
    """Threads and stores of one directory, all for the same names: each reader reads one whole."""
    stores = [new_store(tmp_path / "answers") for _ in range(4)]
    names = [f"{number:032x}.0" for number in range(20)]
    wrong: list[Any] = []

    def work(kept: AnswerStore, number: int) -> None:
        shelf = kept.shelf(JOB, PART)
        for name in names:
            entry = Entry((("name", name),), (str(number).encode() * 1000,), str(number))
            kept.keep(shelf, name, 1000, lambda entry=entry: entry)
            found = kept.find(shelf, name)
            if found is not None and found.chunks[0] != found.paid_by.encode() * 1000:
                wrong.append(found)

    threads = [
        threading.Thread(target=work, args=(kept, number)) for number, kept in enumerate(stores)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(kept.flush(10) for kept in stores)
    assert wrong == []
    assert {path.name for path in answers(stores[0])} == set(names)


def test_oldest_make_room(tmp_path: Path) -> None:
    """All answers together never take more than they may, and the newest are kept."""
    size = len(encode(ENTRY, NAME))
    kept = new_store(tmp_path / "answers", max_bytes=20 * size)
    names = [f"{number:032x}.0" for number in range(100)]
    for name in names:
        keep(kept, name)
        assert sum(path.stat().st_size for path in answers(kept)) <= 20 * size
    assert kept.find(shelf_of(kept), names[-1]) == ENTRY
    assert len(answers(kept)) >= 10
    assert kept.find(shelf_of(kept), names[0]) is None


def test_an_answer_that_is_too_large_is_not_kept(tmp_path: Path) -> None:
    kept = new_store(tmp_path / "answers", max_bytes=1000)
    keep(kept, entry=Entry((), (bytes(2000),), ""))
    assert answers(kept) == []
    assert kept.keep(shelf_of(kept), NAME, 1001, lambda: ENTRY) is None


def test_answers_of_a_job_last_as_long_as_it_is_at_work(tmp_path: Path) -> None:
    """Its time to live begins when it was last seen, and is that of its own settings."""
    kept = new_store(tmp_path / "answers", ttl=100.0)
    other = "9" * 32
    keep(kept)
    keep(kept, job=other)
    for path in files(kept):
        os.utime(path, (time.time() - 1000,) * 2)
    os.utime(directory.folder_of(kept.root, JOB) / "job")
    sweep(kept.root, None, 10.0)
    assert kept.find(shelf_of(kept), NAME) == ENTRY
    assert not directory.folder_of(kept.root, other).exists()


def test_answers_that_are_always_kept_have_a_time_each(tmp_path: Path) -> None:
    kept = new_store(tmp_path / "answers", ttl=100.0)
    for name in (NAME, f"{'b' * 32}.0"):
        kept.keep(kept.shelf("always", PART, 100.0), name, 10, lambda: ENTRY)
    assert kept.flush(10)
    old = next(path for path in answers(kept) if path.name == NAME)
    os.utime(old, (time.time() - 1000,) * 2)
    shelf = kept.shelf("always", PART, 100.0)
    assert kept.find(shelf, NAME) is None
    assert kept.find(shelf, f"{'b' * 32}.0") == ENTRY
    sweep(kept.root, None)
    assert not old.exists()
    assert len(answers(kept)) == 1


def test_what_is_not_ours_is_left_alone(kept: AnswerStore) -> None:
    """In a directory that the user names there may be more, and he may name his home."""
    keep(kept)
    others = [kept.root / "notes.txt", kept.root / "answers-mine" / "a.0", kept.root / "x" / NAME]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    for path in [*others, *others[0].parent.iterdir()]:
        os.utime(path, (0, 0))
    sweep(kept.root, 0, 1.0)
    keep(kept)
    assert forget(kept.root) == 1
    assert all(path.read_text() == "mine" for path in others)
    assert not directory.folder_of(kept.root, JOB).exists()


@pytest.mark.parametrize(
    ("mode", "reason"),
    [(0o770, "other users may write"), (0o777, "other users may write"), (0o1777, "other users")],
)
def test_a_directory_that_others_may_write_to_is_refused(
    tmp_path: Path, mode: int, reason: str
) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    assert reason in str(problem(folder))
    with pytest.raises(OSError, match=reason):
        new_store(folder)
    folder.chmod(0o755)
    assert problem(folder) is None


def test_mode_bits_say_nothing_on_a_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Volume shows any mode."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.setattr(directory, "is_local", lambda path: False)
    assert problem(folder) is None


@pytest.mark.parametrize(
    ("path", "local"),
    [("/", True), ("/mnt/nfs/a", False), ("/mnt/nfsother", True), ("/Volumes/x y/z", False)],
)
def test_what_is_local(monkeypatch: pytest.MonkeyPatch, path: str, local: bool) -> None:
    """The file system that is mounted nearest above a path says it."""
    mounts = [
        "/dev/sda / ext4 rw 0 0",
        "server:/a /mnt/nfs nfs4 rw 0 0",
        "volume /Volumes/x\\040y fuse.volume rw 0 0",
    ]
    monkeypatch.setattr(
        directory, "open", lambda *_, **__: io.StringIO("\n".join(mounts)), raising=False
    )
    assert directory.is_local(path) == local


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    assert "is not a directory" in str(problem(path))
    with pytest.raises(OSError, match="is not a directory"):
        new_store(path)


def test_only_the_last_part_of_a_path_is_made(tmp_path: Path) -> None:
    """Where a mount is missing, nothing is made in its place."""
    with pytest.raises(FileNotFoundError):
        new_store(tmp_path / "not" / "mounted")
    assert list(tmp_path.iterdir()) == []


def test_turns() -> None:
    """Times are counted for each request, and one that was not answered is the next one's."""
    turns = CountedTurns()
    assert [turns.take("a") for _ in range(3)] == [0, 1, 2]
    assert turns.take("b") == 0
    turns.give_back("a", 1)
    turns.give_back("a", 0)
    assert [turns.take("a") for _ in range(3)] == [0, 1, 3]


def test_partitions_of_one_attempt(tmp_path: Path) -> None:
    """One after the other they are different ones; at the same time they are one."""
    place = Place("job", "function", "0", "app/1")

    def evaluation(arrived: float, at: Place = place) -> _Evaluation:
        return _Evaluation(at, arrived, str(tmp_path / "spools"))

    first = evaluation(time.time())
    again = evaluation(time.time())
    arrived_before_the_end = time.time()
    first.close()
    again.close()
    late = evaluation(arrived_before_the_end)
    late.close()
    assert (first.number, again.number, late.number) == (0, 0, 0)
    second = evaluation(time.time())
    second.close()
    third = evaluation(time.time())
    assert (second.number, third.number) == (1, 2)
    assert evaluation(time.time(), Place("job", "function", "0", "app/2")).number == 0
    assert evaluation(time.time(), Place("job", "other", "0", "app/1")).number == 0


def test_a_child_process_asks_as_its_parent(kept: AnswerStore, tmp_path: Path) -> None:
    """What a child has kept, its parent finds, and the other way round."""
    place = Place("job", "function", "0", "app/1")
    parent = TaskAnswers(kept, place, Answers(), b"key", None, str(tmp_path / "spools"))
    located = Place.from_json(parent.located())
    child = TaskAnswers(kept, located, Answers(), b"key", parent.turns)
    digest = "a" * 32

    Question(child, digest, 0).keep(10, lambda: ENTRY)
    Question(parent, digest, 1).keep(10, lambda: ENTRY)
    assert kept.flush(10)
    assert Question(parent, digest, 0).find() == Question(child, digest, 1).find() == ENTRY


def test_partitions_are_not_mixed_up_where_processes_share_nothing(
    kept: AnswerStore, tmp_path: Path
) -> None:
    """Without a file that says what else an attempt has evaluated, nothing is given again."""
    (tmp_path / "file").touch()
    place = Place("job", "function", "0", "app/1")
    found = {
        TaskAnswers(kept, place, Answers(), b"key", None, str(tmp_path / "file")).partition
        for _ in range(3)
    }
    assert len(found) == 3


def test_what_waits_for_a_slow_disk_is_bounded(
    kept: AnswerStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call never waits for it, and memory does not grow without end."""
    go_on = threading.Event()
    monkeypatch.setattr(store, "_WAITING_BYTES", 1000)

    def slow() -> Entry:
        go_on.wait(10)
        return ENTRY

    kept_one = kept.keep(shelf_of(kept), NAME, 600, slow)
    started = time.monotonic()
    assert kept.keep(shelf_of(kept), f"{'b' * 32}.0", 600, slow) is None
    assert not kept.flush(0.01)
    assert time.monotonic() - started < 1
    go_on.set()
    assert kept_one is not None
    assert kept_one.wait(10)
