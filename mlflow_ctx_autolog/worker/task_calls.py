"""Calls of the OpenAI client as those of tasks."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

from mlflow_ctx_autolog.answers.task_answers import TaskAnswers
from mlflow_ctx_autolog.exceptions import BudgetExceeded
from mlflow_ctx_autolog.prices import Pricing
from mlflow_ctx_autolog.recorder.openai_calls import OpenAIRecorder
from mlflow_ctx_autolog.spans.record import OpenSpan, SpanContext, SpanRecord
from mlflow_ctx_autolog.task import Task, current_task

__all__ = ["CallRecording"]

_DIGITS_OF_REQUEST = 12


class CallRecording:
    """Records the calls of this process's tasks.

    Args:
        active: Tells what a span that starts here and now is below.
        problem: Tells why calls are not to be recorded here and now; None if they are.
        started: Is told of a call's span that has started.
        ended: Takes one that has ended.
    """

    def __init__(
        self,
        active: Callable[[], SpanContext | None],
        problem: Callable[[], str | None],
        started: Callable[[Task, OpenSpan], None],
        ended: Callable[[SpanRecord], None],
    ) -> None:
        self.active = active
        self.started = started
        self.ended = ended
        self._problem = problem
        self._recorder = OpenAIRecorder(self._owner)
        self._owners: WeakKeyDictionary[Task, _CallsOfTask] = WeakKeyDictionary()

    def install(self) -> None:
        """Idempotent."""
        self._recorder.install()

    def uninstall(self) -> None:
        """Idempotent."""
        self._recorder.uninstall()

    def close_unread(self, task: Task) -> None:
        """End the spans of those answers that a task has not read to their end."""
        if (owner := self._owners.get(task)) is not None:
            self._recorder.close_unread(owner)

    def _owner(self) -> _CallsOfTask | None:
        task = current_task()
        if task is None:
            return None
        if self._problem() is not None:
            task.count_call()
            return None
        found = self._owners.get(task)
        if found is None:
            found = self._owners.setdefault(task, _CallsOfTask(task, self))
        return found


class _CallsOfTask:
    """The owner of one task's calls."""

    def __init__(self, task: Task, recording: CallRecording) -> None:
        self._task = task
        self._recording = recording

    @property
    def fingerprint_key(self) -> str | None:
        return self._task.context.fingerprint_key

    @property
    def propagates_headers(self) -> bool:
        return self._task.context.config.propagate_headers

    @property
    def names_calls_by(self) -> str | None:
        return self._task.context.config.name_calls_by

    @property
    def pricing(self) -> Pricing:
        return self._task.context.config.pricing

    def parent(self) -> SpanContext | None:
        return self._recording.active()

    def begins(self) -> None:
        self._task.count_call()

    def started(self, span: OpenSpan) -> None:
        self._recording.started(self._task, span)

    @property
    def answers(self) -> TaskAnswers | None:
        return self._task.answers

    def reused(self, *, was_sent: bool) -> None:
        if not was_sent:
            self._task.count_call(-1)
        self._task.count_reused()

    def admit(self, model: str, fingerprint: str | None, *, is_first: bool) -> None:
        task = self._task
        if task.budget is not None:
            try:
                task.budget.admit(model, fingerprint)
            except BudgetExceeded:
                if is_first:
                    task.count_call(-1)
                raise
        if fingerprint is not None and task.context.config.progress:
            task.count_request(fingerprint[:_DIGITS_OF_REQUEST])

    def ended(self, span: SpanRecord) -> None:
        self._recording.ended(span)
