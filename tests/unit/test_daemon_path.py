"""Where Python daemons look for this library when a job has sent it along."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mlflow_ctx_autolog.driver.daemon_path import tell_daemons


def context(path: str | None = None, added: Any = ()) -> Any:
    """Return a stand-in for a SparkContext that files were added to."""
    environment = {} if path is None else {"PYTHONPATH": path}
    return SimpleNamespace(environment=environment, _python_includes=list(added))


def settings(files: str, daemon: str = "mlflow_ctx_autolog.daemon") -> dict[str, str]:
    """Return the settings of a job that was sent with these files."""
    sent = {"spark.submit.pyFiles": files} if files else {}
    return {**sent, "spark.python.daemon.module": daemon}


@pytest.mark.parametrize(
    ("files", "added", "before", "after"),
    [
        ("/a/mlflow_ctx_autolog.zip", [], None, "mlflow_ctx_autolog.zip"),
        ("hdfs://h/b.zip,hdfs://h/mlflow_ctx_autolog.zip", [], "x", "x:mlflow_ctx_autolog.zip"),
        ("", ["mlflow_ctx_autolog.zip"], None, "mlflow_ctx_autolog.zip"),
        ("/a/mlflow_ctx_autolog.zip", [], "mlflow_ctx_autolog.zip", "mlflow_ctx_autolog.zip"),
        ("/a/other.zip", [], None, None),
    ],
)
def test_the_daemon_looks_beside_itself(
    files: str, added: list[str], before: str | None, after: str | None
) -> None:
    """For the library's file, once, and only where it is among the job's."""
    given = context(before, added)
    tell_daemons(given, settings(files))
    tell_daemons(given, settings(files))
    assert given.environment.get("PYTHONPATH") == after


def test_another_daemon_is_left_alone() -> None:
    """It has no need of the library."""
    given = context()
    tell_daemons(given, settings("/a/mlflow_ctx_autolog.zip", "another.daemon"))
    tell_daemons(given, {})
    assert given.environment == {}
