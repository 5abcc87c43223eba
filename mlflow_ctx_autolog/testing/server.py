"""An MLflow tracking server in a process of its own."""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

_LOG_TAIL_CHARACTERS = 4000
_GRACE_SECONDS = 5.0
_PYTHON = "CTX_AUTOLOG_TESTING_SERVER_PYTHON"


class TrackingServer:
    """A tracking server on 127.0.0.1 that keeps its data in one directory.

    Without ``directory`` a temporary one is used and removed by `close`; a given directory is
    created when missing (mode 0700) and kept. Without ``port`` a free one is chosen; the port
    stays the same over `kill` and `start`. ``timeout`` is the time in seconds that `start` waits
    for the server to answer. ``backend_store_uri`` is where it keeps what it is told, by default
    an SQLite file in ``directory``. With ``password`` it demands a log-in, as user ``admin``.
    ``options`` are more of ``mlflow server``'s.
    Where this Python has MLflow's client only, the environment variable
    ``CTX_AUTOLOG_TESTING_SERVER_PYTHON`` names one that has the server.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        port: int | None = None,
        timeout: float = 60.0,
        backend_store_uri: str | None = None,
        password: str | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self._temporary = directory is None
        self.directory = Path(directory or tempfile.mkdtemp(prefix="mlflow-server-")).resolve()
        self.port = _free_port() if port is None else port
        self.timeout = timeout
        self.backend_store_uri = backend_store_uri or f"sqlite:///{self.directory}/mlflow.db"
        self.password = password
        self.options = tuple(options)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """The address to give to ``mlflow.set_tracking_uri``."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        """The file that receives the server's output."""
        return self.directory / "server.log"

    def start(self) -> None:
        """Start the server and return once it answers; does nothing when it runs already.

        Raises RuntimeError, with the end of the log, when the port is taken, the process ends,
        or no answer comes in time.
        """
        if self._process is not None and self._process.poll() is None:
            return
        if _port_taken(self.port):
            raise RuntimeError(f"Port {self.port} is in use already.")
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                env=self._environment(),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # The store holds prompts.
                umask=0o077,
            )
        atexit.register(self.close)
        try:
            self._wait_until_healthy()
        except BaseException:
            self._stop(signal.SIGKILL)
            raise

    def kill(self) -> None:
        """End the server at once, as a crash would, keeping its data."""
        self._stop(signal.SIGKILL)

    def close(self) -> None:
        """End the server and remove a temporary directory. Calling it again does nothing."""
        atexit.unregister(self.close)
        self._stop(signal.SIGTERM)
        if self._temporary:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> TrackingServer:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _command(self) -> list[str]:
        return [
            *(os.environ.get(_PYTHON, sys.executable), "-m", "mlflow", "server"),
            *("--backend-store-uri", self.backend_store_uri),
            *("--artifacts-destination", (self.directory / "artifacts").as_uri()),
            *("--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"),
            *(("--app-name", "basic-auth") if self.password else ()),
            *self.options,
        ]

    def _environment(self) -> dict[str, str]:
        environment = _environment()
        if self.password is not None:
            environment["MLFLOW_AUTH_ADMIN_PASSWORD"] = self.password
            environment["MLFLOW_FLASK_SERVER_SECRET_KEY"] = secrets.token_hex()
        return environment

    def _wait_until_healthy(self) -> None:
        assert self._process is not None
        # An HTTP proxy from the environment must not stand between us and this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            status = self._process.poll()
            if status is not None:
                raise RuntimeError(f"mlflow server ended, status {status}:\n{self._log_tail()}")
            if self._answers(opener):
                return
            time.sleep(0.1)
        raise RuntimeError(
            f"mlflow server did not answer within {self.timeout:g} s:\n{self._log_tail()}"
        )

    def _answers(self, opener: urllib.request.OpenerDirector) -> bool:
        try:
            with opener.open(f"{self.uri}/health", timeout=2.0) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def _log_tail(self) -> str:
        with contextlib.suppress(OSError):
            return self.log.read_text(errors="replace")[-_LOG_TAIL_CHARACTERS:]
        return ""

    def _stop(self, signal_number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        # The process leads a session, so its id is also the id of its process group.
        group = process.pid
        _signal_group(group, signal_number)
        deadline = time.monotonic() + _GRACE_SECONDS
        if signal_number != signal.SIGKILL:
            while _group_alive(process) and time.monotonic() < deadline:
                time.sleep(0.02)
            _signal_group(group, signal.SIGKILL)
        process.wait()
        while _port_taken(self.port) and time.monotonic() < deadline:
            time.sleep(0.01)


def _environment() -> dict[str, str]:
    unwanted = {"MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"}
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    # Background jobs would start processes in sessions of their own, out of reach of `close`.
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    environment["MLFLOW_DISABLE_TELEMETRY"] = "true"
    return environment


def _signal_group(group: int, signal_number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal_number)


def _group_alive(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # Reaps the leader; an unreaped one keeps the group alive.
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _port_taken(port: int) -> bool:
    try:
        # create_server sets SO_REUSEADDR, so connections in TIME_WAIT do not count.
        with socket.create_server(("127.0.0.1", port)):
            return False
    except OSError:
        return True
