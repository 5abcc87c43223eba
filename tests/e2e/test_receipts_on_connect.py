"""What a receipt says on Spark Connect, where no task tells the driver of itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pyspark
import pytest
from workload import stored_trace

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
import json, sys
import mlflow, workload
from pyspark import cloudpickle
from pyspark.sql import SparkSession
import mlflow_ctx_autolog as ctx_autolog

cloudpickle.register_pickle_by_value(workload)
uri, experiment, url = sys.argv[1:]
mlflow.set_tracking_uri(uri)
mlflow.set_experiment(experiment_id=experiment)
# A task may be tried twice.
spark = SparkSession.builder.remote("local[2,2]").getOrCreate()
spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", "1")
ctx_autolog.enable(flush_timeout=5)
told = {}

def extract(batches):
    yield from workload.extractor(url)(batches)

def killed(batches):
    import os, signal
    from pyspark import TaskContext

    for number, batch in enumerate(workload.extractor(url)(batches), 1):
        yield batch
        if TaskContext.get().attemptNumber() == 0 and number == 2:
            os.kill(os.getpid(), signal.SIGKILL)

def act(function):
    spark.range(0, 4, 1, 2).mapInPandas(function, workload.SCHEMA).collect()

def note(name):
    found = ctx_autolog.receipt()
    told[name] = {
        "trace": found.trace_id, "made": found.made, "stored": found.stored,
        "unknown": sum(found.unknown.values()), "complete": found.complete,
    }

with mlflow.start_span("killed"):
    act(killed)
note("killed")
ctx_autolog.enable(strict=True)
try:
    ctx_autolog.receipt()
    told["strict"] = None
except ctx_autolog.IncompleteTraceError as error:
    told["strict"] = str(error)
ctx_autolog.enable(strict=False)
with mlflow.start_span("before"):
    act(extract)
note("before")
act(extract)
note("action")
spark.range(3).count()
note("action, again")
act(extract)
note("another action")
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(
    server: TrackingServer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What the script above printed, run against a local Spark Connect server."""
    support = Path(__file__).parents[1] / "support"
    folder = tmp_path_factory.mktemp("receipts")
    mlflow.set_tracking_uri(server.uri)
    experiment_id = mlflow.set_experiment("receipts-on-connect").experiment_id
    with OpenAIEndpoint() as endpoint:
        ran = subprocess.run(
            [sys.executable, "-c", _SCRIPT, server.uri, experiment_id, endpoint.base_url],
            cwd=folder,
            env={
                **os.environ,
                "PYSPARK_PYTHON": sys.executable,
                "PYTHONPATH": str(support),
                "MLFLOW_CTX_AUTOLOG_SPOOL_DIRECTORY": str(folder / "spool"),
            },
            stdout=subprocess.PIPE,
            timeout=500,
            check=True,
        )
    found: dict[str, dict[str, Any]] = json.loads(ran.stdout.splitlines()[-1])
    return found


def test_attempts_that_were_killed_are_unknown(told: dict[str, Any]) -> None:
    """Each counts for one, and strict=True raises: nobody has told what they made."""
    found = told["killed"]
    assert found["unknown"] == 2
    assert not found["complete"]
    assert "unknown what 2 task attempts" in told["strict"]


def test_a_receipt_is_of_the_last_action(told: dict[str, Any]) -> None:
    """Right after it, also where no span is active: with all spans that the store has."""
    names = ("before", "action", "another action")
    assert len({told[name]["trace"] for name in names}) == len(names)
    for name in names:
        found = told[name]
        trace = stored_trace(found["trace"])
        # Two tasks with two calls each, below a root.
        assert found["made"] == found["stored"] == len(trace.spans) == 7
        assert len(trace.calls) == 4
        assert found["complete"]
        assert found["unknown"] == 0


def test_an_action_that_runs_no_function_is_none_to_tell_of(told: dict[str, Any]) -> None:
    assert told["action, again"] == told["action"]
