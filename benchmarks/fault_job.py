"""The driver of one row of `faults.py`: one Spark job, in a process that can be killed.

It writes an event a line, as JSON, and reads a line before the job and after it: by then the caller
has broken, or mended, what it wants to.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlflow
import pandas as pd
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame
from quiet_spark import quiet_spark

import mlflow_ctx_autolog as ctx_autolog

PARTITIONS, CALLS_IN_EACH = 8, 60
CALLS = PARTITIONS * CALLS_IN_EACH
WARM_UP = "Are you there?"
DOCUMENT = "The licensee may read the data, and may not pass them on to third parties.\n" * 15
SCHEMA = "id long, answer string"


@dataclass(frozen=True)
class Job:
    """What the driver is told."""

    url: str
    """Of the OpenAI endpoint."""
    folder: str
    """Where workers write how long each call took."""
    tracking_uri: str | None
    """None: the job is not traced."""
    experiment_id: str
    settings: dict[str, Any]
    master: str
    conf: dict[str, str] = field(default_factory=dict)
    trouble: str = "none"
    action: str = "collect"
    width: int = 0
    """Characters of each answer at least."""


def in_the_middle_of(partition: int, number: int) -> bool:
    """Whether the next call is the one halfway through a partition."""
    return number == partition * CALLS_IN_EACH + CALLS_IN_EACH // 2


def no_trouble(_task: Any, _number: int) -> None:
    """Let the call be made."""


def kill_worker(task: Any, number: int) -> None:
    """End this Python worker, the first time."""
    if in_the_middle_of(2, number) and task.attemptNumber() == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def kill_executor(task: Any, number: int) -> None:
    """End the JVM above this Python worker and above the daemon it was forked from, once."""
    if in_the_middle_of(2, number) and task.attemptNumber() == 0:
        command = ["ps", "-o", "ppid=", "-p", str(os.getppid())]
        jvm = int(subprocess.check_output(command))
        command = ["ps", "-o", "args=", "-p", str(jvm)]
        assert b"CoarseGrainedExecutorBackend" in subprocess.check_output(command)
        os.kill(jvm, signal.SIGKILL)


def fail_once(task: Any, number: int) -> None:
    """Fail the first attempt of a task."""
    if in_the_middle_of(2, number) and task.attemptNumber() == 0:
        raise RuntimeError("The first attempt fails.")


def raise_always(_task: Any, number: int) -> None:
    """Fail every attempt of a task."""
    if in_the_middle_of(2, number):
        raise RuntimeError(f"Document {number} cannot be read.")


def straggle(task: Any, number: int) -> None:
    """Make the first attempt of the last task slow; a speculative copy of it is another one."""
    if number >= CALLS - CALLS_IN_EACH and task.attemptNumber() == 0:
        time.sleep(0.3)


TROUBLES: dict[str, Callable[[Any, int], None]] = {
    "none": no_trouble,
    "kill worker": kill_worker,
    "kill executor": kill_executor,
    "fail once": fail_once,
    "raise": raise_always,
    "straggle": straggle,
}


def collect(frame: DataFrame) -> None:
    """Run every partition to its end."""
    frame.collect()


def show(frame: DataFrame) -> None:
    """Run the first five partitions in vain, and end further ones as soon as a row is there."""
    frame.where(f"id >= {5 * CALLS_IN_EACH}").show(1)


def collect_and_stop(frame: DataFrame) -> None:
    """End with the application what workers may still have to send."""
    frame.collect()
    frame.sparkSession.stop()


ACTIONS: dict[str, Callable[[DataFrame], None]] = {
    "collect": collect,
    "collect and stop": collect_and_stop,
    "show": show,
}


def extractor(job: Job) -> Callable[[Iterable[pd.DataFrame]], Iterator[pd.DataFrame]]:
    """Return the job's function, which knows nothing of tracing, and times its calls."""
    trouble = TROUBLES[job.trouble]

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        from openai import OpenAI
        from pyspark import TaskContext

        client = OpenAI(base_url=job.url, api_key="not-a-key", max_retries=0)
        task = TaskContext.get()

        def ask(number: int) -> Any:
            trouble(task, number)
            key = f"Document {number} in attempt {task.taskAttemptId()}: who may do what?"
            messages = [{"role": "user", "content": f"{key}\n{DOCUMENT}"}]
            started = time.perf_counter()
            reply = client.chat.completions.create(model="local", messages=messages)  # type: ignore[call-overload]
            seconds = time.perf_counter() - started
            log.write(f"{seconds}\t{key}\n".encode())
            return reply.choices[0].message.content

        # Unbuffered, as this process may be killed.
        with open(f"{job.folder}/calls-{os.getpid()}", "ab", buffering=0) as log:
            for batch in batches:
                answers = [ask(number) for number in batch["id"]]
                # Where it is wide, a batch does not fit into the pipe to Spark, and the function
                # is suspended until Spark wants more.
                yield batch.assign(answer=[answer.ljust(job.width) for answer in answers])

    return extract


def warm_up(url: str) -> Callable[[Iterable[pd.DataFrame]], Iterator[pd.DataFrame]]:
    """Return a function that makes a worker import what the job needs, untraced.

    MLflow among it, which takes the first task of a worker two seconds: that is no fault's doing.
    """

    def ask_once(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        import mlflow.openai  # noqa: F401
        from openai import OpenAI

        client = OpenAI(base_url=url, api_key="not-a-key", max_retries=0)
        messages = [{"role": "user", "content": WARM_UP}]
        client.chat.completions.create(model="local", messages=messages)  # type: ignore[call-overload]
        # Longer than a task takes to start, so that no worker gets two of them.
        time.sleep(0.5)
        yield from batches

    return ask_once


def tell(event: str, **facts: Any) -> None:
    """Write an event to the caller."""
    print(json.dumps({"event": event, **facts}), flush=True)


def main(job: Job) -> None:
    """Run the job."""
    spark = quiet_spark(job.master, job.conf)
    spark.range(0, 4, 1, 4).mapInPandas(warm_up(job.url), "id long").collect()

    traced = job.tracking_uri is not None
    if traced:
        mlflow.set_tracking_uri(job.tracking_uri)
        mlflow.set_experiment(experiment_id=job.experiment_id)
    tell("ready")
    sys.stdin.readline()
    if traced:
        ctx_autolog.enable(**job.settings)
    tell("started")
    error = None
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        span = stack.enter_context(mlflow.start_span("job")) if traced else None
        frame = spark.range(0, CALLS, 1, PARTITIONS).mapInPandas(extractor(job), SCHEMA)
        try:
            ACTIONS[job.action](frame)
        except PySparkException as exception:
            error = type(exception).__name__
    seconds = time.perf_counter() - started
    tell("done", seconds=seconds, error=error)
    sys.stdin.readline()
    if span is not None:
        receipt = ctx_autolog.receipt(span.trace_id)
        tell("receipt", text=str(receipt), complete=receipt.complete)
    tell("ending")
    spark.stop()


if __name__ == "__main__":
    main(Job(**json.loads(sys.argv[1])))
