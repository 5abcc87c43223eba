"""Which functions are the user's among those that reach Spark."""

from __future__ import annotations

import functools
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.delivery.spool import Destination
from mlflow_ctx_autolog.driver import spark
from mlflow_ctx_autolog.driver.instrumentor import users_function


def extract(number: int) -> int:
    return number


class Writer:
    def process(self, row: Any) -> None:
        pass


def pysparks(held: Any = None) -> Callable[..., Any]:
    """Return a function as PySpark makes them, around another."""

    def func(iterator: Any) -> Any:
        return held, iterator

    func.__module__ = "pyspark.core.rdd"
    return func


WRITER = Writer()
PARTIAL = functools.partial(extract, 1)


@pytest.mark.parametrize(
    ("handed", "users"),
    [
        (extract, extract),
        (PARTIAL, PARTIAL),
        (pysparks(extract), extract),
        (pysparks(pysparks(extract)), extract),
        (pysparks(WRITER), WRITER),
        (Writer, Writer),
        (pysparks(), None),
        (pysparks(Writer), None),
        (pysparks(len), None),
        (pysparks(["a list"]), None),
        (5, None),
    ],
)
def test_the_users_function_is_found(handed: Any, users: Any) -> None:
    """It is found inside of PySpark's own, where values, classes and builtins are no functions."""
    assert users_function(handed) is users


def test_functions_that_hold_each_other_are_no_endless_search() -> None:
    """A function of PySpark's that holds itself holds none of the user's."""

    def func() -> Any:
        return func

    func.__module__ = "pyspark.util"
    assert users_function(func) is None


AUTHENTICATED = {"spark.authenticate": "true"}


@pytest.mark.parametrize(
    ("found", "state"),
    [
        ({"spark.master": "local[2]"}, None),
        ({"spark.master": "yarn"}, "is off"),
        ({"spark.master": "yarn", **AUTHENTICATED}, "is off"),
        ({"spark.master": "yarn", **AUTHENTICATED, "spark.network.crypto.enabled": "true"}, None),
        ({"spark.master": "yarn", "spark.ssl.rpc.enabled": "true"}, None),
        ({}, "cannot be told"),
    ],
)
def test_variables_that_others_could_read_are_warned_of_once(
    database: Destination,
    found: dict[str, str],
    state: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where forward_env sends some over a network that is not known to be encrypted."""
    session = object()
    monkeypatch.setattr(spark, "active_session", lambda: session)
    monkeypatch.setattr(spark, "settings_of", lambda asked, names: found)
    for name in ("application_id", "setting"):
        monkeypatch.setattr(spark, name, lambda *_: None)
    monkeypatch.setenv("OF_THE_JOB", "secret")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ctx_autolog.enable(forward_env=["OF_THE_JOB"]), mlflow.start_span("job"):
            ctx_autolog.capture()
        with ctx_autolog.enable(), mlflow.start_span("job"):
            ctx_autolog.capture()

    said = [str(warning.message) for warning in caught if "forward_env" in str(warning.message)]
    assert len(said) == (0 if state is None else 1)
    assert all(str(state) in each and "secret" not in each for each in said)


def test_without_what_spark_connect_needs_the_driver_lives_on(tmp_path: Path) -> None:
    """PySpark ends the process that imports its client there, unless the main module is a file."""
    script = (
        "import sys; sys.modules['grpc'] = None\n"
        "import mlflow_ctx_autolog; mlflow_ctx_autolog.enable(); print('on')"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, "on\n"), ran.stderr
    assert "doctests" not in ran.stderr
