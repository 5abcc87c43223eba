"""Which task attempts Spark has begun that have not told what they made."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlflow_ctx_autolog.driver.spark import spark_context

__all__ = ["Attempt", "silent_attempts"]

# Milliseconds that Spark may take to tell its own listeners what has happened.
_NEWS = 2000
# Jobs, of the latest ones, and task attempts of a stage, that are looked at.
_JOBS, _TASKS = 1000, 5000
# What Spark calls the parts of a stage that run Python.
_PYTHON = re.compile("Python|Pandas|InArrow")
# An error that a Python worker has reported itself, so that it lived on; and one that says that a
# whole executor is gone, whose Python workers may live for a moment yet, in milliseconds.
_REPORTED, _EXECUTOR_GONE, _LINGER = "PythonException", "ExecutorLost", 5000


@dataclass(frozen=True)
class Attempt:
    """A task attempt that Spark has begun, and that has not told what it made.

    Args:
        attempt: Spark's id of it.
        stage: The number of its stage.
        host: The host that it ran on, as Spark calls it.
        ended: When nothing of it can have been running any more, in milliseconds since the epoch;
            None for one that has not ended.
        is_here: Whether that host is the driver's.
        is_swept: Whether all that was left on that host since has been delivered, so that the
            store has what it made, but for what never was on a disk.
    """

    attempt: int
    stage: int
    host: str
    ended: int | None = None
    is_here: bool = False
    is_swept: bool = False

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self.ended is None


def silent_attempts(
    spark: Any,
    since: int,
    until: int | None,
    told: Mapping[int, Collection[int]],
    swept: Collection[int | None],
    others: Collection[int],
) -> list[Attempt]:
    """Return the task attempts of a trace that have not told what they made.

    Whose an attempt is that was killed before anybody told of its stage, Spark does not say: it
    counts for every trace that was open when it ran, rather than for none.

    Args:
        spark: A session or context.
        since: Milliseconds since the epoch at which the trace began.
        until: The same for its end; None where it has not ended.
        told: By their stages, the ids of attempts that have told.
        swept: Ids of those in which all that had been left on their host was delivered.
        others: Stages of which attempts have told in other traces.

    Returns:
        None of them on Spark Connect, and where Spark has stopped.
    """
    context = spark_context(spark)
    if context is None or context._jsc is None:
        return []
    core = context._jsc.sc()
    with contextlib.suppress(Exception):
        core.listenerBus().waitUntilEmpty(_NEWS)
    status = core.statusStore()
    look = _Look(context, status, swept)
    for stage in _stages(status, since, until):
        if stage in told or stage not in others:
            # Of a stage that was skipped, or is forgotten, Spark knows no attempts.
            with contextlib.suppress(Exception):
                look.at(stage, told.get(stage))
    return look.found()


class _Look:
    """A look at what Spark has kept of task attempts."""

    def __init__(self, context: Any, status: Any, swept: Collection[int | None]) -> None:
        self._context = context
        self._status = status
        self._swept = set(swept)
        self._here = str(context._conf.get("spark.driver.host"))
        self._silent: list[Attempt] = []
        # When the last attempt began in which a host was swept.
        self._hosts: dict[str, int] = {}

    def at(self, stage: int, told: Collection[int] | None) -> None:
        """Look at a stage, of which some attempts have told, or None has."""
        last = self._status.lastStageAttempt(stage)
        numbers = range(int(last.attemptId()) + 1)
        open_or_bad = last.numActiveTasks() + last.numFailedTasks() + last.numKilledTasks()
        if not open_or_bad and len(numbers) == 1:
            # Of those that succeeded, one that is silent had no rows to call a function with.
            return
        if told is None and not _runs_python(self._status, stage):
            return
        for number in numbers:
            for task in self._tasks(stage, number, ("FAILED", "KILLED", "RUNNING")):
                attempt = int(task.taskId())
                if attempt not in (told or ()):
                    self._note_silent(task, attempt, stage, has_told=told is not None)
        if self._silent and self._swept.intersection(told or ()):
            for number in numbers:
                for task in self._tasks(stage, number, ("RUNNING", "SUCCESS")):
                    if int(task.taskId()) in self._swept:
                        host, began = str(task.host()), int(task.launchTime().getTime())
                        self._hosts[host] = max(began, self._hosts.get(host, -1))

    def found(self) -> list[Attempt]:
        """Return those that have not told."""
        return [
            replace(each, is_swept=self._hosts.get(each.host, -1) >= each.ended)
            if each.ended is not None
            else each
            for each in self._silent
        ]

    def _tasks(self, stage: int, number: int, states: Sequence[str]) -> Iterator[Any]:
        kinds = self._context._jvm.org.apache.spark.status.api.v1.TaskStatus
        wanted = self._context._jvm.java.util.ArrayList()
        for state in states:
            wanted.add(getattr(kinds, state))
        unsorted = self._context._jvm.scala.Option.apply(None)
        return _items(self._status.taskList(stage, number, 0, _TASKS, unsorted, False, wanted))

    def _note_silent(self, task: Any, attempt: int, stage: int, *, has_told: bool) -> None:
        error = task.errorMessage()
        reason = str(error.get()) if error.isDefined() else ""
        if not has_told and _REPORTED in reason:
            # It lived to report, and not to trace: it ran nothing of ours.
            return
        ended = None
        if str(task.status()) != "RUNNING":
            duration = task.duration()
            ended = int(task.launchTime().getTime())
            ended += int(duration.get()) if duration.isDefined() else 0
            ended += _LINGER if _EXECUTOR_GONE in reason else 0
        host = str(task.host())
        self._silent.append(Attempt(attempt, stage, host, ended, is_here=host == self._here))


def _stages(status: Any, since: int, until: int | None) -> list[int]:
    """Return the stages of the jobs that were submitted while a trace was open."""
    found: dict[int, None] = {}
    jobs = sorted(_items(status.jobsList(None)), key=lambda job: -int(job.jobId()))
    for job in jobs[:_JOBS]:
        submitted = job.submissionTime()
        if not submitted.isDefined():
            continue
        moment = submitted.get().getTime()
        if moment < since:
            break
        if until is None or moment <= until:
            found.update(dict.fromkeys(int(each) for each in _items(job.stageIds())))
    return sorted(found)


def _runs_python(status: Any, stage: int) -> bool:
    return any(_PYTHON.search(name) for name in _names(status.operationGraphForStage(stage)))


def _names(graph: Any) -> Iterator[str]:
    clusters = [graph.rootCluster()]
    while clusters:
        cluster = clusters.pop()
        yield str(cluster.name())
        clusters.extend(_items(cluster.childClusters()))
        yield from (str(node.name()) for node in _items(cluster.childNodes()))


def _items(sequence: Any) -> Iterator[Any]:
    for index in range(sequence.size()):
        yield sequence.apply(index)
