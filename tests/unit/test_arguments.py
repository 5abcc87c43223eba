"""What wrong arguments get: an error at once that names argument, value and what it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog import Handle, versions
from mlflow_ctx_autolog.driver import spark as spark_api

WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "enable text": (
        lambda: ctx_autolog.enable("x"),  # type: ignore[arg-type]
        TypeError,
        r"config='x' .* takes a Config",
    ),
    "enable misspelt": (
        lambda: ctx_autolog.enable(flush_timout=3),  # type: ignore[call-arg]
        TypeError,
        "flush_timout",
    ),
    "enable number as text": (
        lambda: ctx_autolog.enable(max_calls="10"),  # type: ignore[arg-type]
        TypeError,
        "max_calls='10' is not a whole number",
    ),
    "enable no price": (
        lambda: ctx_autolog.enable(prices={"m": 3}),  # type: ignore[dict-item]
        ValueError,
        "price of 'm' is 3; it must be two numbers",
    ),
    "enable reset to text": (
        lambda: ctx_autolog.enable(reset="yes"),  # type: ignore[arg-type]
        TypeError,
        "reset='yes' .* takes True or False",
    ),
    "traced number": (
        lambda: ctx_autolog.traced(3),  # type: ignore[type-var]
        TypeError,
        "function=3 .* takes the function",
    ),
    "traced nothing": (
        lambda: ctx_autolog.traced(None),  # type: ignore[type-var]
        TypeError,
        "function=None .* takes the function",
    ),
    "traced with no session": (
        lambda: ctx_autolog.traced(len, spark="local"),
        TypeError,
        "spark='local' is no Spark session; it takes a SparkSession",
    ),
    "attach number": (
        lambda: ctx_autolog.attach(3).__enter__(),
        ctx_autolog.CarrierError,
        "read from 'int'",
    ),
    "receipt of no trace": (
        lambda: ctx_autolog.receipt("nope"),
        ValueError,
        "trace_id='nope' .* takes the id of a trace",
    ),
    "receipt of a number": (
        lambda: ctx_autolog.receipt(3),  # type: ignore[arg-type]
        TypeError,
        "trace_id=3 .* takes the id of a trace",
    ),
    "receipt in no time": (
        lambda: ctx_autolog.receipt(timeout=-1),
        ValueError,
        "timeout=-1 .* takes seconds, at least 0",
    ),
    "flush for a text": (
        lambda: ctx_autolog.flush("30"),  # type: ignore[arg-type]
        TypeError,
        "timeout='30' .* takes seconds, at least 0",
    ),
    "doctor of a text": (
        lambda: ctx_autolog.doctor("x"),
        TypeError,
        "spark='x' is no Spark session; it takes a SparkSession",
    ),
    "doctor of no address": (
        lambda: ctx_autolog.doctor(model_url="api.openai.com"),
        ValueError,
        "model_url='api.openai.com' .* takes the address",
    ),
    "broadcast by a text": (
        lambda: ctx_autolog.broadcast("x"),
        TypeError,
        "spark='x' is no Spark session; it takes a SparkSession",
    ),
}


@pytest.mark.parametrize("label", WRONG)
def test_a_wrong_argument_is_refused(label: str) -> None:
    """At once, by a TypeError or ValueError, and nothing is on afterwards."""
    call, kind, message = WRONG[label]
    assert issubclass(kind, (TypeError, ValueError))
    with pytest.raises(kind, match=message):
        call()
    assert repr(Handle(None)) == "<mlflow-ctx-autolog: off>"


def test_a_broadcast_needs_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none is active, None stands for nothing."""
    monkeypatch.setattr(spark_api, "active_session", lambda: None)
    with pytest.raises(ValueError, match="spark=None stands for the active Spark session"):
        ctx_autolog.broadcast(None)


def test_the_driver_needs_pyspark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is missing, enable() says so, in which Python, and how to get it."""
    installed = versions.installed_version
    monkeypatch.setattr(
        versions, "installed_version", lambda name: None if name == "pyspark" else installed(name)
    )
    with pytest.raises(ctx_autolog.UnsupportedVersionError, match=r"pyspark is not .*\[local\]"):
        ctx_autolog.enable()
