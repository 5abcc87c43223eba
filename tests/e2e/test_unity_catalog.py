"""Workers that append their spans to a Unity Catalog table themselves, on classic and Connect."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyspark
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

from mlflow_ctx_autolog.testing import DatabricksWorkspace, OpenAIEndpoint

pytestmark = pytest.mark.timeout(300)

# In a process of its own, as a job is, so that MLflow's trace destination is that of the job alone
# and it ends right after the action.
_SCRIPT = """
import json, sys
import mlflow, workload
from pyspark import cloudpickle
from pyspark.sql import SparkSession
import mlflow_ctx_autolog as ctx_autolog

cloudpickle.register_pickle_by_value(workload)
url, builder, settings = sys.argv[1], *map(json.loads, sys.argv[2:])
mlflow.set_tracking_uri("databricks")
spark = getattr(SparkSession.builder, builder)("local[2]").getOrCreate()
token = settings.pop("token", None)
if token is not None:
    settings["databricks_token"] = lambda: token

def extract(batches):
    import sys
    for batch in workload.extractor(url)(batches):
        yield batch.assign(answer="mlflow" if "mlflow" in sys.modules else "none")

handle = ctx_autolog.enable(**settings)
with mlflow.start_span("job") as span:
    frame = spark.range(0, 4, 1, 2)
    rows = frame.mapInPandas(extract, workload.SCHEMA).collect()
    rows += frame.mapInPandas(extract, workload.SCHEMA).collect()
mlflow.flush_trace_async_logging()
print(json.dumps({
    "trace_id": span.trace_id,
    "loaded": sorted({row.answer for row in rows}),
    "transport": str(handle),
}))
"""

_NEEDS_CONNECT = pytest.mark.skipif(
    pyspark.__version__ < "4", reason="Spark 3.5 fetches its Connect server from the network"
)


def run(
    workspace: DatabricksWorkspace, builder: str, settings: dict[str, Any], **environment: str
) -> tuple[dict[str, Any], str]:
    """Run a job of eight calls; return what it printed, and its log."""
    support = Path(__file__).parents[1] / "support"
    with OpenAIEndpoint() as endpoint:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                _SCRIPT,
                endpoint.base_url,
                json.dumps(builder),
                json.dumps(settings),
            ],
            env={
                **os.environ,
                "PYSPARK_PYTHON": sys.executable,
                "PYTHONPATH": str(support),
                "MLFLOW_EXPERIMENT_ID": workspace.experiment_id,
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert len(endpoint.requests) == 8
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def spans(workspace: DatabricksWorkspace) -> list[SpanMessage]:
    assert {table for table, _ in workspace.spans} == {"main.traces.legal_otel_spans"}
    return [
        span
        for _, message in workspace.spans
        for resource in TracesData.FromString(message).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def check_all_are_there(workspace: DatabricksWorkspace, trace_id: str) -> None:
    """Each span is there once: the driver's, four tasks' below it, and eight calls below these."""
    stored = spans(workspace)
    by_id = {each.span_id: each for each in stored}
    assert len(by_id) == len(stored) == 13
    (root,) = [each for each in stored if not each.parent_span_id]
    tasks = {each.span_id for each in stored if each.parent_span_id == root.span_id}
    calls = [each for each in stored if each.parent_span_id in tasks]
    assert (len(tasks), len(calls)) == (4, 8)
    assert {each.trace_id.hex() for each in stored} == {trace_id.rpartition("/")[2]}


@pytest.mark.parametrize(
    ("builder", "log_in"),
    [
        ("master", "forward_env"),
        pytest.param("master", "their own", marks=pytest.mark.slow),
        pytest.param("remote", "databricks_token", marks=_NEEDS_CONNECT),
        pytest.param("remote", "forward_env", marks=[_NEEDS_CONNECT, pytest.mark.slow]),
    ],
)
def test_workers_store_their_spans_themselves(builder: str, log_in: str) -> None:
    """Without MLflow, with a log-in that the user names, in a job that ends with its action."""
    with DatabricksWorkspace("main.traces.legal") as workspace:
        settings = {
            "forward_env": {"forward_env": ["DATABRICKS_TOKEN"]},
            "databricks_token": {"token": workspace.token},
            "their own": {"transport": "direct"},
        }[log_in]
        # The first requests are too many for it.
        workspace.throttle(2)
        said, _ = run(workspace, builder, settings, **workspace.environment)
        check_all_are_there(workspace, said["trace_id"])
        posts = [each for each in workspace.received if "/otel/" in each.path]

    assert said["loaded"] == ["none"]
    assert f"from the workers to databricks+{workspace.uri}" in said["transport"]
    # The workers' own, not the driver's client.
    assert sum("mlflow" not in each.headers.get("user-agent", "") for each in posts) >= 3


def test_without_a_log_in_for_workers_the_driver_stores_them() -> None:
    """Where they can come home."""
    with DatabricksWorkspace("main.traces.legal") as workspace:
        said, _ = run(workspace, "master", {}, **workspace.environment)
        check_all_are_there(workspace, said["trace_id"])
    assert "with the task to the driver" in said["transport"]
