"""Spark Connect, where the context travels in the function's closure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from workload import stored_trace

from mlflow_ctx_autolog.testing import OpenAIEndpoint, TrackingServer

# In a process of its own: one that has had a classic session cannot start Spark Connect.
_SCRIPT = """
import json, sys
import mlflow, workload
from pyspark import cloudpickle
from pyspark.sql import SparkSession
import mlflow_ctx_autolog as ctx_autolog

cloudpickle.register_pickle_by_value(workload)
uri, experiment_id, url = sys.argv[1:]
mlflow.set_tracking_uri(uri)
mlflow.set_experiment(experiment_id=experiment_id)
spark = SparkSession.builder.remote("local[2]").getOrCreate()
extract_rows = workload.row_extractor(url)

def visit(rows):
    list(extract_rows(rows))

ctx_autolog.enable()
with mlflow.start_span("job") as span:
    frame = spark.range(0, 12, 1, 3)
    rows = frame.mapInPandas(workload.extractor(url), workload.SCHEMA).collect()
    frame.foreachPartition(visit)
    carrier = ctx_autolog.broadcast(spark)
ctx_autolog.disable()
untraced = frame.mapInPandas(workload.extractor(url), workload.SCHEMA).collect()
assert sorted(rows) == sorted(untraced)
mlflow.flush_trace_async_logging()
spark.stop()
print(json.dumps({"trace_id": span.trace_id, "rows": len(rows), "carrier": carrier}))
"""


@pytest.fixture
def result(
    server: TrackingServer, endpoint: OpenAIEndpoint, experiment_id: str, tmp_path: Path
) -> dict[str, object]:
    """What the script above printed, run against a local Spark Connect server."""
    support = Path(__file__).parents[1] / "support"
    finished = subprocess.run(
        [sys.executable, "-c", _SCRIPT, server.uri, experiment_id, endpoint.base_url],
        env={**os.environ, "PYSPARK_PYTHON": sys.executable, "PYTHONPATH": str(support)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        timeout=200,
        check=True,
    )
    printed: dict[str, object] = json.loads(finished.stdout.splitlines()[-1])
    return printed


def test_the_one_line_works_on_spark_connect(
    result: dict[str, object], endpoint: OpenAIEndpoint
) -> None:
    """mapInPandas and foreachPartition are below the driver's span, with the task's facts."""
    trace = stored_trace(str(result["trace_id"]))
    assert result["rows"] == 12
    assert len(endpoint.requests) == 36
    assert sum(trace.is_nested(call) for call in trace.calls) == 24
    assert {task.name for task in trace.tasks} == {"extract", "visit"}
    assert all("spark.sql.execution.id" in task.attributes for task in trace.tasks)
    assert all("spark.stage.id" in task.attributes for task in trace.tasks)
    assert json.loads(str(result["carrier"]))["version"] == 1
