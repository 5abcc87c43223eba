"""The spool: what it keeps outlives its process, and nobody else can read or spoil it."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlflow_ctx_autolog.delivery import segments as segments_module
from mlflow_ctx_autolog.delivery import spool as spool_module
from mlflow_ctx_autolog.delivery.directory import directory_problem, private_file
from mlflow_ctx_autolog.delivery.segments import DamagedError, Segment
from mlflow_ctx_autolog.delivery.spool import (
    Destination,
    Record,
    Spool,
    default_directory,
    spool_files,
)

DESTINATION = Destination("http://a", "1")
PLENTY = 10_000_000


def span(key: str, size: int = 0, owner: str = "") -> Record:
    return Record("span", key, (key.encode() + b" ").ljust(size, b"x"), owner)


def keys(spool: Spool) -> list[str]:
    return [record.key for _, record in spool.peek(1000, PLENTY)]


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def number_of(spool: Spool, key: str) -> int:
    return next(number for number, record in spool.peek(1000, PLENTY) if record.key == key)


def bytes_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir())


MakeSpool = Callable[..., Spool]


@pytest.fixture
def make(spools: Path) -> MakeSpool:
    def make(
        destination: Destination = DESTINATION,
        directory: Path | None = spools,
        max_bytes: int = PLENTY,
        in_memory: int = PLENTY,
    ) -> Spool:
        return Spool(destination, directory, max_bytes, in_memory)

    return make


class Disk:
    """Makes the spool's files fail as a disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    @contextmanager
    def failing(self, *methods: str) -> Iterator[None]:
        def fail(*_: object) -> None:
            raise OSError(errno.ENOSPC, "no space left on device")

        with self._monkeypatch.context() as patch:
            for method in methods:
                patch.setattr(Segment, method, fail)
            yield


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@contextmanager
def process(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run Python code in a process of its own until it has said a line."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline() == "ready\n"
            yield running
        finally:
            running.kill()


HOLDER = """
import sys
from pathlib import Path
from mlflow_ctx_autolog.delivery.spool import Destination, Record, Spool

spool = Spool(Destination("http://a", "1"), Path(sys.argv[1]), 10_000_000, 10_000_000)
for number in range(int(sys.argv[2])):
    spool.add([Record("span", f"{number}", b"payload", "task")])
print("ready", flush=True)
sys.stdin.read()
"""


def test_records_come_back_oldest_first(make: MakeSpool) -> None:
    """What was added is found in the same order, whole, and stays until it is removed."""
    spool = make()
    records = [span("b", owner="task"), Record("trace", "a", b"{}\x00\xff"), span("a")]
    assert spool.add(records[:1]) == []
    assert spool.add(records[1:]) == []

    assert [record for _, record in spool.peek(10, PLENTY)] == records
    assert [record for _, record in spool.peek(10, PLENTY)] == records
    assert len(spool) == 3


def test_many_records_come_back_oldest_first(make: MakeSpool) -> None:
    """Also those that are read in several goes, where some of them are in memory."""
    spool = make(max_bytes=100_000)
    records = [span(str(number), size=1000) for number in range(200)]
    for record in records:
        assert spool.add([record]) == []

    found = spool.peek(1000, PLENTY)
    assert [record for _, record in found] == records
    assert len(spool.peek(50, PLENTY)) == 50
    assert len(spool.peek(1000, 50_000)) == 50
    assert spool.remove(number for number, _ in found) == {number for number, _ in found}
    assert len(spool) == 0


def test_new_spool_is_empty_and_makes_no_file(make: MakeSpool, spools: Path) -> None:
    """A spool that has held nothing leaves no trace on the disk."""
    spool = make()

    assert (len(spool), spool.peek(10, PLENTY)) == (0, [])
    spool.discard()
    assert files_in(spools) == []


def test_peek_is_limited_by_count_and_size(make: MakeSpool) -> None:
    """No more is looked at than asked for, but always at least one record."""
    spool = make()
    spool.add([span("a", 100), span("b", 100), span("c", 100)])

    assert [record.key for _, record in spool.peek(2, PLENTY)] == ["a", "b"]
    assert [record.key for _, record in spool.peek(10, 200)] == ["a", "b"]
    assert [record.key for _, record in spool.peek(10, 199)] == ["a"]
    assert [record.key for _, record in spool.peek(10, 1)] == ["a"]


@pytest.mark.parametrize("max_bytes", [PLENTY, 0], ids=["disk", "memory"])
def test_removed_records_are_gone(make: MakeSpool, max_bytes: int) -> None:
    """Removing forgets just the records with these numbers; unknown numbers do no harm."""
    spool = make(max_bytes=max_bytes)
    spool.add([span("a"), span("b"), span("c")])

    spool.remove([number_of(spool, "a"), number_of(spool, "c"), 1234])

    assert keys(spool) == ["b"]
    assert len(spool) == 1


@pytest.mark.parametrize("max_bytes", [PLENTY, 0], ids=["disk", "memory"])
def test_record_can_be_moved_to_the_end(make: MakeSpool, max_bytes: int) -> None:
    """A record that is moved to the end comes after those there are, and before later ones."""
    spool = make(max_bytes=max_bytes)
    spool.add([span("a"), span("b"), span("c")])

    spool.move_to_end(number_of(spool, "a"), span("a"))
    spool.move_to_end(1234, span("x"))
    spool.add([span("d")])

    assert keys(spool) == ["b", "c", "a", "d"]
    spool.remove([number_of(spool, "a")])
    assert keys(spool) == ["b", "c", "d"]
    assert len(spool) == 3


def test_later_record_takes_the_place_of_an_earlier_one(make: MakeSpool) -> None:
    """Of two records of one kind with one key, the later stays, at the later one's place."""
    spool = make()
    first, second = Record("span", "a", b"open"), Record("span", "a", b"ended", "task")
    spool.add([first, span("b"), Record("trace", "a", b"other kind")])
    spool.add([second])

    assert len(spool) == 3
    assert [record for _, record in spool.peek(10, PLENTY)][-1] == second
    assert keys(spool) == ["b", "a", "a"]


def test_record_is_replaced_within_one_addition(make: MakeSpool) -> None:
    """Of two records with one key that come together, the later stays."""
    spool = make()
    spool.add([Record("span", "a", b"open"), Record("span", "a", b"ended")])

    assert [record.payload for _, record in spool.peek(10, PLENTY)] == [b"ended"]
    spool.remove([number for number, _ in spool.peek(10, PLENTY)])
    assert len(spool) == 0


def test_removing_a_replaced_record_leaves_its_successor(make: MakeSpool) -> None:
    """What was replaced while it was on its way to the store is still there, in its new form."""
    spool = make()
    spool.add([Record("span", "a", b"open")])
    on_its_way = [number for number, _ in spool.peek(10, PLENTY)]
    spool.add([Record("span", "a", b"ended")])

    spool.remove(on_its_way)
    assert [record.payload for _, record in spool.peek(10, PLENTY)] == [b"ended"]
    assert len(spool) == 1


def test_later_record_in_memory_is_not_overtaken_by_an_earlier_one(
    make: MakeSpool, disk: Disk
) -> None:
    """An ended span on the disk is not sent before the open one that waits in memory."""
    spool = make()
    with disk.failing("add"):
        spool.add([Record("span", "a", b"open")])
    spool.add([Record("span", "a", b"ended")])

    assert [record.payload for _, record in spool.peek(10, PLENTY)][-1] == b"ended"


def test_file_is_private(make: MakeSpool, spools: Path) -> None:
    """Only this user can read the file, and list or enter the directory that was made for it."""
    before = os.umask(0)
    try:
        make().add([span("a")])
    finally:
        os.umask(before)

    modes = {path.suffix: stat.S_IMODE(path.stat().st_mode) for path in spools.iterdir()}
    assert modes[".spool"] == 0o600
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE(spools.stat().st_mode) == 0o700


def test_default_directory_is_among_temporary_files(
    make: MakeSpool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a directory, files are made in one of this user's own among temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    make(directory=None).add([span("a")])

    assert default_directory().parent == tmp_path
    assert stat.S_IMODE(default_directory().stat().st_mode) == 0o700
    assert len(spool_files()) == 1


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_default_directory_that_others_can_write_is_not_used(
    make: MakeSpool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: int,
) -> None:
    """Where somebody else could put or take files, spans wait in memory, with one warning."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    default_directory().mkdir()
    default_directory().chmod(mode)
    spool = make(directory=None)

    assert spool.add([span("a")]) == []
    assert spool.add([span("b")]) == []

    assert keys(spool) == ["a", "b"]
    assert files_in(default_directory()) == []
    [warning] = [record.getMessage() for record in caplog.records]
    assert "can be written by somebody else" in warning
    assert "spool_directory" in warning


def test_default_directory_of_somebody_else_is_not_used(
    make: MakeSpool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that another user has made under this one's name is not used."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    default_directory().mkdir(mode=0o700)
    spool = make(directory=None)

    assert spool.add([span("a")]) == []
    assert keys(spool) == ["a"]
    assert files_in(default_directory()) == []


@pytest.mark.parametrize(
    "uri",
    [
        "https://name:secret@host:5000/path?x=1",
        "https://secret@host/path",
        "http://name:se@cret@host",
        "postgresql://name:secret@host/db",
        pytest.param(
            "postgresql://host/db?user=name&password=secret",
        ),
    ],
)
def test_no_credentials_on_the_disk(make: MakeSpool, spools: Path, uri: str) -> None:
    """User name and password of a tracking URI are not written to the disk."""
    spool = make(Destination(uri, "1"))
    spool.add([span("a")])

    assert b"host" in bytes_in(spools)
    assert b"cret" not in bytes_in(spools)


def test_destination_without_credentials_is_kept(make: MakeSpool, spools: Path) -> None:
    """The file says where its records belong, without the user in the address."""
    spool = make(Destination("https://name:secret@host:5000/path?sslmode=require&x=1", "7"))
    spool.add([span("a")])

    assert destination_in(spools) == Destination("https://host:5000/path?sslmode=require", "7")


@pytest.mark.parametrize(
    "uri", [None, "sqlite:////tmp/a@b.db", "http://host", "postgresql://host/db?sslmode=require"]
)
def test_destination_is_kept_as_it_is(make: MakeSpool, spools: Path, uri: str | None) -> None:
    """Without a user in the address, the file has the destination as it was."""
    spool = make(Destination(uri, "7"))
    spool.add([span("a")])

    assert destination_in(spools) == Destination(uri, "7")


def destination_in(folder: Path) -> Destination:
    [path] = spool_files(folder)
    first, _, rest = path.read_bytes().partition(b"\n")
    assert first == b"mlflow-ctx-autolog spool 2"
    return Destination(**json.loads(rest.partition(b"\n")[0]))


def test_prompts_do_not_stay_when_they_are_delivered(make: MakeSpool, spools: Path) -> None:
    """When a spool is empty and discarded, nothing of it is left."""
    spool = make()
    spool.add([span("a")])
    assert b"a " in bytes_in(spools)
    spool.remove([number_of(spool, "a")])

    spool.discard()
    assert files_in(spools) == []


def test_discard_leaves_what_still_waits(make: MakeSpool, spools: Path) -> None:
    """A spool that is not empty keeps its file."""
    spool = make()
    spool.add([span("a"), span("b")])
    spool.remove([number_of(spool, "a")])

    spool.discard()
    assert keys(spool) == ["b"]
    assert len(spool_files(spools)) == 1


def test_discarded_spool_can_be_used_again(make: MakeSpool, spools: Path) -> None:
    """After it was discarded a spool makes a new file."""
    spool = make()
    for key in ("a", "b"):
        spool.add([span(key)])
        assert keys(spool) == [key]
        spool.remove([number_of(spool, key)])
        spool.discard()
        assert files_in(spools) == []


def test_without_a_size_there_is_no_file(make: MakeSpool, spools: Path) -> None:
    """With spool_max_bytes=0 nothing is written, and no warning given."""
    spool = make(max_bytes=0)

    assert spool.add([span("a")]) == []
    assert keys(spool) == ["a"]
    assert files_in(spools) == []


def test_full_file_falls_to_memory_and_then_rejects(
    make: MakeSpool, spools: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Beyond its size the file takes no more, memory takes some, and the rest is handed back."""
    spool = make(max_bytes=200_000, in_memory=100_000)
    numbered = [span(f"{number:02}", 20_000) for number in range(20)]

    rejected = [record for record in numbered if spool.add([record])]

    kept = [record for record in numbered if record not in rejected]
    assert 10 <= len(kept) < 15
    assert rejected == numbered[len(kept) :]
    assert len(spool) == len(kept)
    assert keys(spool) == [record.key for record in kept]
    [path] = spool_files(spools)
    assert path.stat().st_size <= 200_000
    assert len([r for r in caplog.records if "spool_max_bytes=200,000" in r.getMessage()]) == 1

    spool.remove([number for number, _ in spool.peek(1000, PLENTY)])
    assert len(spool) == 0
    assert [record for record in numbered[:10] if spool.add([record])] == []


def test_addition_is_all_on_disk_or_all_in_memory(make: MakeSpool, disk: Disk) -> None:
    """Records that come together while the disk is full are all kept, and not twice."""
    spool = make(max_bytes=100_000)
    spool.add([span("first", 20_000)])

    assert spool.add([span(f"{number}", 20_000) for number in range(10)]) == []
    assert keys(spool) == ["first", *(f"{number}" for number in range(10))]
    assert len(spool) == 11


def test_directory_that_cannot_be_made_falls_to_memory(
    make: MakeSpool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where there can be no directory, spans wait in memory, with one warning that names it."""
    (tmp_path / "file").write_text("not a directory")
    spool = make(directory=tmp_path / "file" / "spools")

    assert spool.add([span("a")]) == []
    assert spool.add([span("b")]) == []
    assert keys(spool) == ["a", "b"]
    [warning] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert str(tmp_path / "file" / "spools") in warning


def test_disk_that_is_full_is_not_strewn_with_empty_files(
    make: MakeSpool, spools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trying again and again to make a file on a full disk leaves none behind."""

    def fail(_: str | None) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(segments_module, "without_credentials", fail)
        spool = make()
        for key in "abc":
            assert spool.add([span(key)]) == []

    assert keys(spool) == ["a", "b", "c"]
    assert spool_files(spools) == []


def test_delivered_records_on_a_full_disk_hold_up_no_others(make: MakeSpool, disk: Disk) -> None:
    """Records whose removal failed are not sent again and again in the place of others."""
    spool = make()
    spool.add([span("a"), span("b")])

    with disk.failing("remove"):
        spool.remove([number_of(spool, "a")])

    assert len(spool) == 1
    assert [record.key for _, record in spool.peek(1, PLENTY)] == ["b"]


def test_record_on_the_disk_can_be_moved_behind_those_in_memory(
    make: MakeSpool, disk: Disk
) -> None:
    """A record that the store refuses lets those go first that wait in memory, too."""
    spool = make()
    spool.add([span("refused")])
    with disk.failing("add"):
        spool.add([span("b"), span("c")])

    spool.move_to_end(number_of(spool, "refused"), span("refused"))
    assert keys(spool) == ["b", "c", "refused"]


def test_disk_that_fails_on_reading_leaves_what_is_in_memory(make: MakeSpool, disk: Disk) -> None:
    """While the file cannot be read, what is in memory can still be sent."""
    spool = make()
    spool.add([span("on disk")])
    with disk.failing("add"):
        spool.add([span("in memory")])

    with disk.failing("read"):
        assert keys(spool) == ["in memory"]
    assert sorted(keys(spool)) == ["in memory", "on disk"]


def test_another_process_cannot_open_the_file(make: MakeSpool, spools: Path) -> None:
    """As long as the process that writes a file lives, no other one can open it."""
    with process(HOLDER, spools, 3) as holder:
        [path] = spool_files(spools)
        with pytest.raises(BlockingIOError, match="alive"):
            Segment.open(path)
        # Not harmed by the attempts.
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert found_in(path) == ["0", "1", "2"]


def test_own_file_cannot_be_opened_again(make: MakeSpool, spools: Path) -> None:
    """Nor can the process itself open a file that it is writing to, or lose its lock by trying."""
    spool = make()
    spool.add([span("a")])
    [path] = spool_files(spools)

    for _ in range(2):
        with pytest.raises(BlockingIOError):
            Segment.open(path)
    code = "import sys, pathlib; from mlflow_ctx_autolog.delivery.segments import Segment\n"
    code += "try: Segment.open(pathlib.Path(sys.argv[1]))\nexcept BlockingIOError: print('ready')"
    with process(code, path):
        pass
    assert keys(spool) == ["a"]


def found_in(path: Path) -> list[str]:
    return [record.key for record in records_in(path)]


def records_in(path: Path) -> list[Record]:
    with contextlib.closing(Segment.open(path)) as segment:
        assert segment.scan() == 0
        return [segment.read(number) for number in segment.numbers()]


def test_records_outlive_a_killed_process(spools: Path) -> None:
    """What a process has put into its spool is there when it is killed without a warning."""
    with process(HOLDER, spools, 50) as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait()

    [path] = spool_files(spools)
    assert destination_in(spools) == DESTINATION
    assert records_in(path) == [
        Record("span", f"{number}", b"payload", "task") for number in range(50)
    ]


FORKING = """
import gc, os, sys
from pathlib import Path
from mlflow_ctx_autolog.delivery.segments import Segment
from mlflow_ctx_autolog.delivery.spool import Destination, Record, Spool, spool_files

directory = Path(sys.argv[1])
spool = Spool(Destination("http://a", "1"), directory, 10_000_000, 10_000_000)
spool.add([Record("span", "before", b"payload")])
child = os.fork()
if child == 0:
    del spool
    gc.collect()
    try:
        Segment.open(spool_files(directory)[0])
    except BlockingIOError:
        own = Spool(Destination("http://a", "1"), directory, 10_000_000, 10_000_000)
        own.add([Record("span", "child", b"payload")])
        own.remove([number for number, _ in own.peek(10, 1000)])
        own.discard()
        # All that Python does when a process ends in good order.
        sys.exit(0)
    sys.exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
spool.add([Record("span", "after", b"payload")])
assert len(spool.peek(10, 1000)) == 2
print("ready", flush=True)
sys.stdin.read()
"""


def test_forked_child_leaves_the_file_of_its_parent(spools: Path) -> None:
    """A child that was forked and ends takes neither the parent's records nor its lock."""
    with process(FORKING, spools) as parent:
        [path] = spool_files(spools)
        with pytest.raises(BlockingIOError):
            Segment.open(path)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert found_in(path) == ["before", "after"]


def test_spool_files_of_others_are_not_listed(
    make: MakeSpool, spools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that somebody else has put there is none of this user's spools."""
    make().add([span("a")])
    assert len(spool_files(spools)) == 1

    monkeypatch.setattr(os, "getuid", lambda: 4242)
    assert spool_files(spools) == []


NAMES = [f"mlflow-ctx-autolog-{digit * 32}.spool" for digit in "ab"]


def test_spool_that_vanishes_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that another process removes meanwhile does not end the list."""
    for name in NAMES:
        (tmp_path / name).touch()
    real = Path.lstat

    def lstat(path: Path) -> os.stat_result:
        if path.name == NAMES[0]:
            raise FileNotFoundError(path)
        return real(path)

    monkeypatch.setattr(Path, "lstat", lstat)
    assert spool_files(tmp_path) == [tmp_path / NAMES[1]]


def test_spool_files_are_those_that_are_spools(tmp_path: Path) -> None:
    """Also an older release's; not what users have put beside them; nothing where nothing is."""
    older = f"{'c' * 32}.spool"
    refused = f"mlflow-ctx-autolog-{'d' * 32}.refused.spool"
    others = ("mine.spool", f"{'c' * 32}.spool-wal", "c.damaged", "d.txt", f"x{older}")
    for name in (*NAMES, older, refused, *others):
        (tmp_path / name).touch()

    assert {path.name for path in spool_files(tmp_path)} == {*NAMES, older}
    assert {path.name for path in spool_files(tmp_path, refused=True)} == {*NAMES, older, refused}
    assert spool_files(tmp_path / "missing") == []


def test_what_is_no_spool_is_not_opened_as_one(tmp_path: Path) -> None:
    """It says that, and not that somebody has it."""
    path = tmp_path / NAMES[0]
    path.write_bytes(b"no spool" * 1000)

    with contextlib.closing(Segment.open(path)) as segment:
        with pytest.raises(DamagedError, match="no spool"):
            segment.destination()
        with pytest.raises(DamagedError, match="no spool"):
            segment.scan()


def test_nothing_is_opened_through_a_link(tmp_path: Path) -> None:
    """Which somebody else may have put there; nor is a pipe waited for."""
    (tmp_path / "victim").write_text("precious")
    (tmp_path / NAMES[0]).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic"):
        Segment.open(tmp_path / NAMES[0])
    with pytest.raises(OSError, match="symbolic"):
        private_file(tmp_path, NAMES[0], may_exist=True)
    os.link(tmp_path / "victim", tmp_path / "hard")
    with pytest.raises(PermissionError):
        private_file(tmp_path, "hard", may_exist=True)
    os.mkfifo(tmp_path / NAMES[1])
    with pytest.raises(DamagedError, match="no file"):
        Segment.open(tmp_path / NAMES[1])


def test_default_directory_that_is_a_link_is_not_used(
    make: MakeSpool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it leads to a directory of this user's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "home").mkdir(mode=0o700)
    default_directory().symlink_to(tmp_path / "home")
    spool = make(directory=None)

    assert spool.add([span("a")]) == []
    assert keys(spool) == ["a"]
    assert files_in(tmp_path / "home") == []


NO_DISK = """
import resource, signal, sys, tempfile
from mlflow_ctx_autolog.delivery.directory import directory_problem
from mlflow_ctx_autolog.delivery.spool import Destination, Record, Spool

# Each write fails from now on, in any directory, as on a full disk.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
tempfile.tempdir = None
spool = Spool(Destination("http://a", "1"), None, 10_000_000, 10_000_000)
lost = [spool.add([Record("span", f"{number}", b"payload")]) for number in range(3)]
assert lost == [[], [], []], lost
assert [record.key for _, record in spool.peek(10, 1000)] == ["0", "1", "2"]
assert directory_problem(None) is not None
print("ready", flush=True)
sys.stdin.read()
"""


def test_without_any_temporary_directory_spans_wait_in_memory() -> None:
    """Nothing is raised where Python finds no directory that can be written."""
    with process(NO_DISK):
        pass


def test_large_spool_has_several_files(
    make: MakeSpool, spools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is removed as soon as nothing in it waits, also while others do."""
    monkeypatch.setattr(spool_module, "_SEGMENT_BYTES", 10_000)
    spool = make()
    for number in range(40):
        spool.add([span(f"{number:02}", 1000)])
    files = len(spool_files(spools))
    assert files >= 4
    assert keys(spool) == [f"{number:02}" for number in range(40)]

    spool.remove(number_of(spool, f"{number:02}") for number in range(20))
    assert len(spool_files(spools)) == files - 2
    assert keys(spool) == [f"{number:02}" for number in range(20, 40)]
    spool.remove(number for number, _ in spool.peek(100, PLENTY))
    spool.discard()
    assert files_in(spools) == []


def test_what_is_removed_is_wiped(make: MakeSpool, spools: Path) -> None:
    """Each record by itself, while the others in the file wait."""
    spool = make()
    spool.add([span("a", 3000), span("b", 2_500_000), span("c", 3000)])
    spool.remove([number_of(spool, "b")])

    [path] = spool_files(spools)
    content = path.read_bytes()
    assert b"b xxx" not in content
    assert content.count(b"x" * 2998) == 2
    assert content.count(b"x" * 3000) == 0


def test_half_a_record_is_none(
    make: MakeSpool, spools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the disk gets full as a record is written, those before and after it are whole."""
    spool = make()
    spool.add([span("a", 1000)])
    real = os.pwrite
    written = []

    def pwrite(file: int, content: bytes, at: int) -> int:
        if written:
            raise OSError(errno.ENOSPC, "no space left on device")
        written.append(real(file, content[:500], at))
        return written[0]

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        spool.add([span("b", 1000)])
    assert written == [500]
    spool.add([span("c", 1000)])
    assert keys(spool) == ["a", "b", "c"]
    [path] = spool_files(spools)
    content = path.read_bytes()
    assert (content.count(b"b xxx"), content.count(b"c xxx")) == (0, 1)


def test_directory_problem_names_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert directory_problem(tmp_path / "new" / "spools") is None
    assert str(tmp_path / "file") in str(directory_problem(tmp_path / "file"))
