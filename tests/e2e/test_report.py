"""Known repeats of every cause, made by a real job on two executors, and what the report says."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from pyspark import cloudpickle
from pyspark.sql import SparkSession
from pyspark.storagelevel import StorageLevel
from repeats import (
    ANYWHERE,
    SCHEMA,
    asking,
    assert_sums,
    complete_report,
    first_attempt,
)
from workload import ask

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint

# Workers cannot import the tests' modules.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

Job = Callable[[SparkSession, str, Path], None]


@pytest.fixture(scope="module")
def spark() -> Iterator[SparkSession]:
    """Two executors in processes of their own; Spark would make copies, if there were two hosts."""
    os.environ["PYSPARK_PYTHON"] = sys.executable
    session = (
        SparkSession.builder.master("local-cluster[2,1,1024]")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.sql.shuffle.partitions", "2")
        .config("spark.speculation", "true")
        .config("spark.python.daemon.module", "mlflow_ctx_autolog.daemon")
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("OFF")
    yield session
    session.stop()


def kill_executor() -> None:
    """Kill the Java process that has started this worker."""
    import signal

    with open(f"/proc/{os.getppid()}/stat") as file:
        daemons_parent = int(file.read().split()[3])
    os.kill(daemons_parent, signal.SIGKILL)
    time.sleep(60)


def wait_for_executors(spark: SparkSession) -> None:
    """Wait until Spark has replaced an executor that was killed: the driver and two are three."""
    tracker = spark.sparkContext._jsc.sc().statusTracker()
    while len(tracker.getExecutorInfos()) < 3:
        time.sleep(0.2)


def killed_executor(spark: SparkSession, url: str, folder: Path) -> None:
    def kill(number: int) -> None:
        if number == 3 and first_attempt():
            kill_executor()

    spark.range(0, 4, 1, 2).mapInPandas(asking(url, kill), SCHEMA).collect()


def lost_cache(spark: SparkSession, url: str, folder: Path) -> None:
    asked = spark.range(0, 4, 1, 2).mapInPandas(asking(url), SCHEMA)
    asked.persist(StorageLevel.MEMORY_ONLY)
    asked.collect()
    flag = folder / "killed"

    def kill_once(rows: Iterable[Any]) -> Iterator[Any]:
        if not flag.exists():
            flag.touch()
            kill_executor()
        return iter(rows)

    # Without the function, so that no call of it is cut off.
    spark.sparkContext.parallelize([1], 1).mapPartitions(kill_once).collect()
    asked.collect()
    asked.unpersist()


def lost_shuffle(spark: SparkSession, url: str, folder: Path) -> None:
    flag = folder / "killed"

    def kill_once(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            try:
                os.open(flag, os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                pass
            else:
                kill_executor()
            yield batch

    asked = spark.range(0, 4, 1, 2).mapInPandas(asking(url), SCHEMA)
    asked.repartition(2, "id").mapInPandas(kill_once, SCHEMA).collect()


def _without_folder(job: Callable[[Any, str], None]) -> Job:
    @functools.wraps(job)
    def run(spark: SparkSession, url: str, folder: Path) -> None:
        job(spark, url)

    return run


# Each job, and how many calls of four it repeats for which reason.
JOBS: list[tuple[Job, str, int]] = [
    *((_without_folder(job), cause, repeats) for job, cause, repeats in ANYWHERE),
    (killed_executor, "task_retry", 1),
    (lost_shuffle, "stage_retry", 4),
    (lost_cache, "lost_cache", 4),
]


@pytest.mark.parametrize(
    ("job", "cause", "repeats"),
    [
        pytest.param(
            *(job, cause, repeats),
            id=job.__name__,
            # Which wait for executors to be replaced.
            marks=[pytest.mark.slow] if job in (lost_cache, lost_shuffle) else [],
        )
        for job, cause, repeats in JOBS
    ],
)
def test_each_repeat_has_its_true_cause(
    spark: SparkSession,
    endpoint: OpenAIEndpoint,
    experiment_id: str,
    tmp_path: Path,
    spools: Path,
    job: Job,
    cause: str,
    repeats: int,
) -> None:
    """Every call that a job made again is attributed to why it did, and no other cause is named."""
    wait_for_executors(spark)
    ctx_autolog.enable()
    with mlflow.start_span(job.__name__) as span:
        job(spark, endpoint.base_url, tmp_path)
    report = complete_report(span.trace_id, endpoint, spools)

    found = {each.key: sums.calls for each, sums in report.by_cause().items()}
    if cause in ("lost_cache", "stage_retry"):
        # How many blocks the executor held is up to Spark.
        assert found == {cause: len(endpoint.requests) - report.distinct}
        assert found[cause] > 0
    else:
        assert found == {cause: repeats}
    assert report.distinct == len({request.prompt for request in endpoint.requests})
    assert_sums(report, endpoint)


def test_endpoint_that_fails_once(spark: SparkSession, experiment_id: str, tmp_path: Path) -> None:
    """A call that the user's code makes again after an error is a retry, and costs nothing."""
    from mlflow_ctx_autolog.testing import EndpointError

    seen: set[str] = set()

    def fail_once(request: Any) -> str:
        if request.prompt not in seen:
            seen.add(request.prompt)
            raise EndpointError(500, "try again")
        return "yes"

    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        import openai

        client = openai.OpenAI(base_url=url, api_key="not-a-key", max_retries=0)
        for batch in batches:
            for number in batch["id"]:
                try:
                    ask(client, number)
                except openai.InternalServerError:
                    ask(client, number)
            yield batch

    with OpenAIEndpoint(fail_once) as endpoint:
        url = endpoint.base_url
        ctx_autolog.enable()
        with mlflow.start_span("job") as span:
            spark.range(0, 4, 1, 2).mapInPandas(extract, SCHEMA).collect()
        mlflow.flush_trace_async_logging()
        report = ctx_autolog.report(span.trace_id)
        assert {each.key: sums.calls for each, sums in report.by_cause().items()} == {
            "client_retry": 4
        }
        assert report.errors() == {"InternalServerError": 4}
        assert report.repeated.tokens == 0
        assert_sums(report, endpoint)
