"""A standalone Spark cluster on this machine, whose two workers have addresses of their own.

On local-cluster, all executors are on one host, and Spark puts no speculative copy of a task on a
host that runs the task already.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from pyspark.find_spark_home import _find_spark_home

HOSTS = ("127.0.0.2", "127.0.0.3")
_PACKAGE = "org.apache.spark.deploy"


@contextlib.contextmanager
def standalone_cluster(folder: Path, timeout: float = 60.0) -> Iterator[str]:
    """Run a cluster of two workers with one core and 1 GiB each; yield its master's address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    master = f"spark://127.0.0.1:{port}"
    addresses = ["--host", "127.0.0.1", "--port", str(port), "--webui-port", "0"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_running(folder / "master", f"{_PACKAGE}.master.Master", *addresses))
        logs = []
        for host in HOSTS:
            size = ["--cores", "1", "--memory", "1g", "--webui-port", "0", "--host", host]
            work = ["--work-dir", str(folder / host / "work")]
            command = [f"{_PACKAGE}.worker.Worker", *size, *work, master]
            logs.append(stack.enter_context(_running(folder / host, *command)))
        deadline = time.monotonic() + timeout
        while not all("Successfully registered with master" in log.read_text() for log in logs):
            if time.monotonic() > deadline:
                raise RuntimeError(f"The workers did not register with {master}.")
            time.sleep(0.1)
        yield master


@contextlib.contextmanager
def _running(folder: Path, *command: str) -> Iterator[Path]:
    """Run a Spark daemon, and end it and what it started; yield its log."""
    folder.mkdir(parents=True)
    home = Path(_find_spark_home())
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [home / "bin" / "spark-class", *command],
            env={**os.environ, "SPARK_HOME": str(home)},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield log
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
