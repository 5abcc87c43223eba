"""Jobs in a tracking store: which there are, and all spans of one, wherever they are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mlflow_ctx_autolog.exceptions import StoreError
from mlflow_ctx_autolog.stores import reading
from mlflow_ctx_autolog.stores.job_search import current_experiment_id, find_jobs
from mlflow_ctx_autolog.stores.stored_trace import (
    LINKED_TRACE,
    TRACE_KEY,
    StoredSpan,
    StoredTrace,
)

__all__ = ["Job", "await_own_jobs", "before_reading", "last_jobs", "read_job"]

# What is done before jobs are read, since some of this process' own may be on their way.
before_reading: list[Callable[[], object]] = []


@dataclass(frozen=True)
class Job:
    """One job, which is one trace of the driver.

    Args:
        trace_id: MLflow's id.
        experiment_id: Of the experiment that it is kept in.
        name: Of its root span; its id where there is none.
        started: Nanoseconds since the epoch; None where not known.
        ended: The same; None where it runs still.
    """

    trace_id: str
    experiment_id: str
    name: str
    started: int | None = None
    ended: int | None = None

    @property
    def seconds(self) -> float | None:
        """How long it took."""
        if self.started is None or self.ended is None:
            return None
        return (self.ended - self.started) / 1e9


def await_own_jobs() -> None:
    """Wait for what is on its way of jobs of this process, before any are read."""
    for do in before_reading:
        do()


def last_jobs(uri: str, count: int) -> list[str]:
    """Return the ids of the last jobs of the current experiment, the latest first.

    Where more than one is asked for, those of the same name as the latest.

    Raises:
        StoreError: The store does not answer, or there are fewer.
    """
    experiment_id = current_experiment_id()
    found: list[str] = []
    name: str | None = None
    for info in find_jobs(uri, experiment_id):
        if name is None:
            name = info.name
        if info.name == name:
            found.append(info.trace_id)
            if len(found) == count:
                return found
    what = "no job" if not found else f"only one job named {name!r}"
    raise StoreError(
        f"there is {what} in the experiment {experiment_id} of {uri}: name a trace, or set the "
        "experiment with mlflow.set_experiment()"
    )


def read_job(
    uri: str, trace_id: str, wanted: Callable[[str], bool], note: Callable[[str], None]
) -> StoredTrace:
    """Return a trace, or that of its job, with the spans of the traces linked to its tasks.

    Args:
        uri: Where it is stored.
        trace_id: MLflow's id.
        wanted: Which attributes of its spans to keep, by their names.
        note: Is told what cannot be read.

    Raises:
        StoreError: The store does not answer, or has no such trace.
    """
    trace = reading.read_stored_trace(uri, trace_id, wanted)
    job_trace_id = trace.metadata.get(TRACE_KEY, trace_id)
    if job_trace_id != trace.trace_id:
        trace = reading.read_stored_trace(uri, job_trace_id, wanted)

    def spans() -> Iterator[StoredSpan]:
        linked: list[str] = []
        for span in trace.spans:
            if (linked_id := span.text(LINKED_TRACE)) is not None:
                linked.append(linked_id)
            yield span
        for linked_id in linked:
            try:
                yield from reading.read_stored_trace(uri, linked_id, wanted).spans
            except StoreError as error:
                note(f"The linked trace {linked_id} of {trace.trace_id} cannot be read: {error}")

    return replace(trace, spans=spans())
