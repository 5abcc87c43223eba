"""What a type checker says of a user's code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WELL = """
import mlflow_ctx_autolog as ctx_autolog

with ctx_autolog.enable(flush_timeout=3, prices={"m": (1, 2.5)}, transport="driver", redact=str):
    print(ctx_autolog.receipt().stored, ctx_autolog.doctor().failures)
"""
BADLY = """
import mlflow_ctx_autolog as ctx_autolog

ctx_autolog.enable(flush_timout=3)
ctx_autolog.enable(transport="pigeon")
ctx_autolog.enable(max_calls="10")
ctx_autolog.enabel()
"""


def test_wrong_settings_are_caught_before_a_job_runs(tmp_path: Path) -> None:
    """Names, types and choices; and code that is right is left alone, in strict mode."""
    pytest.importorskip("mypy")
    (tmp_path / "well.py").write_text(WELL)
    (tmp_path / "badly.py").write_text(BADLY)
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache", "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    errors = [line for line in checked.stdout.splitlines() if ": error: " in line]

    assert [line.partition(": ")[0] for line in errors] == [f"badly.py:{n}" for n in (4, 5, 6, 7)]
    assert 'did you mean "flush_timeout"?' in errors[0]
