"""How many calls of a Spark job end up under the driver's trace, pattern by pattern.

60 calls in 6 partitions on local-cluster[2,1,1024], with MLflow's defaults, against a local
endpoint and a real tracking server. Each pattern runs in a driver process and a Spark of its own.

    make bench

The patterns: this library; MLflow's tracing context passed by hand in HTTP headers, with its
asynchronous export on and off; and setting MLflow up inside the function, as published articles
do, likewise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import contenders
import mlflow
import pandas as pd
from contenders import (
    Function,
    as_it_is,
    headers_and_async_export,
    headers_by_hand,
    set_up_inside,
)
from pyspark import cloudpickle
from quiet_spark import quiet_spark

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint, TrackingServer

MASTER = "local-cluster[2,1,1024]"
CALLS, PARTITIONS, THREADS = 60, 6, 8
LATENCY = 0.05
EXPERIMENT = "benchmark"


def extractor(url: str, threads: int) -> Function:
    """Return the job's function; it knows nothing of tracing."""

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        from concurrent.futures import ThreadPoolExecutor

        from openai import OpenAI

        client = OpenAI(base_url=url, api_key="not-a-key", max_retries=0)

        def ask(number: int) -> Any:
            content = f"Who may do what under contract {number}?"
            messages = [{"role": "user", "content": content}]
            reply = client.chat.completions.create(model="local", messages=messages)  # type: ignore[call-overload]
            return reply.choices[0].message.content

        for batch in batches:
            if threads == 1:
                yield batch.assign(answer=[ask(number) for number in batch["id"]])
            else:
                with ThreadPoolExecutor(threads) as pool:
                    yield batch.assign(answer=list(pool.map(ask, batch["id"])))

    return extract


Pattern = tuple[Callable[[Function], Function], int]
# Name: how the function is prepared, threads in each partition.
PATTERNS: dict[str, Pattern] = {
    "ctx_autolog.enable()": (as_it_is, 1),
    "ctx_autolog.enable(), 8 threads": (as_it_is, THREADS),
    "headers by hand": (headers_and_async_export, 1),
    "headers by hand, 8 threads": (headers_and_async_export, THREADS),
    "headers by hand, async off": (headers_by_hand, 1),
    "headers by hand, async off, 8 threads": (headers_by_hand, THREADS),
    "set up inside the function": (partial(set_up_inside, asynchronous=True), 1),
    "set up inside the function, async off": (set_up_inside, 1),
}


def run(pattern: str, uri: str, url: str) -> dict[str, Any]:
    """Run one pattern in this process and return what is in the store afterwards."""
    prepare, threads = PATTERNS[pattern]
    cloudpickle.register_pickle_by_value(contenders)
    mlflow.set_tracking_uri(uri)
    experiment_id = mlflow.set_experiment(EXPERIMENT).experiment_id
    spark = quiet_spark(MASTER)
    tracing: AbstractContextManager[object] = nullcontext()
    if prepare is as_it_is:
        tracing = ctx_autolog.enable()
    started = time.perf_counter()
    with tracing, mlflow.start_span("benchmark") as span:
        function = prepare(extractor(url, threads))
        rows = spark.range(0, CALLS, 1, PARTITIONS).mapInPandas(function, "id long, answer string")
        assert len(rows.collect()) == CALLS
    seconds = time.perf_counter() - started
    mlflow.flush_trace_async_logging()
    traces = mlflow.search_traces(
        locations=[experiment_id], return_type="list", max_results=CALLS * 2
    )
    result = _count(traces, span.trace_id) | {"seconds": round(seconds, 1)}
    spark.stop()
    return result


def _count(traces: list[Any], trace_id: str) -> dict[str, Any]:
    calls = [span for t in traces for span in t.data.spans if span.span_type == "CHAT_MODEL"]
    (driver,) = [trace for trace in traces if trace.info.trace_id == trace_id]
    below = [span for span in driver.data.spans if span.span_type == "CHAT_MODEL"]
    tokens = sum(span.attributes["mlflow.chat.tokenUsage"]["total_tokens"] for span in below)
    total = (driver.info.token_usage or {}).get("total_tokens", 0)
    return {
        "traces": len(traces),
        "kept": len(calls),
        "below": sum(_is_below(span, driver) for span in below),
        "total": total,
        "sum": tokens,
    }


def _is_below(span: Any, trace: Any) -> bool:
    """Whether a span's ancestors lead to the trace's root."""
    by_id = {each.span_id: each for each in trace.data.spans}
    while span is not None and span.parent_id is not None:
        span = by_id.get(span.parent_id)
    return span is not None


def main() -> None:
    """Run every pattern and print them side by side."""
    header = (
        f"{'pattern':<38} {'traces':>6} {'kept':>6} {'below driver':>12} {'tokens':>13} {'s':>6}"
    )
    print(f"{CALLS} calls in {PARTITIONS} partitions, {MASTER}, mlflow {mlflow.__version__}")
    print(header)
    print("-" * len(header))
    for pattern in PATTERNS:
        with TrackingServer() as server, OpenAIEndpoint(latency=LATENCY) as endpoint:
            finished = subprocess.run(
                [sys.executable, __file__, pattern, server.uri, endpoint.base_url],
                env={**os.environ, "PYSPARK_PYTHON": sys.executable},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                check=True,
            )
        found = json.loads(finished.stdout.splitlines()[-1])
        print(
            f"{pattern:<38} {found['traces']:>6} {found['kept']:>3}/{CALLS} "
            f"{found['below']:>9}/{CALLS} {found['total']:>6}/{endpoint.total_tokens:<6} "
            f"{found['seconds']:>6}",
            flush=True,
        )
    print(
        "\nkept: call spans in the store; below driver: those whose ancestors lead to the driver's "
        "span;\ntokens: the driver's trace total / what the endpoint billed. Seconds include "
        "starting the workers."
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(run(*sys.argv[1:])))
    else:
        main()
