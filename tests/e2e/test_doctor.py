"""What ``doctor()`` finds on real workers, and what is said of silence after a job."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import functions
import mlflow
import pandas as pd
import pyspark
import pytest
import requests
from pyspark.sql import SparkSession
from pyspark.sql.functions import udf
from workload import SCHEMA, ask, stored_trace, stored_traces

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.driver.handover import driver
from mlflow_ctx_autolog.testing import OpenAIEndpoint, TrackingServer, TrackingStore

# One worker at a time, as each has to import everything.
MASTER = "local[1]"


def causes(diagnosis: ctx_autolog.Diagnosis) -> dict[tuple[str, str], str]:
    """Return what does not pass, by check and place."""
    complaints = [*diagnosis.failures, *diagnosis.warnings]
    return {(finding.check, finding.where): finding.level for finding in complaints}


def test_a_cluster_on_which_all_is_well(
    spark: SparkSession,
    endpoint: OpenAIEndpoint,
    experiment_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is found, the call of the round trip arrives, and nothing is left behind."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-that-is-secret")
    with ctx_autolog.enable(strict=True), mlflow.start_span("job") as span:
        diagnosis = ctx_autolog.doctor(spark, model_url=endpoint.base_url)
        spark.range(4).mapInPandas(lambda batches: batches, "id long").collect()

    assert causes(diagnosis) == {}
    assert {finding.level for finding in diagnosis.findings} == {"pass"}
    assert diagnosis.findings[-1].check == "round_trip"
    assert ctx_autolog.receipt().trace_id == span.trace_id
    assert [trace.root.name for trace in stored_traces(experiment_id)] == ["job"]
    assert endpoint.requests == []
    assert "secret" not in str(diagnosis)


def test_a_store_and_an_endpoint_that_nobody_reaches(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """A wrong tracking URI, and a wrong model endpoint, are found on the workers as well."""
    endpoint.close()
    mlflow.set_tracking_uri(endpoint.base_url.removesuffix("/v1"))
    with mlflow.start_span("job"):
        diagnosis = ctx_autolog.doctor(spark, model_url=endpoint.base_url)
        mlflow.set_tracking_uri("http://127.0.0.1:9")

    assert causes(diagnosis) == {
        ("store_is_reachable", "driver"): "fail",
        ("store_is_reachable", "workers"): "fail",
        ("model_is_reachable", "workers"): "fail",
    }
    assert "something else has to be put right" in diagnosis.findings[-1].found


@contextmanager
def _interpreter(spark: SparkSession, folder: Path) -> Iterator[Path]:
    """Give the workers another interpreter for a block: this one, with a folder before its path."""
    packages = folder / "packages"
    packages.mkdir()
    python = folder / "python"
    base = os.path.realpath(sys.executable)
    site_packages = Path(ctx_autolog.__file__).parents[1]
    for entry in site_packages.iterdir():
        (packages / entry.name).symlink_to(entry)
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}:$PYTHONPATH" exec "{base}" "$@"\n')
    python.chmod(0o755)
    before = spark.sparkContext.pythonExec
    spark.sparkContext.pythonExec = str(python)
    try:
        yield packages
    finally:
        spark.sparkContext.pythonExec = before


def _take_the_library_away(packages: Path) -> None:
    for entry in packages.glob("mlflow_ctx_autolog*"):
        entry.unlink()


def _make_the_library_older(packages: Path) -> None:
    package = packages / "mlflow_ctx_autolog"
    installed = package.resolve()
    package.unlink()
    shutil.copytree(installed, package)
    text = (package / "__init__.py").read_text(encoding="utf-8")
    older = text.replace(f'__version__ = "{ctx_autolog.__version__}"', '__version__ = "0.0.1"')
    (package / "__init__.py").write_text(older, encoding="utf-8")


def _set_the_clock_back(packages: Path) -> None:
    code = "import time\nright = time.time\ntime.time = lambda: right() - 3600\n"
    (packages / "sitecustomize.py").write_text(code)


def _disable_tracing(packages: Path) -> None:
    code = "import os\nos.environ['OTEL_SDK_DISABLED'] = 'true'\n"
    (packages / "sitecustomize.py").write_text(code)


def _take_openai_back_by_years(packages: Path) -> None:
    (packages / "openai").unlink()
    (packages / "openai").mkdir()
    (packages / "openai" / "__init__.py").write_text("__version__ = '0.28.1'\n")


def _hide_properties(packages: Path) -> None:
    """Have tasks see no local property of Spark's, on Connect no tag, as on some platforms."""
    code = (
        "from pyspark import TaskContext\n"
        "nothing = property(lambda self: {}, lambda self, value: None)\n"
        "TaskContext._localProperties = nothing\n"
    )
    (packages / "sitecustomize.py").write_text(code)


@pytest.fixture(autouse=True)
def _nothing_is_known_of_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "hides_properties", False)


@pytest.mark.parametrize(
    ("spoil", "cause", "level", "found"),
    [
        (_take_the_library_away, "library_is_installed", "fail", "No module named"),
        (_make_the_library_older, "library_is_the_same", "fail", "0.0.1 there"),
        (_set_the_clock_back, "clocks_agree", "warn", "is off by 3"),
        (_disable_tracing, "tracing_is_on", "fail", "OTEL_SDK_DISABLED"),
        (_take_openai_back_by_years, "versions_are_supported", "fail", "openai 0.28.1, not from"),
        (_hide_properties, "tasks_see_their_span", "warn", "the task has not seen it"),
    ],
)
def test_what_is_wrong_on_workers_only(
    spark: SparkSession,
    endpoint: OpenAIEndpoint,
    experiment_id: str,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    cause: str,
    level: str,
    found: str,
) -> None:
    """The cause is named, and no other: not even that workers without the library lack the rest."""
    with _interpreter(spark, tmp_path) as packages, mlflow.start_span("job"):
        spoil(packages)
        diagnosis = ctx_autolog.doctor(spark, model_url=endpoint.base_url)

    (finding,) = [*diagnosis.failures, *diagnosis.warnings]
    assert (finding.check, finding.level) == (cause, level)
    assert found in finding.found
    assert finding.where != "driver"


@pytest.mark.parametrize("is_asked", [True, False], ids=["doctor", "the first job"])
def test_where_properties_are_hidden_calls_belong_to_their_span(
    spark: SparkSession,
    endpoint: OpenAIEndpoint,
    experiment_id: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    is_asked: bool,
) -> None:
    """What the doctor has found, or a task, is heeded: the span travels in the broadcast.

    What runs before that is found out is a trace of its action, and no other span's.
    """
    ask_model = functions.asker(endpoint.base_url)
    column = udf(lambda number: ask_model(number), "string")

    def act(name: str, times: int) -> Any:
        with mlflow.start_span(name) as span:
            frames = [spark.range(0, 4, 1, 2).select(column("id")) for _ in range(times)]
            assert frames[0].sameSemantics(frames[-1])
            for frame in frames:
                frame.collect()
        return span

    with _interpreter(spark, tmp_path) as packages, ctx_autolog.enable():
        _hide_properties(packages)
        if is_asked:
            ctx_autolog.doctor(spark, model_url=endpoint.base_url)
        else:
            act("before", 1)
        spans = [act("one", 1), act("other", 2)]
        assert ctx_autolog.flush(60)

    assert [len(stored_trace(span.trace_id).calls) for span in spans] == [4, 8]
    others = [each for each in stored_traces(experiment_id) if each.root.name not in _ACTS]
    assert [len(each.calls) for each in others] == ([] if is_asked else [4])
    warned = [text for text in caplog.messages if "see no local properties" in text]
    assert len(warned) == (0 if is_asked else 1)


_ACTS = ("before", "one", "other")


def test_a_file_on_two_hosts(
    spark: SparkSession,
    endpoint: OpenAIEndpoint,
    ctx_autolog_store: TrackingStore,
    tmp_path: Path,
) -> None:
    """Though the workers of the other host can write to it now, as on a disk that is shared."""
    with _interpreter(spark, tmp_path) as packages, mlflow.start_span("job"):
        code = "import socket\nsocket.gethostname = lambda: 'other-host'\n"
        (packages / "sitecustomize.py").write_text(code)
        diagnosis = ctx_autolog.doctor(spark, model_url=endpoint.base_url)

    assert causes(diagnosis) == {("file_has_one_host", "workers"): "fail"}
    assert "other-host" in diagnosis.failures[0].found


@pytest.mark.slow
def test_an_address_that_is_another_server_for_workers(
    spark: SparkSession, server: TrackingServer, endpoint: OpenAIEndpoint, tmp_path: Path
) -> None:
    """As localhost is: they store their spans well, where the driver does not find them."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(server.uri)
    mlflow.set_experiment(experiment_id="0")
    try:
        with (
            TrackingServer(tmp_path / "other") as other,
            _interpreter(spark, tmp_path) as packages,
            mlflow.start_span("job"),
        ):
            code = f"""import socket
right = socket.getaddrinfo
def elsewhere(host, port, *args, **kwargs):
    return right(host, {other.port} if port == {server.port} else port, *args, **kwargs)
socket.getaddrinfo = elsewhere
"""
            (packages / "sitecustomize.py").write_text(code)
            diagnosis = ctx_autolog.doctor(spark, model_url=endpoint.base_url)
    finally:
        mlflow.flush_trace_async_logging()
        mlflow.set_tracking_uri(before)

    assert causes(diagnosis) == {("store_is_the_same", "workers"): "fail"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    """A server that demands a log-in, where one user may read everything and write nothing."""
    folder = tmp_path_factory.mktemp("guarded")
    with TrackingServer(folder, password=ADMIN["MLFLOW_TRACKING_PASSWORD"]) as server:
        requests.post(
            f"{server.uri}/api/2.0/mlflow/users/create",
            json={
                "username": READER["MLFLOW_TRACKING_USERNAME"],
                "password": READER["MLFLOW_TRACKING_PASSWORD"],
            },
            auth=(ADMIN["MLFLOW_TRACKING_USERNAME"], ADMIN["MLFLOW_TRACKING_PASSWORD"]),
            timeout=30,
        ).raise_for_status()
        yield server


ADMIN = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "correct-horse-battery"}
READER = {"MLFLOW_TRACKING_USERNAME": "reader", "MLFLOW_TRACKING_PASSWORD": "staple-correct-horse"}
UNKNOWN = {**ADMIN, "MLFLOW_TRACKING_PASSWORD": "wrong-password-here"}
NONE: dict[str, str] = dict.fromkeys(ADMIN, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("log_in", "cause", "found"),
    [
        (NONE, "log_in_is_accepted", "set on the driver only: MLFLOW_TRACKING_PASSWORD"),
        (UNKNOWN, "log_in_is_accepted", "401"),
        (READER, "experiment_is_writable", "403"),
    ],
)
def test_a_log_in_of_workers_that_will_not_do(
    spark: SparkSession,
    guarded: TrackingServer,
    endpoint: OpenAIEndpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log_in: dict[str, str],
    cause: str,
    found: str,
) -> None:
    """Where the workers have none, a wrong one, or one that may only read."""
    for name, value in ADMIN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_CTX_AUTOLOG_TRANSPORT", "direct")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(guarded.uri)
    try:
        mlflow.set_experiment("job")
        with _interpreter(spark, tmp_path) as packages, mlflow.start_span("job"):
            lines = ["import os"]
            for name, value in log_in.items():
                lines.append(
                    f"os.environ[{name!r}] = {value!r}" if value else f"del os.environ[{name!r}]"
                )
            (packages / "sitecustomize.py").write_text("\n".join(lines))
            diagnosis = ctx_autolog.doctor(spark, model_url=endpoint.base_url)
        mlflow.flush_trace_async_logging()
    finally:
        mlflow.set_tracking_uri(before)

    assert causes(diagnosis) == {(cause, "workers"): "fail"}
    assert found in diagnosis.failures[0].found
    shown = f"{diagnosis} {json.dumps(diagnosis.to_dict())}"
    assert not any(each["MLFLOW_TRACKING_PASSWORD"] in shown for each in (ADMIN, READER, UNKNOWN))


def _function(url: str, prepare: str) -> Callable[[Iterable[pd.DataFrame]], Iterator[pd.DataFrame]]:
    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        import mlflow
        from openai import OpenAI

        exec(prepare, {"mlflow": mlflow})
        client = OpenAI(base_url=url, api_key="not-a-key", max_retries=0)
        for batch in batches:
            yield batch.assign(answer=[ask(client, number) for number in batch["id"]])

    return extract


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        ("mlflow.tracing.disable()", "mlflow.tracing.disable() was called"),
        ("mlflow.openai.autolog(disable=True)", "autolog is switched off"),
        ("mlflow.tracing.enable()", None),
    ],
)
def test_calls_that_leave_no_span(
    spark: SparkSession,
    endpoint: OpenAIEndpoint,
    experiment_id: str,
    caplog: pytest.LogCaptureFixture,
    prepare: str,
    reason: str | None,
) -> None:
    """Where functions ran and their calls left no span, the driver says so once, and why."""
    with caplog.at_level(logging.WARNING, logger="mlflow_ctx_autolog"), ctx_autolog.enable():
        with mlflow.start_span("job") as span:
            extract = _function(endpoint.base_url, prepare)
            spark.range(0, 4, 1, 2).mapInPandas(extract, SCHEMA).collect()
            # Without a model call, which is no silence.
            spark.range(0, 4, 1, 2).mapInPandas(lambda batches: batches, "id long").collect()
        mlflow.flush_trace_async_logging()

    warned = [text for text in caplog.messages if "left no span" in text]
    assert len(warned) == (reason is not None)
    if reason is not None:
        assert span.trace_id in warned[0]
        assert reason in warned[0]
        assert "Tracing is on" in warned[0]


_CONNECT = pytest.param(
    "--remote",
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(
            pyspark.__version__ < "4",
            reason="Spark 3.5 fetches its Connect server from the network",
        ),
    ],
)


@pytest.mark.parametrize("option", ["--master", _CONNECT])
def test_the_command(
    server: TrackingServer,
    endpoint: OpenAIEndpoint,
    experiment_id: str,
    tmp_path: Path,
    option: str,
) -> None:
    """On classic Spark and Spark Connect it finds what Spark is told to repeat, and says so."""
    settings = (
        "spark.speculation true",
        "spark.task.maxFailures 8",
        "spark.dynamicAllocation.enabled true",
        "spark.python.worker.reuse false",
        # Or each task would import everything anew.
        "spark.python.daemon.module mlflow_ctx_autolog.daemon",
    )
    (tmp_path / "spark-defaults.conf").write_text("\n".join(settings))
    command = Path(sys.executable).with_name("mlflow-ctx-autolog")
    finished = subprocess.run(
        [command, "doctor", "--json", "--strict", option, "local[2]"],
        env={
            **os.environ,
            "PYSPARK_PYTHON": sys.executable,
            "SPARK_CONF_DIR": str(tmp_path),
            "MLFLOW_TRACKING_URI": server.uri,
            "MLFLOW_EXPERIMENT_ID": experiment_id,
            "OPENAI_BASE_URL": endpoint.base_url,
        },
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        timeout=200,
        check=False,
    )
    findings = {each["check"]: each for each in json.loads(finished.stdout)["findings"]}
    levels = {name: each["level"] for name, each in findings.items()}

    assert finished.returncode == 1
    assert {name for name in levels if levels[name] != "pass"} == {
        "no_speculation",
        "few_retries",
        "executors_say_goodbye",
        "workers_are_reused",
    }
    assert levels["no_speculation"] == "warn"
    assert "read back from the store" in findings["round_trip"]["found"]
    assert stored_traces(experiment_id) == []
