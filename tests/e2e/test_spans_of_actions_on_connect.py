"""On Spark Connect, too, calls belong to the span that is active where the action runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import functions
import pyspark
import pytest

from mlflow_ctx_autolog.testing import OpenAIEndpoint, TrackingServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        pyspark.__version__ < "4", reason="Spark 3.5 fetches its Connect server from the network"
    ),
    pytest.mark.timeout(560),
]

# In a process of its own: one that has had a classic session cannot start Spark Connect.
_SCRIPT = """
import asyncio, json, sys, tempfile, threading
import functions, mlflow, workload
from pyspark import cloudpickle
from pyspark.sql import SparkSession
from pyspark.sql.functions import udf
import mlflow_ctx_autolog as ctx_autolog

cloudpickle.register_pickle_by_value(functions)
cloudpickle.register_pickle_by_value(workload)
uri, experiment, url = sys.argv[1:]
mlflow.set_tracking_uri(uri)
mlflow.set_experiment(experiment_id=experiment)
spark = SparkSession.builder.remote("local[2]").getOrCreate()
ctx_autolog.enable()
ask, spans, found = functions.asker(url), {}, {}
column = udf(lambda number: ask(number), "string")

def plan():
    return spark.range(0, 4, 1, 2).select(column("id").alias("answer"))

def act(frame, name, times=1):
    with mlflow.start_span(name) as spans[name]:
        for _ in range(times):
            frame.collect()

before = plan()
act(before, "plan before")
with mlflow.start_span("plan inside") as spans["plan inside"]:
    inside = plan()
inside.collect()
with mlflow.start_span("cached") as spans["cached"]:
    cached = plan().cache()
    cached.count()
act(plan(), "read")
cached.unpersist()
frame = plan()
threads = [threading.Thread(target=act, args=(frame, f"thread {n}", 2)) for n in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()

async def turn(name):
    with mlflow.start_span(name) as spans[name]:
        for _ in range(2):
            await asyncio.sleep(0)
            frame.collect()

async def turns():
    await asyncio.gather(turn("turn 0"), turn("turn 1"))

asyncio.run(turns())
with mlflow.start_span("registered") as spans["registered"]:
    spark.udf.register("ask_of_actions", lambda number: ask(number))
    spark.range(2).selectExpr("ask_of_actions(id) AS a").createOrReplaceTempView("asked")
with mlflow.start_span("text") as spans["text"]:
    spark.sql("SELECT ask_of_actions(id) FROM range(3)").collect()
with mlflow.start_span("view") as spans["view"]:
    spark.table("asked").collect()
with functions.stream_of(spark.range(0, 4, 1, 2)) as stream:
    answers = stream.select(column("id").alias("answer"))
    with mlflow.start_span("stream") as spans["stream"]:
        query = answers.writeStream.format("memory").queryName("answers")
        query = query.trigger(availableNow=True).start()
    act(spark.range(1), "beside the stream")
    query.awaitTermination()
found["tags"] = sorted(spark.getTags())
found["same"] = plan().sameSemantics(plan())
with ctx_autolog.enable(propagation="broadcast"):
    with mlflow.start_span("by broadcast") as spans["by broadcast"]:
        alone = plan()
    act(alone, "of another")
ctx_autolog.flush(60)
mlflow.flush_trace_async_logging()
found["calls"] = {
    name: len(workload.stored_trace(span.trace_id).calls) for name, span in spans.items()
}
of_spans = {span.trace_id for span in spans.values()}
others = [t for t in workload.stored_traces(experiment) if t.trace.info.trace_id not in of_spans]
found["alone"] = [len(trace.calls) for trace in others]
print(json.dumps(found))
"""


@pytest.fixture
def found(
    server: TrackingServer, experiment_id: str, endpoint: OpenAIEndpoint, tmp_path: Path
) -> Any:
    ran = subprocess.run(
        [sys.executable, "-c", _SCRIPT, server.uri, experiment_id, endpoint.base_url],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYSPARK_PYTHON": sys.executable,
            "PYTHONPATH": str(Path(functions.__file__).parent),
            # Has the server listen on a free port.
            "SPARK_TESTING": "on a free port",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=540,
    )
    assert ran.returncode == 0, ran.stderr[-5000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_calls_belong_to_the_span_of_the_action(found: Any) -> None:
    assert found["calls"] == {
        "plan before": 4,
        "plan inside": 0,
        "cached": 4,
        "read": 0,
        "thread 0": 8,
        "thread 1": 8,
        "turn 0": 8,
        "turn 1": 8,
        "registered": 0,
        "text": 3,
        "view": 2,
        "stream": 4,
        "beside the stream": 0,
        # A plan is sent, and with it what its functions carry, when the action runs.
        "by broadcast": 0,
        "of another": 4,
    }
    # Those of the action under no span.
    assert found["alone"] == [4]
    assert found["same"] is True
    assert found["tags"] == []
