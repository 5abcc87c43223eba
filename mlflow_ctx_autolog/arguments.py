"""Checks of the arguments of public functions: each error names argument, value, what it takes."""

from __future__ import annotations

import re
from typing import Any

from mlflow_ctx_autolog.exceptions import shortened

__all__ = [
    "check_function",
    "check_number",
    "check_spark",
    "check_type",
    "check_url",
]


def _shown(name: str, value: object) -> str:
    return f"{name}={shortened(repr(value))}"


def check_type(name: str, value: object, kind: type | tuple[type, ...], takes: str) -> None:
    """Check an argument.

    Args:
        name: The parameter's name.
        value: What it was given.
        kind: The class, or classes, that it has to be of.
        takes: What it takes, in words.

    Raises:
        TypeError: It is of another.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{_shown(name, value)} cannot be used; it takes {takes}")


def check_function(name: str, value: object) -> None:
    """Check what is to run on workers.

    Raises:
        TypeError: Spark could not call it.
    """
    # Of a DataStreamWriter.foreach() or a StatefulProcessor, Spark calls a method.
    if not callable(value) and not any(hasattr(value, each) for each in _CALLED_METHODS):
        raise TypeError(
            f"{_shown(name, value)} cannot be called; it takes the function that you hand to Spark"
        )


_CALLED_METHODS = ("process", "handleInputRows")


def check_spark(name: str, value: Any) -> None:
    """Check a Spark session or context, classic or Connect; None stands for the active one.

    Raises:
        TypeError: It is neither.
    """
    # Asked of the class: nothing has to be imported, and stand-ins of tests pass.
    kind = type(value)
    if value is not None and not any(
        hasattr(kind, each) for each in ("createDataFrame", "parallelize")
    ):
        raise TypeError(
            f"{_shown(name, value)} is no Spark session; it takes a SparkSession, classic or "
            "Connect, or a SparkContext, or None for the active one"
        )


def check_number(name: str, value: object, takes: str) -> None:
    """Check a number of seconds or the like, that is not negative.

    Raises:
        TypeError: It is no number.
        ValueError: It is negative or no number at all.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{_shown(name, value)} is not a number; it takes {takes}")
    if not value >= 0:
        raise ValueError(f"{_shown(name, value)} is out of range; it takes {takes}")


def check_url(name: str, value: object) -> None:
    """Check the address of an HTTP server; None stands for the default one.

    Raises:
        TypeError: It is no text.
        ValueError: It is no address.
    """
    takes = "the address of a model endpoint, such as https://host/v1"
    if value is None:
        return
    check_type(name, value, str, takes)
    if not re.match("https?://[^/]", str(value)):
        raise ValueError(f"{_shown(name, value)} is no address; it takes {takes}")
