"""How child processes ask their parent, and how it answers."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from mlflow_ctx_autolog import DriverContext
from mlflow_ctx_autolog.spans.content import ContentPolicy
from mlflow_ctx_autolog.task import Task, Work
from mlflow_ctx_autolog.worker import children as children_module
from mlflow_ctx_autolog.worker.children import Children, Parent

_parent: list[Parent] = []


def join(port: int, token: str) -> None:
    _parent[:] = [Parent(port, token)]


class Family:
    """A process that runs a task, and what its children have asked."""

    def __init__(self) -> None:
        context = DriverContext(experiment_id="1")
        task = Task(context, ContentPolicy(context.config), is_open=True)
        self.work: Work | None = Work(task)
        self.asked: list[Any] = []
        self.children = Children(
            lambda: self.work, self.answer, join, lambda: _parent[0] if _parent else None
        )

    def answer(self, work: Work | None, question: dict[str, Any]) -> Any:
        self.asked.append((work, question))
        return {"pid": os.getpid(), **question}


@pytest.fixture
def family() -> Iterator[Family]:
    family = Family()
    family.children.install()
    yield family
    family.children.uninstall()
    # The hooks of forks stay, and have nothing to say.
    family.work = None


def ask_from_a_child(results: Any) -> None:
    results.put((os.getpid(), [parent.ask({"n": 1}) for parent in _parent]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_asks_the_process_that_started_it(
    family: Family, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forked or spawned, it finds its parent, which knows the work that has started it."""
    context = multiprocessing.get_context(method)
    results = context.Queue()
    # A spawned child imports this module by name.
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    target, invite = ask_from_a_child, join
    if method == "spawn":
        import test_children as by_name

        target, invite = by_name.ask_from_a_child, by_name.join
        monkeypatch.setattr(family.children, "_join", invite)
    process = context.Process(target=target, args=(results,))
    process.start()
    pid, answers = results.get(timeout=120)
    process.join(60)

    assert pid != os.getpid()
    assert answers == [{"pid": os.getpid(), "n": 1}]
    assert family.asked == [(family.work, {"n": 1})]
    assert not any("ctx_autolog" in name for name in vars(process))


def test_a_pool_that_is_kept_is_known_after_its_task(family: Family) -> None:
    """The parent answers it still, and says that the task is over."""
    invitation = family.children.invite()
    assert invitation is not None
    parent = Parent(*invitation)
    parent.ask({"n": 1})
    family.children.uninstall()

    assert parent.ask({"n": 2}) == {"pid": os.getpid(), "n": 2}
    assert family.asked[1] == (None, {"n": 2})


def test_without_a_task_nobody_is_invited(family: Family) -> None:
    """Nor does the process listen."""
    family.work = None

    assert family.children.invite() is None
    assert family.children._server is None


def test_only_children_are_answered(family: Family) -> None:
    """Another process of the host gets nothing, not even an error."""
    invitation = family.children.invite()
    assert invitation is not None
    with socket.create_connection(("127.0.0.1", invitation[0]), 60) as connection:
        connection.sendall(b"0" * 32 + b'\n{"n": 1}\n')
        assert connection.makefile("rb").read() == b""
    assert Parent(invitation[0], "0" * 32).ask({"n": 1}) is None

    assert family.asked == []


def test_a_parent_that_is_gone_is_asked_once(family: Family) -> None:
    """A child whose parent was killed is not held up by each of its calls."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    parent = Parent(port, "0" * 32)

    assert parent.ask({}) is None
    with socket.create_server(("127.0.0.1", port)):
        assert parent.ask({}) is None


def test_strangers_cannot_use_up_threads_and_files(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a token there may be but a few connections at once, and for a moment each."""
    monkeypatch.setattr(children_module, "_TIME_FOR_TOKEN", 0.5)
    invitation = family.children.invite()
    assert invitation is not None
    before = threading.active_count()
    strangers = [socket.create_connection(("127.0.0.1", invitation[0]), 60) for _ in range(100)]
    for stranger in strangers[:10]:
        # Who says something now and then has no more time.
        stranger.sendall(b"0")
    assert [stranger.recv(1) for stranger in strangers[40:]] == [b""] * 60
    assert threading.active_count() <= before + 32

    assert [stranger.recv(1) for stranger in strangers[:40]] == [b""] * 40
    assert Parent(*invitation).ask({"n": 1}) == {"pid": os.getpid(), "n": 1}
    for stranger in strangers:
        stranger.close()
