"""What threads and pools inherit from the task that hands them work."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mlflow_ctx_autolog import DriverContext
from mlflow_ctx_autolog.recorder.annotations import annotate, current_annotations
from mlflow_ctx_autolog.spans.content import ContentPolicy
from mlflow_ctx_autolog.task import Task, Work, current_work
from mlflow_ctx_autolog.worker.threads import ThreadHandovers

colour: contextvars.ContextVar[str] = contextvars.ContextVar("colour", default="none")


def new_task() -> Task:
    context = DriverContext(experiment_id="1", tracking_uri="http://store")
    return Task(context, ContentPolicy(context.config))


@pytest.fixture
def task() -> Iterator[Task]:
    task = new_task()
    task.open()
    yield task
    task.close()


@pytest.fixture
def handovers() -> Iterator[list[str]]:
    """The name of what is active, which becomes the parent of work that is handed over."""
    active: list[str] = []

    def work() -> Work | None:
        found = current_work()
        return None if found is None else found._replace(parent=active[-1])

    patches = ThreadHandovers(work)
    patches.install()
    yield active
    patches.uninstall()


def parent_of_this() -> Any:
    work = current_work()
    return None if work is None else work.parent


def test_a_thread_belongs_to_what_was_active_when_it_was_started(
    task: Task, handovers: list[str]
) -> None:
    """Also a Timer, and a subclass that has a run() of its own, which stays its own."""
    found: list[Any] = []

    class Reader(threading.Thread):
        def run(self) -> None:
            found.append(parent_of_this())

    handovers.append("first")
    reader, timer = Reader(), threading.Timer(0, lambda: found.append(parent_of_this()))
    for thread in (reader, timer):
        thread.start()
        attributes = set(vars(thread))
        handovers.append("second")
        thread.join()
        assert attributes == set(vars(thread))

    assert found == ["first", "second"]
    assert "run" not in vars(reader)


def test_an_item_of_a_pool_belongs_to_what_was_active_when_it_was_submitted(
    task: Task, handovers: list[str]
) -> None:
    """Whichever thread of the pool does it, and whoever started that."""
    found = []
    with ThreadPoolExecutor(1) as pool:
        for name in ("first", "second"):
            handovers.append(name)
            found.append(pool.submit(parent_of_this).result())

    assert found == ["first", "second"]


def test_the_users_context_variables_do_not_follow(task: Task, handovers: list[str]) -> None:
    """What a pool's functions see of the user's variables is what they see without us."""
    handovers.append("first")
    token = colour.set("red")
    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(colour.get).result() == "none"
    finally:
        colour.reset(token)


def test_exceptions_and_arguments_pass_through(task: Task, handovers: list[str]) -> None:
    """A future holds the exception that the function raised, whatever its arguments are called."""
    handovers.append("first")

    def fail(function: str, *, pool: str) -> None:
        raise KeyError(function + pool)

    with ThreadPoolExecutor(1) as executor:
        with pytest.raises(KeyError, match="no clause"):
            executor.submit(fail, "no ", pool="clause").result()
        with pytest.raises(TypeError):
            executor.submit()  # type: ignore[call-arg]


def test_a_thread_that_outlives_its_task_belongs_to_the_next(handovers: list[str]) -> None:
    """The span that was active when it was started is no longer the parent of anything."""
    steps = [threading.Event() for _ in range(2)]
    found: list[Work | None] = []

    def serve() -> None:
        for step in steps:
            step.wait(60)
            found.append(current_work())
            answered.release()

    answered = threading.Semaphore(0)
    handovers.append("first")
    first, second = new_task(), new_task()
    first.open()
    thread = threading.Thread(target=serve)
    thread.start()
    steps[0].set()
    assert answered.acquire(timeout=60)
    first.close()
    second.open()
    steps[1].set()
    thread.join(60)
    second.close()

    assert found == [Work(first, "first"), Work(second)]


def test_outside_tasks_nothing_is_patched() -> None:
    """After uninstall() threads and pools are Python's own."""
    before = vars(threading.Thread)["start"], vars(ThreadPoolExecutor)["submit"]
    patches = ThreadHandovers(current_work)
    patches.install()
    assert vars(threading.Thread)["start"] is not before[0]
    patches.uninstall()

    assert (vars(threading.Thread)["start"], vars(ThreadPoolExecutor)["submit"]) == before


def test_keys_on_calls_go_along(task: Task, handovers: list[str]) -> None:
    """With threads and what pools are handed; what these set stays theirs."""
    handovers.append("span")
    found: list[Any] = []

    def look() -> None:
        found.append(current_annotations())
        annotate(step="inside")

    with ThreadPoolExecutor(1) as pool, annotate(doc_id=7):
        # Whose thread is started here, under these keys.
        pool.submit(look).result()
        with annotate(doc_id=8):
            pool.submit(look).result()
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
        assert current_annotations() == {"doc_id": 7}
    with ThreadPoolExecutor(1) as pool:
        pool.submit(look).result()

    assert found == [{"doc_id": 7}, {"doc_id": 8}, {"doc_id": 8}, {}]
