"""The child processes of a task, which ask their parent for it and hand their spans to it."""

from __future__ import annotations

import json
import multiprocessing.process
import os
import secrets
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from typing import Any

from mlflow_ctx_autolog.patching import Patch
from mlflow_ctx_autolog.task import Work

__all__ = ["Children", "Parent"]

Answer = Callable[["Work | None", dict[str, Any]], Any]

# Seconds that a child waits for its parent, which is on the same host, before it does without.
_PATIENCE = 5.0
_LONGEST_TOKEN = 100
# Connections of this host that have not shown a token yet: how many there may be at once, and for
# how many seconds each.
_STRANGERS, _TIME_FOR_TOKEN = 32, 5.0


class Parent:
    """What a child process knows of its parent.

    Args:
        port: Where the parent listens on this host.
        token: Names the child, and proves that it is one.
    """

    def __init__(self, port: int, token: str) -> None:
        self.port, self.token = port, token
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._is_gone = False

    def ask(self, question: dict[str, Any]) -> Any:
        """Return the parent's answer, in JSON's types; None where the parent is gone."""
        with self._lock:
            if self._is_gone:
                return None
            try:
                line = json.dumps(question).encode() + b"\n"
                if self._connection is None:
                    self._connection = socket.create_connection(("127.0.0.1", self.port), _PATIENCE)
                    self._answers = self._connection.makefile("rb")
                    line = self.token.encode() + b"\n" + line
                self._connection.sendall(line)
                return json.loads(self._answers.readline())
            except (OSError, ValueError):
                self._is_gone = True
                return None


class Children:
    """Lets the processes that a task starts, in whatever way, take part in it.

    A forked child inherits the way to its parent. To one that is spawned, it is handed along with
    the process object, which :mod:`multiprocessing` sends to it; it is never in an environment,
    on a command line or on disk.

    Args:
        work: Returns the work that is being done here and now; None outside tasks.
        answer: Answers what a child asks, given the work that started it; None where its task is
            over.
        join: Makes the process that it is called in a child; a function of a module, by whose
            name a spawned child finds it.
        joined: The parent of this process, if it is such a child itself.
    """

    def __init__(
        self,
        work: Callable[[], Work | None],
        answer: Answer,
        join: Callable[[int, str], None],
        joined: Callable[[], Parent | None],
    ) -> None:
        self._work = work
        self._answer = answer
        self._join = join
        self._joined = joined
        self._works: dict[str, Work | None] = {}
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._forking = threading.local()
        self._patch = Patch(multiprocessing.process.BaseProcess, "start", self._start)
        os.register_at_fork(
            before=self._before_fork,
            after_in_parent=self._after_fork_in_parent,
            after_in_child=self._after_fork_in_child,
        )

    def install(self) -> None:
        """Idempotent."""
        self._patch.apply()

    def uninstall(self) -> None:
        """Invite no more, and remember no task that is over. Idempotent."""
        self._patch.revert()
        with self._lock:
            # A pool that is kept has yet to find the way to the next task.
            self._works = dict.fromkeys(self._works)

    def invite(self) -> tuple[int, str] | None:
        """Return port and token for a child that is about to be started; None for a stranger."""
        if (parent := self._joined()) is not None:
            return parent.port, parent.token
        if (work := self._work()) is None:
            return None
        token = secrets.token_hex(16)
        with self._lock:
            if self._server is None:
                try:
                    self._server = _Server(self)
                except OSError:
                    # The child's calls are not traced; it is started all the same.
                    return None
            self._works[token] = work
            return self._server.port, token

    def admits(self, token: str) -> bool:
        """Whether that is the token of a child."""
        return token in self._works

    def answer(self, token: str, question: dict[str, Any]) -> Any:
        """Return what a child is told, in JSON's types."""
        return self._answer(self._works[token], question)

    def _start(self, original: Callable[..., Any], process: Any) -> Any:
        process._ctx_autolog = _Invitation(self._join, self.invite())
        try:
            return original(process)
        finally:
            del process._ctx_autolog

    def _before_fork(self) -> None:
        self._forking.invitation = self.invite()

    def _after_fork_in_parent(self) -> None:
        self._forking.invitation = None

    def _after_fork_in_child(self) -> None:
        self._lock = threading.Lock()
        self._works = {}
        if self._server is not None:
            self._server.socket.close()
            self._server = None
        if (invitation := getattr(self._forking, "invitation", None)) is not None:
            self._join(*invitation)


class _Invitation:
    """Becomes nothing but a process that has joined, where it is unpickled."""

    def __init__(
        self, join: Callable[[int, str], None], port_and_token: tuple[int, str] | None
    ) -> None:
        self._join = join
        self._port_and_token = port_and_token

    def __reduce__(self) -> Any:
        if self._port_and_token is None:
            return type(None), ()
        return self._join, self._port_and_token


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, children: Children) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.children = children
        self.strangers = threading.BoundedSemaphore(_STRANGERS)
        self.port: int = self.server_address[1]
        threading.Thread(
            target=self.serve_forever, name="mlflow-ctx-autolog-children", daemon=True
        ).start()

    def verify_request(self, *_: Any) -> bool:
        """Let in only as many as may be without a token."""
        return self.strangers.acquire(blocking=False)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent: children that go away are expected here."""


class _Handler(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True
    server: _Server

    def handle(self) -> None:
        try:
            token = self._token()
        finally:
            self.server.strangers.release()
        if self.server.children.admits(token):
            for line in self.rfile:
                answer = self.server.children.answer(token, json.loads(line))
                self.wfile.write(json.dumps(answer).encode() + b"\n")

    def _token(self) -> str:
        deadline = time.monotonic() + _TIME_FOR_TOKEN
        token = b""
        # Byte by byte, as what comes after it is read otherwise.
        while len(token) < _LONGEST_TOKEN and (remaining := deadline - time.monotonic()) > 0:
            self.connection.settimeout(remaining)
            byte = self.connection.recv(1)
            if byte in (b"", b"\n"):
                break
            token += byte
        self.connection.settimeout(None)
        return token.decode("ascii", "replace").strip()
