"""One large job: what its trace costs the job, the driver, the workers and the store, and a report.

    python benchmarks/large_job.py [--calls 100000] [--partitions 200]

Real Spark (local[2]), a real tracking server on SQLite, a local endpoint that answers at once, and
prompts of 500 characters of which one in ten is asked twice. Each part is in a process of its own.
Prints two Markdown tables: the job, traced and untraced, and the report on its trace.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from peak_memory import peak_memory
from quiet_spark import quiet_spark

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint, TrackingServer

TEXT = "clause " * 70


def extractor(url: str) -> Callable[[Iterable[pd.DataFrame]], Iterator[pd.DataFrame]]:
    """Return a job's function, which says how much memory its process has had at most."""

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        import resource

        from openai import OpenAI

        client = OpenAI(base_url=url, api_key="not-a-key", max_retries=0)
        for batch in batches:
            for number in batch["id"]:
                asked = number - 1 if number % 10 == 9 else number
                messages = [{"role": "user", "content": f"{asked} {TEXT}"}]
                client.chat.completions.create(model="local", messages=messages)  # type: ignore[call-overload]
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
            yield pd.DataFrame({"megabytes": [most]})

    return extract


def job(uri: str, url: str, calls: str, partitions: str) -> dict[str, Any]:
    """Run the job in this process; without tracing where there is no store."""
    spark = quiet_spark("local[2]")
    tracing: AbstractContextManager[Any] = nullcontext()
    trace: AbstractContextManager[Any] = nullcontext()
    if uri:
        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment("large")
        tracing, trace = ctx_autolog.enable(flush_timeout=300), mlflow.start_span("job")
    rows = spark.range(0, int(calls), 1, int(partitions))
    started = time.perf_counter()
    with tracing:
        with trace as span:
            found = rows.mapInPandas(extractor(url), "megabytes double").collect()
        seconds = time.perf_counter() - started
        receipt = str(ctx_autolog.receipt(timeout=300)) if uri else "-"
    spark.stop()
    return {
        "seconds": seconds,
        "worker": max(row.megabytes for row in found),
        "driver": peak_memory(),
        "receipt": receipt,
        "trace_id": span.trace_id if uri else "",
    }


def report(uri: str, trace_id: str, folder: str) -> dict[str, Any]:
    """Report on the trace in this process."""
    mlflow.set_tracking_uri(uri)
    page = Path(folder) / "report.html"
    started = time.perf_counter()
    found = ctx_autolog.report(trace_id)
    read = time.perf_counter() - started
    found.to_html(page)
    traces = Counter(each.call.trace_id for each in found.calls)
    return {
        "near": traces.pop(trace_id, 0),
        "linked": len(traces),
        "read": read,
        "seconds": time.perf_counter() - started,
        "megabytes": peak_memory(),
        "html": page.stat().st_size / 1e6,
        "calls": found.made.calls,
        "causes": {cause.key: sums.calls for cause, sums in found.by_cause().items()},
    }


def in_a_process(*arguments: str) -> dict[str, Any]:
    """Run one of the functions above in a process of its own."""
    finished = subprocess.run(
        [sys.executable, __file__, *arguments],
        env={**os.environ, "PYSPARK_PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        check=True,
    )
    return dict(json.loads(finished.stdout.splitlines()[-1]))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--partitions", type=int, default=200)
    parser.add_argument("--keep", help="a folder for the store and the report's page")
    given = parser.parse_args()
    numbers = str(given.calls), str(given.partitions)
    print(f"mlflow {mlflow.__version__}, {os.cpu_count()} cores, {given.calls:,} calls in")
    print(f"{given.partitions} partitions\n")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.keep or temporary)
        with TrackingServer(folder / "server") as server:
            with OpenAIEndpoint() as endpoint:
                untraced = in_a_process("job", "", endpoint.base_url, *numbers)
            with OpenAIEndpoint() as endpoint:
                traced = in_a_process("job", server.uri, endpoint.base_url, *numbers)
            requests = len(re.findall(r'"POST \S*/traces\S* HTTP', server.log.read_text()))
            database = sum(file.stat().st_size for file in (folder / "server").glob("*.db*")) / 1e6
            print("| | s | ratio | worker, MB | driver, MB | requests | store, MB | receipt |")
            print("|---|---|---|---|---|---|---|---|")
            for name, run in (("untraced", untraced), ("traced", traced)):
                ratio = run["seconds"] / untraced["seconds"]
                store = f"{requests:,} | {database:.0f}" if run is traced else "- | -"
                print(
                    f"| {name} | {run['seconds']:.0f} | {ratio:.2f} | {run['worker']:.0f} "
                    f"| {run['driver']:.0f} | {store} | {run['receipt']} |",
                    flush=True,
                )
            found = in_a_process("report", server.uri, traced["trace_id"], str(folder))
        print("\n| report: calls | in the driver's trace | linked traces | read, s ", end="")
        print("| with its page, s | MB | page, MB | repeats |")
        print("|---|---|---|---|---|---|---|---|")
        print(
            f"| {found['calls']:,} | {found['near']:,} | {found['linked']:,} | {found['read']:.0f} "
            f"| {found['seconds']:.0f} | {found['megabytes']:.0f} | {found['html']:.1f} "
            f"| {found['causes']} |"
        )


if __name__ == "__main__":
    if sys.argv[1:2] in (["job"], ["report"]):
        print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
