"""Which functions are the user's among those that reach Spark."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from mlflow_ctx_autolog.driver.spark import _users_function


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
    assert _users_function(handed) is users


def test_functions_that_hold_each_other_are_no_endless_search() -> None:
    """A function of PySpark's that holds itself holds none of the user's."""

    def func() -> Any:
        return func

    func.__module__ = "pyspark.util"
    assert _users_function(func) is None
