"""MLflow in a worker, which need not have it."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import logging, sys
from mlflow_ctx_autolog.context import DriverContext
from mlflow_ctx_autolog.worker.mlflow_loading import MLflowInWorker

logging.basicConfig(stream=sys.stdout, level=logging.WARNING, format="%(message)s")
loading = MLflowInWorker(lambda *_: None, lambda _: None)
loading.install(DriverContext("1", autologs={autologs}))
assert ("mlflow" in sys.modules) is bool({autologs})
{wish}
print(loading.load("a test").tracer.is_installed)
"""


@pytest.mark.parametrize(
    "wish", ["import mlflow", "import mlflow.tracing.utils", "loading.price_of('gpt-4o')"]
)
@pytest.mark.parametrize("autologs", ["{}", "{'anthropic': {}}"])
def test_whoever_loads_mlflow_first_its_spans_come_here(wish: str, autologs: str) -> None:
    """Also where it is us, as for a price: its arrival finds no half of what we have of it."""
    script = SCRIPT.format(wish=wish, autologs=autologs)
    told = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE)
    *warnings, is_installed = told.stdout.decode().splitlines()
    assert is_installed == "True"
    # That of a library which is not installed here.
    assert [text for text in warnings if not text.startswith("MLflow's autolog for")] == []
