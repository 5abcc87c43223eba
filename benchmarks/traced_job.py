"""The job that the contenders trace: some calls in one partition, in a Python worker of its own.

Run as a program it is a driver: for each job that comes in as a line of JSON, it runs it and prints
what it measured. The harness, `bench.py`, has one for each
environment of the contenders.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import contenders
import mlflow
import pandas as pd
from contenders import CONTENDERS, Function
from peak_memory import peak_memory
from pyspark import cloudpickle
from quiet_spark import quiet_spark

import mlflow_ctx_autolog as ctx_autolog

_SCHEMA = (
    "worker long, daemon long, first_call double, began double, cpu_began double, "
    "ended double, megabytes double"
)
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Job:
    """What to run: ``calls`` timed calls, after a first one that is not.

    Args:
        contender: A name among `CONTENDERS`.
        calls: How many calls are timed.
        threads: Of the function, at the same time.
        latency: Of the model, in milliseconds.
        prompt: Characters of each prompt.
    """

    contender: str
    calls: int
    threads: int = 1
    latency: int = 0
    prompt: int = 500


def asking(url: str, job: Job) -> Function:
    """Return the job's function, which yields one row with its measurements at the end."""
    threads, model, prompt = job.threads, f"wait-{job.latency}", "clause " * (job.prompt // 7)

    def ask_all(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        import contextvars
        import resource
        from concurrent.futures import ThreadPoolExecutor

        from openai import OpenAI

        def megabytes() -> float:
            with open("/proc/self/statm") as statm:
                return int(statm.read().split()[1]) * resource.getpagesize() / 1e6

        client = OpenAI(base_url=url, api_key="not-a-key", max_retries=0)

        def ask(number: int) -> None:
            messages = [{"role": "user", "content": f"{number} {prompt}"}]
            client.chat.completions.create(model=model, messages=messages)  # type: ignore[call-overload]

        first_call = time.time()
        ask(-1)
        before, began, cpu_began = megabytes(), time.time(), time.process_time()
        for batch in batches:
            if threads == 1:
                for number in batch["id"]:
                    ask(number)
                continue
            with ThreadPoolExecutor(threads) as pool:
                # The context goes along to each thread, which only this library does by itself.
                contexts = [contextvars.copy_context() for _ in batch["id"]]
                list(pool.map(lambda c, number: c.run(ask, number), contexts, batch["id"]))
        ended = time.time()
        gained = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 - before
        row = [os.getpid(), os.getppid(), first_call, began, cpu_began, ended, gained]
        yield pd.DataFrame([row], columns=[part.split()[0] for part in _SCHEMA.split(", ")])

    return ask_all


class Driver:
    """Runs jobs in one Spark session, each in a Python worker that is forked for it."""

    def __init__(self, daemon: str, uri: str, url: str) -> None:
        self._url = url
        mlflow.set_tracking_uri(uri)
        settings = {
            "spark.driver.host": "127.0.0.1",
            "spark.python.worker.reuse": "false",
            "spark.python.daemon.module": daemon,
        }
        self._spark = quiet_spark("local[1]", settings)
        self._daemon = 0
        # The first job starts the JVM's part and, with it, the daemon.
        self._act(asking(url, Job(contenders.UNTRACED, 1)), 1)

    def run(self, job: Job) -> dict[str, Any]:
        """Run a job, wait until its spans are stored, and return what was measured.

        CPU, in seconds, is that of the worker from the first timed call until it is gone: what a
        task does at its end is in it. So it is with the wall time, which ends with the action.
        """
        contender = CONTENDERS[job.contender]
        mlflow.set_experiment(f"{job.contender} {time.time()}")
        function = asking(self._url, job)
        peak = peak_memory()
        trace_id = ""
        with contender.enable() if contender.is_ours else contextlib.nullcontext():
            if job.contender == contenders.UNTRACED:
                measured = self._act(function, job.calls)
            else:
                with mlflow.start_span("job") as span:
                    trace_id = span.trace_id
                    measured = self._act(contender.prepare(function), job.calls)
                mlflow.flush_trace_async_logging()
                if contender.is_ours:
                    ctx_autolog.receipt(timeout=120)
        return {**measured, "driver_megabytes": peak_memory() - peak, "trace_id": trace_id}

    def _act(self, function: Function, calls: int) -> dict[str, Any]:
        frame = self._spark.range(0, calls, 1, 1).mapInPandas(function, _SCHEMA)
        watch = Watch(self._daemon)
        action = time.time()
        (row,) = frame.collect()
        done = time.time()
        while Path(f"/proc/{row.worker}").exists():
            time.sleep(0.01)
        self._daemon = row.daemon
        return {
            "start": row.first_call - action,
            "cpu": (watch.stop(row.worker) - row.cpu_began) / calls,
            "wall": (done - row.began) / calls,
            "task_end": done - row.ended,
            "megabytes": row.megabytes,
        }


class Watch:
    """Keeps what CPU time the children of a process have used, until they are gone.

    Spark's daemon does not wait for its workers, so that the kernel does not keep it. It is looked
    at every 10 ms, the clock's tick; the last one may be missed.
    """

    def __init__(self, process: int) -> None:
        self._children = Path(f"/proc/{process}/task/{process}/children")
        self._used: dict[int, float] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self, child: int) -> float:
        """Return the CPU time that a child has used, in seconds; 0 for one that was not seen."""
        self._is_over.set()
        self._thread.join()
        return self._used.get(child, 0.0)

    def _look(self) -> None:
        while not self._is_over.wait(0.01):
            with contextlib.suppress(OSError):
                for child in map(int, self._children.read_text().split()):
                    stat = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
                    self._used[child] = (int(stat[11]) + int(stat[12])) / _TICKS


def main(daemon: str, uri: str, url: str) -> None:
    """Run the jobs of standard input."""
    for module in (contenders, sys.modules["__main__"]):
        cloudpickle.register_pickle_by_value(module)
    driver = Driver(daemon, uri, url)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(driver.run(Job(**json.loads(line)))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
