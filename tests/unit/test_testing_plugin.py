"""The fixtures that pytest has where this library is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlflow

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import TrackingStore


def run_pytest(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run a user's test file, without the plugins of other libraries."""
    (folder / "test_users.py").write_text(code)
    plugin = "mlflow_ctx_autolog.testing.plugin"
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", plugin],
        cwd=folder,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_suite_that_does_not_use_it_does_not_pay_for_it(tmp_path: Path) -> None:
    """Neither MLflow nor PySpark is imported, and a fixture of the same kind is the user's own."""
    done = run_pytest(
        tmp_path,
        """
import sys
import pytest

@pytest.fixture
def endpoint():
    return "mine"

def test_users(endpoint):
    assert endpoint == "mine"
    assert "mlflow_ctx_autolog.testing.plugin" in sys.modules
    assert not {"mlflow", "openai", "pyspark", "pandas", "opentelemetry"} & set(sys.modules)
""",
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_store_is_mlflows_meanwhile_and_no_longer(tmp_path: Path) -> None:
    """Each test has an empty store; afterwards tracing is off and MLflow's store as before."""
    done = run_pytest(
        tmp_path,
        """
import mlflow
import mlflow_ctx_autolog as ctx_autolog
import pytest

before = mlflow.get_tracking_uri()

@pytest.mark.parametrize("n", [1, 2])
def test_users(ctx_autolog_store, n):
    ctx_autolog.enable()
    with mlflow.start_span("job"):
        pass
    assert len(ctx_autolog_store.traces()) == 1

def test_afterwards():
    from mlflow_ctx_autolog.driver.handover import driver

    assert mlflow.get_tracking_uri() == before
    assert driver.config is None
""",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


def test_the_spool_is_the_tests_own(ctx_autolog_store: TrackingStore, tmp_path: Path) -> None:
    """What other jobs have left behind on this host is none of the test's business."""
    assert ctx_autolog.Config.from_env().spool_directory == str(tmp_path / "spools")
    assert mlflow.get_tracking_uri() == ctx_autolog_store.uri
