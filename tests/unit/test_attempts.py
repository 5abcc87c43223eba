"""Which task attempts have told nothing, by what Spark's own store of states says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from mlflow_ctx_autolog.delivery.records import Destination
from mlflow_ctx_autolog.driver import attempts
from mlflow_ctx_autolog.driver.attempts import Attempt, silent_attempts
from mlflow_ctx_autolog.driver.books import Book

CRASHED = "Python worker exited unexpectedly (crashed)"
REPORTED = "org.apache.spark.api.python.PythonException: ValueError: no"
GONE = "ExecutorLostFailure (executor 1 exited)"


class Seq(list[Any]):
    """A sequence of Scala's, as py4j shows it."""

    def size(self) -> int:
        return len(self)

    def apply(self, index: int) -> Any:
        return self[index]


def option(value: Any) -> Any:
    return SimpleNamespace(isDefined=lambda: value is not None, get=lambda: value)


def date(milliseconds: int) -> Any:
    return SimpleNamespace(getTime=lambda: milliseconds)


def task(number: int, state: str, began: int, error: str | None = None, host: str = "one") -> Any:
    return SimpleNamespace(
        taskId=lambda: number,
        status=lambda: state,
        host=lambda: host,
        launchTime=lambda: date(began),
        duration=lambda: option(100),
        errorMessage=lambda: option(error),
    )


class Spark:
    """What Spark knows of the stages of some jobs.

    Args:
        stages: The task attempts of each.
        part: What Spark calls a part of each stage.
    """

    def __init__(self, stages: dict[int, list[Any]], part: str = "MapInPandas") -> None:
        self.stages = stages
        self._part = part
        self._jsc = MagicMock()
        self._jvm = MagicMock()
        self._jvm.java.util.ArrayList = lambda: SimpleNamespace(wanted=[], add=self._wanted.append)
        kinds = SimpleNamespace(**{n: n for n in ("FAILED", "KILLED", "RUNNING", "SUCCESS")})
        self._jvm.org.apache.spark.status.api.v1.TaskStatus = kinds
        self._conf = {"spark.driver.host": "here"}
        self._wanted: list[str] = []
        status = self._jsc.sc().statusStore()
        status.jobsList.return_value = Seq([self._job()])
        status.lastStageAttempt = self._stage
        status.taskList = self._tasks
        status.operationGraphForStage = lambda _: self._graph()

    def _job(self) -> Any:
        return SimpleNamespace(
            jobId=lambda: 0,
            submissionTime=lambda: option(date(1000)),
            stageIds=lambda: Seq(self.stages),
        )

    def _stage(self, stage: int) -> Any:
        def count(*states: str) -> Any:
            return lambda: sum(each.status() in states for each in self.stages[stage])

        return SimpleNamespace(
            attemptId=lambda: 0,
            numActiveTasks=count("RUNNING"),
            numFailedTasks=count("FAILED"),
            numKilledTasks=count("KILLED"),
        )

    def _tasks(self, stage: int, *_: Any) -> Seq:
        wanted, self._wanted[:] = list(self._wanted), []
        return Seq(each for each in self.stages[stage] if each.status() in wanted)

    def _graph(self) -> Any:
        root = SimpleNamespace(
            name=lambda: "Stage", childClusters=Seq, childNodes=lambda: Seq([self._node()])
        )
        return SimpleNamespace(rootCluster=lambda: root)

    def _node(self) -> Any:
        return SimpleNamespace(name=lambda: self._part)


@pytest.fixture(autouse=True)
def classic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "spark_context", lambda spark: spark)


def silent(
    spark: Any,
    told: dict[int, set[int]],
    swept: set[int] = frozenset(),  # type: ignore[assignment]
    others: set[int] = frozenset(),  # type: ignore[assignment]
    since: int = 0,
    until: int | None = None,
) -> list[Attempt]:
    return silent_attempts(spark, since, until, told, swept, others)


def test_one_that_was_killed_has_told_nothing() -> None:
    """Though its retry has, and others beside it."""
    spark = Spark({0: [task(1, "FAILED", 2000, CRASHED), task(2, "SUCCESS", 3000)]})
    assert silent(spark, {0: {2}}) == [Attempt(1, 0, "one", ended=2100)]
    assert silent(spark, {0: {1, 2}}) == []


def test_one_that_runs_has_not_ended() -> None:
    """Which whoever asks may wait for."""
    (found,) = silent(Spark({0: [task(1, "RUNNING", 2000)]}), {})
    assert found.is_running


def test_one_that_has_succeeded_had_nothing_to_tell() -> None:
    """As an empty partition, for which no function is called."""
    assert silent(Spark({0: [task(1, "SUCCESS", 2000), task(2, "SUCCESS", 2000)]}), {0: {2}}) == []


def test_a_stage_that_nobody_tells_of_counts_where_it_runs_python() -> None:
    """And where a Python worker may have been at work: not where it has reported an error."""
    for part, error, expected in (
        ("MapInPandas", CRASHED, 1),
        ("PythonRDD", CRASHED, 1),
        ("Exchange", CRASHED, 0),
        ("MapInPandas", REPORTED, 0),
    ):
        spark = Spark({0: [task(1, "FAILED", 2000, error)]}, part)
        assert len(silent(spark, {})) == expected


def test_what_is_of_another_trace_or_time_is_left_out() -> None:
    """A stage of which another trace was told, and jobs before and after this one."""
    spark = Spark({0: [task(1, "FAILED", 2000, CRASHED)]})
    assert silent(spark, {}, others={0}) == []
    assert silent(spark, {}, since=1001) == []
    assert silent(spark, {}, until=999) == []
    assert len(silent(spark, {}, since=1000, until=1000)) == 1


@pytest.mark.parametrize(
    ("began", "host", "error", "is_swept"),
    [
        (2100, "one", CRASHED, True),
        (2099, "one", CRASHED, False),
        (2100, "two", CRASHED, False),
        # Its Python workers may have lived on for a moment.
        (2100, "one", GONE, False),
        (7100, "one", GONE, True),
    ],
)
def test_what_it_has_left_is_delivered_by_a_later_one(
    began: int, host: str, error: str, is_swept: bool
) -> None:
    """On the same host, and only by one that began once it had ended."""
    killed = task(1, "FAILED", 2000, error)
    spark = Spark({0: [killed, task(2, "SUCCESS", began, host=host)]})
    (found,) = silent(spark, {0: {2}}, swept={2})
    assert found.is_swept is is_swept


def test_the_drivers_host_is_known() -> None:
    """There the driver delivers itself what was left."""
    (found,) = silent(Spark({0: [task(1, "FAILED", 2000, CRASHED, host="here")]}), {})
    assert found.is_here


def test_spark_connect_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a session that has stopped."""
    monkeypatch.setattr(attempts, "spark_context", lambda _: None)
    assert silent(object(), {}) == []


@pytest.mark.parametrize(
    ("numbers", "unknown"),
    [([0], {}), ([0, 1], {}), ([1], {"": 1}), ([3], {"": 3}), ([0, 2], {"": 1})],
)
def test_an_attempt_that_was_tried_again_is_unknown(
    numbers: list[int], unknown: dict[str, int]
) -> None:
    """Where no task brings a receipt, the numbers of later attempts tell of earlier ones."""
    book = Book(Destination("http://store", "1"), SimpleNamespace(trace_id="tr-1"), True)
    for number in numbers:
        for partition in (0, 1):
            seen = {
                "spark.stage.id": 7,
                "spark.partition.id": partition,
                "spark.task.attempt_number": number if partition else 0,
            }
            book.note_number(SimpleNamespace(get_attribute=seen.get))
    assert book.unknown == unknown
