"""The ways onto a cluster that docs/clusters.md gives, on a standalone one.

Its workers' Python has every package but this library.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyspark
import pytest

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint, TrackingServer

pytestmark = pytest.mark.slow

SPARK_HOME = Path(pyspark.__file__).parent
ROOT = Path(__file__).parents[2]
JOB = """
import mlflow, mlflow_ctx_autolog as ctx_autolog
from pyspark.sql import SparkSession

def extract(batches):
    import sys
    from mlflow_ctx_autolog import __file__ as place
    from openai import OpenAI
    client = OpenAI()
    for batch in batches:
        for number in batch["id"]:
            messages = [{"role": "user", "content": str(number)}]
            client.chat.completions.create(model="gpt-x", messages=messages)
        is_forked = hasattr(sys.modules["__main__"], "preload")
        yield batch.assign(place=place, forked=is_forked, python=sys.executable)

spark = SparkSession.builder.getOrCreate()
ctx_autolog.enable()
with mlflow.start_span("job"):
    schema = "id long, place string, forked boolean, python string"
    rows = spark.range(0, 6, 1, 2).mapInPandas(extract, schema).collect()
print("PLACE", rows[0].place, rows[0].forked, rows[0].python)
print("RECEIPT", ctx_autolog.receipt())
"""


@dataclass(frozen=True)
class Cluster:
    """A cluster's address, and a folder for what is sent to it."""

    master: str
    folder: Path
    environment: dict[str, str]

    def submit(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the job with some arguments of spark-submit."""
        (self.folder / "job.py").write_text(JOB)
        command = [
            str(SPARK_HOME / "bin" / "spark-submit"),
            *("--master", self.master),
            *("--conf", "spark.ui.enabled=false"),
            *("--conf", "spark.driver.host=127.0.0.1"),
            *arguments,
            "job.py",
        ]
        return subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )


@contextmanager
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[None]:
    """Run a process of the cluster for a block."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(text: str, log: Path) -> None:
    deadline = time.monotonic() + 100
    while text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def python_without_the_library(folder: Path) -> Path:
    """Make an interpreter that has all packages of this one but the library."""
    packages = folder / "packages"
    packages.mkdir()
    for entry in Path(ctx_autolog.__file__).parents[1].iterdir():
        if not entry.name.startswith("mlflow_ctx_autolog"):
            (packages / entry.name).symlink_to(entry)
    python = folder / "python"
    base = os.path.realpath(sys.executable)
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}:$PYTHONPATH" exec "{base}" "$@"\n')
    python.chmod(0o755)
    return python


@pytest.fixture(scope="module")
def cluster_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A master and a worker of Spark; its address, and a Python without the library."""
    folder = tmp_path_factory.mktemp("cluster")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_WORKER_DIR": str(folder / "work"),
    }
    start = [str(SPARK_HOME / "bin" / "spark-class"), "org.apache.spark.deploy"]
    master, worker = folder / "master.log", folder / "worker.log"
    url = f"spark://127.0.0.1:{port}"
    where = ["--host", "127.0.0.1", "--webui-port", "0"]
    with ExitStack() as stack:
        command = [start[0], f"{start[1]}.master.Master", *where, "--port", str(port)]
        stack.enter_context(running(command, environment, master))
        wait_for("New state: ALIVE", master)
        command = [start[0], f"{start[1]}.worker.Worker", *where, "--cores", "2", "-m", "1g", url]
        stack.enter_context(running(command, environment, worker))
        wait_for("Successfully registered", worker)
        yield url, python_without_the_library(folder)


@pytest.fixture
def cluster(
    cluster_processes: tuple[str, Path],
    endpoint: OpenAIEndpoint,
    server: TrackingServer,
    experiment_id: str,
    tmp_path: Path,
) -> Cluster:
    """The cluster, for a job whose calls and spans go to an endpoint and a server of the test's."""
    url, python = cluster_processes
    environment = {
        **os.environ,
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYSPARK_PYTHON": str(python),
        "MLFLOW_TRACKING_URI": server.uri,
        "MLFLOW_EXPERIMENT_ID": experiment_id,
    }
    # Executors do not inherit the driver's.
    model = {"OPENAI_BASE_URL": endpoint.base_url, "OPENAI_API_KEY": "unused"}
    settings = "".join(f"spark.executorEnv.{name} {text}\n" for name, text in model.items())
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "spark-defaults.conf").write_text(settings)
    return Cluster(url, tmp_path, {**environment, "SPARK_CONF_DIR": str(tmp_path / "conf")})


def place_of(run: subprocess.CompletedProcess[str]) -> list[str]:
    """Return where workers have found the library, if they were forked by its daemon, by whom."""
    assert run.returncode == 0, run.stderr[-5000:]
    lines = [line.split(maxsplit=1) for line in run.stdout.splitlines() if " " in line]
    told = {line[0]: line[1] for line in lines}
    assert told["RECEIPT"] == "9 spans made, 9 stored"
    return told["PLACE"].split()


@pytest.fixture
def archive(cluster: Cluster) -> Path:
    """The library's wheel by a name that Spark puts on the workers' path."""
    (wheel,) = (ROOT / "dist").glob("*.whl")
    path = cluster.folder / "mlflow_ctx_autolog.zip"
    path.write_bytes(wheel.read_bytes())
    return path


def test_the_library_can_be_sent_along(cluster: Cluster, archive: Path) -> None:
    """As a file named .zip, which its wheel is, workers import it, and all calls are stored."""
    place, forked, _ = place_of(cluster.submit("--py-files", archive.name))
    assert "mlflow_ctx_autolog.zip" in place
    assert forked == "False"


def test_a_daemon_finds_what_was_sent_along(cluster: Cluster, archive: Path) -> None:
    """Also the one that imports it ahead of the workers, which starts before they look there."""
    daemon = "spark.python.daemon.module=mlflow_ctx_autolog.daemon"
    place, forked, _ = place_of(cluster.submit("--py-files", archive.name, "--conf", daemon))
    assert "mlflow_ctx_autolog.zip" in place
    assert forked == "True"


def test_without_the_library_the_error_names_what_works(cluster: Cluster) -> None:
    """A job whose workers lack it fails with how to install it, and how to send it along."""
    run = cluster.submit(PYSPARK_DRIVER_PYTHON=sys.executable)
    assert run.returncode != 0
    told = run.stdout + run.stderr
    assert "pip install mlflow-ctx-autolog" in told
    assert "--py-files mlflow_ctx_autolog.zip" in told


def test_an_environment_can_be_sent_along(cluster: Cluster) -> None:
    """An archive of venv-pack, whose Python is that of driver and workers."""
    environment = cluster.folder / "environment"
    (wheel,) = (ROOT / "dist").glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python")]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    packages = ["--constraint", ROOT / "dev.lock", wheel, "pyarrow", "venv-pack", "setuptools<81"]
    subprocess.run([*pip, "install", "--quiet", *packages], check=True, timeout=200)
    pack = [environment / "bin" / "venv-pack", "--prefix", environment]
    subprocess.run(
        [*pack, "--quiet", "--output", cluster.folder / "environment.tar.gz"], check=True
    )

    run = cluster.submit(
        "--archives",
        "environment.tar.gz#environment",
        PYSPARK_PYTHON="./environment/bin/python",
        PYSPARK_DRIVER_PYTHON=str(environment / "bin" / "python"),
    )
    place, _, python = place_of(run)
    assert "/environment/" in place
    assert "environment" in python
