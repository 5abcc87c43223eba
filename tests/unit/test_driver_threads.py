"""On the driver, what other threads do belongs to the span that handed it over."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import mlflow
import pytest
from workload import stored_traces

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.delivery.spool import Destination

Work = Callable[[], None]


@pytest.fixture(autouse=True)
def enabled(database: Destination) -> Iterator[None]:
    with ctx_autolog.enable():
        yield


def _work() -> None:
    with mlflow.start_span("work"):
        pass


def _in_thread(work: Work) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def _in_pool(work: Work) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def _in_executor(work: Work) -> None:
    async def run() -> None:
        await asyncio.get_running_loop().run_in_executor(None, work)

    asyncio.run(run())


def _names(database: Destination) -> list[list[str]]:
    mlflow.flush_trace_async_logging()
    return sorted(sorted(span.name for span in trace.spans) for trace in stored_traces("0"))


@pytest.mark.parametrize("hand_over", [_in_thread, _in_pool, _in_executor])
def test_work_belongs_to_the_span_that_handed_it_over(
    database: Destination, hand_over: Callable[[Work], None]
) -> None:
    """A thread, an item of a pool, and what an event loop has run elsewhere."""
    with mlflow.start_span("job"):
        hand_over(_work)

    assert _names(database) == [["job", "work"]]


def test_a_pool_that_was_filled_under_a_span_is_free_after_it(database: Destination) -> None:
    """Its threads were started under the span; what is submitted without one belongs to none."""
    with ThreadPoolExecutor(1) as pool:
        with mlflow.start_span("job"):
            pool.submit(_work).result()
            other = threading.Thread(target=lambda: pool.submit(_work).result())
        pool.submit(_work).result()
        other.start()
        other.join()

    assert _names(database) == [["job", "work"], ["work"], ["work"]]


def test_a_thread_that_outlives_the_span_is_free(database: Destination) -> None:
    """What it does after the span has ended is a trace of its own."""
    over = threading.Event()

    def wait() -> None:
        over.wait(10)
        _work()

    with mlflow.start_span("job"):
        thread = threading.Thread(target=wait)
        thread.start()
    over.set()
    thread.join()

    assert _names(database) == [["job"], ["work"]]
