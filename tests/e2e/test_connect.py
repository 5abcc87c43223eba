"""Spark Connect, where the context travels in the function's closure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import functions
import mlflow
import pyspark
import pytest
import repeats
import workload
from coverage_table import SPARK, cases
from workload import stored_trace, stored_traces

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint, TrackingServer

pytestmark = [
    pytest.mark.skipif(
        pyspark.__version__ < "4", reason="Spark 3.5 fetches its Connect server from the network"
    ),
    # The first one waits for the whole script.
    pytest.mark.timeout(560),
]

# In a process of its own: one that has had a classic session cannot start Spark Connect.
_SCRIPT = """
import json, sys
import functions, mlflow, repeats, workload
from pyspark import cloudpickle
from pyspark.sql import SparkSession
import mlflow_ctx_autolog as ctx_autolog

cloudpickle.register_pickle_by_value(functions)
cloudpickle.register_pickle_by_value(repeats)
cloudpickle.register_pickle_by_value(workload)
uri, experiment_id, url = sys.argv[1:]
mlflow.set_tracking_uri(uri)
mlflow.set_experiment(experiment_id=experiment_id)
# A task may be tried twice.
spark = SparkSession.builder.remote("local[2,2]").getOrCreate()
spark.conf.set("spark.sql.shuffle.partitions", "2")
extract_rows = workload.row_extractor(url)

def visit(rows):
    list(extract_rows(rows))

ctx_autolog.enable()
with mlflow.start_span("job") as span:
    frame = spark.range(0, 12, 1, 3)
    rows = frame.mapInPandas(workload.extractor(url), workload.SCHEMA).collect()
    frame.foreachPartition(visit)
    carrier = ctx_autolog.broadcast(spark)

ways, errors = {}, {}
for name, job in functions.ON_FRAMES.items():
    if not functions.is_there(name, on_connect=True):
        continue
    with mlflow.start_span(name) as way_span:
        ways[name] = way_span.trace_id
        try:
            job(spark.range(0, functions.ROWS, 1, 2), functions.asker(url))
        except Exception as error:
            errors[name] = str(error)

# One that has made a call holds a client, and cannot be handed on.
call, handed_on = functions.asker(url), functions.asker(url)
spark.udf.register("follow", lambda number: call(number))
followed = []
for name in ("monday", "tuesday"):
    with mlflow.start_span(name) as day:
        spark.sql("SELECT follow(id) FROM range(2)").collect()
    followed.append(day.trace_id)

def keep(batch, number):
    from pyspark.sql.functions import udf
    import mlflow_ctx_autolog

    for row in batch.collect():
        call(row.id)
    batch.select(udf(lambda number: handed_on(number + 100), "string")("id")).collect()

    def answer(number):
        with mlflow_ctx_autolog.attach(batches_carrier):
            return handed_on(number + 200)

    batch.select(udf(answer, "string")("id")).collect()

with mlflow.start_span("batches") as batches, functions.stream_of(spark.range(3)) as stream:
    batches_carrier = ctx_autolog.broadcast(spark)
    stream.writeStream.foreachBatch(keep).trigger(availableNow=True).start().awaitTermination()

try:
    frame.rdd
    has_rdds = True
except Exception:
    has_rdds = False

repeated = {}
for job, _, _ in repeats.ANYWHERE:
    with mlflow.start_span(job.__name__) as job_span:
        job(spark, url)
    repeated[job.__name__] = job_span.trace_id

with ctx_autolog.enable(max_calls=5), mlflow.start_span("budget") as budget_span:
    try:
        # In one partition: Spark ends the workers beside a task that fails, and calls in flight.
        spark.range(0, 8, 1, 1).mapInPandas(workload.extractor(url), workload.SCHEMA).collect()
        refusal = None
    except Exception as error:
        refusal = str(error)

with ctx_autolog.enable(max_spans_per_trace=10), mlflow.start_span("large") as large_span:
    spark.range(0, 40, 1, 2).mapInPandas(workload.extractor(url), workload.SCHEMA).collect()
    ctx_autolog.flush(30)

def say(batches):
    import mlflow

    for batch in batches:
        mlflow.update_current_trace(tags={"fruit": "apple"}, client_request_id="req-1")
        yield batch.assign(answer="")

with mlflow.start_span("words") as words_span:
    spark.range(0, 1, 1, 1).mapInPandas(say, workload.SCHEMA).collect()
# A trace of the action's own.
mlflow.set_experiment("words-on-connect")
spark.range(0, 1, 1, 1).mapInPandas(say, workload.SCHEMA).collect()
ctx_autolog.flush(30)

ctx_autolog.disable()
untraced = frame.mapInPandas(workload.extractor(url), workload.SCHEMA).collect()
assert sorted(rows) == sorted(untraced)
mlflow.flush_trace_async_logging()
spark.stop()
print(json.dumps({
    "trace_id": span.trace_id,
    "rows": len(rows),
    "carrier": carrier,
    "ways": ways,
    "errors": errors,
    "followed": followed,
    "batches": batches.trace_id,
    "has_rdds": has_rdds,
    "repeated": repeated,
    "budget": budget_span.trace_id,
    "refusal": refusal,
    "large": large_span.trace_id,
    "words": words_span.trace_id,
}))
"""


@pytest.fixture(scope="module")
def result(
    server: TrackingServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """What the script above printed, run against a local Spark Connect server."""
    support = Path(__file__).parents[1] / "support"
    mlflow.set_tracking_uri(server.uri)
    experiment_id = mlflow.set_experiment("spark-connect").experiment_id
    with OpenAIEndpoint() as endpoint:
        finished = subprocess.run(
            [sys.executable, "-c", _SCRIPT, server.uri, experiment_id, endpoint.base_url],
            env={**os.environ, "PYSPARK_PYTHON": sys.executable, "PYTHONPATH": str(support)},
            cwd=tmp_path_factory.mktemp("connect"),
            stdout=subprocess.PIPE,
            timeout=500,
            check=True,
        )
        yield json.loads(finished.stdout.splitlines()[-1])


def test_the_one_line_works_on_spark_connect(result: dict[str, Any]) -> None:
    """mapInPandas and foreachPartition are below the driver's span, with the task's facts."""
    trace = stored_trace(result["trace_id"])
    assert result["rows"] == 12
    assert sum(trace.is_nested(call) for call in trace.calls) == 24
    assert {task.attributes["spark.function.name"] for task in trace.tasks} == {"extract", "visit"}
    assert all("spark.sql.execution.id" in task.attributes for task in trace.tasks)
    assert all("spark.stage.id" in task.attributes for task in trace.tasks)
    assert all("spark.connect.operation.id" in task.attributes for task in trace.tasks)
    assert not any("spark.call_site" in task.attributes for task in trace.tasks)
    assert json.loads(result["carrier"])["version"] == 1


@pytest.mark.parametrize("way", functions.covered("Spark Connect", functions.ON_FRAMES))
def test_every_way_works_on_spark_connect(result: dict[str, Any], way: str) -> None:
    """Every call of a function handed over in this way is below its task and the driver's span."""
    assert way not in result["errors"], result["errors"][way]
    trace = stored_trace(result["ways"][way])
    assert len(trace.calls) == functions.ROWS
    assert all(trace.is_nested(call) for call in trace.calls)
    # Of a data source, with the method that runs in a task.
    functions_run = {task.attributes["spark.function.name"] for task in trace.tasks}
    assert {name.partition(".")[0] for name in functions_run} == {"extract"}
    attempts = [task.attributes["spark.task.attempt_id"] for task in trace.tasks]
    assert len(attempts) == len(set(attempts))


def test_a_registered_function_follows_on_spark_connect(result: dict[str, Any]) -> None:
    """A function registered under no span belongs to the span of each query that uses it."""
    for trace_id in result["followed"]:
        trace = stored_trace(trace_id)
        assert [trace.is_nested(call) for call in trace.calls] == [True, True]


@pytest.mark.parametrize(
    ("job", "cause", "repeated"),
    [(job.__name__, cause, number) for job, cause, number in repeats.ANYWHERE],
)
def test_each_repeat_has_its_true_cause_on_spark_connect(
    result: dict[str, Any], job: str, cause: str, repeated: int
) -> None:
    """The server tells its client of the final plans, as it does of results."""
    report = ctx_autolog.report(result["repeated"][job])
    found = {each.key: sums.calls for each, sums in report.by_cause().items()}
    assert found == {cause: repeated}


def test_a_budget_holds_on_spark_connect(result: dict[str, Any]) -> None:
    """No call more is made, and the error that Spark hands on says why."""
    assert "max_calls=5 is reached" in result["refusal"]
    assert ctx_autolog.report(result["budget"]).made.calls == 5


def _prompts(calls: list[Any]) -> list[str]:
    return sorted(call.inputs["messages"][0]["content"] for call in calls)


def test_a_trace_stays_small_on_spark_connect(result: dict[str, Any]) -> None:
    """Its tokens are those of all calls, and the report sees them all."""
    trace = stored_trace(result["large"])
    assert 10 <= len(trace.calls) < 20
    usage = trace.calls[0].get_attribute("mlflow.chat.tokenUsage")["total_tokens"]
    assert trace.total_tokens >= 40 * usage
    report = ctx_autolog.report(result["large"])
    assert report.made.calls == 40
    assert all(each.call.attempt is not None for each in report.calls)


def test_what_a_task_says_of_its_trace_on_spark_connect(result: dict[str, Any]) -> None:
    """No receipt comes home: the driver reads it from the task's span, or the task writes it."""
    experiment = mlflow.get_experiment_by_name("words-on-connect")
    assert experiment is not None
    (of_action,) = stored_traces(experiment.experiment_id)
    for trace in (stored_trace(result["words"]), of_action):
        assert len(trace.tasks) == 1
        info = trace.trace.info
        assert (info.tags["fruit"], info.client_request_id) == ("apple", "req-1")
        assert info.state == "OK"


@pytest.mark.covers(SPARK, "stream, `foreachBatch`", "Spark Connect")
def test_calls_of_a_batch_function_are_traced_on_spark_connect(result: dict[str, Any]) -> None:
    """foreachBatch's function runs beside the server, in a span of its own below the driver's."""
    trace = stored_trace(result["batches"])
    (keep,) = [task for task in trace.tasks if task.attributes["spark.function.name"] == "keep"]
    assert keep.parent_id == trace.root.span_id
    assert _prompts(trace.children_of(keep)) == [workload.question(each) for each in range(3)]


@pytest.mark.covers(
    SPARK,
    "stream, `foreachBatch`, functions that it hands to Spark",
    "Spark Connect",
    limit="the function runs in a process of the server's, where nothing is enabled. "
    "In what it hands on, `attach` to a carrier that `broadcast` has made before.",
)
def test_a_batch_function_hands_on_what_attaches(result: dict[str, Any]) -> None:
    """Of the functions that it hands to Spark, only the calls of one that attaches are traced."""
    trace = stored_trace(result["batches"])
    (keep,) = [task for task in trace.tasks if task.attributes["spark.function.name"] == "keep"]
    others = [call for call in trace.calls if call.parent_id != keep.span_id]
    assert all(trace.is_nested(call) for call in others)
    assert _prompts(others) == [workload.question(200 + number) for number in range(3)]


@pytest.mark.parametrize(
    "way",
    cases(
        SPARK,
        "Spark Connect",
        functions.ON_RDDS,
        limit="there are no RDDs. Use a DataFrame's `mapInPandas` or `foreachPartition`.",
    ),
)
def test_there_are_no_rdds_on_spark_connect(result: dict[str, Any], way: str) -> None:
    """Spark Connect refuses to make an RDD."""
    assert not result["has_rdds"]


_WITH_A_DATABASE = """
import sys
import mlflow, workload
from pyspark import cloudpickle
from pyspark.sql import SparkSession
import mlflow_ctx_autolog as ctx_autolog

cloudpickle.register_pickle_by_value(workload)
uri, url = sys.argv[1:]
mlflow.set_tracking_uri(uri)
spark = SparkSession.builder.remote("local[2]").getOrCreate()
extract = workload.extractor(url)

def note(batches):
    for batch in extract(batches):
        yield batch.assign(facts=str("mlflow" in sys.modules))

with ctx_autolog.enable(), mlflow.start_span("job") as span:
    schema = f"{workload.SCHEMA}, facts string"
    rows = spark.range(0, 12, 1, 3).mapInPandas(note, schema).collect()
receipt = ctx_autolog.receipt(span.trace_id)
print(span.trace_id, {row.facts for row in rows}, receipt.complete, receipt.made)
"""


def test_a_database_is_written_by_the_driver(endpoint: OpenAIEndpoint, tmp_path: Path) -> None:
    """What workers of this host leave in the directory is taken from there; none loads MLflow."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    support = str(Path(workload.__file__).parent)
    environ = {**os.environ, "PYTHONPATH": support, "PYSPARK_PYTHON": sys.executable}
    # Of another store, where a test has set it.
    environ.pop("MLFLOW_EXPERIMENT_ID", None)
    done = subprocess.run(
        [sys.executable, "-c", _WITH_A_DATABASE, uri, endpoint.base_url],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    trace_id, said = done.stdout.strip().splitlines()[-1].split(" ", 1)
    assert said == "{'False'} True 16"
    mlflow.set_tracking_uri(uri)
    trace = stored_trace(trace_id)
    assert len(trace.calls) == len(endpoint.requests) == 12
    assert all(trace.is_nested(call) for call in trace.calls)
    assert trace.total_tokens == endpoint.total_tokens
