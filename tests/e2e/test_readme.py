"""The README: short, and its blocks run as pasted, one after the other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import readme


def test_the_readme_can_be_read_at_once() -> None:
    """It has at most 900 words, tables and code included."""
    assert len(readme.text().split()) <= readme.MOST_WORDS


def test_every_page_it_names_is_there() -> None:
    """Its links lead to files of this repository."""
    links = re.findall(r"\]\((?!http)([^)#]+)", readme.text())
    assert [link for link in links if not (readme.README.parent / link).exists()] == []


@pytest.mark.sqlite
def test_the_blocks_run_as_pasted(tmp_path: Path) -> None:
    """In a new Python, in an empty folder, and print what the README says they print."""
    (tmp_path / "job.py").write_text(readme.program())
    ours = ("MLFLOW_", "OPENAI_", "SPARK_")
    environment = {name: text for name, text in os.environ.items() if not name.startswith(ours)}
    environment |= {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    run = subprocess.run(
        [sys.executable, "job.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )

    assert run.returncode == 0, run.stderr
    assert [line for line in readme.printed_lines() if line not in run.stdout.splitlines()] == []
    assert "A call made in a Spark task arrived under the driver's trace" in run.stdout
