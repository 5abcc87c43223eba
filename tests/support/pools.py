"""The ways to make calls concurrently inside a partition, as a user would write them.

Each takes the endpoint's address and some numbers, and returns an answer for each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

Way = Callable[[str, list[int]], list[str]]


def thread_pool(url: str, numbers: list[int]) -> list[str]:
    from concurrent.futures import ThreadPoolExecutor

    from model_calls import ask_model

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(functools.partial(ask_model, url), numbers))


def nested_thread_pools(url: str, numbers: list[int]) -> list[str]:
    from concurrent.futures import ThreadPoolExecutor

    from model_calls import ask_model

    with ThreadPoolExecutor(2) as outer, ThreadPoolExecutor(2) as inner:

        def ask_by_another(number: int) -> str:
            return inner.submit(ask_model, url, number).result()

        return list(outer.map(ask_by_another, numbers))


def plain_threads(url: str, numbers: list[int]) -> list[str]:
    import queue
    from threading import Thread

    from model_calls import ask_into

    results: queue.SimpleQueue[str] = queue.SimpleQueue()
    threads = [Thread(target=ask_into, args=(results, url, number)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results.get() for _ in numbers]


def asyncio_gather(url: str, numbers: list[int]) -> list[str]:
    import asyncio

    from openai import AsyncOpenAI

    async def ask_all() -> list[str]:
        limit = asyncio.Semaphore(2)
        async with AsyncOpenAI(base_url=url, api_key="not-a-key", max_retries=0) as client:

            async def ask(number: int) -> str:
                message = {"role": "user", "content": f"What of document {number}?"}
                async with limit:
                    reply = await client.chat.completions.create(
                        model="gpt-test", messages=[message]
                    )
                return str(reply.choices[0].message.content)

            return list(await asyncio.gather(*(ask(number) for number in numbers)))

    return asyncio.run(ask_all())


def asyncio_threads(url: str, numbers: list[int]) -> list[str]:
    import asyncio

    from model_calls import ask_model

    async def ask_all() -> list[str]:
        loop = asyncio.get_running_loop()
        by_default_pool = [
            loop.run_in_executor(None, ask_model, url, number) for number in numbers[1:]
        ]
        first = await asyncio.to_thread(ask_model, url, numbers[0])
        return [first, *await asyncio.gather(*by_default_pool)]

    return asyncio.run(ask_all())


def event_loop_in_a_thread(url: str, numbers: list[int]) -> list[str]:
    import asyncio
    from threading import Thread

    from openai import AsyncOpenAI

    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever, daemon=True)
    thread.start()
    client = AsyncOpenAI(base_url=url, api_key="not-a-key", max_retries=0)

    async def ask(number: int) -> str:
        message = {"role": "user", "content": f"What of document {number}?"}
        reply = await client.chat.completions.create(model="gpt-test", messages=[message])
        return str(reply.choices[0].message.content)

    try:
        futures = [asyncio.run_coroutine_threadsafe(ask(number), loop) for number in numbers]
        return [future.result() for future in futures]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def multiprocessing_thread_pool(url: str, numbers: list[int]) -> list[str]:
    from multiprocessing.pool import ThreadPool

    from model_calls import ask_model

    with ThreadPool(2) as pool:
        return pool.map(functools.partial(ask_model, url), numbers)


def forked_process(url: str, numbers: list[int]) -> list[str]:
    import multiprocessing

    from model_calls import ask_into

    forking = multiprocessing.get_context("fork")
    results = forking.Queue()
    for number in numbers:
        process = forking.Process(target=ask_into, args=(results, url, number))
        process.start()
        process.join()
    return [results.get() for _ in numbers]


def _process_pool(method: str, url: str, numbers: list[int]) -> list[str]:
    import multiprocessing

    from model_calls import ask_model

    # On leaving the block, the pool kills its processes.
    with multiprocessing.get_context(method).Pool(1) as pool:
        return pool.map(functools.partial(ask_model, url), numbers)


def _process_pool_executor(method: str, url: str, numbers: list[int]) -> list[str]:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    from model_calls import ask_model

    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
        return list(pool.map(functools.partial(ask_model, url), numbers))


def _joblib(backend: str, url: str, numbers: list[int]) -> list[str]:
    import joblib
    from model_calls import ask_model

    parallel = joblib.Parallel(n_jobs=2, backend=backend)
    return list(parallel(joblib.delayed(ask_model)(url, number) for number in numbers))


WAYS: dict[str, Way] = {
    "`ThreadPoolExecutor`": thread_pool,
    "`ThreadPoolExecutor` within another": nested_thread_pools,
    "`threading.Thread`": plain_threads,
    "`multiprocessing.pool.ThreadPool`": multiprocessing_thread_pool,
    "`asyncio.run` with `gather` and a semaphore": asyncio_gather,
    "`asyncio.to_thread`, `loop.run_in_executor`": asyncio_threads,
    "an event loop in a thread of its own": event_loop_in_a_thread,
    "`joblib`, threading": functools.partial(_joblib, "threading"),
    "`joblib`, loky": functools.partial(_joblib, "loky"),
    "`multiprocessing.Process`, fork": forked_process,
    "`multiprocessing.Pool`, fork": functools.partial(_process_pool, "fork"),
    "`multiprocessing.Pool`, spawn": functools.partial(_process_pool, "spawn"),
    "`ProcessPoolExecutor`, fork": functools.partial(_process_pool_executor, "fork"),
    "`ProcessPoolExecutor`, spawn": functools.partial(_process_pool_executor, "spawn"),
}
