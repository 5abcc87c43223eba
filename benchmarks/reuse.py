"""What is paid twice with answers that are kept and without, and what looking them up costs.

    make bench-setup
    .venv/bin/python benchmarks/reuse.py

Jobs run on real executors, and ask a real endpoint; looking up is timed in one process, on this
disk and on a file system whose every operation takes 5 ms.
"""

from __future__ import annotations

import argparse
import functools
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import mlflow
import pandas as pd
from pyspark import cloudpickle
from pyspark.sql import SparkSession

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.answers.directory import sweep
from mlflow_ctx_autolog.answers.entry import Entry
from mlflow_ctx_autolog.answers.store import AnswerStore
from mlflow_ctx_autolog.answers.task_answers import Place, TaskAnswers
from mlflow_ctx_autolog.answers_settings import Answers
from mlflow_ctx_autolog.testing import OpenAIEndpoint, TrackingServer

cloudpickle.register_pickle_by_value(sys.modules[__name__])

PARTITIONS = 8
DOCUMENT = "The licensee may read the data, and may not pass them on to third parties.\n" * 27
SCHEMA = "id long, answer string"
SLOW = 0.005


def first_attempt() -> bool:
    from pyspark import TaskContext

    return TaskContext.get().attemptNumber() == 0


def extractor(url: str, after: Callable[[int], None]) -> Callable[..., Any]:
    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        from openai import OpenAI

        client = OpenAI(base_url=url, api_key="not-a-key", max_retries=0)
        for batch in batches:
            answers = []
            for number in batch["id"]:
                messages: Any = [{"role": "user", "content": f"{number}: {DOCUMENT}"}]
                reply = client.chat.completions.create(model="gpt-test", messages=messages)
                answers.append(str(reply.choices[0].message.content))
                after(number)
            yield batch.assign(answer=answers)

    return extract


def job_of_two_actions(spark: SparkSession, url: str, calls: int) -> None:
    frame = spark.range(0, calls, 1, PARTITIONS)
    asked = frame.mapInPandas(extractor(url, lambda _: None), SCHEMA)
    asked.foreach(lambda _: None)
    asked.foreach(lambda _: None)


def job_that_fails_in_its_last_task(spark: SparkSession, url: str, calls: int) -> None:
    def fail(number: int) -> None:
        if number == calls - 1 and first_attempt():
            raise ValueError("not in the first attempt")

    frame = spark.range(0, calls, 1, PARTITIONS)
    frame.mapInPandas(extractor(url, fail), SCHEMA).foreach(lambda _: None)


def job_that_loses_an_executor(spark: SparkSession, url: str, calls: int) -> None:
    def kill(number: int) -> None:
        if number == calls - 1 and first_attempt():
            with open(f"/proc/{os.getppid()}/stat") as file:
                os.kill(int(file.read().split()[3]), signal.SIGKILL)
            time.sleep(60)

    frame = spark.range(0, calls, 1, PARTITIONS)
    frame.mapInPandas(extractor(url, kill), SCHEMA).foreach(lambda _: None)


JOBS = [job_that_fails_in_its_last_task, job_of_two_actions, job_that_loses_an_executor]


def measure_jobs(calls: int) -> None:
    os.environ["PYSPARK_PYTHON"] = sys.executable
    builder = SparkSession.builder.master("local-cluster[2,1,1024]")
    builder = builder.config("spark.ui.enabled", "false").config("spark.speculation", "false")
    spark = builder.config("spark.ui.showConsoleProgress", "false").getOrCreate()
    spark.sparkContext.setLogLevel("OFF")
    print(f"{calls:,} calls in {PARTITIONS} partitions, on two executors of one core")
    print(f"{'':32} {'without':>12} {'with':>12} {'paid twice with':>18}")
    for job in JOBS:
        paid = {}
        for reuse in (False, True):
            with OpenAIEndpoint() as endpoint, tempfile.TemporaryDirectory() as folder:
                settings = {"reuse_answers": folder if reuse else False}
                with ctx_autolog.enable(**settings), mlflow.start_span(job.__name__):
                    job(spark, endpoint.base_url, calls)
                paid[reuse] = len(endpoint.requests)
        ratios = [f"{paid[reuse] / calls:.3f}" for reuse in (False, True)]
        print(
            f"{job.__name__.replace('_', ' '):32} {ratios[0]:>12} {ratios[1]:>12} "
            f"{paid[True] - calls:>18,}"
        )
    spark.stop()


class SlowDisk:
    """Has each operation of files take its time in this process, also of the thread that writes."""

    names = ("open", "link", "unlink", "mkdir", "listdir", "stat")

    def __enter__(self) -> None:
        self._originals = {name: getattr(os, name) for name in self.names}
        for name, original in self._originals.items():

            def slow(*args: Any, original: Any = original, **kwargs: Any) -> Any:
                time.sleep(SLOW)
                return original(*args, **kwargs)

            setattr(os, name, slow)

    def __exit__(self, *error: object) -> None:
        for name, original in self._originals.items():
            setattr(os, name, original)


REPLY = Entry((("content-type", "application/json"),), (b'{"choices": []}' + bytes(2000),), "a/b")
HEADERS = [(f"x-header-{number}", "value" * 4) for number in range(12)]
URL = "https://api.openai.com/v1/chat/completions"


def task_answers(store: AnswerStore) -> TaskAnswers:
    return TaskAnswers(store, Place("job", "function", "0", ""), Answers(), b"key")


def timed(action: Callable[[], Any]) -> tuple[float, float]:
    """Return the milliseconds that an action takes, and those of CPU of its thread."""
    clock, cpu = time.perf_counter(), time.thread_time()
    action()
    return (time.perf_counter() - clock) * 1000, (time.thread_time() - cpu) * 1000


def measure_lookups(count: int, is_slow: bool) -> None:
    bodies = [
        b'{"model": "m", "messages": [{"role": "user", "content": "%d %s"}]}'
        % (number, DOCUMENT.encode().replace(b"\n", b" "))
        for number in range(count)
    ]
    with tempfile.TemporaryDirectory() as folder:
        store = AnswerStore(Path(folder) / "answers", 3600.0, 1 << 30, lists=is_slow)

        def ask(answers: TaskAnswers, body: bytes, keep: bool) -> None:
            question = answers.question("POST", URL, HEADERS, body)
            assert question is not None
            found = question.find()
            assert (found is None) == keep
            if keep:
                kept = question.keep(2000, lambda: REPLY)
                if kept is not None:
                    kept.wait(0.001)

        rows = []
        for keep in (True, False):
            answers = task_answers(store)
            # Which asks once which answers there are.
            answers.shelf("0" * 32)
            store.flush(60)
            if keep:
                first = bodies[:1]
                ask(answers, first[0], keep)
            asking = [functools.partial(ask, answers, body, keep) for body in bodies[keep:]]
            rows.append([timed(action) for action in asking])
            store.flush(600)
    place = f"{SLOW * 1000:g} ms an operation" if is_slow else "this disk"
    for name, times in zip(("new", "known"), rows, strict=True):
        waits, cpus = zip(*times, strict=True)
        last = sorted(waits)[int(len(waits) * 0.99)]
        print(
            f"  a call that is {name:5}, {place:20} wait {median(waits):6.3f} ms "
            f"(99%: {last:6.3f})   CPU {median(cpus):6.3f} ms"
        )


def measure_many(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = AnswerStore(Path(folder) / "answers", 3600.0, 1 << 40)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.perf_counter()
        shelves = [store.shelf("0" * 32, f"{number:032x}") for number in range(100)]
        for number in range(count):
            name = f"{number:032x}.0"
            kept = store.keep(shelves[number % 100], name, 2000, lambda: REPLY)
            if kept is None or number % 100 == 0:
                store.flush(60)
        store.flush(600)
        seconds = time.perf_counter() - started
        # A process that begins with all of them there.
        fresh = AnswerStore(store.root, 3600.0, 1 << 40)
        shelf = fresh.shelf("0" * 32, f"{7:032x}")
        name = f"{count - 93:032x}.0"
        waits = [timed(lambda: fresh.find(shelf, name))[0] for _ in range(1000)]
        swept, _ = timed(lambda: sweep(store.root, None))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        size = sum(entry.stat().st_size for entry in store.root.rglob("*") if entry.is_file())
        blocks = sum(entry.stat().st_blocks * 512 for entry in store.root.rglob("*"))
    print(
        f"  {count:,} answers of 2 kB: {size / count:,.0f} bytes each, {blocks / count:,.0f} on "
        f"disk; written in {seconds:.1f} s; found in {median(waits):.3f} ms; looked through in "
        f"{swept / 1000:.1f} s; memory grew by {grown / 1024:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--lookups", type=int, default=500)
    parser.add_argument("--answers", type=int, default=100_000)
    parser.add_argument("--without-spark", action="store_true")
    given = parser.parse_args()
    print("Looking up")
    for is_slow in (False, True):
        if is_slow:
            with SlowDisk():
                measure_lookups(given.lookups, is_slow)
        else:
            measure_lookups(given.lookups, is_slow)
    print("Many")
    measure_many(given.answers)
    if not given.without_spark:
        with TrackingServer() as server:
            mlflow.set_tracking_uri(server.uri)
            mlflow.set_experiment("reuse")
            measure_jobs(given.calls)


if __name__ == "__main__":
    main()
