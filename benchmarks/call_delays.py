"""How much longer calls take when they are traced, by what the tracking store does meanwhile.

    make faults
    python benchmarks/call_delays.py --write docs/call-delays.md

Jobs take turns in one Spark session, each task in a Python process of its own: one job that is not
traced, then a traced one for each state of the store, round after round, with one worker at a time
and with two. What is said of a state is the median over the rounds, each compared with the untraced
job of its own round.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import mlflow
import pandas as pd
from pyspark.sql import SparkSession
from quiet_spark import quiet_spark

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import Slow, Status, TrackingServer, UnreliableProxy

TASKS, CALLS, LATENCY, ROUNDS = 8, 25, 50, 4
WORKERS = (1, 2)
Times = dict[str, dict[str, float]]
STATES: dict[str, Any] = {
    "up": "pass",
    "gone": "refuse",
    "accepts and never answers": "hang",
    "answers after 5 s": Slow(5),
    "answers 500": Status(500),
    "answers 429, `Retry-After: 2`": Status(429, {"Retry-After": "2"}),
    "answers 403": Status(403),
}
DOCUMENT = "The licensee may read the data, and may not pass them on to third parties.\n" * 15

TEXT = """\
# What a call waits for

Written by `make faults`, which measured it with {versions} on {cores} cores, where the model's
endpoint, the tracking server, Spark and its workers all run.

How much longer a call takes when it is traced, in ms, by what the tracking store does meanwhile.
Each job is {calls} calls with a prompt of 1 kB to a model that takes {latency} ms, in {tasks} tasks
that each have a new Python process: its first call has openai's imports and its connection in it,
so *first calls* stand apart from the *later* ones. There is an untraced job in each of {rounds}
rounds; the others are compared with that of their round, and the tables have the medians over the
rounds. Where a first call is shorter when it is traced, a part of openai was imported before the
task's function began.

*Around the request* is what passes in the call before its HTTP request and after it, which is
where tracing does its work on the caller's thread. The whole call has the model's endpoint in it,
too, and whatever else this machine does in these {latency} ms.

One worker has a core of its own, and endpoint, server and Spark share what is left: so it is on a
cluster, where the model is elsewhere. With two, all of them share two cores, and what the longest
calls have more than the others is waiting for one.

{tables}
"""


def timing(url: str) -> Any:
    """Return the job's function, which yields ids, and ms of each call and of its request."""
    model, document = f"wait-{LATENCY}", DOCUMENT

    def ask_all(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        from openai import OpenAI

        completions = OpenAI(base_url=url, api_key="not-a-key", max_retries=0).chat.completions
        timed: list[float] = []

        def in_ms(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                timed.append((time.perf_counter() - began) * 1000)

        completions._post = functools.partial(in_ms, completions._post)  # type: ignore[method-assign]

        def ask(number: int) -> None:
            messages = [{"role": "user", "content": f"{number}: {document}"}]
            in_ms(completions.create, model=model, messages=messages)

        for batch in batches:
            timed.clear()
            for number in batch["id"]:
                ask(number)
            yield pd.DataFrame({"id": batch["id"], "request": timed[::2], "call": timed[1::2]})

    return ask_all


def times_of(spark: SparkSession, url: str) -> Times:
    """Run a job; return what its calls took, and what of it around the request, in ms."""
    frame = spark.range(0, TASKS * CALLS, 1, TASKS)
    rows = frame.mapInPandas(timing(url), "id long, request double, call double").collect()
    assert len(rows) == TASKS * CALLS
    first = [row for row in rows if row.id % CALLS == 0]
    later = [row for row in rows if row.id % CALLS]
    return {
        "Around the request": summary(
            [row.call - row.request for row in first], [row.call - row.request for row in later]
        ),
        "The whole call": summary([row.call for row in first], [row.call for row in later]),
    }


def summary(first: list[float], later: list[float]) -> dict[str, float]:
    """Return what a table says of the times of first and of later calls."""
    return {
        "later calls: median": median(later),
        "later calls: 99th percentile": sorted(later)[math.ceil(0.99 * len(later)) - 1],
        "later calls: longest": max(later),
        "first calls: median": median(first),
        "first calls: longest": max(first),
    }


def measure(rounds: int) -> Iterator[tuple[int, dict[str, Times]]]:
    """Yield the number of workers, and the times by what the store did, of each round."""
    here = Path(__file__).parent
    endpoint = subprocess.Popen(
        [sys.executable, "-c", "import bench; bench.serve()"],
        cwd=here,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    url = endpoint.stdout.readline().strip()  # type: ignore[union-attr]
    os.environ["PYSPARK_PYTHON"] = sys.executable
    with (
        TrackingServer() as server,
        UnreliableProxy(server.uri) as proxy,
        tempfile.TemporaryDirectory() as spools,
    ):
        mlflow.set_tracking_uri(proxy.uri)
        mlflow.set_experiment("call delays")
        for workers in WORKERS:
            spark = quiet_spark(f"local[{workers}]", {"spark.python.worker.reuse": "false"})
            times_of(spark, url)
            for _ in range(rounds):
                found = {"": times_of(spark, url)}
                for state, mode in STATES.items():
                    with ctx_autolog.enable(spool_directory=spools):
                        proxy.mode = mode
                        with mlflow.start_span("job") as span:
                            found[state] = times_of(spark, url)
                        proxy.mode = "pass"
                        receipt = ctx_autolog.receipt(span.trace_id, timeout=60)
                    assert receipt.complete, receipt
                yield workers, found
            spark.stop()
    endpoint.communicate()


def table(rounds: list[dict[str, dict[str, float]]]) -> str:
    """Return what each state adds, as a table in Markdown."""
    columns = list(rounds[0][""])
    lines = ["| the store | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    untraced = (f"{median(found[''][column] for found in rounds):.1f}" for column in columns)
    lines += ["| *not traced, in all* | " + " | ".join(untraced) + " |"]
    for state in STATES:
        added = (
            f"{median(found[state][column] - found[''][column] for found in rounds):+.1f}"
            for column in columns
        )
        lines += [f"| {state} | " + " | ".join(added) + " |"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--write", type=Path, help="a file for the page")
    given = parser.parse_args()
    rounds: dict[int, list[dict[str, Times]]] = {workers: [] for workers in WORKERS}
    for workers, found in measure(given.rounds):
        rounds[workers].append(found)
        done = f"round {len(rounds[workers])} of {given.rounds}, {workers} at a time"
        print(f"{done}: {found}", file=sys.stderr, flush=True)
    page = TEXT.format(
        versions=", ".join(f"{name} {version(name)}" for name in ("mlflow", "pyspark", "openai")),
        cores=os.cpu_count(),
        calls=TASKS * CALLS,
        tasks=TASKS,
        latency=LATENCY,
        rounds=given.rounds,
        tables="\n\n".join(
            f"## {what}, {workers} Python worker{'s' * (workers > 1)} at a time\n\n"
            + table(
                [
                    {state: times[what] for state, times in found.items()}
                    for found in rounds[workers]
                ]
            )
            for workers in WORKERS
            for what in rounds[workers][0][""]
        ),
    )
    print(page)
    if given.write:
        given.write.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
