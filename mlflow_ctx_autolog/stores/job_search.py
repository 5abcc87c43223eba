"""Finding jobs in a tracking store by what it knows of their traces, without reading spans."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.tracing.client import TracingClient
from mlflow.tracking import fluent

from mlflow_ctx_autolog.exceptions import StoreError, shortened
from mlflow_ctx_autolog.stores.stored_trace import JOB_TAG, TRACE_KEY

__all__ = ["FoundJob", "current_experiment_id", "experiment_id_of", "find_jobs", "log_metrics"]

_NAME_TAG = "mlflow.traceName"
_AT_ONCE = 500


@dataclass(frozen=True)
class FoundJob:
    """What the store knows of a job's trace.

    Args:
        trace_id: MLflow's id.
        name: Of the trace; its id where it has none.
        state: ``OK``, ``ERROR`` or ``IN_PROGRESS``.
        started: Milliseconds since the epoch.
        milliseconds: How long it took; None while it runs.
        metadata: What MLflow and the driver say of it.
    """

    trace_id: str
    name: str
    state: str
    started: int
    milliseconds: int | None
    metadata: Mapping[str, str]


def current_experiment_id() -> str:
    """Return the id of MLflow's current experiment."""
    return str(fluent._get_experiment_id())


def experiment_id_of(uri: str, experiment: str) -> str:
    """Return the id of an experiment that is named by it, or by its name.

    Raises:
        StoreError: There is none, or the store does not answer.
    """
    client = mlflow.MlflowClient(uri)
    try:
        found = client.get_experiment_by_name(experiment)
        if found is None and experiment.isdigit():
            found = client.get_experiment(experiment)
    except MlflowException as error:
        raise _failure(f"the experiment {experiment!r} of {uri}", error) from error
    if found is None:
        raise StoreError(f"there is no experiment {experiment!r} in {uri}")
    return str(found.experiment_id)


def find_jobs(uri: str, experiment_id: str, since: int | None = None) -> Iterator[FoundJob]:
    """Yield the jobs of an experiment, the latest first; traces of other origin are left out.

    Args:
        uri: Where to look.
        experiment_id: The experiment.
        since: Milliseconds since the epoch at which the first may have begun.

    Raises:
        StoreError: The store does not answer, or has no such experiment.
    """
    conditions = [] if since is None else [f"trace.timestamp_ms >= {since}"]
    no_linked = [*conditions, f"tag.`{JOB_TAG}` IS NULL"]
    token: str | None = None
    while True:
        try:
            try:
                page = _page(uri, experiment_id, no_linked, token)
            except MlflowException:
                if token is not None or no_linked == conditions:
                    raise
                # Which older releases do not take.
                no_linked = conditions
                page = _page(uri, experiment_id, no_linked, token)
        except MlflowException as error:
            raise _failure(f"the experiment {experiment_id} of {uri}", error) from error
        for trace in page:
            info = trace.info
            # A linked trace belongs to the job that it names.
            if info.trace_metadata.get(TRACE_KEY) == info.trace_id:
                yield _found(info)
        token = page.token
        if not token:
            return


def _page(uri: str, experiment_id: str, conditions: Sequence[str], token: str | None) -> Any:
    return _client(uri).search_traces(
        experiment_ids=[experiment_id],
        filter_string=" AND ".join(conditions) or None,
        max_results=_AT_ONCE,
        order_by=["timestamp_ms DESC"],
        page_token=token,
        include_spans=False,
    )


def _found(info: Any) -> FoundJob:
    return FoundJob(
        str(info.trace_id),
        str(info.tags.get(_NAME_TAG) or info.trace_id),
        str(getattr(info.state, "value", info.state)),
        int(info.request_time),
        None if info.execution_duration is None else int(info.execution_duration),
        dict(info.trace_metadata),
    )


def log_metrics(metrics: Mapping[str, float]) -> None:
    """Log numbers to the active run.

    Raises:
        RuntimeError: No run is active.
    """
    if mlflow.active_run() is None:
        raise RuntimeError("No MLflow run is active; log inside with mlflow.start_run():")
    mlflow.log_metrics(dict(metrics))


@functools.lru_cache(maxsize=8)
def _client(uri: str) -> TracingClient:
    return TracingClient(uri)


def _failure(what: str, error: MlflowException) -> StoreError:
    return StoreError(f"{what} cannot be read: {shortened(str(error))}")
