"""What faults cost: spans lost, calls and jobs delayed, and what the user is told.

    make faults
    python benchmarks/faults.py --rows kill-worker,hang
    python benchmarks/faults.py --write docs/faults.md
    python benchmarks/faults.py --rows hang --write docs/faults.md

Each row runs the job of `fault_job.py` in a driver process of its own, once untraced and once
traced, against a real tracking server behind a proxy that fails on command.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
from fault_job import CALLS, CALLS_IN_EACH, PARTITIONS, WARM_UP, Job
from standalone import standalone_cluster

from mlflow_ctx_autolog.testing import (
    OpenAIEndpoint,
    Request,
    Slow,
    Status,
    TrackingServer,
    UnreliableProxy,
)

LATENCY = 0.1
MASTER = "local[2,3]"
EARLY = CALLS // 8
JOB_TIMEOUT, EXIT_TIMEOUT = 100.0, 60.0
TINY = "128K"
CONF = {
    "spark.driver.host": "127.0.0.1",
    "spark.executor.memory": "512m",
    # Several batches a partition, so that it can be closed between them.
    "spark.sql.execution.arrow.maxRecordsPerBatch": "20",
}
SPECULATION = {
    "spark.speculation": "true",
    "spark.speculation.interval": "100ms",
    "spark.speculation.quantile": "0.5",
}

# Every Python process of the job writes what the library tells its user to one file, whether it
# is logged or warned of.
LISTENER = """
import json, logging, os

class Told(logging.FileHandler):
    def format(self, record):
        return json.dumps([os.getpid(), record.getMessage()])

told = Told(os.environ["FAULTS_TOLD"], delay=True)
told.setLevel(logging.WARNING)
logging.captureWarnings(True)
for name in ("mlflow_ctx_autolog", "py.warnings"):
    logging.getLogger(name).addHandler(told)
"""


class NotPossible(Exception):  # noqa: N818
    """This machine does not permit what a row needs."""


@dataclass(frozen=True)
class Row:
    name: str
    fault: str
    script: Callable[[TracedRun], None]
    trouble: str = "none"
    action: str = "collect"
    cluster: bool = False
    conf: dict[str, str] = field(default_factory=dict)
    width: int = 0
    tiny_disk: bool = False

    @property
    def untraced(self) -> tuple[str, str, bool, str]:
        """What this row's job has in common with others when it is not traced."""
        return self.trouble, self.action, self.cluster, json.dumps(self.conf)


@dataclass
class Outcome:
    """What one run of the job came to."""

    answered: set[str] = field(default_factory=set)
    """The calls that the endpoint answered, by the first line of their prompts."""
    delays: dict[str, float] = field(default_factory=dict)
    """Seconds that each call took, for those that returned to the job's function."""
    seconds: float | None = None
    error: str | None = None
    receipt_seconds: float = 0.0
    exit_seconds: float = 0.0
    stored: list[str] = field(default_factory=list)
    """The same for the call spans in the store."""
    notes: list[str] = field(default_factory=list)
    told: list[tuple[str, str]] = field(default_factory=list)
    """Who told what."""

    def delay(self, share: float) -> float:
        """Return a quantile of the calls' times, in milliseconds."""
        ordered = sorted(self.delays.values())
        return ordered[math.ceil(share * len(ordered)) - 1] * 1000


class Run:
    """One driver process with its endpoint."""

    def __init__(self, row: Row, folder: Path, master: str) -> None:
        self.row = row
        self.outcome = Outcome()
        self._folder = folder
        self._master = master
        self._changed = threading.Condition()
        self._events: dict[str, dict[str, Any]] = {}
        self._driver: subprocess.Popen[str] | None = None
        self._endpoint = OpenAIEndpoint(self._answer, LATENCY)
        (folder / "listener").mkdir()
        (folder / "listener" / "sitecustomize.py").write_text(LISTENER)
        (folder / "calls").mkdir()

    def close(self) -> None:
        if self._driver is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._driver.pid, signal.SIGKILL)
            self._driver.wait()
        self._endpoint.close()

    def start_driver(self) -> None:
        """Start the driver and its workers, and wait until all is ready for the job."""
        path = [str(self._folder / "listener"), *filter(None, [os.environ.get("PYTHONPATH")])]
        told = {"FAULTS_TOLD": str(self._folder / "told"), "PYTHONPATH": os.pathsep.join(path)}
        executors = {f"spark.executorEnv.{name}": value for name, value in told.items()}
        job = Job(
            url=self._endpoint.base_url,
            folder=str(self._folder / "calls"),
            master=self._master,
            conf={**CONF, **executors, **self.row.conf},
            trouble=self.row.trouble,
            action=self.row.action,
            width=self.row.width,
            **self._tracing(),
        )
        script = str(Path(__file__).with_name("fault_job.py"))
        with (self._folder / "stderr").open("wb") as errors:
            self._driver = subprocess.Popen(
                [*self._wrapper(), sys.executable, script, json.dumps(asdict(job))],
                env={
                    **os.environ,
                    **told,
                    "PYSPARK_PYTHON": sys.executable,
                    "SPARK_LOCAL_IP": "127.0.0.1",
                },
                cwd=self._folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        threading.Thread(target=self._listen, args=[self._driver.stdout], daemon=True).start()
        self._wait_for("ready", JOB_TIMEOUT)

    def start_job(self) -> None:
        """Let the driver begin, and wait until it has turned tracing on."""
        self._go_on()
        self._wait_for("started", JOB_TIMEOUT)

    def wait_for_calls(self, count: int) -> None:
        """Wait until so many calls have been answered and the job goes on."""
        with self._changed:
            self._changed.wait_for(
                lambda: len(self.outcome.answered) >= count or "done" in self._events, JOB_TIMEOUT
            )
        self.must_go_on()

    def must_go_on(self) -> None:
        if "done" in self._events:
            raise RuntimeError("The job was done before the fault was over.")

    def wait_until_done(self) -> None:
        """Wait until the job's action is done, and the driver's span ended."""
        done = self._wait_for("done", JOB_TIMEOUT)
        self.outcome.seconds, self.outcome.error = done["seconds"], done["error"]

    def let_driver_end(self) -> None:
        """Let the driver go on after the action, and wait until it has ended."""
        assert self._driver is not None
        asked = time.perf_counter()
        self._go_on()
        self._wait_for("ending", EXIT_TIMEOUT)
        started = time.perf_counter()
        self.outcome.receipt_seconds = started - asked
        try:
            self._driver.wait(EXIT_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._driver.kill()
            self.outcome.notes.append(f"the driver, not ended after {EXIT_TIMEOUT:g} s, was killed")
        self.outcome.exit_seconds = time.perf_counter() - started

    def finish(self) -> None:
        """Do nothing more than to wait for the end."""
        self.wait_until_done()
        self.let_driver_end()

    def kill_driver(self) -> None:
        """Kill the driver, and wait until the processes that it started have ended."""
        assert self._driver is not None
        self._driver.kill()
        self._driver.wait()
        deadline = time.monotonic() + EXIT_TIMEOUT
        command = ["ps", "-o", "stat=", "-s", str(self._driver.pid)]
        while time.monotonic() < deadline:
            states = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            if all(state.startswith("Z") for state in states.split()):
                return
            time.sleep(0.1)
        self.outcome.notes.append("processes of the job outlived the driver")

    def measure(self) -> Outcome:
        """Read what the driver and its workers have left."""
        for file in (self._folder / "calls").iterdir():
            for line in file.read_text().splitlines():
                seconds, _, key = line.partition("\t")
                self.outcome.delays[key] = float(seconds)
        return self.outcome

    def _tracing(self) -> dict[str, Any]:
        return {"tracking_uri": None, "experiment_id": "", "settings": {}}

    def _wrapper(self) -> list[str]:
        """Return what goes before the driver's command."""
        return []

    def _go_on(self) -> None:
        assert self._driver is not None
        assert self._driver.stdin is not None
        self._driver.stdin.write("\n")
        self._driver.stdin.flush()

    def _answer(self, request: Request) -> str:
        key = request.prompt.partition("\n")[0]
        if key != WARM_UP:
            with self._changed:
                self.outcome.answered.add(key)
                self._changed.notify_all()
        return "The licensee may read the data."

    def _listen(self, lines: Iterator[str]) -> None:
        for line in lines:
            if line.startswith('{"event"'):  # Else it is the output of show().
                event = json.loads(line)
                with self._changed:
                    self._events[event.pop("event")] = event
                    self._changed.notify_all()
        with self._changed:
            self._events["ended"] = {}
            self._changed.notify_all()

    def _wait_for(self, event: str, timeout: float) -> dict[str, Any]:
        with self._changed:
            self._changed.wait_for(lambda: {event, "ended"} & self._events.keys(), timeout)
            if event in self._events:
                return self._events[event]
        errors = (self._folder / "stderr").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"The driver did not get as far as {event!r}:\n{errors}")


class TracedRun(Run):
    """One driver process with its endpoint, tracking server and proxy, and what befalls them."""

    def __init__(self, row: Row, folder: Path, master: str, server: TrackingServer) -> None:
        super().__init__(row, folder, master)
        self.proxy = UnreliableProxy(server.uri)
        self._server = server
        self._spool = folder / "spool"
        self._spool.mkdir(mode=0o700)
        mlflow.set_tracking_uri(server.uri)
        self._experiment_id = mlflow.create_experiment("faults")

    def close(self) -> None:
        super().close()
        self.proxy.close()

    def kill_server(self) -> None:
        """End the tracking server as a crash does: connections break, and nobody listens."""
        self.proxy.mode = "refuse"
        self._server.kill()

    def start_server(self) -> None:
        self._server.start()
        self.proxy.mode = "pass"

    def recover(self) -> None:
        """Send what the job has left on disk, as a user would."""
        before = len(self._stored())
        command = os.path.join(sysconfig.get_path("scripts"), "mlflow-ctx-autolog")
        done = subprocess.run(
            [command, "recover", str(self._spool)],
            capture_output=True,
            text=True,
            timeout=EXIT_TIMEOUT,
            check=False,
        )
        lines = (done.stdout + done.stderr).splitlines()
        said = [re.sub(r"SPOOL/\S+: ", "", self._without_places(line)) for line in lines]
        self.outcome.told.append(("recover", "; ".join(said) or "nothing"))
        if done.returncode:
            self.outcome.notes.append(f"recover ended with status {done.returncode}")
        self.outcome.notes.append(f"{before:,} before `recover`")

    def measure(self) -> Outcome:
        super().measure()
        self.outcome.stored = self._stored(look_at_roots=True)
        self.outcome.told[:0] = self._told()
        return self.outcome

    def _tracing(self) -> dict[str, Any]:
        return {
            "tracking_uri": self.proxy.uri,
            "experiment_id": self._experiment_id,
            "settings": {"spool_directory": str(self._spool)},
        }

    def _wrapper(self) -> list[str]:
        if not self.row.tiny_disk:
            return []
        # In a namespace of the driver's own, a file system can be mounted without being root.
        namespace = ["unshare", "--mount", "--map-root-user"]
        try:
            subprocess.run([*namespace, "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise NotPossible("needs the right to mount a file system") from error
        mount = f'mount -t tmpfs -o size={TINY} tmpfs "$0" && exec "$@"'
        return [*namespace, "sh", "-c", mount, str(self._spool)]

    def _stored(self, look_at_roots: bool = False) -> list[str]:
        """Ask the server itself, without the proxy, for the call spans that it has."""
        traces = mlflow.search_traces(
            locations=[self._experiment_id], return_type="list", max_results=10 * CALLS
        )
        spans = [span for trace in traces for span in trace.data.spans]
        if look_at_roots:
            if len(traces) > 1:
                self.outcome.notes.append(f"in {len(traces)} traces")
            if not any(span.name == "job" and span.parent_id is None for span in spans):
                self.outcome.notes.append("without the driver's span")
        calls = [span for span in spans if span.span_type == "CHAT_MODEL"]
        prompts = [span.inputs["messages"][-1]["content"] for span in calls]
        return [prompt.partition("\n")[0] for prompt in prompts]

    def _told(self) -> list[tuple[str, str]]:
        """Return what the library has said, alike messages of several workers as one."""
        assert self._driver is not None
        tellers: defaultdict[str, set[int]] = defaultdict(set)
        wording: dict[str, str] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in (self._folder / "told").read_text().splitlines():
                pid, message = json.loads(line)
                if ": CtxAutologWarning: " in message:
                    message = message.partition(": CtxAutologWarning: ")[2].splitlines()[0]
                elif re.match(r"\S+:\d+: \w*Warning: ", message):
                    continue  # A warning of another library.
                who = "driver" if pid == self._driver.pid else "worker"
                kind = who + re.sub(r"[\d.,]+", "", message)
                tellers[kind].add(pid)
                wording.setdefault(kind, message)
        told = []
        for kind, message in wording.items():
            who, count = kind[:6], len(tellers[kind])
            told.append((who if count == 1 else f"{count} {who}s", self._without_places(message)))
        if receipt := self._events.get("receipt"):
            told.append(("receipt", self._without_places(receipt["text"])))
        return told

    def _without_places(self, message: str) -> str:
        for place, name in (
            (self.proxy.uri, "http://server"),
            (str(self._spool), "SPOOL"),
            (str(self._folder), "FOLDER"),
        ):
            message = message.replace(place, name)
        return message


def undisturbed(run: TracedRun) -> None:
    run.start_job()
    run.finish()


def undisturbed_then_recovered(run: TracedRun) -> None:
    undisturbed(run)
    run.recover()


def down_from_the_start(run: TracedRun) -> None:
    run.kill_server()
    run.start_job()
    run.finish()
    run.start_server()
    run.recover()


def dies_and_returns(run: TracedRun) -> None:
    run.start_job()
    run.wait_for_calls(EARLY)
    run.kill_server()
    run.start_server()
    run.must_go_on()
    run.finish()


def dies_for_good(run: TracedRun) -> None:
    run.start_job()
    run.wait_for_calls(EARLY)
    run.kill_server()
    run.finish()
    run.start_server()
    run.recover()


def throughout(mode: Any) -> Callable[[TracedRun], None]:
    """Return a row's script: a fault that lasts as long as the job, but not as the driver."""

    def script(run: TracedRun) -> None:
        run.proxy.mode = mode
        run.start_job()
        run.wait_until_done()
        run.proxy.mode = "pass"
        run.let_driver_end()

    return script


def refuses_until_recovered(run: TracedRun) -> None:
    run.proxy.mode = Status(413)
    run.start_job()
    run.finish()
    run.proxy.mode = "pass"
    run.recover()


def slow_to_the_end(run: TracedRun) -> None:
    run.proxy.mode = Slow(5)
    undisturbed(run)


def dies_and_returns_after_the_job(run: TracedRun) -> None:
    run.start_job()
    run.wait_for_calls(EARLY)
    run.kill_server()
    run.wait_until_done()
    run.start_server()
    run.let_driver_end()


def driver_killed(run: TracedRun) -> None:
    run.start_job()
    run.wait_for_calls(CALLS // 2 + CALLS_IN_EACH // 2)
    run.kill_driver()
    run.recover()


MENDED = "from `enable()` on; mended before the driver exits"
ROWS = [
    Row("up", "none: server up", undisturbed),
    Row(
        "down",
        "server down from `enable()` on; back after the driver has exited, then `recover`",
        down_from_the_start,
    ),
    Row("outage", "server dies early in the job, and returns during it", dies_and_returns),
    Row(
        "dies",
        "server dies early in the job; back after the driver has exited, then `recover`",
        dies_for_good,
    ),
    Row("500", f"server answers 500 {MENDED}", throughout(Status(500))),
    Row(
        "429",
        f"server answers 429 with `Retry-After: 2` {MENDED}",
        throughout(Status(429, {"Retry-After": "2"})),
    ),
    Row("401", f"server answers 401 {MENDED}", throughout(Status(401))),
    Row("403", f"server answers 403 {MENDED}", throughout(Status(403))),
    Row(
        "redirect",
        f"server redirects elsewhere {MENDED}",
        throughout(Status(307, {"Location": "http://127.0.0.1:9/"})),
    ),
    Row(
        "413",
        "server refuses all spans (413) from `enable()` on; mended after the driver has exited, "
        "then `recover`",
        refuses_until_recovered,
    ),
    Row("hang", f"server accepts and never answers {MENDED}", throughout("hang")),
    Row("slow", "server answers after 5 s, from `enable()` to the end", slow_to_the_end),
    Row("garbage", f"server answers 200 with garbage {MENDED}", throughout("garbage")),
    Row(
        "disk",
        f"the spool's disk is full (a tmpfs of {TINY}iB); server up",
        undisturbed,
        tiny_disk=True,
    ),
    Row(
        "disk-outage",
        "the spool's disk is full, and the server dies early in the job; "
        "back before the driver exits",
        dies_and_returns_after_the_job,
        tiny_disk=True,
    ),
    Row(
        "kill-worker",
        "a Python worker is killed (SIGKILL) in the middle of a task; then `recover`",
        undisturbed_then_recovered,
        trouble="kill worker",
    ),
    Row(
        "kill-executor",
        "an executor's JVM is killed (SIGKILL) in the middle of a task; then `recover`",
        undisturbed_then_recovered,
        trouble="kill executor",
        cluster=True,
    ),
    Row("retry", "a task fails in the middle and is retried", undisturbed, trouble="fail once"),
    Row(
        "speculation",
        "a straggler has a speculative copy, and is ended by Spark; then `recover`",
        undisturbed_then_recovered,
        trouble="straggle",
        cluster=True,
        conf=SPECULATION,
    ),
    Row(
        "raise",
        "the user's function raises, the job fails, and Spark ends the worker of the task beside "
        "it; then `recover`",
        undisturbed_then_recovered,
        trouble="raise",
    ),
    Row(
        "show",
        "`show(1)` on a plan of many partitions: the last tasks are closed early",
        undisturbed,
        action="show",
        width=200_000,
    ),
    Row(
        "no-reuse",
        "none, but each task has a worker process of its own (`spark.python.worker.reuse=false`)",
        undisturbed,
        conf={"spark.python.worker.reuse": "false"},
    ),
    Row("stop", "`spark.stop()` right after the action", undisturbed, action="collect and stop"),
    Row(
        "kill-driver",
        "the driver is killed (SIGKILL) in the middle of the job; then `recover`",
        driver_killed,
    ),
]

HEADER = """\
| fault | made | stored in the end | lost | longest call delay added (ms) | job time vs untraced \
| what the user was told |
|---|---|---|---|---|---|---|"""

DOCUMENT = f"""\
# What faults cost

Written by `make faults`, which measured it with {{versions}} on {{cores}} cores. Each row is a
Spark job in a driver process of its own: {CALLS} OpenAI calls in {PARTITIONS} partitions of
{CALLS_IN_EACH}, one after the other, to an endpoint on the same machine that takes
{LATENCY * 1000:g} ms. It runs once untraced and once traced, with default settings, against a real
MLflow server behind a proxy that fails on command: on `{MASTER}`, and where executors matter on a
standalone cluster of two executors with one core each.

- **made**: the calls that the endpoint answered, those of failed and repeated attempts included.
- **stored in the end**: the call spans that the server has after the driver has exited, and after
  `mlflow-ctx-autolog recover` where the row says so. Call by call, not only in number: a span
  counts as that of the call whose prompt it has.
- **lost**: calls made without a span in the store. Calls *cut off* are those whose process was
  killed before the answer got back to the function; there was nothing yet to store.
- **longest call delay added**: the longest time that `chat.completions.create` took in the worker,
  minus the longest in the untraced run; in brackets the same for the 99th percentile. Two single
  calls are compared, either of which may have waited for something else on this machine:
  [call-delays.md](call-delays.md) has the same over several runs.
- **job time vs untraced**: from the action's start to the end of the driver's span, by the same of
  the untraced run. Workers have imported `openai` and MLflow before, which takes each two seconds.
- `receipt()` waits for what is on its way, `flush_timeout` (10 s) at most; *exit held up* is what
  the exit of the driver took longer than untraced, after that.
- **what the user was told**: the library's warnings, shortened, and its receipt.

{{table}}
"""


def table_row(row: Row, traced: Outcome, untraced: Outcome) -> str:
    """Return a row's line of the table."""
    lost = traced.answered - set(traced.stored)
    cut_off = len(lost - traced.delays.keys())
    notes = list(traced.notes)
    if twice := len(traced.stored) - len(set(traced.stored)):
        notes.append(f"{twice:,} twice")
    if unanswered := len(set(traced.stored) - traced.answered):
        notes.append(f"{unanswered:,} of them unanswered")
    if traced.receipt_seconds > 5:
        notes.append(f"`receipt()` waited {traced.receipt_seconds:.0f} s for the store")
    held_up = traced.exit_seconds - untraced.exit_seconds
    if held_up > 5:
        notes.append(f"exit held up by {held_up:.0f} s")
    longest, p99 = (traced.delay(share) - untraced.delay(share) for share in (1, 0.99))
    ratio = "not ended"
    if traced.seconds is not None and untraced.seconds is not None:
        ratio = f"{traced.seconds / untraced.seconds:.2f}"
    told = [f"{who}: {_shortened(message)}" for who, message in traced.told]
    if traced.error != untraced.error and traced.seconds is not None:
        told.insert(0, f"**the job failed: {traced.error}**")
    cells = [
        row.fault,
        f"{len(traced.answered):,}",
        f"{len(traced.stored):,}" + (f" ({'; '.join(notes)})" if notes else ""),
        f"{len(lost):,}" + (f" ({cut_off:,} cut off)" if cut_off else ""),
        f"{longest:.0f} ({p99:.0f})",
        ratio,
        "<br>".join(told) or "nothing",
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _shortened(message: str, length: int = 160) -> str:
    message = " ".join(message.split())
    return message if len(message) <= length else message[: length - 1].rstrip() + "…"


class Table:
    """Runs rows. Untraced runs and the cluster serve all rows that can share them."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._cluster: str | None = None
        self._untraced: dict[tuple[str, str, bool], Outcome] = {}
        self._runs = 0

    def line(self, row: Row) -> str:
        """Run a row, and return its line of the table."""
        try:
            master = self._master(row)
            if row.untraced not in self._untraced:
                self._untraced[row.untraced] = self._run_untraced(row, master)
            return table_row(row, self._run_traced(row, master), self._untraced[row.untraced])
        except NotPossible as reason:
            return f"| {row.fault} | | | | | | not run: {reason} |"
        except Exception as error:
            print(f"{row.name}: {error}", file=sys.stderr)
            return f"| {row.fault} | | | | | | **not measured: {_shortened(str(error))}** |"

    def _master(self, row: Row) -> str:
        if not row.cluster:
            return MASTER
        if self._cluster is None:
            cluster = standalone_cluster(self._folder / "cluster")
            self._cluster = self._stack.enter_context(cluster)
        return self._cluster

    def _run_untraced(self, row: Row, master: str) -> Outcome:
        with contextlib.closing(Run(row, self._new_folder(), master)) as run:
            run.start_driver()
            run.start_job()
            run.finish()
            return run.measure()

    def _run_traced(self, row: Row, master: str) -> Outcome:
        folder = self._new_folder()
        with (
            TrackingServer(folder / "server") as server,
            contextlib.closing(TracedRun(row, folder, master, server)) as run,
        ):
            run.start_driver()
            row.script(run)
            return run.measure()

    def _new_folder(self) -> Path:
        self._runs += 1
        folder = self._folder / str(self._runs)
        folder.mkdir()
        return folder


def _lines_in(document: Path) -> dict[str, str]:
    """Return the lines of the table in a document, by their fault."""
    lines = document.read_text(encoding="utf-8").splitlines()
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}


def main() -> None:
    """Run the rows asked for, and print or write the table."""
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(description="What faults cost.")
    parser.add_argument("--rows", metavar="NAME,...", help=f"some of {', '.join(names)}")
    parser.add_argument(
        "--write", metavar="FILE", type=Path, help="write the table, or these rows of it"
    )
    arguments = parser.parse_args()
    chosen = arguments.rows.split(",") if arguments.rows else names
    if unknown := set(chosen) - set(names):
        parser.error(f"no such rows: {', '.join(sorted(unknown))}")

    print(HEADER, flush=True)
    lines = _lines_in(arguments.write) if arguments.write and arguments.rows else {}
    with (
        tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder,
        contextlib.ExitStack() as stack,
    ):
        table = Table(Path(folder), stack)
        for row in ROWS:
            if row.name in chosen:
                lines[row.fault] = table.line(row)
                print(lines[row.fault], flush=True)
    if arguments.write:
        packages = ("mlflow", "pyspark", "openai")
        versions = ", ".join(f"{name} {version(name)}" for name in packages)
        text = DOCUMENT.format(
            versions=f"Python {sys.version_info.major}.{sys.version_info.minor}, {versions}",
            cores=os.cpu_count(),
            table="\n".join([HEADER, *(lines[row.fault] for row in ROWS if row.fault in lines)]),
        )
        arguments.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
