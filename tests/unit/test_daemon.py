"""What PySpark's daemon holds when it forks a worker, without Spark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_SCRIPT = """
import json, os, sys
from mlflow_ctx_autolog import daemon

daemon.preload()
threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
drawn = []
for _ in range(2):
    reading, writing = os.pipe()
    if os.fork() == 0:
        import numpy, random
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
        ids = RandomIdGenerator()
        draws = numpy.random.random(), random.random(), ids.generate_span_id()
        os.write(writing, json.dumps(draws).encode())
        os._exit(0)
    os.wait()
    drawn.append(json.loads(os.read(reading, 1000)))
print(json.dumps({
    "threads": threads,
    "modules": [name for name in ("mlflow", "openai") if name in sys.modules],
    "options": os.environ.get("JE_ARROW_MALLOC_CONF"),
    "drawn": drawn,
}))
"""


@pytest.fixture(scope="module")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process says that has preloaded, and forked twice."""
    finished = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        # As Spark sets it for a task with one processor.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path_factory.mktemp("daemon"),
        stdout=subprocess.PIPE,
        timeout=100,
        check=True,
    )
    found: dict[str, Any] = json.loads(finished.stdout)
    return found


def test_preloading_starts_no_thread(preloaded: dict[str, Any]) -> None:
    """What workers need is imported, and the process is fit to be forked."""
    assert preloaded["modules"] == ["openai"]
    assert preloaded["threads"] == 1


def test_preloading_leaves_the_environment_as_it_was(preloaded: dict[str, Any]) -> None:
    """What keeps Arrow from starting a thread does not reach the user's functions."""
    assert preloaded["options"] is None


def test_forked_workers_draw_different_numbers(preloaded: dict[str, Any]) -> None:
    """NumPy's and Python's generators and the ids of spans differ from worker to worker."""
    first, second = preloaded["drawn"]
    assert all(one != other for one, other in zip(first, second, strict=True))


def test_where_preloading_fails_the_plain_daemon_serves(tmp_path: Path) -> None:
    """A worker still starts where the client cannot be imported, and the log says why."""
    (tmp_path / "openai.py").write_text("raise RuntimeError('a broken release')")
    script = (
        "import mlflow_ctx_autolog.daemon as daemon; "
        "daemon.manager = lambda: print('serving'); daemon.main()"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert finished.stdout == "serving\n"
    assert "a broken release" in finished.stderr
    assert "each of them imports it by itself" in finished.stderr
