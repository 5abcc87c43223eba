"""enable() and disable() behave as MLflow users expect of autolog."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import openai
import pytest
from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter
from mlflow.tracing.processor.mlflow_v3 import MlflowV3SpanProcessor
from openai.resources.chat.completions import AsyncCompletions, Completions
from packaging.version import Version
from py4j.java_gateway import GatewayClient
from pyspark import RDD, RDDBarrier
from pyspark.sql import DataFrame as AnyDataFrame
from pyspark.sql.streaming import DataStreamWriter
from pyspark.sql.udf import UserDefinedFunction
from pyspark.sql.udtf import UserDefinedTableFunction
from pyspark.sql.utils import ForeachBatchFunction
from workload import ask, stored_traces

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog import autolog, versions
from mlflow_ctx_autolog.delivery.spool import Destination
from mlflow_ctx_autolog.driver import handover as driver
from mlflow_ctx_autolog.testing import OpenAIEndpoint, TrackingServer

try:
    from pyspark.sql.classic.dataframe import DataFrame
except ImportError:  # Before Spark 4.
    DataFrame = AnyDataFrame  # type: ignore[misc]

mlflow.openai  # noqa: B018 - imported on first use; the places below look into it.


def _places() -> dict[tuple[str, str], Any]:
    """Every place that enabling touches, as it is now."""
    owners: dict[Any, tuple[str, ...]] = {
        Completions: ("create", "parse"),
        AsyncCompletions: ("create", "parse"),
        RDD: ("mapPartitionsWithIndex",),
        RDDBarrier: ("mapPartitions", "mapPartitionsWithIndex"),
        UserDefinedFunction: ("__call__", "_judf"),
        UserDefinedTableFunction: ("__call__", "_judtf"),
        DataStreamWriter: ("_construct_foreach_function",),
        ForeachBatchFunction: ("call",),
        GatewayClient: ("send_command",),
        sys.modules["mlflow.openai.autolog"]: ("start_span_no_context",),
        sys.modules["mlflow.tracing.provider"]: ("_get_span_processors",),
        MlflowV3SpanExporter: ("_log_spans", "_log_trace"),
    }
    return {
        (owner.__name__, name): inspect.getattr_static(owner, name)
        for owner, names in owners.items()
        for name in names
        # Older clients have no Completions.parse.
        if hasattr(owner, name)
    }


@pytest.mark.parametrize("times", [1, 3])
def test_disable_leaves_nothing_behind(experiment_id: str, times: int) -> None:
    """However often it was enabled, after one disable() every function is the one it was."""
    # A trace of another test whose end MLflow could not export is waited for still.
    for book in driver.driver.ledger.books.all():
        driver.driver.ledger.forget(book.trace_id)
    ctx_autolog.disable()
    before = _places()
    for _ in range(times):
        ctx_autolog.enable()
    enabled = _places()
    untouched = {place for place in before if enabled[place] is before[place]}
    in_workers = {("mlflow.tracing.provider", "_get_span_processors")}
    for_traces = {("MlflowV3SpanExporter", name) for name in ("_log_spans", "_log_trace")}
    assert untouched == in_workers | for_traces
    with mlflow.start_span("driver"):
        ctx_autolog.capture()
        assert all(_places()[place] is not before[place] for place in for_traces)
    mlflow.flush_trace_async_logging()
    ctx_autolog.disable()
    ctx_autolog.disable()
    assert _places() == before


def test_beneath_another_librarys_patch_we_go_inert(
    experiment_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where somebody patched on top of us, theirs stays and ours passes every call through."""
    before = DataFrame.mapInPandas
    ctx_autolog.enable()
    ours: Callable[..., Any] = DataFrame.mapInPandas
    seen = []

    def theirs(*args: Any, **kwargs: Any) -> Any:
        seen.append(args)
        return ours(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(DataFrame, "mapInPandas", theirs)
        ctx_autolog.disable()
        assert DataFrame.mapInPandas is theirs

        handed_over = []
        patched.setattr(driver.driver, "submit", lambda *args: handed_over.append(args))
        with pytest.raises((AssertionError, AttributeError)):
            DataFrame.mapInPandas(None, print, "id long")  # type: ignore[arg-type]
        assert len(seen) == 1
        assert handed_over == []
    # Once theirs is gone, so is what is left of ours.
    ctx_autolog.disable()
    assert DataFrame.mapInPandas is before


def test_the_handle_restores_what_was_before(experiment_id: str) -> None:
    """As a context manager, enable() undoes itself, also where it only changed a setting."""
    before = _places()
    with ctx_autolog.enable(batch_size=7):
        with ctx_autolog.enable(batch_size=9), mlflow.start_span("x"):
            assert ctx_autolog.capture().config.batch_size == 9
        with mlflow.start_span("x"):
            assert ctx_autolog.capture().config.batch_size == 7
    # Until its trace has ended, for which MLflow has threads of its own.
    mlflow.flush_trace_async_logging()
    assert _places() == before


def test_a_setting_takes_effect_at_once(
    experiment_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keywords win over Config, Config over nothing, and the environment fills in the rest."""
    monkeypatch.setenv("MLFLOW_CTX_AUTOLOG_FLUSH_TIMEOUT", "5")
    with mlflow.start_span("x"):
        ctx_autolog.enable()
        assert ctx_autolog.capture().config.flush_timeout == 5
        ctx_autolog.enable(flush_timeout=6)
        assert ctx_autolog.capture().config.flush_timeout == 6
        ctx_autolog.enable(ctx_autolog.Config(flush_timeout=7), batch_size=3)
        config = ctx_autolog.capture().config
        assert (config.flush_timeout, config.batch_size) == (7, 3)


def _in_force() -> ctx_autolog.Config:
    config = driver.driver.config
    assert config is not None
    return config


def test_a_second_enable_changes_only_what_it_names(
    experiment_id: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The rest stays; a Config names all, reset=True takes the defaults, and the log tells."""
    monkeypatch.setenv("MLFLOW_CTX_AUTOLOG_FLUSH_TIMEOUT", "5")
    ctx_autolog.enable(max_calls=10, batch_size=7)
    with caplog.at_level(logging.INFO, logger="mlflow_ctx_autolog"):
        ctx_autolog.enable(sampling="errors+5%", batch_size=8)
    config = _in_force()
    assert (config.max_calls, config.sampling) == (10, "errors+5%")
    assert (config.batch_size, config.flush_timeout) == (8, 5)
    assert "Settings changed: batch_size from 7 to 8; sampling from None to 'errors+5%'." in (
        caplog.messages
    )
    ctx_autolog.enable(reset=True, batch_size=9)
    assert _in_force() == ctx_autolog.Config.from_env(batch_size=9)
    ctx_autolog.enable(max_calls=10)
    ctx_autolog.enable(ctx_autolog.Config(batch_size=3))
    assert _in_force() == ctx_autolog.Config(batch_size=3)
    ctx_autolog.disable()
    ctx_autolog.enable()
    assert _in_force() == ctx_autolog.Config.from_env()


def test_a_block_keeps_what_it_does_not_name_and_restores_the_rest(experiment_id: str) -> None:
    """A budget stays in force in a block, and what was changed there is taken back."""
    ctx_autolog.enable(max_calls=10)
    before = _in_force()
    with ctx_autolog.enable(strict=False, batch_size=5):
        assert (_in_force().max_calls, _in_force().batch_size) == (10, 5)
        ctx_autolog.enable(max_calls=20)
    assert _in_force() == before


def test_the_handle_says_what_is_on(experiment_id: str, server: TrackingServer) -> None:
    """In one line: where spans go, why, and which settings are not the defaults."""
    handle = ctx_autolog.enable(ctx_autolog.Config(max_calls=10))
    line = repr(handle)
    assert "\n" not in line
    assert line.startswith(
        f"<mlflow-ctx-autolog: on. Spans travel from the workers to {server.uri}: "
    )
    assert line.endswith(" Settings: max_calls=10.>")
    ctx_autolog.enable(transport="driver")
    assert f"to the driver, which stores them in {server.uri}" in repr(handle)
    ctx_autolog.disable()
    assert repr(handle) == "<mlflow-ctx-autolog: off>"


def test_nonsense_is_refused_and_changes_nothing(experiment_id: str) -> None:
    """A bad setting raises at enable(), with the value and the range, and nothing is patched."""
    before = _places()
    with pytest.raises(ValueError, match=r"batch_size=-1 .* at least 1"):
        ctx_autolog.enable(batch_size=-1)
    with pytest.raises(TypeError, match="colour"):
        ctx_autolog.enable(colour="red")  # type: ignore[call-arg]
    assert _places() == before


@pytest.mark.parametrize(
    ("package", "version"), [("mlflow", "3.8.1"), ("openai", "4.0.0"), ("pyspark", "3.4.4")]
)
def test_versions_that_cannot_be_patched_are_refused(
    experiment_id: str, monkeypatch: pytest.MonkeyPatch, package: str, version: str
) -> None:
    """enable() names the version found and those supported."""
    installed = versions.installed_version
    monkeypatch.setattr(
        versions, "installed_version", lambda name: version if name == package else installed(name)
    )
    with pytest.raises(
        ctx_autolog.UnsupportedVersionError, match=rf"{package} {version}.*from 3|1"
    ):
        ctx_autolog.enable()


def test_a_release_without_what_we_patch_is_refused(
    experiment_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where MLflow has moved the function away, enable() says so and leaves nothing behind."""
    before = _places()
    module = sys.modules["mlflow.openai.autolog"]
    with monkeypatch.context() as patched:
        patched.delattr(module, "start_span_no_context")
        patched.setattr(autolog, "_openai_calls", autolog.OpenAIAutolog())
        with pytest.raises(ctx_autolog.UnsupportedVersionError, match="start_span_no_context"):
            ctx_autolog.enable()
    assert _places() == before


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("file:///tmp/runs", "file store"),
        ("databricks", "Databricks"),
        ("https://me:planted-secret@host/x", "holds a user, a password"),
        ("https://planted-secret@host/x", "holds a user, a password"),
        ("postgresql://user:planted-secret@host/db", "holds a user, a password"),
        ("postgresql://host/db?user=me&password=planted-secret", "holds a user, a password"),
    ],
)
def test_a_store_that_workers_cannot_write_to_is_the_drivers(
    experiment_id: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    uri: str,
    reason: str,
) -> None:
    """Spans come home where workers cannot store them; the log says why, and no password travels.

    Where the workers were asked to store them, it is an error.
    """
    monkeypatch.setenv("MLFLOW_CTX_AUTOLOG_FLUSH_TIMEOUT", "0.1")
    with mlflow.start_span("x"):
        monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: uri)
        with caplog.at_level(logging.INFO, logger="mlflow_ctx_autolog"):
            ctx_autolog.enable()
        context = ctx_autolog.capture()
        with pytest.raises(ctx_autolog.UnsupportedStoreError, match=reason):
            ctx_autolog.enable(transport="direct")

    assert context.tracking_uri is None
    assert "planted-secret" not in context.to_json()
    assert "planted-secret" not in caplog.text
    assert reason in caplog.text
    assert "to the driver" in caplog.text


def test_the_transport_can_be_chosen(experiment_id: str, server: TrackingServer) -> None:
    """Spans go to the store directly where it takes them, and by way of the driver when asked."""
    with mlflow.start_span("x"):
        ctx_autolog.enable()
        assert ctx_autolog.capture().tracking_uri == server.uri
        ctx_autolog.enable(transport="driver")
        assert ctx_autolog.capture().tracking_uri is None
    with pytest.raises(ValueError, match=r"transport='pigeon'.*auto, direct, driver"):
        ctx_autolog.enable(transport="pigeon")


def test_a_store_that_cannot_end_such_a_trace_is_warned_of(
    experiment_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow 3.9 fails at the end of the driver's trace; enable() says so, and of no other."""
    from mlflow.store.tracking.rest_store import RestStore

    ctx_autolog.enable()
    monkeypatch.setattr(RestStore, "_get_server_version", lambda *_: Version("3.9.0"))
    with pytest.warns(ctx_autolog.CtxAutologWarning, match=r"MLflow 3\.9\.0.*3\.10"):
        ctx_autolog.enable()


def test_a_server_that_is_away_does_not_stop_enable(
    experiment_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """enable() works while the server is down, and MLflow can still ask for its version later."""
    from mlflow.store.tracking.rest_store import RestStore

    RestStore._get_server_version.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(mlflow, "get_tracking_uri", lambda: "http://127.0.0.1:9")
        ctx_autolog.enable()
    assert RestStore._get_server_version.cache_info().currsize == 0


def test_a_unity_catalog_location_without_a_table_is_refused(
    experiment_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where neither workers nor the driver could store the spans, enable() raises."""
    registry = sys.modules["mlflow.tracing.provider"]._MLFLOW_TRACE_USER_DESTINATION
    monkeypatch.setattr(registry, "get", lambda: SimpleNamespace(catalog_name="catalog"))
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: "databricks")
    before = _places()
    with pytest.raises(ctx_autolog.UnsupportedStoreError, match="Unity Catalog"):
        ctx_autolog.enable()
    assert _places() == before


def test_a_damaged_traceparent_is_refused(
    experiment_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is asked for, and nothing is left enabled."""
    monkeypatch.setenv("TRACEPARENT", "00-not-hex-01")
    before = _places()
    with pytest.raises(ValueError, match="TRACEPARENT='00-not-hex-01' is not a W3C traceparent"):
        ctx_autolog.enable(join_trace=True)
    assert _places() == before
    monkeypatch.setenv("TRACEPARENT", f"00-{'a' * 32}-{'b' * 16}-01")
    with ctx_autolog.enable(join_trace=True):
        assert ctx_autolog.capture().traceparent == f"00-{'a' * 32}-{'b' * 16}-01"
        with mlflow.start_span("job") as span:
            assert (span.trace_id, span.parent_id) == (f"tr-{'a' * 32}", "b" * 16)
    with mlflow.start_span("other") as other:
        assert other.parent_id is None


def test_a_relative_database_is_the_same_for_workers(
    database: Destination, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An SQLite file named relative to the driver's folder travels by its full path."""
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    with mlflow.start_span("x"):
        assert ctx_autolog.capture().tracking_uri == database.tracking_uri
    mlflow.flush_trace_async_logging()
    ctx_autolog.disable()


def test_in_the_drivers_own_process_attach_only_activates(
    experiment_id: str, endpoint: OpenAIEndpoint
) -> None:
    """attach() where the context was captured, in any thread, makes the driver's span active."""
    import threading

    client = openai.OpenAI(base_url=endpoint.base_url, api_key="not-a-key")
    ctx_autolog.enable()
    with mlflow.start_span("driver"):
        context = ctx_autolog.capture()

        def work() -> None:
            with ctx_autolog.attach(context):
                ask(client, 1)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    (trace,) = stored_traces(experiment_id)
    (call,) = trace.calls
    assert call.parent_id == trace.root.span_id
    assert trace.tasks == []


def test_a_span_that_mlflow_could_not_start_is_no_parent(
    database: Destination, endpoint: OpenAIEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call inside it is made as ever and is a trace of its own, and no context is carried."""
    client = openai.OpenAI(base_url=endpoint.base_url, api_key="not-a-key", max_retries=0)

    def fail(*args: Any) -> None:
        raise ConnectionError("the tracking server is away")

    ctx_autolog.enable()
    with monkeypatch.context() as patched:
        patched.setattr(MlflowV3SpanProcessor, "_start_trace", fail)
        span = mlflow.start_span("job")
        with span:
            patched.undo()
            ask(client, 1)
            context = ctx_autolog.capture()

    assert context.traceparent is None
    assert len(stored_traces(database.experiment_id)) == 1
