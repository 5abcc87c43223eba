"""Carriers are few: functions and actions share them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mlflow_ctx_autolog.context import BY_PROPERTY, DriverContext
from mlflow_ctx_autolog.driver.carriers import Carriers

PARENTS = [f"00-{number:032x}-{number:016x}-01" for number in (1, 2)]
SHARED = DriverContext("0", propagation=BY_PROPERTY)


class Spark:
    """Broadcasts."""

    def __init__(self) -> None:
        self.broadcasts: list[str] = []

    def broadcast(self, text: str) -> list[str]:
        self.broadcasts.append(text)
        return [text]


def carrier(carriers: Carriers, spark: Any, parent: str, shared: DriverContext = SHARED) -> Any:
    return carriers.of(shared, lambda: replace(shared, traceparent=parent), spark)


def test_one_broadcast_serves_all_spans() -> None:
    """It has the span in which it was made."""
    carriers, spark = Carriers(), Spark()
    first, second = [carrier(carriers, spark, parent) for parent in PARENTS]
    assert first is second
    (text,) = spark.broadcasts
    assert DriverContext.from_json(text).traceparent == PARENTS[0]


def test_other_settings_and_another_application_have_their_own() -> None:
    carriers, spark, other = Carriers(), Spark(), Spark()
    carrier(carriers, spark, PARENTS[0])
    carrier(carriers, spark, PARENTS[0], replace(SHARED, experiment_id="1"))
    carrier(carriers, other, PARENTS[1])
    assert (len(spark.broadcasts), len(other.broadcasts)) == (2, 1)


def test_where_nothing_can_be_broadcast_it_is_a_text() -> None:
    """The same one each time, so that functions pickle alike."""
    carriers = Carriers()
    texts = [carrier(carriers, None, parent) for parent in PARENTS]
    assert texts[0] is texts[1]


def test_the_active_span_is_asked_for_only_where_a_carrier_is_made() -> None:
    carriers = Carriers()
    carrier(carriers, None, PARENTS[0])
    assert carriers.of(SHARED, lambda: pytest.fail("asked again"), None)
