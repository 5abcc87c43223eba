"""Requests that are held against a budget, also by a spawned process, which imports this module."""

from __future__ import annotations

from typing import Any

from mlflow_ctx_autolog import BudgetExceeded, Config
from mlflow_ctx_autolog.recorder.budget import Budget, open_budget

PRICES = {"gpt-test": (2.0, 10.0)}


def admitted(budget: Budget, count: int, request: str | None = None) -> int:
    """Return how many of so many requests may be sent."""
    number = 0
    for _ in range(count):
        try:
            budget.admit("gpt-test", request)
        except BudgetExceeded:
            continue
        number += 1
    return number


def spend(folder: str, count: int, numbers: Any, start: Any = None) -> None:
    """Try to send so many requests where 50 may be; put into the queue how many were admitted.

    With a barrier ``start``, when all processes have come to it.
    """
    if start is not None:
        start.wait()
    config = Config(spool_directory=folder, max_calls=50)
    budget = open_budget(config, "trace", "first", {}, PRICES.get)
    assert budget is not None
    numbers.put(admitted(budget, count))
