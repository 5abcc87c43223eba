"""The versions that are supported, and the tests that each combination of them must pass.

``make matrix`` runs them all, ``make oldest`` the oldest corner. Each row differs from the newest
in one thing; ``oldest`` is the oldest of everything. A row whose Python is not on this machine is
skipped.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False


# Enough to notice whatever a release has moved.
UNIT_TESTS = (
    "unit/test_openai_calls.py",
    "unit/test_packaging.py",
    "unit/test_plugin.py",
    "unit/test_task.py",
    "unit/test_worker.py",
)
TESTS = ("e2e/test_functions.py", "e2e/test_one_line.py", *UNIT_TESTS)


@dataclass(frozen=True)
class Row:
    """What is installed; by default the newest of everything, in this environment's Python."""

    mlflow: str = "mlflow"
    openai: str = "openai"
    pyspark: str = "pyspark"
    python: str = "3.11"
    also: tuple[str, ...] = ()
    tests: tuple[str, ...] = TESTS
    environment: tuple[tuple[str, str], ...] = ()


# What came out later than the releases beside it and is too new for them.
SPARK_3_5 = ("numpy<2", "pandas<2.3")
OPENAI_1_40 = ("httpx<0.28",)

ROWS = {
    "newest": Row(),
    "oldest": Row(
        python="3.10",
        mlflow="mlflow==3.9.0",
        openai="openai==1.40.0",
        pyspark="pyspark==3.5.0",
        also=(*SPARK_3_5, *OPENAI_1_40),
        # Run with every change. Streams, which take long, are in the row pyspark-3.5.
        tests=("e2e/test_functions.py", *UNIT_TESTS, "-k", "not stream"),
    ),
    "python-3.10": Row(python="3.10"),
    "python-3.12": Row(python="3.12"),
    "python-3.13": Row(python="3.13"),
    "mlflow-3.9": Row(mlflow="mlflow==3.9.*"),
    "mlflow-3.13": Row(mlflow="mlflow==3.13.*"),
    "mlflow-skinny": Row(mlflow="mlflow-skinny"),
    "mlflow-tracing": Row(mlflow="mlflow-tracing"),
    "openai-1.40": Row(openai="openai==1.40.0", also=OPENAI_1_40),
    "openai-1": Row(openai="openai<2"),
    "openai-2": Row(openai="openai<3"),
    "pyspark-3.5": Row(pyspark="pyspark==3.5.*", also=SPARK_3_5),
    "pyspark-4.0": Row(pyspark="pyspark==4.0.*"),
    # Which takes no newer openai.
    "databricks-openai": Row(
        openai="openai<3", also=("databricks-openai",), tests=("e2e/test_calls.py",)
    ),
    # The libraries besides OpenAI's that MLflow traces. Not in .venv, since MLflow's autolog
    # imports the Agents SDK wherever it is installed: two seconds, which benchmarks would measure.
    "flavors": Row(
        also=("anthropic", "langchain", "langchain-openai", "litellm", "openai-agents"),
        tests=("e2e/test_flavors.py",),
        environment=(("LITELLM_LOCAL_MODEL_COST_MAP", "True"),),
    ),
    # The libraries that record calls twice where both are on, as doctor() has to find.
    "tracers": Row(
        also=(
            "ddtrace",
            "langfuse",
            "openinference-instrumentation-openai",
            "opentelemetry-instrumentation-openai",
        ),
        tests=("unit/test_doctor.py",),
    ),
}

NEEDED = (
    "click",
    "packaging",
    "pandas<3",
    "pyarrow>=11",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "setuptools",
)
# Two files at a time, in this order, so that those that take longest do not come last.
AT_ONCE = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")


def _interpreter(version: str) -> str:
    """Return a Python of a version: one of pyenv's, else that on PATH."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = sorted(versions.glob(f"{version}.*/bin/python"))
    return str(found[-1]) if found else f"python{version}"


def _add_session(name: str, row: Row) -> None:
    @nox.session(name=name, python=_interpreter(row.python))
    def versions(session: nox.Session) -> None:
        (wheel,) = Path("dist").glob("*.whl")
        requirements = (row.mlflow, row.openai, row.pyspark, *row.also)
        session.install(*NEEDED, *requirements)
        if "databricks-openai" in row.also:
            # It brings databricks-connect, whose files lie over those of pyspark.
            session.run("python", "-m", "pip", "uninstall", "-qy", "databricks-connect", "pyspark")
            session.install(row.pyspark)
        session.install("--no-deps", str(wheel))
        # Always the newest server: not every client brings one, and that of 3.9 fails (README).
        server = str(Path(".venv/bin/python").absolute())
        session.chdir("tests")
        session.run(
            "pytest",
            "-q",
            *AT_ONCE,
            *(session.posargs or row.tests),
            env={"CTX_AUTOLOG_TESTING_SERVER_PYTHON": server, **dict(row.environment)},
        )


for name, row in ROWS.items():
    _add_session(name, row)
