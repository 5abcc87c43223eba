"""The README's lines of installation, in fresh environments, and its job in each of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import readme

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STORED = "23 spans made, 23 stored"


@dataclass(frozen=True)
class Row:
    """What is installed, and where the spans go.

    Args:
        packages: Besides the library.
        extra: The library's extra.
        alone: Whether the library is installed without what it asks for.
        has_store: Whether this MLflow has a store of its own.
    """

    packages: tuple[str, ...]
    extra: str = ""
    alone: bool = False
    has_store: bool = False


# What a cluster has.
SPARK = ("pyspark", "pyarrow", "pandas<3")
# What mlflow-tracing comes without, though the library asks for it.
BESIDES = ("openai", "click", "opentelemetry-sdk")
ROWS = {
    "local, pyspark 3.5": Row(
        ("pyspark==3.5.*", "pandas<2.3", "numpy<2"), extra="[local]", has_store=True
    ),
    "local, pyspark 4.0": Row(("pyspark==4.0.*",), extra="[local]", has_store=True),
    "local, newest": Row((), extra="[local]", has_store=True),
    "skinny, pyspark 3.5": Row(("pyspark==3.5.*", "pyarrow", "pandas<2.3", "numpy<2")),
    "skinny, newest": Row(SPARK),
    "tracing, newest": Row(("mlflow-tracing", *SPARK, *BESIDES), alone=True),
}


@dataclass(frozen=True)
class Environment:
    """An environment, and a folder to run programs in."""

    python: Path
    folder: Path

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run its Python."""
        others = ("MLFLOW_", "OPENAI_", "PYTHONPATH")
        kept = {name: text for name, text in os.environ.items() if not name.startswith(others)}
        kept |= {"PYSPARK_PYTHON": str(self.python), "SPARK_LOCAL_IP": "127.0.0.1", **environment}
        return subprocess.run(
            [self.python, *arguments],
            cwd=self.folder,
            env=kept,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )


def installer(python: Path) -> list[str]:
    """Return the command that installs packages into an environment."""
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--quiet", "--python", str(python)]
    return [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]


@pytest.fixture(params=ROWS)
def installed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Row, Environment]:
    """A row, and a fresh environment that is made by it."""
    row = ROWS[request.param]
    prefix, folder = tmp_path / "environment", tmp_path / "folder"
    folder.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", prefix], check=True)
    (wheel,) = (ROOT / "dist").glob("*.whl")
    python = prefix / "bin" / "python"
    install = installer(python)
    if row.alone:
        subprocess.run([*install, "--no-deps", str(wheel)], check=True, timeout=500)
        subprocess.run([*install, *row.packages], check=True, timeout=500)
    else:
        subprocess.run([*install, f"{wheel}{row.extra}", *row.packages], check=True, timeout=500)
    return row, Environment(python, folder)


@pytest.mark.timeout(1200)
def test_the_install_line_leads_to_a_trace(
    installed: tuple[Row, Environment], request: pytest.FixtureRequest
) -> None:
    """With MLflow's own store where it has one; else enable() says what is missing, and how."""
    row, environment = installed
    program = "\n".join(readme.python_blocks()[:3])
    (environment.folder / "job.py").write_text(program)
    if not row.has_store:
        enable = "import mlflow_ctx_autolog as ctx_autolog; ctx_autolog.enable()"
        told = environment.run("-c", enable)
        assert "no tracking store: the tracking URI is sqlite:" in told.stderr
        assert "pip install mlflow" in told.stderr
    store = {}
    if not row.has_store:
        store["MLFLOW_EXPERIMENT_ID"] = request.getfixturevalue("experiment_id")
        store["MLFLOW_TRACKING_URI"] = request.getfixturevalue("server").uri
    run = environment.run("job.py", **store)

    assert run.returncode == 0, run.stderr[-5000:]
    assert STORED in run.stdout.splitlines()
    assert (environment.folder / "mlflow.db").exists() == row.has_store
