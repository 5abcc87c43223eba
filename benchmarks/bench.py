"""What tracing costs, by this library and by what a user may pick instead, all in one run.

    make bench          # this part takes half an hour; writes docs/benchmarks
    make bench-quick    # less than three minutes; prints

The jobs of the contenders take turns, each in a Python worker of its own, against a real tracking
server, and an endpoint in a process of its own. What is said of a contender is the median of its
jobs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import mlflow
from contenders import (
    ARTICLE,
    CONTENDERS,
    OPENINFERENCE,
    OURS,
    OURS_PRELOADED,
    UNTRACED,
    Contender,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from traced_job import Job

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.delivery.spool import Destination
from mlflow_ctx_autolog.stores.sending import send
from mlflow_ctx_autolog.stores.tracking_store import span_record
from mlflow_ctx_autolog.testing import Collector, OpenAIEndpoint, Request, TrackingServer

HERE = Path(__file__).parent
# What the contenders call the span of a chat completion.
CALL_NAMES = ("Completions", "ChatCompletion", "openai.chat")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Size:
    """How much is measured: calls of each job by (latency in ms, threads), rounds, and so on."""

    calls: dict[tuple[int, int], int]
    rounds: int
    memory_calls: int
    growth: tuple[int, ...]
    growth_by_hand: int
    growth_rounds: int
    idle_runs: int


FULL = Size(
    {(0, 1): 300, (0, 16): 320, (50, 1): 40, (50, 16): 320, (500, 1): 5, (500, 16): 48},
    rounds=3,
    memory_calls=20_000,
    growth=(100, 1_000, 5_000, 20_000, 50_000),
    growth_by_hand=5_000,
    growth_rounds=12,
    idle_runs=7,
)
# Without memory, which so few calls say nothing of.
QUICK = Size(
    {(0, 1): 60},
    rounds=1,
    memory_calls=0,
    growth=(100, 1_000),
    growth_by_hand=1_000,
    growth_rounds=5,
    idle_runs=3,
)

Found = dict[str, Any]


def answer(request: Request) -> str:
    """Take the milliseconds that the model's name says, and answer."""
    time.sleep(int(request.model.removeprefix("wait-")) / 1000)
    return "The technician may enter the site at any time, the customer on weekdays."


def serve() -> None:
    """Be the endpoint until standard input ends."""
    with OpenAIEndpoint(answer) as endpoint:
        print(endpoint.base_url, flush=True)
        sys.stdin.read()


class Server:
    """The tracking server, and what it has used and stored."""

    def __init__(self, server: TrackingServer) -> None:
        self.uri = server.uri
        self._log = server.log
        self._database = server.directory / "mlflow.db"
        self._group = os.getpgid(server._process.pid)

    def used(self) -> Found:
        """Return the requests so far, the CPU time in seconds, and the database's bytes."""
        cpu = sum(
            (int(fields[11]) + int(fields[12])) / _TICKS
            for fields in _processes()
            if int(fields[2]) == self._group
        )
        (size,), (page,) = self._ask("PRAGMA page_count"), self._ask("PRAGMA page_size")
        requests = self._log.read_text(errors="replace").count(" HTTP/1.1")
        return {"requests": requests, "server_cpu": cpu, "bytes": size[0] * page[0]}

    def calls(self) -> dict[str, int]:
        """Return how many spans of calls each trace has, by its id."""
        names = ", ".join(map(repr, CALL_NAMES))
        counted = f"SELECT trace_id, count(*) FROM spans WHERE name IN ({names}) GROUP BY trace_id"
        return dict(self._ask(counted))

    def _ask(self, statement: str) -> list[Any]:
        with contextlib.closing(sqlite3.connect(self._database, timeout=60)) as database:
            return database.execute(statement).fetchall()


def _processes() -> Iterator[list[str]]:
    """Yield the fields of /proc/*/stat from the state on."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            yield path.read_text().rpartition(")")[2].split()


class Bench:
    """The processes that a run needs, and the jobs that they run."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self.server = Server(stack.enter_context(TrackingServer()))
        self._collector = stack.enter_context(Collector())
        # Else a worker would deliver what other jobs of this host have left, and be measured so.
        self._spools = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-spools-"))
        self._endpoint = self._start("-c", "import bench; bench.serve()")
        self._url = self._endpoint.stdout.readline().strip()
        self._drivers: dict[str, subprocess.Popen[str]] = {}

    def _start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env={
                **os.environ,
                "PYSPARK_PYTHON": sys.executable,
                "PYTHONPATH": str(HERE),
                "MLFLOW_CTX_AUTOLOG_SPOOL_DIRECTORY": self._spools,
                **environment,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._stack.callback(process.communicate)
        return process

    def _driver(self, contender: Contender) -> subprocess.Popen[str]:
        key = contender.environment
        if key not in self._drivers:
            exported = {
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{self._collector.uri}/v1/traces",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            }
            program = str(HERE / "traced_job.py")
            self._drivers[key] = self._start(
                *(program, contender.daemon, self.server.uri, self._url),
                **(exported if contender.to_collector else {}),
            )
            assert self._drivers[key].stdout.readline() == "ready\n"
        return self._drivers[key]

    def run(self, job: Job) -> Found:
        """Run a job; return what it, the worker and the server measured, and what was stored."""
        contender = CONTENDERS[job.contender]
        driver = self._driver(contender)
        stored, before, arrived = self.server.calls(), self.server.used(), self._arrived()
        driver.stdin.write(json.dumps(asdict(job)) + "\n")
        driver.stdin.flush()
        found: Found = json.loads(driver.stdout.readline())
        after = self.server.used()
        found.update({name: after[name] - before[name] for name in after})
        by_trace = self.server.calls()
        # The first call of each job is not timed, but traced as well.
        found["made"] = job.calls + 1
        found["stored"] = sum(by_trace.values()) - sum(stored.values())
        found["below"] = by_trace.get(found["trace_id"], 0)
        if contender.to_collector:
            found["stored"] = found["below"] = self._arrived() - arrived
        return found

    def _arrived(self) -> int:
        return sum(
            span.name in CALL_NAMES
            for message in self._collector.messages
            for resource in ExportTraceServiceRequest.FromString(message).resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        )


def is_installed(contender: Contender) -> bool:
    try:
        return not contender.package or bool(version(contender.package))
    except PackageNotFoundError:
        return False


def measure_calls(bench: Bench, size: Size) -> dict[tuple[int, int], dict[str, Found]]:
    """Run the jobs, round by round; return medians by (latency, threads) and contender."""
    found: dict[Any, dict[str, list[Found]]] = defaultdict(lambda: defaultdict(list))
    names = [name for name, contender in CONTENDERS.items() if is_installed(contender)]
    for _ in range(size.rounds):
        for (latency, threads), calls in size.calls.items():
            for name in names:
                measured = bench.run(Job(name, calls, threads, latency))
                found[latency, threads][name].append(measured)
                say(f"{latency} ms, {threads} threads, {name}: {measured}")
    return {
        key: {name: medians(jobs) for name, jobs in jobs.items()} for key, jobs in found.items()
    }


def medians(jobs: list[Found]) -> Found:
    """Return the median of each number that was measured."""
    names = [name for name, value in jobs[0].items() if not isinstance(value, str)]
    return {name: median(job[name] for job in jobs) for name in names}


def measure_memory(bench: Bench, size: Size) -> dict[str, Found]:
    """Return what one job of many calls with prompts of 2 kB gained in memory."""
    found = {}
    for name in (UNTRACED, OPENINFERENCE, OURS, "ours, driver"):
        if size.memory_calls and is_installed(CONTENDERS[name]):
            found[name] = bench.run(Job(name, size.memory_calls, prompt=2_000))
            say(f"memory, {name}: {found[name]}")
    return found


class Growing:
    """A trace on the server that grows."""

    def __init__(self, server: Server, announced: bool, size: int) -> None:
        self._server = server
        self._destination = Destination(server.uri, mlflow.set_experiment("growth").experiment_id)
        self._root = mlflow.start_span_no_context("growing")
        if announced:
            with mlflow.tracing.provider.safe_set_span_in_context(self._root):
                ctx_autolog.capture()
            ctx_autolog.flush()
        for stored in range(0, size, 100):
            self._send_of(min(100, size - stored), 1)

    def cost(self, batch: int, batches: int) -> tuple[float, float]:
        """Store some more spans; return what one took in ms: wall time, and CPU of the server."""
        cpu, spans = self._server.used()["server_cpu"], batch * batches
        wall = self._send_of(batch, batches)
        cpu = self._server.used()["server_cpu"] - cpu
        return wall * 1000 / spans, cpu * 1000 / spans

    def _send_of(self, batch: int, batches: int) -> float:
        """Send batches of new spans; return the seconds that sending took."""
        prepared = [[span_record(self._span()) for _ in range(batch)] for _ in range(batches)]
        began = time.perf_counter()
        for records in prepared:
            send(self._destination, records)
        return time.perf_counter() - began

    def _span(self) -> Any:
        span = mlflow.start_span_no_context("call", "CHAT_MODEL", parent_span=self._root)
        usage = {"input_tokens": 70, "output_tokens": 12, "total_tokens": 82}
        span.set_attribute("mlflow.chat.tokenUsage", usage)
        span.set_inputs({"messages": [{"role": "user", "content": "clause " * 70}]})
        return span


def measure_growth(server: Server, size: Size) -> list[Found]:
    """Return what a span costs by the size of its trace: ours in batches, by hand one by one."""
    mlflow.set_tracking_uri(server.uri)
    # Announced, and not: without, the store adds up the whole trace at each request.
    ways = {"ours": (True, 100, 1), "by hand": (False, 1, 5)}
    traces = {
        (spans, way): Growing(server, announced, spans)
        for spans in size.growth
        for way, (announced, _, _) in ways.items()
        if way == "ours" or spans <= size.growth_by_hand
    }
    costs: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    # In turns, as a machine is faster at one time than at another.
    for _ in range(size.growth_rounds):
        for (spans, way), trace in traces.items():
            costs[spans, way].append(trace.cost(*ways[way][1:]))
    rows = []
    for spans in size.growth:
        row: Found = {"spans": spans}
        for way in ways:
            if measured := costs.get((spans, way)):
                row[way] = tuple(median(column) for column in zip(*measured, strict=True))
        rows.append(row)
        say(f"growth: {row}")
    return rows


def measure_idle(runs: int) -> Found:
    """Return milliseconds of a bare interpreter, of our import, and of `enable` after it."""
    programs = {
        "import": "import time, sys; b = time.perf_counter(); import mlflow_ctx_autolog; "
        "e = time.perf_counter(); "
        "assert not {'mlflow', 'pyspark', 'openai'} & set(sys.modules); print(e - b)",
        "enable": "import time, mlflow; import mlflow_ctx_autolog as c; "
        "mlflow.set_tracking_uri('sqlite:////nonexistent/idle.db'); b = time.perf_counter(); "
        "c.enable(); print(time.perf_counter() - b)",
    }
    return {
        name: median(
            float(
                subprocess.run(
                    [sys.executable, "-c", program],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    check=True,
                    cwd="/",
                ).stdout
            )
            * 1000
            for _ in range(runs)
        )
        for name, program in programs.items()
    }


def page(found: Found) -> str:
    """Return the results as a page in Markdown."""
    calls = found["calls"]
    lines = [
        "# Benchmarks",
        "",
        found["machine"],
        "",
        "![The results as a plot](benchmarks.svg)",
        "",
    ]
    lines += ["## Each call, and the start of a worker", ""]
    lines += [
        "What tracing adds to no tracing, for each call: CPU of the worker process until it is "
        "gone, and wall time until the job's action returns, each with what happens at the task's "
        "end. The start is from the action to a fresh worker's first call. Medians.",
        "",
    ]
    for (latency, threads), rows in calls.items():
        plain, article = rows[UNTRACED], rows.get(ARTICLE)
        of = _threads(threads)
        lines += [f"### {latency} ms latency, {of}", ""]
        lines += _table(
            "contender",
            "worker CPU, ms",
            "CPU added, ms",
            "wall, ms",
            "wall added, ms",
            "ratio to no tracing",
            "of what the article's adds",
            "start, s",
            "start added, s",
            "calls kept",
            "below the driver's span",
        )
        for name in CONTENDERS:
            if name not in rows:
                lines += [f"| {name} | {CONTENDERS[name].package} is not installed |" + " |" * 9]
                continue
            row = rows[name]
            wall = (row["wall"] - plain["wall"]) * 1000
            of_article = wall / ((article["wall"] - plain["wall"]) * 1000)
            traced = name != UNTRACED
            cells = [
                name,
                f"{row['cpu'] * 1000:.2f}",
                f"{(row['cpu'] - plain['cpu']) * 1000:+.2f}" if traced else "",
                f"{row['wall'] * 1000:.2f}",
                f"{wall:+.2f}" if traced else "",
                f"{row['wall'] / plain['wall']:.3f}",
                _share(of_article) if traced else "",
                f"{row['start']:.2f}",
                f"{row['start'] - plain['start']:+.2f}" if traced else "",
                f"{row['stored']:.0f}/{row['made']:.0f}" if traced else "",
                f"{row['below']:.0f}/{row['made']:.0f}" if traced else "",
            ]
            lines += ["| " + " | ".join(cells) + " |"]
        lines += [""]
    lines += ["## The server, for 1,000 calls", ""]
    lines += ["At 0 ms latency, 1 thread. What goes to a collector does not reach the server.", ""]
    lines += _table("contender", "requests", "CPU, s", "database, MB")
    for name, row in calls[0, 1].items():
        if name == UNTRACED:
            continue
        scale = 1000 / row["made"]
        lines += [
            f"| {name} | {row['requests'] * scale:,.0f} | {row['server_cpu'] * scale:.2f} "
            f"| {row['bytes'] * scale / 1e6:.2f} |"
        ]
    if rows := found["memory"]:
        many = next(iter(rows.values()))["made"] - 1
        lines += ["", "## Memory", ""]
        lines += [
            f"One partition of {many:,} calls with prompts of 2 kB: what the process has gained "
            "at its peak, the worker since its first call, the driver since the job began.",
            "",
        ]
        lines += _table("contender", "worker, MB", "driver, MB", "calls kept")
        for name, row in rows.items():
            kept = "" if name == UNTRACED else f"{row['stored']:,}/{row['made']:,}"
            gained = f"{row['megabytes']:.1f} | {row['driver_megabytes']:.1f}"
            lines += [f"| {name} | {gained} | {kept} |"]
    lines += ["", "## Growth of a trace", ""]
    lines += [
        "What it takes to store one more span in a trace of so many, at the client and as CPU of "
        "the server: ours in batches of 100 to a trace that was announced; headers by hand in a "
        "request for each span. A trace of each size, which take turns and grow on by "
        f"{100 * found['growth_rounds']:,} spans in all meanwhile; medians.",
        "",
    ]
    lines += _table(
        "spans", "ours, ms", "ratio", "server CPU, ms", "by hand, ms", "ratio", "server CPU, ms"
    )
    first = found["growth"][0]
    for row in found["growth"]:
        cells = [f"{row['spans']:,}"]
        for name in ("ours", "by hand"):
            if name in row:
                wall, cpu = row[name]
                cells += [f"{wall:.2f}", f"{wall / first[name][0]:.2f}", f"{cpu:.2f}"]
            else:
                cells += ["not measured", "", ""]
        lines += ["| " + " | ".join(cells) + " |"]
    idle = found["idle"]
    lines += ["", "## Idle", ""]
    lines += [
        f"`import mlflow_ctx_autolog` takes {idle['import']:.0f} ms and imports neither mlflow, "
        f"pyspark nor openai. `enable()` without Spark and without a call, mlflow imported, takes "
        f"{idle['enable']:.0f} ms.",
        "",
        *goals(found),
    ]
    return "\n".join(lines) + "\n"


def goals(found: Found) -> list[str]:
    """Return what was aimed at, beside what came out."""
    calls, growth, idle = found["calls"], found["growth"], found["idle"]
    at_0 = calls[0, 1]
    plain = at_0[UNTRACED]

    def added(name: str, what: str) -> float:
        return float(at_0[name][what] - plain[what])

    rows = []
    if OPENINFERENCE in at_0:
        ratio = added(OURS, "cpu") / added(OPENINFERENCE, "cpu")
        what = "worker CPU added, of OpenInference's, 0 ms, 1 thread"
        rows += [(what, "≤ 0.5", ratio, ratio <= 0.5, "cpu")]
    for name in (OURS, OURS_PRELOADED):
        goal = 80
        ratio = added(ARTICLE, "wall") / added(name, "wall")
        met = ratio >= goal or ratio < 0
        what = f"wall the article's pattern adds, to {name}, 0 ms"
        rows += [(what, f"≥ {goal}", ratio, met, "cpu")]
    for (latency, threads), row in calls.items():
        if latency == 50:
            ratio = row[OURS]["wall"] / row[UNTRACED]["wall"]
            what = f"wall to no tracing, 50 ms, {_threads(threads)}"
            most = 1.01 if threads == 1 else 1.03
            rows += [(what, f"≤ {most}", ratio, ratio <= most, "wall-time-at-50-ms")]
    ratio = growth[-1]["ours"][0] / growth[0]["ours"][0]
    what = f"a span at {growth[-1]['spans']:,}, to one at 100"
    rows += [(what, "≤ 1.2", ratio, ratio <= 1.2, "")]
    for name, goal in ((OURS, 0.1), (OURS_PRELOADED, 0.05)):
        more = median(row[name]["start"] - row[UNTRACED]["start"] for row in calls.values())
        what = f"worker start added by {name}, s"
        rows += [(what, f"≤ {goal}", more, more <= goal, "the-start-of-a-worker")]
    rows += [("import, ms", "< 50", idle["import"], idle["import"] < 50, "")]
    lines = ["## Goals", "", *_table("what", "goal", "measured", "met")]
    for what, goal, value, met, why in rows:
        reason = f", [why](limits.md#{why})" if why else ""
        lines += [f"| {what} | {goal} | {value:.3g} | {'yes' if met else '**no**' + reason} |"]
    return lines


def plot(found: Found, path: Path) -> None:
    """Draw CPU and wall time that each contender adds at 0 ms, and the start of a worker."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks"
    import matplotlib.pyplot as plt

    rows = found["calls"][0, 1]
    plain = rows[UNTRACED]
    names = [name for name in rows if name != UNTRACED][::-1]
    colors = ["#c2410c" if name.startswith("ours") else "#64748b" for name in names]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True, layout="constrained")
    for axis, what, factor, title in (
        (axes[0], "cpu", 1000, "worker CPU added to a call, ms"),
        (axes[1], "wall", 1000, "wall time added to a call, ms"),
        (axes[2], "start", 1, "added to a worker's start, s"),
    ):
        values = [(rows[name][what] - plain[what]) * factor for name in names]
        bars = axis.barh(names, values, color=colors)
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.set_title(title)
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def _threads(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def _share(ratio: float) -> str:
    return f"1/{1 / ratio:.0f}" if 0 < ratio < 0.5 else f"{ratio:.2f}"


def _table(*columns: str) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]


def machine(size: Size) -> str:
    """Say where and with what it was measured."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    models = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if "model name" in line]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ["mlflow", "pyspark", "openai", "opentelemetry-sdk"]
    packages += [c.package for c in CONTENDERS.values() if c.package and is_installed(c)]
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    jobs = ", ".join(
        f"{calls} calls ({latency} ms, {_threads(threads)})"
        for (latency, threads), calls in size.calls.items()
    )
    return (
        f"{os.cpu_count()} cores ({models[0] if models else platform.machine()}), "
        f"{memory:.0f} GiB, load {os.getloadavg()[0]:.1f} before it began; "
        f"Python {platform.python_version()}, {versions}. {size.rounds} "
        f"round{'s' * (size.rounds != 1)} of jobs of "
        f"{jobs}; local[1], an MLflow server on SQLite, all on this machine."
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few jobs, in three minutes")
    parser.add_argument("--rounds", type=int, help="of the jobs")
    parser.add_argument("--write", type=Path, help="a folder for the page and the plot")
    given = parser.parse_args()
    # So that a run that is ended leaves no servers behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    size = QUICK if given.quick else FULL
    size = replace(size, rounds=given.rounds or size.rounds)
    found: Found = {"machine": machine(size), "idle": measure_idle(size.idle_runs)}
    found["growth_rounds"] = size.growth_rounds
    with contextlib.ExitStack() as stack:
        bench = Bench(stack)
        found["calls"] = measure_calls(bench, size)
        found["memory"] = measure_memory(bench, size)
        found["growth"] = measure_growth(bench.server, size)
    print(page(found))
    if given.write:
        given.write.mkdir(parents=True, exist_ok=True)
        (given.write / "README.md").write_text(page(found))
        plot(found, given.write / "benchmarks.svg")


if __name__ == "__main__":
    main()
