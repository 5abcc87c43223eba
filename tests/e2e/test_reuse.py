"""Work that Spark does again, on two executors: what is paid for, and what the rows say."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import functions
import mlflow
import model_calls
import pandas as pd
import pools
import pytest
from pyspark import cloudpickle
from pyspark.sql import SparkSession
from pyspark.sql.functions import udf
from repeats import filtered_udf, first_attempt
from workload import SCHEMA, ask, stored_trace

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.spans.attributes import REUSED_FROM
from mlflow_ctx_autolog.testing import OpenAIEndpoint, Request

# Workers cannot import the tests' modules.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
cloudpickle.register_pickle_by_value(pools)

MASTER = "local-cluster[2,1,1024]"
IS_PRELOADED = True
ROWS = 8


class Numbered:
    """Answers that differ from call to call, as a model's do."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._number = 0

    def __call__(self, request: Request) -> str:
        with self._lock:
            self._number += 1
            return f"{request.prompt} Answer {self._number}."


@pytest.fixture
def endpoint() -> Iterator[OpenAIEndpoint]:
    with OpenAIEndpoint(Numbered()) as found:
        yield found


def extractor(
    url: str, after: Callable[[int], None] | None = None, prompt: Callable[[int], str] | None = None
) -> Callable[..., Any]:
    """Return a function for mapInPandas that makes one call a row."""

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        from openai import OpenAI

        client = OpenAI(base_url=url, api_key="not-a-key", max_retries=0)
        for batch in batches:
            answers = []
            for number in batch["id"]:
                asked = (prompt or (lambda number: f"What of document {number}?"))(number)
                answers.append(ask(client, number, question=lambda _, asked=asked: asked))
                if after is not None:
                    after(number)
            yield batch.assign(answer=answers)

    return extract


def kill_executor() -> None:
    """Kill the Java process that has started this worker."""
    with open(f"/proc/{os.getppid()}/stat") as file:
        daemons_parent = int(file.read().split()[3])
    os.kill(daemons_parent, signal.SIGKILL)
    time.sleep(60)


def paid(endpoint: OpenAIEndpoint) -> int:
    return len(endpoint.requests)


def texts(rows: Iterable[Any]) -> list[str]:
    return sorted(row.answer for row in rows)


def reused(trace: Any) -> list[Any]:
    return [call for call in trace.calls if REUSED_FROM in call.attributes]


def assert_told(trace_id: str, endpoint: OpenAIEndpoint, reuses: int) -> None:
    """What the trace says was paid is what the endpoint has billed, and each reuse names a call."""
    trace = stored_trace(trace_id)
    again = reused(trace)
    assert len(again) == reuses
    assert len(trace.calls) - reuses == len(endpoint.requests)
    assert trace.total_tokens == endpoint.total_tokens
    payers = {f"{trace_id}/{call.span_id}" for call in trace.calls if call not in again}
    assert {call.attributes[REUSED_FROM] for call in again} <= payers


def test_a_task_that_is_tried_again(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """It gets what it had been given, and asks what it had not asked."""

    def fail(number: int) -> None:
        if number == ROWS - 1 and first_attempt():
            raise ValueError("not in the first attempt")

    with ctx_autolog.enable(reuse_answers=True), mlflow.start_span("job") as span:
        frame = spark.range(0, ROWS, 1, 1).mapInPandas(extractor(endpoint.base_url, fail), SCHEMA)
        rows = frame.collect()
        receipt = ctx_autolog.receipt(span.trace_id)
    assert paid(endpoint) == ROWS
    assert [row.answer for row in rows] == [
        f"What of document {n}? Answer {n + 1}." for n in range(ROWS)
    ]
    assert_told(span.trace_id, endpoint, ROWS)
    assert receipt.complete
    assert receipt.made == len(stored_trace(span.trace_id).spans)


def test_two_actions_on_one_plan_agree(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str, tmp_path: Path
) -> None:
    """Wherever the tasks of the second one run, where all workers see the directory."""
    folder = tmp_path / "answers"
    with ctx_autolog.enable(reuse_answers=str(folder)), mlflow.start_span("job") as span:
        frame = spark.range(0, ROWS, 1, 4).mapInPandas(extractor(endpoint.base_url), SCHEMA)
        first, second = texts(frame.collect()), texts(frame.collect())
    assert first == second
    assert paid(endpoint) == ROWS
    assert_told(span.trace_id, endpoint, ROWS)
    modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert modes == {0o600}


def test_equal_rows_are_answers_of_their_own(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """One prompt in all rows of all partitions: as many answers as rows, in each of two actions."""
    prompt = "Invent a clause."
    with ctx_autolog.enable(reuse_answers=True), mlflow.start_span("job"):
        function = extractor(endpoint.base_url, prompt=lambda _: prompt)
        frame = spark.range(0, 40, 1, 8).mapInPandas(function, SCHEMA)
        first, second = texts(frame.collect()), texts(frame.collect())
    assert first == second
    assert len(set(first)) == paid(endpoint) == 40


def test_partitions_in_one_task_share_nothing(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """coalesce() has one task evaluate several partitions, which are different rows."""
    prompt, url = "Invent a clause.", endpoint.base_url
    with ctx_autolog.enable(reuse_answers=True), mlflow.start_span("job"):
        function = extractor(url, prompt=lambda _: prompt)
        frame = spark.range(0, 12, 1, 4).mapInPandas(function, SCHEMA).coalesce(1)
        first, second = texts(frame.collect()), texts(frame.collect())
        rdd = spark.sparkContext.range(0, 12, 1, 4).mapPartitions(
            lambda rows: [ask_once(url, prompt) for _ in rows]
        )
        third, fourth = (sorted(rdd.coalesce(1).collect()) for _ in range(2))
    assert first == second
    assert third == fourth
    assert len({*first, *third}) == paid(endpoint) == 24


def ask_once(url: str, prompt: str) -> str:
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="not-a-key", max_retries=0)
    return ask(client, 0, question=lambda _: prompt)


def test_a_plan_that_holds_the_function_twice(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str, tmp_path: Path
) -> None:
    """What is joined with itself is paid for once where the stages come one after the other."""
    with (
        ctx_autolog.enable(reuse_answers=str(tmp_path / "answers")),
        mlflow.start_span("job") as span,
    ):
        frame = spark.range(0, ROWS, 1, 2).mapInPandas(extractor(endpoint.base_url), SCHEMA)
        again = frame.selectExpr("id AS other", "answer AS same")
        rows = frame.join(again.hint("broadcast"), frame.id == again.other).collect()
    assert all(row.answer == row.same for row in rows)
    assert len(rows) == paid(endpoint) == ROWS
    assert_told(span.trace_id, endpoint, ROWS)


def test_an_rdd_that_is_united_with_itself(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str, tmp_path: Path
) -> None:
    """Its partitions are known by their own numbers, wherever they are in the stage."""
    url = endpoint.base_url
    with ctx_autolog.enable(reuse_answers=str(tmp_path / "answers")), mlflow.start_span("job"):
        rdd = spark.sparkContext.range(0, 4, 1, 2).map(lambda n: ask_once(url, f"What of {n}?"))
        rows = rdd.union(rdd).collect()
    # Two executors may be asked for the same partition at the same moment.
    assert paid(endpoint) <= 8
    assert len(rows) == 8
    with ctx_autolog.enable(reuse_answers=str(tmp_path / "answers")), mlflow.start_span("job"):
        rdd = spark.sparkContext.range(0, 4, 1, 2).map(lambda n: ask_once(url, f"And of {n}?"))
        rdd.count()
        before = paid(endpoint)
        assert len(rdd.union(rdd).collect()) == 8
    assert paid(endpoint) == before


@pytest.mark.slow
def test_a_udf_that_the_optimiser_has_duplicated(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """Both evaluations of a row are of one partition, and get one answer."""
    # As a model's takes: the second evaluation is to begin before the first one has ended.
    endpoint.latency = 1.5
    with ctx_autolog.enable(reuse_answers=True), mlflow.start_span("job") as span:
        filtered_udf(spark, endpoint.base_url)
    assert paid(endpoint) == 4
    assert_told(span.trace_id, endpoint, 4)


@pytest.mark.slow
def test_an_executor_that_is_lost(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str, tmp_path: Path
) -> None:
    """With a directory that all workers see, no answer is paid for twice."""

    def kill(number: int) -> None:
        if number == ROWS - 1 and first_attempt():
            kill_executor()

    with ctx_autolog.enable(reuse_answers=str(tmp_path / "a")), mlflow.start_span("job"):
        frame = spark.range(0, ROWS, 1, 2).mapInPandas(extractor(endpoint.base_url, kill), SCHEMA)
        assert len(frame.collect()) == ROWS
    assert paid(endpoint) == ROWS


def test_micro_batches_are_jobs_of_their_own(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str, tmp_path: Path
) -> None:
    """Equal rows of two batches are answers of their own; what a batch asks twice is paid once."""
    url = endpoint.base_url
    found: list[list[str]] = []

    def keep(batch: Any, number: int) -> None:
        function = extractor(url, prompt=lambda _: "Invent a clause.")
        answered = batch.coalesce(1).mapInPandas(function, SCHEMA)
        first, second = texts(answered.collect()), texts(answered.collect())
        assert first == second
        found.append(first)

    source = tmp_path / "source"
    source.mkdir()
    with (
        ctx_autolog.enable(reuse_answers=str(tmp_path / "answers")),
        mlflow.start_span("job"),
    ):
        stream = spark.readStream.schema("id long").parquet(str(source))
        query = stream.writeStream.foreachBatch(keep).start()
        for _ in range(2):
            spark.range(0, 3, 1, 1).write.mode("append").parquet(str(source))
            query.processAllAvailable()
        query.stop()
        function = extractor(url, prompt=lambda _: "Invent a rule.")
        answers = stream.mapInPandas(function, SCHEMA)
        query = answers.writeStream.format("memory").queryName("invented").start()
        query.processAllAvailable()
        spark.range(0, 3, 1, 1).write.mode("append").parquet(str(source))
        query.processAllAvailable()
        query.stop()
        invented = texts(spark.table("invented").collect())
    assert [len(each) for each in found] == [3, 3]
    assert len({text for each in found for text in each}) == 6
    assert len(invented) == len(set(invented)) == 9
    assert paid(endpoint) == 6 + 9


@pytest.mark.parametrize(
    "way",
    ["`ThreadPoolExecutor`", "`multiprocessing.Pool`, fork", "`ProcessPoolExecutor`, spawn"],
)
def test_threads_and_child_processes(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str, way: str
) -> None:
    """What a partition asks from wherever, equal requests among it, it is given again."""
    spark.sparkContext.addPyFile(str(Path(model_calls.__file__)))
    ask_all, url = pools.WAYS[way], endpoint.base_url

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            yield batch.assign(answer=ask_all(url, [int(n) % 2 for n in batch["id"]]))

    with ctx_autolog.enable(reuse_answers=True), mlflow.start_span("job") as span:
        frame = spark.range(0, 6, 1, 1).mapInPandas(extract, SCHEMA)
        first, second = texts(frame.collect()), texts(frame.collect())
    assert Counter(first) == Counter(second)
    assert len(set(first)) == paid(endpoint) == 6
    assert_told(span.trace_id, endpoint, 6)


def test_budget_counts_what_is_paid(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """A job that may make as many calls as it has rows comes to its end twice."""
    with (
        ctx_autolog.enable(reuse_answers=True, max_calls=ROWS, max_repeats=0),
        mlflow.start_span("job"),
    ):
        frame = spark.range(0, ROWS, 1, 2).mapInPandas(extractor(endpoint.base_url), SCHEMA)
        assert texts(frame.collect()) == texts(frame.collect())
    assert paid(endpoint) == ROWS


def test_without_a_span_the_application_is_the_job(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """Two actions agree, too, where each of them is a trace of its own."""
    with ctx_autolog.enable(reuse_answers=True):
        frame = spark.range(0, ROWS, 1, 2).mapInPandas(extractor(endpoint.base_url), SCHEMA)
        assert texts(frame.collect()) == texts(frame.collect())
    assert paid(endpoint) == ROWS


def test_a_pipeline_that_is_run_again(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str, tmp_path: Path
) -> None:
    """With scope="always" another job goes on where the first one has failed."""
    flag = tmp_path / "fixed"
    always = ctx_autolog.Answers(str(tmp_path / "answers"), scope="always")

    def fail(number: int) -> None:
        if number == ROWS - 1 and not flag.exists():
            raise ValueError("a bug")

    def run() -> Any:
        frame = spark.range(0, ROWS, 1, 2).mapInPandas(extractor(endpoint.base_url, fail), SCHEMA)
        return frame.collect()

    for _ in range(2):
        with ctx_autolog.enable(reuse_answers=always), mlflow.start_span("job"):
            if flag.exists():
                assert len(run()) == ROWS
            else:
                with pytest.raises(Exception, match="a bug"):
                    run()
                flag.touch()
    assert paid(endpoint) == ROWS


def test_encrypted_and_forgotten(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str, tmp_path: Path
) -> None:
    """With a key nothing on the disk can be read; what is forgotten is asked for again."""
    fernet = pytest.importorskip("cryptography.fernet")
    folder = tmp_path / "answers"
    key = fernet.Fernet.generate_key()
    handle = ctx_autolog.enable(reuse_answers=str(folder), answers_key=key)
    with handle, mlflow.start_span("job"):
        frame = spark.range(0, 4, 1, 2).mapInPandas(extractor(endpoint.base_url), SCHEMA)
        assert texts(frame.collect()) == texts(frame.collect())
        assert paid(endpoint) == 4
        stored = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
        assert len([each for each in stored if len(each) > 100]) == 4
        assert not any(b"document" in each or b"choices" in each for each in stored)
        assert ctx_autolog.forget_answers() == 4
        frame.collect()
    assert paid(endpoint) == 8


def test_files_of_each_host_are_forgotten(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """forget_answers() finds what the workers of this host have kept."""
    with ctx_autolog.enable(reuse_answers=True), mlflow.start_span("job"):
        frame = spark.range(0, 4, 1, 2).mapInPandas(extractor(endpoint.base_url), SCHEMA)
        frame.collect()
        assert ctx_autolog.forget_answers() == 4
        frame.collect()
    assert paid(endpoint) == 8


def test_a_directory_that_goes_away(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str, tmp_path: Path
) -> None:
    """The calls go on, and are made again; what has taken its place is left alone."""
    folder = tmp_path / "answers"

    def take_away(number: int) -> None:
        if number == 1:
            import shutil

            shutil.rmtree(folder)

    with ctx_autolog.enable(reuse_answers=str(folder)), mlflow.start_span("job"):
        frame = spark.range(0, 4, 1, 1).mapInPandas(extractor(endpoint.base_url, take_away), SCHEMA)
        assert len(frame.collect()) == 4
        assert not folder.exists()
    assert paid(endpoint) == 4


def test_a_directory_that_workers_cannot_use(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str, tmp_path: Path
) -> None:
    """Where it is missing with all above it, calls are made as ever."""
    folder = tmp_path / "not" / "mounted"
    with ctx_autolog.enable(reuse_answers=str(folder)), mlflow.start_span("job"):
        frame = spark.range(0, 4, 1, 1).mapInPandas(extractor(endpoint.base_url), SCHEMA)
        assert [len(frame.collect()) for _ in range(2)] == [4, 4]
    assert paid(endpoint) == 8
    assert not folder.parent.exists()


def test_functions_of_one_job_share_nothing(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """Functions of one name that are not the same ask each for itself; one that is, once."""
    url, prompt = endpoint.base_url, "Invent a clause."
    functions_ = [
        extractor(url, prompt=lambda _: prompt),
        extractor(url, prompt=lambda _: prompt, after=lambda _: None),
    ]
    with ctx_autolog.enable(reuse_answers=True), mlflow.start_span("job"):
        rows = [
            texts(spark.range(0, 4, 1, 2).mapInPandas(function, SCHEMA).collect())
            for function in [*functions_, *functions_]
        ]
    assert rows[:2] == rows[2:]
    assert len({*rows[0], *rows[1]}) == paid(endpoint) == 8


def test_udf_row_by_row(spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str) -> None:
    """A UDF that Spark calls for each row gets its answers again, too."""
    call = functions.asker(endpoint.base_url)
    with ctx_autolog.enable(reuse_answers=True), mlflow.start_span("job"):
        answers = spark.range(0, 6, 1, 2).select(udf(lambda n: call(n), "string")("id"))
        assert sorted(answers.collect()) == sorted(answers.collect())
    assert paid(endpoint) == 6


def test_off_by_default(spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str) -> None:
    """Without the setting each action asks, and nothing is written."""
    with ctx_autolog.enable(), mlflow.start_span("job"):
        frame = spark.range(0, 4, 1, 2).mapInPandas(extractor(endpoint.base_url), SCHEMA)
        frame.collect()
        frame.collect()
    assert paid(endpoint) == 8
    assert not (Path(os.environ["MLFLOW_CTX_AUTOLOG_SPOOL_DIRECTORY"]) / "answers").exists()
