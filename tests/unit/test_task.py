"""Which task a call belongs to, and what a task keeps from step to step."""

from __future__ import annotations

import contextvars
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from mlflow_ctx_autolog import DriverContext
from mlflow_ctx_autolog import task as task_module
from mlflow_ctx_autolog.delivery.spool import Destination
from mlflow_ctx_autolog.spans.content import ContentPolicy
from mlflow_ctx_autolog.task import Task, current_task, open_tasks

T = TypeVar("T")

colour: contextvars.ContextVar[str] = contextvars.ContextVar("colour", default="none")


def new_task(experiment_id: str = "1") -> Task:
    return task_of(DriverContext(experiment_id=experiment_id, tracking_uri="http://store"))


def task_of(context: DriverContext) -> Task:
    return Task(context, ContentPolicy(context.config))


@pytest.fixture
def first() -> Iterator[Task]:
    task = new_task()
    task.open()
    yield task
    task.close()


@pytest.fixture
def second(first: Task) -> Iterator[Task]:
    task = new_task()
    task.open()
    yield task
    task.close()


def in_new_thread(function: Callable[[], T]) -> T:
    """Call a function on a thread that knows nothing of its starter's context variables."""
    results: list[T] = []
    thread = threading.Thread(target=contextvars.Context().run, args=(in_list, results, function))
    thread.start()
    thread.join(60)
    assert len(results) == 1
    return results[0]


def in_list(results: list[T], function: Callable[[], T]) -> None:
    results.append(function())


def test_no_task_is_none() -> None:
    """Where no task is open, a call belongs to none."""
    assert current_task() is None
    assert in_new_thread(current_task) is None


def test_function_of_a_task_belongs_to_it(first: Task, second: Task) -> None:
    """A call made by a task's function belongs to that task, also if another began later."""
    assert first.run(current_task) is first
    assert second.run(current_task) is second


def test_nested_functions_belong_to_their_own_tasks(first: Task, second: Task) -> None:
    """Where Spark pipelines functions, each one's calls belong to its own task."""

    def outer() -> list[Task | None]:
        return [current_task(), first.run(current_task), current_task()]

    assert second.run(outer) == [second, first, second]


def test_context_wins_over_what_is_running(first: Task, second: Task) -> None:
    """A thread that runs in the context of one task belongs to it while another is running."""
    context = first.run(contextvars.copy_context)

    assert second.run(in_new_thread, lambda: context.run(current_task)) is first


def test_foreign_thread_belongs_to_the_running_task(first: Task, second: Task) -> None:
    """A call from any other thread belongs to the task whose function is being executed."""
    assert first.run(in_new_thread, current_task) is first
    assert second.run(in_new_thread, current_task) is second


def test_foreign_thread_belongs_to_the_innermost_running_task(first: Task, second: Task) -> None:
    """Of several functions that call one another, the innermost has the calls of other threads."""
    assert second.run(first.run, in_new_thread, current_task) is first


def test_foreign_thread_belongs_to_the_task_opened_last(first: Task, second: Task) -> None:
    """Between steps, a call from another thread belongs to the task opened last."""
    assert in_new_thread(current_task) is second

    second.close()
    assert in_new_thread(current_task) is first


def test_a_step_may_call_another_step_of_its_task(first: Task) -> None:
    """It runs in the context variables that it is called in."""

    def inner() -> str:
        assert current_task() is first
        return colour.get()

    def outer() -> str:
        colour.set("red")
        return first.run(inner)

    assert first.run(outer) == "red"


def test_task_that_failed_is_no_longer_running(first: Task, second: Task) -> None:
    """After a step that raised, its task no longer counts as the running one."""

    def fail() -> None:
        raise KeyError("from the function")

    with pytest.raises(KeyError, match="from the function"):
        first.run(fail)

    assert in_new_thread(current_task) is second


def test_closed_task_is_not_found(first: Task) -> None:
    """A thread that outlives its task belongs to none once that has ended."""
    context = first.run(contextvars.copy_context)
    assert context.run(current_task) is first

    first.close()

    assert context.run(current_task) is None
    assert current_task() is None


def test_thread_of_a_closed_task_belongs_to_an_open_one(first: Task, second: Task) -> None:
    """A thread that outlives its task belongs to the task that is open by then."""
    context = second.run(contextvars.copy_context)
    second.close()

    assert context.run(current_task) is first


def test_open_tasks_are_listed_oldest_first(first: Task, second: Task) -> None:
    """The open tasks are those begun and not ended, and ending one twice does no harm."""
    assert open_tasks() == (first, second)

    first.close()
    first.close()

    assert open_tasks() == (second,)


def test_equal_tasks_are_told_apart(first: Task, second: Task) -> None:
    """Two attempts with the same context are two tasks."""
    assert first.context == second.context

    second.close()

    assert open_tasks() == (first,)


def test_run_passes_arguments_and_result(first: Task) -> None:
    """A step gets its arguments and hands back its result."""
    assert first.run(divmod, 7, 3) == (2, 1)
    assert first.run(int, "11", base=2) == 3


def test_context_variables_last_from_step_to_step(first: Task, second: Task) -> None:
    """What a function sets in one step it finds in the next, and nobody else sees it."""
    first.run(colour.set, "red")
    second.run(colour.set, "blue")

    assert colour.get() == "none"
    assert first.run(colour.get) == "red"
    assert second.run(colour.get) == "blue"


def test_context_variables_of_the_caller_do_not_leak_in(first: Task) -> None:
    """What the caller sets after the task has begun is not seen by the task's function."""
    token = colour.set("green")
    try:
        assert first.run(colour.get) == "none"
    finally:
        colour.reset(token)


def test_task_begins_with_the_context_variables_of_its_opener() -> None:
    """A function finds the context variables that were set where its task began."""
    token = colour.set("green")
    try:
        task = new_task()
    finally:
        colour.reset(token)

    assert task.run(colour.get) == "green"


def test_active_block_belongs_to_its_task(first: Task, second: Task) -> None:
    """Inside an attached block, calls of this and other threads belong to the block's task."""
    with first.active():
        assert current_task() is first
        assert in_new_thread(current_task) is first
        colour.set("in the block")

    assert current_task() is second
    assert in_new_thread(current_task) is second
    assert colour.get() == "in the block"
    colour.set("none")


def test_active_block_in_a_generator_may_end_elsewhere(first: Task, second: Task) -> None:
    """A generator with an attached block may be finished from another context."""

    def steps() -> Iterator[Task | None]:
        with first.active():
            yield current_task()

    generator = steps()
    assert contextvars.copy_context().run(next, generator) is first
    assert contextvars.copy_context().run(next, generator, "ended") == "ended"

    assert current_task() is second


def test_destination_is_that_of_the_driver() -> None:
    """A task's spans go to the store and the experiment that its context names."""
    assert new_task("77").destination == Destination("http://store", "77")


def test_without_a_store_the_destination_is_the_driver() -> None:
    """Spans that only the driver can store are not taken for those of another driver."""
    contexts = [DriverContext("77", None, process_id=name) for name in ("first", "second")]
    first, second = (task_of(context).destination for context in contexts)

    assert first.tracking_uri is None
    assert first == task_of(contexts[0]).destination
    assert first != second


def test_spans_of_a_task_are_added_up() -> None:
    """A task's totals are those of its model calls, and a span that sums up its own counts once."""
    task = new_task()
    task.count_span("a", "chain", {"total_tokens": 3}, {"total_cost": 0.5})
    task.count_span("b", "chain", {"total_tokens": 4}, {})
    task.count_span("chain", "task", {"total_tokens": 7}, {})
    task.count_span("c", "task", {"total_tokens": 1}, {"total_cost": 0.25})

    assert task.usage.total == {"total_tokens": 8}
    assert task.cost.total == {"total_cost": 0.75}


@pytest.fixture
def _eager_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_eager_switching")
def test_calls_from_many_threads_are_all_counted() -> None:
    """Calls made by several threads of a function at once are all counted."""
    task = new_task()
    together = threading.Barrier(8)

    def call() -> None:
        together.wait(60)
        for _ in range(1000):
            task.count_call()
            task.count_span("call", "task", {"total_tokens": 1}, {"total_cost": 1})

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert task.calls == 8000
    assert (task.usage.total, task.cost.total) == ({"total_tokens": 8000}, {"total_cost": 8000})


def test_task_can_run_on_several_threads_at_once(first: Task) -> None:
    """Steps on other threads run while one is under way, with the task's context variables."""
    first.run(colour.set, "red")

    def step() -> tuple[Task | None, str]:
        return current_task(), colour.get()

    assert first.run(lambda: in_new_thread(lambda: first.run(step))) == (first, "red")


def test_a_task_knows_its_repeats_by_so_many_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many it makes; of others it says that it does not know."""
    monkeypatch.setattr(task_module, "_REQUESTS", 2)
    task = new_task()
    for request in "abacb" + "cd":
        task.count_request(request)
    assert (task.requests, task.repeats, task.requests_untold) == ({"a", "b"}, 2, 3)
