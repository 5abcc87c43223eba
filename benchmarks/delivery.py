"""What delivery costs: requests and time of a job, and a worker's memory.

Everything against a local endpoint and a real tracking server, each job in a process and a Spark
of its own, local[2].

    make bench

Prints, against the alternatives in the same run:

1. A job of 2,000 calls in 4 partitions: its time as a ratio to the untraced job of its round, and
   its requests to the server; the server up, and gone for the whole job. The alternative is
   MLflow's tracing context passed by hand in HTTP headers, with asynchronous export off, so that it
   loses nothing. Medians over the rounds.
2. Memory that a worker has gained after 20,000 calls with prompts of 2 kB in one partition, the
   server up and gone, and without tracing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import contenders
import mlflow
import pandas as pd
from contenders import UNTRACED, Function, headers_by_hand
from pyspark import cloudpickle
from quiet_spark import quiet_spark

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint, TrackingServer

CALLS, PARTITIONS = 2_000, 4
LATENCY = 0.05
ROUNDS = 3
GONE = "http://127.0.0.1:9"
MANY_CALLS, PROMPT = 20_000, "clause " * 290


def extractor(url: str, prompt: str) -> Function:
    """Return a job's function, which says what it has gained in memory since its 200th call."""

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        import resource

        from openai import OpenAI

        def resident() -> float:
            with open("/proc/self/statm") as statm:
                return int(statm.read().split()[1]) * resource.getpagesize() / 1e6

        client = OpenAI(base_url=url, api_key="not-a-key", max_retries=0)
        calls, before, most = 0, 0.0, 0.0
        for batch in batches:
            for number in batch["id"]:
                messages = [{"role": "user", "content": f"{number} {prompt}"}]
                client.chat.completions.create(model="local", messages=messages)  # type: ignore[call-overload]
                calls += 1
                if calls == 200:
                    before = resident()
                if calls % 100 == 0:
                    most = max(most, resident())
            yield batch.assign(megabytes=most - before)

    return extract


def run(pattern: str, uri: str, url: str, calls: str, partitions: str, prompt: str) -> Any:
    """Run one job in this process; return its seconds and what its worker gained in memory."""
    cloudpickle.register_pickle_by_value(contenders)
    os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "false" if pattern == "headers" else "true"
    mlflow.set_tracking_uri(uri)
    if uri != GONE:
        mlflow.set_experiment("benchmark")
    else:
        mlflow.tracing.set_destination(mlflow.entities.trace_location.MlflowExperimentLocation("0"))
    spark = quiet_spark("local[2]")
    function = extractor(url, prompt)
    rows = spark.range(0, int(calls), 1, int(partitions))
    # Not timed: starting the workers, and importing what all patterns import.
    warm_up = spark.range(0, 8, 1, 2).mapInPandas(_importing, "id long")
    warm_up.collect()
    tracing: AbstractContextManager[object] = nullcontext()
    if pattern == "ctx_autolog":
        tracing = ctx_autolog.enable()
    started = time.perf_counter()
    with tracing, nullcontext() if pattern == "untraced" else mlflow.start_span("job"):
        if pattern == "headers":
            function = headers_by_hand(function)
        found = rows.mapInPandas(function, "id long, megabytes double").collect()
        seconds = time.perf_counter() - started
    assert len(found) == int(calls)
    spark.stop()
    return {"seconds": seconds, "megabytes": max(row.megabytes for row in found)}


def _importing(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    import mlflow.openai  # noqa: F401
    import openai  # noqa: F401

    yield from batches


def in_a_process(pattern: str, uri: str, calls: int, partitions: int, prompt: str) -> Any:
    """Run one job in a process of its own."""
    with OpenAIEndpoint(latency=0.0 if prompt else LATENCY) as endpoint:
        arguments = [pattern, uri, endpoint.base_url, str(calls), str(partitions), prompt]
        finished = subprocess.run(
            [sys.executable, __file__, *arguments],
            env={**os.environ, "PYSPARK_PYTHON": sys.executable},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=True,
        )
    return json.loads(finished.stdout.splitlines()[-1])


# What a job is traced by, and whether its server is up.
PATTERNS = (
    (UNTRACED, "untraced", False),
    ("ctx_autolog.enable()", "ctx_autolog", True),
    ("ctx_autolog.enable(), server gone", "ctx_autolog", False),
    ("headers by hand", "headers", True),
)


def jobs() -> None:
    """Print time and requests of a job."""
    print(f"\n{CALLS:,} calls of {LATENCY * 1000:g} ms in {PARTITIONS} partitions, local[2]")
    columns = f"{'seconds':>8} {'ratio':>6} {'added to a call, ms':>20} {'requests':>9}"
    print(f"{'pattern':<34} {columns}", flush=True)
    found = defaultdict(list)
    for _ in range(ROUNDS):
        measured = {
            name: job(pattern, is_up, CALLS, PARTITIONS, "") for name, pattern, is_up in PATTERNS
        }
        untraced = measured[UNTRACED][0]["seconds"]
        for name, (job_found, requests) in measured.items():
            seconds = job_found["seconds"]
            # Two calls at a time.
            added = (seconds - untraced) * 2 / CALLS * 1000
            found[name].append((seconds, seconds / untraced, added, requests))
    for name, rounds in found.items():
        seconds, ratio, added, requests = map(median, zip(*rounds, strict=True))
        print(f"{name:<34} {seconds:>8.1f} {ratio:>6.2f} {added:>20.1f} {requests:>9,.0f}")
    print("(headers by hand, server gone: one call alone takes minutes, so it is left out)")


def job(
    pattern: str, is_up: bool, calls: int, partitions: int, prompt: str
) -> tuple[dict[str, float], int]:
    """Run a job; return what it found, and how often the server was asked to store something."""
    if not is_up:
        return in_a_process(pattern, GONE, calls, partitions, prompt), 0
    with TrackingServer() as server:
        found = in_a_process(pattern, server.uri, calls, partitions, prompt)
        log = server.log.read_text()
    return found, len(re.findall(r'"POST \S*/traces\S* HTTP', log))


def memory() -> None:
    """Print what a worker gains in memory."""
    print(f"\n{MANY_CALLS:,} calls with prompts of {len(PROMPT):,} characters in one partition")
    print(f"{'pattern':<34} {'MB gained':>10}")
    for name, pattern, is_up in PATTERNS:
        if pattern != "headers":
            found, _ = job(pattern, is_up, MANY_CALLS, 1, PROMPT)
            print(f"{name:<34} {found['megabytes']:>10.1f}", flush=True)


def main() -> None:
    """Run both."""
    print(f"mlflow {mlflow.__version__}, {os.cpu_count()} cores")
    jobs()
    memory()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    if len(sys.argv) == 7:
        print(json.dumps(run(*sys.argv[1:])))
    else:
        for part in [globals()[name] for name in sys.argv[1:]] or [main]:
            part()
