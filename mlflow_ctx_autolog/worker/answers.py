"""Which answers the tasks of this process may be given again, and those of child processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mlflow_ctx_autolog.answers.task_answers import (
    Place,
    TaskAnswers,
    Turns,
    job_of,
    open_task_answers,
)
from mlflow_ctx_autolog.answers_settings import Answers, AnswersKey
from mlflow_ctx_autolog.context import DriverContext
from mlflow_ctx_autolog.task import driver_span, open_tasks
from mlflow_ctx_autolog.worker.spark_task import application_id

__all__ = ["answers_of", "answers_of_parents", "take_turn"]


def answers_of(
    context: DriverContext, name: str, function: str, facts: Mapping[str, Any]
) -> TaskAnswers | None:
    """Return the answers that a task attempt may be given again; None where none are kept.

    Args:
        context: What came from the driver.
        name: The name of the function.
        function: What names it whenever it is the same, in one process of the driver.
        facts: What :func:`~mlflow_ctx_autolog.worker.spark_task.task_attributes` returned.
    """
    answers = context.config.reuse_answers
    if not isinstance(answers, Answers):
        return None
    # Of an action without a span, the application is the job: another action may ask the same.
    span = None if context.action is not None else driver_span(context)
    job = job_of(
        None if span is None else span.trace_id, context.application_id or application_id(), facts
    )
    place = None
    if job is not None:
        partition = facts.get("spark.partition.id")
        application = context.application_id or job
        place = Place(
            job,
            # What another process pickles, another day, is no more the same.
            name if answers.scope == "always" else function,
            None if partition is None else str(partition),
            f"{application}/{facts.get('spark.task.attempt_id')}",
        )
    return _open_answers(context, place)


def _open_answers(
    context: DriverContext, place: Place | None, turns: Turns | None = None
) -> TaskAnswers | None:
    config = context.config
    if not isinstance(config.reuse_answers, Answers):
        return None
    return open_task_answers(
        config.reuse_answers,
        place,
        job_key=context.fingerprint_key,
        answers_key=config.answers_key if isinstance(config.answers_key, AnswersKey) else None,
        max_bytes=config.max_answer_bytes,
        spool_directory=config.spool_directory,
        turns=turns,
    )


def answers_of_parents(
    context: DriverContext, place: str, ask: Callable[[dict[str, Any]], Any], task: str
) -> TaskAnswers | None:
    """Return the answers that a task may be given again which the parent process runs.

    Args:
        context: What came from the driver.
        place: What :meth:`TaskAnswers.located` returned there.
        ask: Asks the parent, and returns None where it is gone.
        task: The id of the task's span.
    """
    return _open_answers(context, Place.from_json(place), _ParentsTurns(ask, task))


class _ParentsTurns:
    """Has the parent process count, which counts for all child processes of its task."""

    def __init__(self, ask: Callable[[dict[str, Any]], Any], task: str) -> None:
        self._ask = ask
        self._task = task

    def take(self, request: str) -> int | None:
        turn = self._ask({"task": self._task, "request": request})
        return turn if isinstance(turn, int) else None

    def give_back(self, request: str, turn: int) -> None:
        self._ask({"task": self._task, "request": request, "unanswered": turn})


def take_turn(question: Mapping[str, Any]) -> int | None:
    """Answer a child process that asks on behalf of a task of this process.

    Args:
        question: ``task`` is the id of the task's span, ``request`` the digest of a request, and
            ``unanswered``, if there, the turn at it that the child gives back.

    Returns:
        Its turn; None for one that is given back, and where the task is over.
    """
    for task in open_tasks():
        if task.span_id == question["task"] and task.answers is not None:
            request = str(question["request"])
            if "unanswered" not in question:
                return task.answers.turns.take(request)
            task.answers.turns.give_back(request, int(question["unanswered"]))
    return None
