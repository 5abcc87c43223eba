"""Where the driver's trace goes, and what it is like, the spans of workers go and are as well."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import mlflow
import pytest
from mlflow.entities.trace_location import MlflowExperimentLocation
from mlflow.tracking.default_experiment.databricks_notebook_experiment_provider import (
    DatabricksNotebookExperimentProvider,
)
from submitted import arrived
from workload import stored_trace, stored_traces

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.delivery.spool import Destination
from mlflow_ctx_autolog.driver import handover as driver
from mlflow_ctx_autolog.driver import spark
from mlflow_ctx_autolog.driver.instrumentor import FunctionUse
from mlflow_ctx_autolog.driver.routes import describe_transport
from mlflow_ctx_autolog.stores import tracking_store as store

pytestmark = pytest.mark.filterwarnings("ignore::mlflow_ctx_autolog.CtxAutologWarning")


@pytest.fixture
def other(database: Destination, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Another experiment than the one that is active."""
    yield mlflow.MlflowClient().create_experiment("other")
    monkeypatch.undo()
    mlflow.tracing.reset()


def _by_name(other: str, patch: pytest.MonkeyPatch) -> None:
    mlflow.set_experiment("other")


def _by_id(other: str, patch: pytest.MonkeyPatch) -> None:
    mlflow.set_experiment(experiment_id=other)


def _none_active(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mlflow.tracking.fluent, "_active_experiment_id", None)
    # Which set_experiment() sets for the processes that this one starts.
    patch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)


def _by_variable(other: str, patch: pytest.MonkeyPatch) -> None:
    _none_active(patch)
    patch.setenv("MLFLOW_EXPERIMENT_ID", other)


def _by_name_in_variable(other: str, patch: pytest.MonkeyPatch) -> None:
    _none_active(patch)
    patch.setenv("MLFLOW_EXPERIMENT_NAME", "other")


def _as_default_of_a_notebook(other: str, patch: pytest.MonkeyPatch) -> None:
    _none_active(patch)
    patch.setattr(DatabricksNotebookExperimentProvider, "in_context", lambda self: True)
    patch.setattr(DatabricksNotebookExperimentProvider, "get_experiment_id", lambda self: other)


def _as_destination(other: str, patch: pytest.MonkeyPatch) -> None:
    mlflow.tracing.set_destination(MlflowExperimentLocation(other))


def _as_destination_of_this_context(other: str, patch: pytest.MonkeyPatch) -> None:
    mlflow.tracing.set_destination(MlflowExperimentLocation(other), context_local=True)


def _as_destination_in_variable(other: str, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("MLFLOW_TRACING_DESTINATION", other)
    mlflow.tracing.provider.reset()


def _as_run(other: str, patch: pytest.MonkeyPatch) -> None:
    mlflow.start_run(experiment_id=other)


@pytest.mark.parametrize("has_span", [True, False])
@pytest.mark.parametrize(
    "choose",
    [
        _by_name,
        _by_id,
        _by_variable,
        _by_name_in_variable,
        _as_default_of_a_notebook,
        _as_destination,
        _as_destination_of_this_context,
        _as_destination_in_variable,
        _as_run,
    ],
)
def test_workers_store_where_the_driver_does(
    other: str,
    choose: Callable[[str, pytest.MonkeyPatch], None],
    has_span: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However the experiment was chosen, whether a span is active or not."""
    choose(other, monkeypatch)
    try:
        with mlflow.start_span("job") if has_span else nullcontext():
            assert ctx_autolog.capture().experiment_id == other
    finally:
        mlflow.end_run()


def test_traces_of_tasks_are_as_declared(database: Destination) -> None:
    """Without a span on the driver, they have what mlflow.tracing.context says."""
    with mlflow.tracing.context(
        session_id="s-1", user="alice", tags={"team": "legal"}, metadata={"contract": "c-7"}
    ):
        document = json.loads(ctx_autolog.capture().to_json())
    carrier = json.dumps({**document, "process_id": "another"})
    arrived(lambda: None, carrier, required=True)()

    (trace,) = stored_traces("0")
    assert trace.metadata["mlflow.trace.session"] == "s-1"
    assert trace.metadata["mlflow.trace.user"] == "alice"
    assert trace.metadata["contract"] == "c-7"
    assert trace.trace.info.tags["team"] == "legal"
    assert trace.trace.info.state == "OK"
    assert trace.trace.info.execution_duration is not None


@pytest.mark.parametrize("is_by_context", [True, False])
def test_where_tracing_is_off_functions_stay_as_they_are(
    database: Destination, is_by_context: bool
) -> None:
    """Nothing is traced on workers that would not be traced on the driver."""

    def extract() -> None:
        """Do nothing."""

    if is_by_context:
        with mlflow.tracing.context(enabled=False):
            use = FunctionUse(extract, extract, None, False, False, False, False)
            assert driver.driver.submit(use) is None
            assert ctx_autolog.traced(extract) is extract
        return
    mlflow.tracing.disable()
    try:
        assert ctx_autolog.traced(extract) is extract
    finally:
        mlflow.tracing.enable()


@pytest.mark.parametrize("ratio", ["0", "1"])
def test_tasks_that_are_traces_of_their_own_are_sampled_as_on_the_driver(
    database: Destination, ratio: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ratio travels, so that of a job without a span as many tasks are kept."""
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", ratio)
    document = json.loads(ctx_autolog.capture().to_json())
    monkeypatch.delenv("MLFLOW_TRACE_SAMPLING_RATIO")
    carrier = json.dumps({**document, "process_id": "another"})
    for _ in range(3):
        arrived(lambda: None, carrier, required=True)()

    assert len(stored_traces("0")) == 3 * int(ratio)


@pytest.mark.parametrize(
    ("uri", "is_here"),
    [
        ("http://127.0.0.1:5000", True),
        ("http://localhost:5000", True),
        ("http://[::1]:5000", True),
        ("sqlite:////tmp/x.db", True),
        ("http://mlflow.example:5000", False),
        ("postgresql://db.example/mlflow", False),
        ("databricks", False),
    ],
)
def test_addresses_of_this_host_only_are_told_apart(uri: str, is_here: bool) -> None:
    """Those that mean another place on another machine."""
    assert store.is_of_this_host(uri) is is_here


class Session:
    """Of Spark Connect, as far as its settings are asked for."""

    def __init__(self, **settings: str) -> None:
        self._settings = {f"spark.{name}": value for name, value in settings.items()}

    @property
    def conf(self) -> Any:
        return self._settings


@pytest.mark.parametrize(
    ("master", "elsewhere"),
    [
        ("local[2]", False),
        ("local-cluster[2,1,1024]", False),
        ("spark://127.0.0.1:7077", False),
        ("spark://host:7077", True),
        ("yarn", True),
        ("k8s://https://host:443", True),
        (None, False),
    ],
)
def test_spans_come_home_where_workers_cannot_reach_the_address(
    database: Destination, master: str | None, elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With workers on other hosts, auto does not send them to an address of this one."""
    session = Session(**({} if master is None else {"master": master}))
    monkeypatch.setattr(spark, "active_session", lambda: session)

    mlflow.set_tracking_uri("http://127.0.0.1:5000")
    assert ("to the driver" in describe_transport(driver.settings())) is elsewhere
    # Of a database, wherever they are, unless that is asked for.
    mlflow.set_tracking_uri(database.tracking_uri)
    assert "to the driver" in describe_transport(driver.settings())
    monkeypatch.setenv("MLFLOW_CTX_AUTOLOG_TRANSPORT", "direct")
    assert "from the workers to sqlite" in describe_transport(driver.settings())


def test_spans_of_other_libraries_nest_where_mlflow_shares_its_provider(
    database: Destination,
) -> None:
    """With MLFLOW_USE_DEFAULT_TRACER_PROVIDER=false on the driver, in a worker as well."""
    with mlflow.start_span("driver") as span:
        document = json.loads(ctx_autolog.capture().to_json())
    document["environment"] = {"MLFLOW_USE_DEFAULT_TRACER_PROVIDER": "false"}
    script = f"""
        import mlflow
        from opentelemetry import trace
        from mlflow_ctx_autolog.worker.runner import load_submitted

        def extract():
            with trace.get_tracer("other").start_as_current_span("of another library"):
                with mlflow.start_span("mine"):
                    pass

        options = {{"name": "extract", "repeated": False}}
        load_submitted(extract, options, {json.dumps(document)!r})()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)

    trace = stored_trace(span.trace_id)
    by_name = {each.name: each for each in trace.spans}
    (task,) = trace.tasks
    assert by_name["of another library"].parent_id == task.span_id
    assert by_name["mine"].parent_id == by_name["of another library"].span_id
