"""Where Python daemons look for this library when a job has sent it along."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mlflow_ctx_autolog.driver.daemon_path import tell_daemons


def context(files: str, daemon: str | None, path: str | None = None, added: Any = ()) -> Any:
    """Return a stand-in for a SparkContext with these files."""
    conf = {"spark.submit.pyFiles": files, "spark.python.daemon.module": daemon}
    environment = {} if path is None else {"PYTHONPATH": path}
    return SimpleNamespace(
        environment=environment,
        _python_includes=list(added),
        getConf=lambda: SimpleNamespace(get=lambda name, default: conf[name] or default),
    )


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
    given = context(files, "mlflow_ctx_autolog.daemon", before, added)
    tell_daemons(given)
    tell_daemons(given)
    assert given.environment.get("PYTHONPATH") == after


def test_another_daemon_is_left_alone() -> None:
    """It has no need of the library."""
    given = context("/a/mlflow_ctx_autolog.zip", None)
    tell_daemons(given)
    assert given.environment == {}
