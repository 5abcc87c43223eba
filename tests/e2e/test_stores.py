"""Each store by each transport: every call below the driver's span, and totals that are right.

``docs/stores.md`` says the same in a table, which is checked against what is tested here.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import postgresql
import pytest
import requests
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData
from pyspark.sql import SparkSession
from workload import SCHEMA, extractor, stored_trace

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import (
    Collector,
    DatabricksWorkspace,
    OpenAIEndpoint,
    TrackingServer,
)

IS_PRELOADED = True

LOG_IN = ["MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"]
PASSWORD = "correct-horse-battery"
ORCHESTRATOR = "a" * 32
WORKSPACE = "legal"
COLLECTOR_KEY = "key of the collector"

Environment = dict[str, str]


@contextmanager
def sqlite_file(folder: Path) -> Iterator[tuple[str, Environment]]:
    yield f"sqlite:///{folder}/mlflow.db", {}


@contextmanager
def server_on_sqlite(folder: Path) -> Iterator[tuple[str, Environment]]:
    with TrackingServer(folder) as server:
        yield server.uri, {}


@contextmanager
def server_on_postgresql(folder: Path) -> Iterator[tuple[str, Environment]]:
    if postgresql.binaries() is None:
        pytest.skip("Debian's postgresql is not installed: apt-get install postgresql")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with (
        postgresql.database(port) as address,
        TrackingServer(folder, backend_store_uri=address) as server,
    ):
        yield server.uri, {}


@contextmanager
def server_with_log_in(folder: Path) -> Iterator[tuple[str, Environment]]:
    with TrackingServer(folder, password=PASSWORD) as server:
        yield server.uri, dict(zip(LOG_IN, ("admin", PASSWORD), strict=True))


@contextmanager
def server_with_workspaces(folder: Path) -> Iterator[tuple[str, Environment]]:
    with TrackingServer(folder, options=["--enable-workspaces"]) as server:
        requests.post(
            f"{server.uri}/api/3.0/mlflow/workspaces", json={"name": WORKSPACE}, timeout=30
        ).raise_for_status()
        yield server.uri, {"MLFLOW_WORKSPACE": WORKSPACE}


@contextmanager
def folder_of_files(folder: Path) -> Iterator[tuple[str, Environment]]:
    yield folder.as_uri(), {"MLFLOW_ALLOW_FILE_STORE": "true"}


@contextmanager
def databricks(folder: Path) -> Iterator[tuple[str, Environment]]:
    with DatabricksWorkspace() as workspace:
        experiment = {"MLFLOW_EXPERIMENT_ID": workspace.experiment_id}
        yield "databricks", {**workspace.environment, **experiment}


Store = Callable[[Path], AbstractContextManager[tuple[str, Environment]]]
STORES: dict[str, tuple[Store, list[str]]] = {
    "SQLite file": (sqlite_file, ["auto", "direct", "driver"]),
    "Server on SQLite": (server_on_sqlite, ["auto", "direct", "driver"]),
    "Server on PostgreSQL": (server_on_postgresql, ["auto", "direct", "driver"]),
    "Server with a log-in that workers lack": (server_with_log_in, ["auto", "direct", "driver"]),
    "Server with workspaces": (server_with_workspaces, ["auto", "direct", "driver"]),
    "Folder of files": (folder_of_files, ["auto", "driver"]),
    "Databricks, traces in the experiment": (databricks, ["auto", "driver"]),
}


def test_the_table_of_the_documentation_is_what_is_tested() -> None:
    """Store by store, the transports that docs/stores.md calls refused are those not tested."""
    text = (Path(__file__).parents[2] / "docs" / "stores.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    assert rows[0] == ("store", "auto", "direct", "driver", "otlp")
    cells = {name: set(transports) for name, (_, transports) in STORES.items()}
    # In test_unity_catalog.py.
    cells["Databricks, traces in Unity Catalog"] = {"auto", "direct", "driver"}
    cells["OpenTelemetry collector"] = {"auto", "otlp"}
    documented = {
        name: {transport for transport, cell in zip(rows[0][1:], row, strict=True) if cell != "-"}
        for name, *row in rows[1:]
        if not name.startswith("--")
    }
    assert documented == cells


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLflow's state as at the start of a process, before and after."""
    uri = mlflow.get_tracking_uri()
    mlflow.flush_trace_async_logging(terminate=True)
    mlflow.tracing.reset()
    monkeypatch.setattr(mlflow.tracking.fluent, "_active_experiment_id", None)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
    yield
    ctx_autolog.disable()
    mlflow.flush_trace_async_logging(terminate=True)
    monkeypatch.undo()
    mlflow.tracing.reset()
    mlflow.set_tracking_uri(uri)


def _storing(
    url: str, timeout: float
) -> Callable[[Iterable[pd.DataFrame]], Iterator[pd.DataFrame]]:
    """Return a function that answers whether the worker itself has stored its calls so far."""

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in extractor(url)(batches):
            yield batch.assign(answer=str(ctx_autolog.flush(timeout)))

    return extract


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name == "Server with workspaces" else name
        for name in STORES
    ],
)
def test_every_call_is_in_every_store(
    spark: SparkSession,
    clean: None,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By each transport that the store takes; what it does not take is refused at enable()."""
    store, transports = STORES[name]
    (tmp_path / "store").mkdir()
    with store(tmp_path / "store") as (uri, environment):
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
        mlflow.set_tracking_uri(uri)
        if "MLFLOW_EXPERIMENT_ID" not in environment:
            mlflow.set_experiment("any")
        for transport in transports:
            with (
                OpenAIEndpoint() as endpoint,
                # Where the store has a log-in, direct works for those who let it travel.
                ctx_autolog.enable(
                    transport=transport,
                    forward_env=LOG_IN if transport == "direct" else (),
                ),
                mlflow.start_span("job") as span,
            ):
                extract = _storing(endpoint.base_url, 60 if transport == "direct" else 0)
                rows = spark.range(0, 4, 1, 2).mapInPandas(extract, SCHEMA).collect()
            if transport == "direct":
                assert {row.answer for row in rows} == {"True"}
            assert ctx_autolog.flush(60)
            trace = stored_trace(span.trace_id)
            assert len(endpoint.requests) == 4, transport
            trace.assert_nested(calls=4)
            assert trace.total_tokens == endpoint.total_tokens > 0, transport
            assert ctx_autolog.receipt(timeout=30).complete, transport
            info = stored_trace(span.trace_id).trace.info
            assert info.request_preview == "extract on 4 rows; 2 tasks; gpt-test", transport
            assert str(info.response_preview).startswith("4 calls, 0 errors, "), transport
        if "direct" not in transports:
            with pytest.raises(ctx_autolog.UnsupportedStoreError, match="set to 'direct', but"):
                ctx_autolog.enable(transport="direct")


def test_a_unity_catalog_location_gets_every_span(
    spark: SparkSession,
    clean: None,
    endpoint: OpenAIEndpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The driver posts the spans of workers to the table of its own, and the totals are right."""
    with DatabricksWorkspace("main.traces.legal") as workspace:
        for variable, value in workspace.environment.items():
            monkeypatch.setenv(variable, value)
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", workspace.experiment_id)
        mlflow.set_tracking_uri("databricks")
        with ctx_autolog.enable(), mlflow.start_span("job") as span:
            extract = extractor(endpoint.base_url)
            spark.range(0, 4, 1, 2).mapInPandas(extract, SCHEMA).collect()
        mlflow.flush_trace_async_logging()
        assert ctx_autolog.flush(60)
        tables = {table for table, _ in workspace.spans}
        spans = _spans([message for _, message in workspace.spans])
        (info,) = workspace.infos.values()

    assert tables == {"main.traces.legal_otel_spans"}
    by_id = {each.span_id: each for each in spans}
    (root,) = [each for each in spans if not each.parent_span_id]
    tasks = [each for each in by_id.values() if each.parent_span_id == root.span_id]
    calls = [each for each in by_id.values() if by_id.get(each.parent_span_id) in tasks]
    assert (len(tasks), len(calls)) == (2, 4)
    assert {each.trace_id.hex() for each in spans} == {span.trace_id.rpartition("/")[2]}
    usage = json.loads(info["trace_metadata"]["mlflow.trace.tokenUsage"])
    assert usage["total_tokens"] == endpoint.total_tokens > 0


def _spans(messages: list[bytes]) -> list[SpanMessage]:
    return [
        span
        for message in messages
        for resource in TracesData.FromString(message).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _attributes(span: SpanMessage) -> dict[str, Any]:
    values = {each.key: each.value for each in span.attributes}
    return {key: getattr(value, value.WhichOneof("value")) for key, value in values.items()}


@pytest.mark.parametrize("with_conventions", [False, True])
def test_a_collector_gets_every_span_once(
    spark: SparkSession,
    clean: None,
    endpoint: OpenAIEndpoint,
    with_conventions: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With MLflow exporting by OTLP, workers do so, too; its log-in travels where it is named."""
    with Collector(COLLECTOR_KEY) as collector:
        # For traces only, else MLflow sends metrics, too, for which it needs a tracking server.
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{collector.uri}/v1/traces")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        key = COLLECTOR_KEY.replace(" ", "%20")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"x-collector-key={key}")
        if with_conventions:
            monkeypatch.setenv("MLFLOW_ENABLE_OTEL_GENAI_SEMCONV", "true")
            monkeypatch.setenv("TRACEPARENT", f"00-{ORCHESTRATOR}-{'b' * 16}-01")
        settings = {
            "transport": "otlp" if with_conventions else "auto",
            "join_trace": with_conventions,
        }
        with (
            ctx_autolog.enable(**settings, forward_env=["OTEL_EXPORTER_OTLP_HEADERS"]),
            mlflow.start_span("job") as span,
        ):
            extract = extractor(endpoint.base_url)
            spark.range(0, 4, 1, 2).mapInPandas(extract, SCHEMA).collect()
        mlflow.tracing.provider.provider.get().force_flush()
        assert ctx_autolog.flush(30)
        spans = _spans(collector.messages)
        receipt = ctx_autolog.receipt(span.trace_id)

    by_id = {each.span_id: each for each in spans}
    assert len(by_id) == len(spans) == 1 + 2 + 4
    assert {each.trace_id.hex() for each in spans} == {span.trace_id.removeprefix("tr-")}
    (root,) = [each for each in spans if each.parent_span_id not in by_id]
    assert root.parent_span_id.hex() == ("b" * 16 if with_conventions else "")
    assert (root.trace_id.hex() == ORCHESTRATOR) is with_conventions
    tasks = [each for each in spans if each.parent_span_id == root.span_id]
    calls = [each for each in spans if by_id.get(each.parent_span_id) in tasks]
    assert (len(tasks), len(calls)) == (2, 4)
    assert (receipt.made, receipt.stored, receipt.lost) == (6, 6, 0)
    for call in calls:
        attributes = _attributes(call)
        if with_conventions:
            assert attributes["gen_ai.operation.name"] == "chat"
            assert attributes["gen_ai.request.model"] == "gpt-test"
            assert attributes["gen_ai.usage.input_tokens"] > 0
            assert "What of document" in attributes["gen_ai.input.messages"]
            assert call.kind == SpanMessage.SPAN_KIND_CLIENT
        else:
            assert attributes["mlflow.spanType"] == '"CHAT_MODEL"'
    ctx_autolog.disable()


@pytest.mark.parametrize(
    ("environment", "settings", "reason"),
    [
        ({}, {"transport": "otlp"}, "OTEL_EXPORTER_OTLP_ENDPOINT is set"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}, {}, "grpc"),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://user:secret@c",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            },
            {},
            "without user name",
        ),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            },
            {"transport": "direct"},
            "MLFLOW_ENABLE_OTLP_EXPORTER=false",
        ),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
                "MLFLOW_ENABLE_OTLP_EXPORTER": "false",
            },
            {"transport": "otlp"},
            "apart from the span they belong to",
        ),
    ],
)
def test_a_collector_that_workers_cannot_use_is_refused(
    clean: None,
    environment: dict[str, str],
    settings: dict[str, Any],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At enable(), with what to set, and without any secret."""
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ctx_autolog.UnsupportedStoreError, match=re.escape(reason)) as caught:
        ctx_autolog.enable(**settings)

    assert "secret" not in str(caught.value)
