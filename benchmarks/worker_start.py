"""What tracing adds to the start of a Python worker: from the action to its first call.

Against a local endpoint and a real tracking server, local[1], each way in a driver of its own. No
worker is used again, so that each of the runs starts one. The ways take turns.

    make benchmark
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import IO

import mlflow
import pandas as pd
from pyspark.sql import SparkSession

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint, TrackingServer

RUNS = 7
DAEMON = "mlflow_ctx_autolog.daemon"
# Name: whether calls are traced, and the daemon that forks the workers.
WAYS = {
    "no tracing": (False, "pyspark.daemon"),
    "enable()": (True, "pyspark.daemon"),
    f"enable(), {DAEMON}": (True, DAEMON),
    f"no tracing, {DAEMON}": (False, DAEMON),
}


def drive(way: str, uri: str, url: str) -> None:
    """Run a job with one call for each line that comes in, and say when it began."""
    traced, daemon = WAYS[way]
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("worker start")
    spark = (
        SparkSession.builder.master("local[1]")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.python.worker.reuse", "false")
        .config("spark.python.daemon.module", daemon)
        .getOrCreate()
    )
    spark.sparkContext.setLogLevel("OFF")

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        from openai import OpenAI

        client = OpenAI(base_url=url, api_key="not-a-key", max_retries=0)
        for batch in batches:
            client.chat.completions.create(
                model="gpt-test", messages=[{"role": "user", "content": "Are you there?"}]
            )
            yield batch

    tracing: AbstractContextManager[object] = ctx_autolog.enable() if traced else nullcontext()
    with tracing:
        for _ in sys.stdin:
            span = mlflow.start_span("job") if traced else nullcontext()
            with span:
                frame = spark.range(0, 1, 1, 1).mapInPandas(extract, "id long")
                began = time.time()
                frame.collect()
            print(json.dumps(began), flush=True)
    spark.stop()


def begin(process: subprocess.Popen[str]) -> float:
    """Have one job run; return when its action began, in seconds since the epoch."""
    send, receive = process.stdin, process.stdout
    assert isinstance(send, IO) or send is not None
    assert receive is not None
    send.write("go\n")
    send.flush()
    return float(receive.readline())


def main() -> None:
    """Run every way in turn, and print the medians and what each adds to no tracing."""
    arrived = []

    def answer(_: object) -> str:
        arrived.append(time.time())
        return "I am."

    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with TrackingServer() as server, OpenAIEndpoint(answer) as endpoint:
        drivers = {
            way: subprocess.Popen(
                [sys.executable, __file__, way, server.uri, endpoint.base_url],
                env={**os.environ, "PYSPARK_PYTHON": sys.executable},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for way in WAYS
        }
        # The first run of each starts the JVM's part and, with it, the daemon.
        for run in range(-1, RUNS):
            for way, driver in drivers.items():
                began = begin(driver)
                if run >= 0:
                    seconds[way].append(arrived[-1] - began)
        for driver in drivers.values():
            driver.communicate()
    medians = {way: median(each) for way, each in seconds.items()}
    untraced = medians["no tracing"]
    print(f"From the action to the first call, in a fresh Python worker; median of {RUNS}, seconds")
    for way, found in medians.items():
        print(f"{way:<42} {found:6.2f}  {found - untraced:+6.2f}  x{found / untraced:.2f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        drive(*sys.argv[1:])
    else:
        main()
