"""The command ``mlflow-ctx-autolog``: its help, and ``recover``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

from mlflow_ctx_autolog.cli import commands, main
from mlflow_ctx_autolog.delivery.directory import default_directory
from mlflow_ctx_autolog.delivery.segments import Segment
from mlflow_ctx_autolog.delivery.spool import Destination, Record
from mlflow_ctx_autolog.exceptions import StoreError
from mlflow_ctx_autolog.stores import sending, tracking_store

DESTINATION = Destination("http://a", "1")
SPANS = [Record("span", f"{number}", b"payload") for number in range(3)]


class Store:
    """Stands in for all stores, and remembers the URI that was asked for."""

    def __init__(self) -> None:
        self.asked_for: list[str | None] = []
        self.received: list[tuple[Destination, list[Record]]] = []
        self.is_down = False

    def send_to(
        self, uri: str | None, destination: Destination, records: Sequence[Record]
    ) -> Destination:
        self.asked_for.append(uri)
        if self.is_down:
            raise StoreError("it answered 503")
        self.received.append((destination, list(records)))
        return destination


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(sending, "send_to", store.send_to)
    monkeypatch.setattr(tracking_store, "spans_of", lambda records: [])
    return store


def left_behind(folder: Path) -> Path:
    file = Segment.create(DESTINATION, folder)
    file.add(list(enumerate(SPANS, start=1)))
    file.close()
    return file.path


def test_directory_is_recovered(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All spools of a directory are delivered, and one line tells of each."""
    paths = [left_behind(tmp_path), left_behind(tmp_path)]

    assert main(["recover", str(tmp_path)]) == 0
    assert store.received == [(DESTINATION, SPANS)] * 2
    assert set(store.asked_for) == {None}
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"{path}: 3 stored, 0 left" for path in sorted(paths)]
    assert list(tmp_path.iterdir()) == []


def test_single_file_is_recovered(store: Store, tmp_path: Path) -> None:
    """One spool can be named, and the others are left alone."""
    path, other = left_behind(tmp_path), left_behind(tmp_path)

    assert main(["recover", str(path)]) == 0
    assert store.received == [(DESTINATION, SPANS)]
    assert list(tmp_path.iterdir()) == [other]


def test_store_can_be_named(store: Store, tmp_path: Path) -> None:
    """Records can be sent elsewhere than they were to go."""
    left_behind(tmp_path)

    assert main(["recover", str(tmp_path), "--tracking-uri", "http://b"]) == 0
    assert set(store.asked_for) == {"http://b"}


def test_nothing_to_recover(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty directory is said to be one, and is no failure."""
    assert main(["recover", str(tmp_path)]) == 0
    assert "nothing is left" in capsys.readouterr().out
    assert store.received == []


def test_answers_whose_time_is_over_are_removed(store: Store, tmp_path: Path) -> None:
    """Those of a job that has long been over, and no others."""
    for job, seen in (("0" * 32, 0), ("1" * 32, time.time())):
        folder = tmp_path / "answers" / f"answers-{job}"
        (folder / ("2" * 32)).mkdir(parents=True)
        (folder / ("2" * 32) / f"{'3' * 32}.0").touch()
        (folder / "job").write_text("3600.0")
        os.utime(folder / "job", (seen, seen))

    assert main(["recover", str(tmp_path)]) == 0
    assert [path.name for path in (tmp_path / "answers").iterdir()] == [f"answers-{'1' * 32}"]


def test_path_that_does_not_exist(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelt path is a failure."""
    assert main(["recover", str(tmp_path / "missing")]) == 2
    assert f"{tmp_path / 'missing'} does not exist" in capsys.readouterr().err


def test_store_that_is_down_leaves_the_records(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be delivered stays, and the command says why and fails."""
    path = left_behind(tmp_path)
    store.is_down = True

    assert main(["recover", str(tmp_path)]) == 2
    printed = capsys.readouterr().out
    assert f"{path}: 0 stored, 3 left" in printed
    assert "it answered 503" in printed
    assert path.exists()


def test_file_in_use_is_left_alone(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The spool of a process that is alive is no failure, and does not stop the command."""
    file = Segment.create(DESTINATION, tmp_path)
    left_behind(tmp_path)

    assert main(["recover", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"{file.path}: left alone" in printed
    assert "3 stored" in printed
    file.close()


def test_file_that_cannot_be_read(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is no spool is a failure, and does not stop the command."""
    broken = tmp_path / f"mlflow-ctx-autolog-{'0' * 32}.spool"
    broken.write_bytes(b"no spool" * 1000)
    left_behind(tmp_path)

    assert main(["recover", str(tmp_path)]) == 2
    printed = capsys.readouterr().out
    assert f"{broken}: cannot be read: it is no spool" in printed
    assert "3 stored" in printed


def test_without_a_directory_the_spools_of_this_host_are_found(
    store: Store, spools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those in the directory of the settings, and those among the temporary files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left_behind(spools)
    left_behind(default_directory())

    assert main(["recover"]) == 0
    assert store.received == [(DESTINATION, SPANS)] * 2


def test_spools_in_a_folder_below_are_found(store: Store, tmp_path: Path) -> None:
    """As those of users are in the directory for temporary files."""
    left_behind(tmp_path / "mlflow-ctx-autolog-0")

    assert main(["recover", str(tmp_path)]) == 0
    assert store.received == [(DESTINATION, SPANS)]


def test_recovery_can_be_read_by_programs(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one object for each spool."""
    path = left_behind(tmp_path)

    assert main(["recover", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == [{"file": str(path), "problem": None, "stored": 3, "left": 0}]


def test_versions_can_be_read_by_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """As one object for each package."""
    assert main(["versions", "--json"]) == 0
    told = {each["package"]: each for each in json.loads(capsys.readouterr().out)}
    assert set(told) == {"python", "mlflow", "openai", "pyspark"}
    assert told["openai"]["verdict"] == "supported"


@pytest.mark.parametrize("name", sorted(commands.commands))
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With what it does, its exit status, and, where it takes arguments, examples."""
    assert main([name, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Exit status: 2 where" in text
    assert "--json" in text
    assert name == "versions" or f"mlflow-ctx-autolog {name}" in text


def test_the_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """With examples, what its exit status means, and how to have words completed."""
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "mlflow-ctx-autolog report last" in text
    assert "Exit status: 0 where all is well, 2 where" in text
    assert "_MLFLOW_CTX_AUTOLOG_COMPLETE=bash_source" in text


def test_words_are_completed() -> None:
    """By the shell that asks for it, and without waiting for MLflow to be imported."""
    command = Path(sys.executable).with_name("mlflow-ctx-autolog")
    asked = {
        "_MLFLOW_CTX_AUTOLOG_COMPLETE": "bash_complete",
        "COMP_WORDS": "mlflow-ctx-autolog re",
        "COMP_CWORD": "1",
    }
    answer = subprocess.run(
        [command], env={**os.environ, **asked}, capture_output=True, text=True, timeout=60
    )
    assert answer.stdout.split() == ["plain,recover", "plain,report"]


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    """Where the command is not on the path."""
    told = subprocess.run(
        [sys.executable, "-m", "mlflow_ctx_autolog", "--version"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert told.stdout.strip() == version("mlflow-ctx-autolog")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["report"], "Name traces, or last, or --run-id"),
        (["report", "last", "--run-id", "1"], "Name traces, or last, or --run-id"),
        (["report", "last", "--prices", "{"], "neither JSON"),
        (["report", "last", "--prices", "/no/such/file"], "nor a file of it"),
        (["doctor", "--master", "local", "--remote", "sc://host"], "cannot be given together"),
        (["recver"], "No such command 'recver'"),
    ],
)
def test_a_wrong_command_is_refused(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With 2, and what is wrong about it."""
    assert main(arguments) == 2
    assert reason in capsys.readouterr().err
