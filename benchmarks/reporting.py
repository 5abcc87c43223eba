"""What it takes to report on a large job, to compare two, and to look back at a thousand.

Jobs are written into an SQLite store as workers would have stored them: calls in traces of 2,000,
linked to the tasks of the driver's trace, each with a prompt of 2,000 characters. Each step is a
process of its own, so that its memory is its own.

    python benchmarks/reporting.py [--calls 100000] [--jobs 1000] [--write FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Span, TraceInfo, TraceLocation, TraceState
from mlflow.tracing.client import TracingClient

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.spans.call_sums import CALL_SUMS, CallSums
from mlflow_ctx_autolog.stores.stored_trace import (
    JOB_TAG,
    LINKED_SPAN,
    LINKED_TRACE,
    TRACE_KEY,
    split_metadata,
)

SECOND = 1_000_000_000
IN_A_TRACE = 2_000
PROMPT = "What does this clause of the contract grant, and to whom? " * 35
LIMITS = {"report": 60.0, "page": 60.0, "compare": 120.0, "history": 10.0}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--jobs", type=int, default=1_000)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--step", nargs="+")
    given = parser.parse_args()
    if given.step:
        take(*given.step)
        return
    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        mlflow.set_tracking_uri(uri)
        experiment_id = mlflow.create_experiment("jobs")
        jobs = [store_job(uri, experiment_id, number, given.calls) for number in (1, 2)]
        history_id = mlflow.create_experiment("history")
        for number in range(given.jobs):
            store_sums(uri, history_id, number)
        rows = [
            step("report", uri, jobs[0], folder),
            step("page", uri, jobs[0], folder),
            step("compare", uri, *jobs),
            step("history", uri, "history"),
        ]
    lines = [
        "| step | seconds | limit | CPU | memory | result |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['step']} | {row['seconds']:.1f} | {LIMITS[row['step']]:.0f} | "
            f"{row['cpu']:.1f} s | {row['memory']:.0f} MB | {row['result']} |"
            for row in rows
        ),
    ]
    text = f"{given.calls:,} calls a job; {given.jobs:,} jobs.\n\n" + "\n".join(lines)
    print(text)
    if given.write is not None:
        given.write.write_text(f"# Reports of large jobs\n\n{text}\n", encoding="utf-8")


def step(name: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--step", name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def take(name: str, uri: str, *arguments: str) -> None:
    """Take one step in this process, and print what it took."""
    mlflow.set_tracking_uri(uri)
    began = time.monotonic()
    if name == "report":
        found = ctx_autolog.report(arguments[0])
        result = str(found).partition("\n")[0]
    elif name == "page":
        report = ctx_autolog.report(arguments[0])
        path = report.to_html(Path(arguments[1]) / "report.html")
        result = f"{path.stat().st_size / 1e6:.1f} MB"
    elif name == "compare":
        result = str(ctx_autolog.compare(*arguments)).partition("\n")[0]
    else:
        result = str(ctx_autolog.history(arguments[0], days=3650)).partition("\n")[0]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = time.monotonic() - began
    row = {"step": name, "seconds": seconds, "cpu": time.process_time(), "memory": memory}
    print(json.dumps({**row, "result": result}))


def store_job(uri: str, experiment_id: str, number: int, calls: int) -> str:
    client, numbers = TracingClient(uri), random.Random(number)
    job = f"tr-{number:032x}"
    tasks, traces = [], -(-calls // IN_A_TRACE)
    root = span(job, f"{1:016x}", None, "nightly", "UNKNOWN", 0, 3600, {})
    for place in range(traces):
        linked = f"tr-{number * 10_000 + place + 100:032x}"
        task_id = f"{place + 2:016x}"
        tasks.append(span(job, task_id, root["span_id"], "extract", "TASK", 1, 3500, {
            "spark.task.outcome": "completed",
            "spark.application.id": "app-1",
            "spark.sql.execution.id": "0",
            "spark.stage.id": 0,
            "spark.partition.id": place,
            "spark.task.attempt_number": 0,
            "spark.task.attempt_id": place,
            "spark.handover.id": "one",
            "spark.rows.in": IN_A_TRACE,
            "host.name": f"worker-{place % 10}",
            "process.pid": place,
            "llm.calls": IN_A_TRACE,
            LINKED_TRACE: linked,
        }))  # fmt: skip
        size = min(IN_A_TRACE, calls - place * IN_A_TRACE)
        info = trace_info(linked, experiment_id, {TRACE_KEY: job}, {JOB_TAG: job})
        client.store.start_trace(info)
        log(client, experiment_id, list(calls_of(numbers, linked, task_id, place, size)))
    client.store.start_trace(trace_info(job, experiment_id, {TRACE_KEY: job}, {}))
    log(client, experiment_id, [root, *tasks])
    return job


def calls_of(
    numbers: random.Random, trace_id: str, task_id: str, place: int, size: int
) -> Iterator[dict[str, Any]]:
    top = f"{10**9 + place:016x}"
    yield span(trace_id, top, None, "extract", "UNKNOWN", 1, 3500, {LINKED_SPAN: task_id})
    for call in range(size):
        began = numbers.uniform(1, 3400)
        tokens = {
            "input_tokens": int(numbers.lognormvariate(6.5, 0.4)),
            "output_tokens": int(numbers.lognormvariate(4.5, 0.6)),
        }
        reason = "length" if numbers.random() < 0.01 else "stop"
        answer = f'{{"number": {call}, "text": "{PROMPT[:200]}"}}'
        ended = began + numbers.lognormvariate(0, 0.5)
        span_id = f"{(place + 1) * 10**6 + call:016x}"
        yield span(trace_id, span_id, top, "Completions", "CHAT_MODEL", began, ended, {
            "model": "gpt-x",
            "mlflow.llm.model": "gpt-x",
            "mlflow.spanInputs": {
                "model": "gpt-x", "messages": [{"role": "user", "content": f"{call} {PROMPT}"}]
            },
            "mlflow.spanOutputs": {
                "choices": [{"finish_reason": reason, "message": {"content": answer}}]
            },
            "mlflow.chat.tokenUsage": tokens,
            "mlflow.llm.cost": {"total_cost": 1e-6 * tokens["input_tokens"]},
            "gen_ai.response.finish_reasons": [reason],
            "llm.answer.chars": len(answer),
            "llm.answer.hash": f"{numbers.getrandbits(128):032x}",
            "llm.request.fingerprint": f"{place}-{call if numbers.random() > 0.05 else 0}",
            "llm.request.shape": "user",
            "annotation.doc_id": call,
        })  # fmt: skip


def span(
    trace_id: str,
    span_id: str,
    parent: str | None,
    name: str,
    kind: str,
    began: float,
    ended: float,
    attributes: dict[str, Any],
) -> dict[str, Any]:
    return {
        "trace_id": trace_id,
        "span_id": span_id,
        "parent_id": parent,
        "name": name,
        "start": int(began * SECOND),
        "end": int(ended * SECOND),
        "attributes": {"mlflow.traceRequestId": trace_id, "mlflow.spanType": kind, **attributes},
    }


def log(client: TracingClient, experiment_id: str, spans: list[dict[str, Any]]) -> None:
    client.log_spans(experiment_id, [entity(each) for each in spans])


def entity(each: dict[str, Any]) -> Span:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

    def context(span_id: str) -> SpanContext:
        number = int(each["trace_id"].removeprefix("tr-"), 16)
        return SpanContext(number, int(span_id, 16), False, TraceFlags(1))

    return Span(
        ReadableSpan(
            each["name"],
            context=context(each["span_id"]),
            parent=None if each["parent_id"] is None else context(each["parent_id"]),
            attributes={name: json.dumps(value) for name, value in each["attributes"].items()},
            start_time=each["start"],
            end_time=each["end"],
            status=Status(StatusCode.OK),
        )
    )


def trace_info(
    trace_id: str, experiment_id: str, metadata: dict[str, str], tags: dict[str, str]
) -> TraceInfo:
    return TraceInfo(
        trace_id=trace_id,
        trace_location=TraceLocation.from_experiment_id(experiment_id),
        request_time=int(time.time() * 1000),
        execution_duration=3_600_000,
        state=TraceState.OK,
        trace_metadata={
            # Else the store adds up all spans of the trace anew with each batch.
            "mlflow.trace.tokenUsage": json.dumps({"input_tokens": 1, "output_tokens": 1}),
            "mlflow.trace.cost": json.dumps({"total_cost": 1.0}),
            **metadata,
        },
        tags={"mlflow.traceName": "nightly", **tags},
    )


def store_sums(uri: str, experiment_id: str, number: int) -> None:
    numbers, sums = random.Random(number), CallSums()
    for _ in range(300):
        sums.add({"llm.answer.chars": 9}, numbers.lognormvariate(0, 0.5), failed=False)
    job = f"tr-{10**9 + number:032x}"
    summed = split_metadata(CALL_SUMS, json.dumps({**sums.to_dict(), "rows": 300}))
    info = trace_info(job, experiment_id, {TRACE_KEY: job, **summed}, {})
    TracingClient(uri).store.start_trace(info)


if __name__ == "__main__":
    main()
