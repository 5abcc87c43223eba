"""Every way of PySpark's to run Python on workers is one that is known, traced or not.

A release that brings another one fails these tests, until somebody has said which it is.
"""

from __future__ import annotations

from pathlib import Path

import pyspark
import pyspark.util
import pytest

from mlflow_ctx_autolog.diagnosis.diagnosis import Diagnosis
from mlflow_ctx_autolog.diagnosis.ways import KINDS, PROGRAMS, untraced_ways

DOCS = Path(__file__).parents[2] / "docs"
PYSPARK = Path(pyspark.__file__).parent


def programs() -> set[str]:
    """Return the modules of the installed PySpark that Spark starts, or that these consist of."""
    patterns = ("*worker*.py", "*daemon*.py", "sql/**/*worker*.py", "sql/**/*runner.py")
    paths = {path for pattern in patterns for path in PYSPARK.glob(pattern)}
    paths |= {path for path in PYSPARK.rglob("*.py") if path.parent.name in ("worker", "workers")}
    # A program of that kind connects to the JVM that has started it.
    paths |= {path for path in PYSPARK.rglob("*.py") if _connects(path.read_text("utf-8"))}
    names = {str(path.relative_to(PYSPARK).with_suffix("")) for path in paths}
    return {each for each in names if not each.endswith("__init__") and "/tests/" not in each}


def _connects(text: str) -> bool:
    program = text.partition('if __name__ == "__main__":')[2]
    return "local_connect_and_auth(" in program or "get_sock_file_to_executor(" in program


def test_every_kind_of_function_is_known() -> None:
    """Each has a row in the table of what is covered."""
    table = (DOCS / "coverage.md").read_text(encoding="utf-8")
    kinds = {name for name in vars(pyspark.util.PythonEvalType) if name.isupper()}
    assert kinds <= set(KINDS)
    assert "SQL_MAP_PANDAS_ITER_UDF" in kinds
    for row in KINDS.values():
        assert f"| {row} |" in table


def test_every_program_that_runs_python_is_known() -> None:
    """Of each is known what it runs untraced."""
    found = programs()
    assert found <= set(PROGRAMS), found - set(PROGRAMS)
    assert {"worker", "daemon", "sql/worker/analyze_udtf"} <= found


def test_what_is_not_traced_is_said_where_users_look() -> None:
    """The page of limits has each, and the doctor says those of the installed release."""
    limits = (DOCS / "limits.md").read_text(encoding="utf-8")
    for method in ("analyze", "schema", "partitions", "pushFilters", "writer", "commit", "abort"):
        assert f"`{method}`" in limits
    ways = untraced_ways()
    assert "a table function's analyze()" in ways
    assert ("a data source's schema()" in ways) == (pyspark.__version__ >= "4")
    text = " ".join(str(Diagnosis((), 0.0, tuple(ways))).split())
    assert f"Not traced, whatever it calls: {'; '.join(ways)}." in text


def test_a_kind_that_a_new_release_brings_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyspark.util.PythonEvalType, "SQL_OF_TOMORROW", 999, raising=False)
    assert untraced_ways()[-1] == "SQL_OF_TOMORROW"
