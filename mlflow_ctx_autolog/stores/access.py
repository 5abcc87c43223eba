"""How far this process gets with a tracking store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlflow.exceptions import MlflowException

from mlflow_ctx_autolog.delivery.records import Destination, Record
from mlflow_ctx_autolog.exceptions import StoreError
from mlflow_ctx_autolog.stores.answers import failure
from mlflow_ctx_autolog.stores.databricks import is_table, table_access
from mlflow_ctx_autolog.stores.mlflow_client import (
    exchange_with,
    in_its_workspace,
    is_remote,
    own_errors,
    store_of,
)
from mlflow_ctx_autolog.stores.sending import send
from mlflow_ctx_autolog.stores.tracking_server import LOG_IN, json_object

__all__ = ["access"]

# Seconds that the store may take to answer whether it is there.
_PROBE_TIME = 5.0
_EXPERIMENT_PATH = "/api/2.0/mlflow/experiments/get"
_MISSING = "RESOURCE_DOES_NOT_EXIST"


def access(
    tracking_uri: str,
    experiment_id: str | None = None,
    records: Sequence[Record] = (),
    workspace: str | None = None,
) -> dict[str, str | None]:
    """Return how far this process gets with a tracking store, in seconds rather than minutes.

    Args:
        tracking_uri: The store.
        experiment_id: An experiment in it, or a Unity Catalog table; None to ask no further than
            for the log-in.
        records: What to store there, to see whether that is allowed.
        workspace: The workspace of the server that the experiment is in.

    Returns:
        For each step that was taken what is wrong there, None where nothing is. The steps are
        ``"reach"``, ``"login"``, ``"experiment"`` and ``"write"``; the first that fails is the
        last.
    """
    destination = Destination(tracking_uri, experiment_id or "0", workspace=workspace)
    if is_table(tracking_uri):
        last, problem = table_access(tracking_uri, destination.experiment_id)
        return _steps(last, problem)
    last, problem = _try_experiment(destination)
    if experiment_id is None and last == "experiment":
        last, problem = "login", None
    elif problem is None and records:
        last, problem = _try_write(destination, records)
    return _steps(last, problem)


def _steps(last: str, problem: str | None) -> dict[str, str | None]:
    """Return each step up to the last, with what is wrong there."""
    steps = ("reach", "login", "experiment", "write")
    return {**dict.fromkeys(steps[: steps.index(last)]), last: problem}


@in_its_workspace
def _try_experiment(destination: Destination) -> tuple[str, str | None]:
    """Return the last step towards reading an experiment, and what is wrong there."""
    named = f"the experiment {destination.experiment_id}"
    try:
        store = store_of(destination)
        if is_remote(store):
            question = {"experiment_id": destination.experiment_id}
            answer = exchange_with(
                store, "GET", _EXPERIMENT_PATH, timeout=_PROBE_TIME, params=question
            )
            if answer.status == 401:
                return "login", "it answered 401 to this process's log-in"
            if answer.status == 403:
                return "experiment", f"this log-in may not read {named}"
            if 300 <= answer.status < 400:
                raise failure(answer, LOG_IN, f"{store.get_host_creds().host}{_EXPERIMENT_PATH}")
            document = json_object(answer) or {}
            experiment = document.get("experiment")
            stage = experiment.get("lifecycle_stage") if isinstance(experiment, dict) else None
            is_missing = document.get("error_code") == _MISSING
            if stage is None and not is_missing:
                return "reach", f"it answered {answer.status}, and with no experiment"
        else:
            with own_errors():
                stage, is_missing = _local_stage(store, destination.experiment_id)
    except StoreError as error:
        return "reach", str(error)
    if is_missing:
        return "experiment", f"{named} does not exist"
    return "experiment", None if stage == "active" else f"{named} is {stage}"


def _try_write(destination: Destination, records: Sequence[Record]) -> tuple[str, str | None]:
    """Return the last step towards storing spans, and what is wrong there."""
    try:
        send(destination, records)
    except StoreError as error:
        # To take whole traces only is no failure.
        return ("experiment", None) if error.unsupported else ("write", str(error))
    return "write", None


def _local_stage(store: Any, experiment_id: str) -> tuple[str | None, bool]:
    try:
        return str(store.get_experiment(experiment_id).lifecycle_stage), False
    except MlflowException as error:
        if error.error_code != _MISSING:
            raise
        return None, True
