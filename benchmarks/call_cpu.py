"""What a call costs in CPU, by who traces it, without Spark and a model on the network.

    make bench

Each contender has new processes of its own, in turns with the others. The model's reply is made in
the process; what is exported goes to a real tracking server. CPU is that of the whole process, all
its threads, from after the first calls until everything has been exported.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import mlflow
from bench import Server, is_installed
from contenders import (
    CONTENDERS,
    OPENINFERENCE,
    OPENLLMETRY,
    UNTRACED,
    Contender,
    Function,
)
from pyspark import cloudpickle

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import TrackingServer

HERE = Path(__file__).parent
CALLS, FIRST_CALLS, ROUNDS = 1000, 50, 5
MLFLOW_ALONE = "MLflow's autolog, nothing exported"
DOCUMENT = "The licensee may read the data, and may not pass them on to third parties.\n" * 27
ANSWER = "The technician may enter the site at any time, the customer on weekdays."


def ask_all(numbers: Iterable[int]) -> Iterator[float]:
    """Make the calls; yield the process's CPU time, in seconds, when the first ones are made."""
    from openai import OpenAI, _base_client

    # From openai 3 on, httpx2.
    httpx = getattr(_base_client, "httpx2", None) or _base_client.httpx  # type: ignore[attr-defined]
    message = {"role": "assistant", "content": ANSWER}
    reply = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "gpt-4o-mini",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 400, "completion_tokens": 15, "total_tokens": 415},
    }
    answering = httpx.MockTransport(lambda _: httpx.Response(200, json=reply))
    client = OpenAI(api_key="not-a-key", http_client=httpx.Client(transport=answering))
    for number in numbers:
        if number == FIRST_CALLS:
            yield time.process_time()
        messages = [{"role": "user", "content": f"{number}: {DOCUMENT}"}]
        client.chat.completions.create(model="gpt-4o-mini", messages=messages)


def autolog_alone(function: Function) -> Function:
    """Have MLflow make the spans below a root, as it does for a driver, and export none."""

    def wrapped(numbers: Iterable[Any]) -> Iterator[Any]:
        import mlflow
        from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter

        MlflowV3SpanExporter.export = lambda *_: None
        mlflow.openai.autolog()
        with mlflow.start_span("task"):
            yield from function(numbers)

    return wrapped


def attached(function: Function) -> Function:
    """Attach the driver's context to a process that no Spark has started."""
    carrier = ctx_autolog.capture().to_json()

    def wrapped(numbers: Iterable[Any]) -> Iterator[Any]:
        import mlflow_ctx_autolog as ctx_autolog

        with ctx_autolog.attach(carrier, "task"):
            yield from function(numbers)

    return wrapped


WAYS = {
    UNTRACED: Contender(),
    MLFLOW_ALONE: Contender(autolog_alone),
    OPENINFERENCE: CONTENDERS[OPENINFERENCE],
    OPENLLMETRY: CONTENDERS[OPENLLMETRY],
    "ours, without the file on disk": Contender(attached, settings={"spool_max_bytes": 0}),
    "ours": Contender(attached, settings={}),
}


def run_job() -> None:
    """Run the job that comes on standard input; print its CPU time for each call, in ms."""
    job = cloudpickle.loads(sys.stdin.buffer.read())
    rows = job(range(FIRST_CALLS + CALLS))
    before = next(rows)
    for _ in rows:
        pass
    print(json.dumps((time.process_time() - before) * 1000 / CALLS))


def measure(rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Return the ms of CPU for each call, of each round, and the calls stored, by contender."""
    found: dict[str, list[float]] = defaultdict(list)
    kept: dict[str, int] = defaultdict(int)
    with TrackingServer() as running, tempfile.TemporaryDirectory() as spools:
        server = Server(running)
        environment = {
            **os.environ,
            "MLFLOW_TRACKING_URI": server.uri,
            "MLFLOW_CTX_AUTOLOG_SPOOL_DIRECTORY": spools,
        }
        mlflow.set_tracking_uri(server.uri)
        mlflow.set_experiment("CPU of calls")
        for _ in range(rounds):
            for name, contender in WAYS.items():
                if not is_installed(contender):
                    continue
                before = sum(server.calls().values())
                with contender.enable() if contender.is_ours else nullcontext():
                    with mlflow.start_span("job"):
                        done = subprocess.run(
                            [sys.executable, str(HERE / "call_cpu.py"), "--job"],
                            input=cloudpickle.dumps(contender.prepare(ask_all)),
                            env=environment,
                            stdout=subprocess.PIPE,
                            check=True,
                        )
                    mlflow.flush_trace_async_logging()
                found[name].append(float(json.loads(done.stdout)))
                kept[name] += sum(server.calls().values()) - before
                print(f"{name}: {found[name][-1]:.2f} ms", file=sys.stderr, flush=True)
    return found, kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        run_job()
        return
    found, kept = measure(given.rounds)
    print(f"{CALLS:,} calls of 2 kB in a process, {given.rounds} rounds; medians\n")
    print("| contender | CPU of a call, ms | added, ms | of what MLflow's adds | calls kept |")
    print("|---|---|---|---|---|")
    added = {
        name: median(mine - plain for mine, plain in zip(times, found[UNTRACED], strict=True))
        for name, times in found.items()
    }
    for name, times in found.items():
        cells = [name, f"{median(times):.2f}", "", "", ""]
        if name != UNTRACED:
            cells[2:4] = f"{added[name]:+.2f}", f"{added[name] / added[MLFLOW_ALONE]:.2f}"
        if name not in (UNTRACED, MLFLOW_ALONE):
            cells[4] = f"{kept[name]:,}/{given.rounds * (FIRST_CALLS + CALLS):,}"
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
