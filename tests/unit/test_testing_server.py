"""The tracking server process."""

from __future__ import annotations

import os
import stat
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from mlflow_ctx_autolog.testing import TrackingServer
from mlflow_ctx_autolog.testing import server as server_module


def healthy(server: TrackingServer) -> bool:
    try:
        with urllib.request.urlopen(f"{server.uri}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


def running_in_session(leader: int) -> list[str]:
    """Return the states of the session's processes that are not zombies."""
    command = ["ps", "-o", "stat=", "-s", str(leader)]
    listing = subprocess.run(command, capture_output=True, text=True, check=False)
    return [state for state in listing.stdout.split() if not state.startswith("Z")]


@pytest.mark.slow
def test_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server answers, survives kill and start on its port and data, and leaves no process."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    directory = tmp_path / "new" / "data"
    with TrackingServer(directory) as server:
        uri = server.uri
        assert healthy(server)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert (directory / "mlflow.db").exists()
        assert server._process is not None
        first = server._process.pid
        server.start()
        assert server._process.pid == first

        server.kill()
        server.kill()
        assert not healthy(server)
        assert running_in_session(first) == []

        server.start()
        assert (server.uri, healthy(server)) == (uri, True)
        second = server._process.pid
    assert not healthy(server)
    assert running_in_session(second) == []
    server.close()
    assert (directory / "mlflow.db").exists()


def test_temporary_directory_is_removed() -> None:
    """Without a directory of the user's, nothing stays behind after close."""
    server = TrackingServer()
    assert server.directory.is_dir()
    server.close()
    server.close()
    assert not server.directory.exists()


def test_port_in_use(tmp_path: Path) -> None:
    """A port that is taken is reported before anything is started."""
    with server_module.socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = TrackingServer(tmp_path, port=port)
        with pytest.raises(RuntimeError, match=f"Port {port} is in use"):
            server.start()


def test_early_end_is_reported_with_the_log(tmp_path: Path) -> None:
    """When the server process dies, the error holds the end of its log."""
    (tmp_path / "mlflow.db").write_text("this is not a database file, but long enough to be read")
    with (
        pytest.raises(RuntimeError, match=r"(?s)ended, status 1:.*database"),
        TrackingServer(tmp_path),
    ):
        pass


def test_timeout_is_reported(tmp_path: Path) -> None:
    """When no answer comes in time, the process is ended and the error says so."""
    server = TrackingServer(tmp_path, timeout=0.2)
    with pytest.raises(RuntimeError, match=r"did not answer within 0\.2 s"):
        server.start()
    assert server._process is None
    assert not healthy(server)


def test_environment_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server does not inherit a tracking address, and starts no background jobs."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    environment = server_module._environment()
    assert "MLFLOW_TRACKING_URI" not in environment
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert environment["PATH"] == os.environ["PATH"]
