"""The command ``mlflow-ctx-autolog recover``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from mlflow_ctx_autolog.cli import main
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


def test_path_that_does_not_exist(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelt path is a failure."""
    assert main(["recover", str(tmp_path / "missing")]) == 2
    assert f"{tmp_path / 'missing'} does not exist" in capsys.readouterr().out


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


def test_command_without_a_path_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Which spools are meant has to be said."""
    with pytest.raises(SystemExit) as caught:
        main(["recover"])

    assert caught.value.code == 2
    assert "path" in capsys.readouterr().err
