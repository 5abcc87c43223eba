"""What is delivered: records, and where they belong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Destination", "Record"]


@dataclass(frozen=True)
class Destination:
    """Where a span is stored: a tracking store and an experiment in it.

    Args:
        tracking_uri: The store; None where only the driver knows it.
        experiment_id: The experiment; of spans that go to a Unity Catalog table, that table.
        driver_id: Names the driver's process that stores it; None where this process does.
        workspace: The workspace of the server that the experiment is in; None for the default one.
    """

    tracking_uri: str | None
    experiment_id: str
    driver_id: str | None = None
    workspace: str | None = None


class Record(NamedTuple):
    """One thing to be told to the store.

    Args:
        kind: ``"span"``, whose payload is an OTLP message with that one span; or ``"trace"``,
            whose payload is the JSON of MLflow's ``TraceInfo``.
        key: The span's or trace's id. A later record takes the place of an earlier one that is
            still waiting.
        payload: See ``kind``.
        owner: The task's span that it is counted under; empty for one that is not counted.
    """

    kind: str
    key: str
    payload: bytes
    owner: str = ""
