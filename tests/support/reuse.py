"""Calls of the OpenAI client whose answers are kept, without Spark."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai._base_client import AsyncAPIClient, SyncAPIClient

from mlflow_ctx_autolog.answers.client import ReusedAnswers
from mlflow_ctx_autolog.answers.store import AnswerStore
from mlflow_ctx_autolog.answers.task_answers import Place, TaskAnswers
from mlflow_ctx_autolog.answers_settings import Answers
from mlflow_ctx_autolog.patching import Patch

__all__ = ["Attempts", "ProgressingCall", "new_store"]


@dataclass
class ProgressingCall:
    """A call of a task, as the recorder of spans knows it."""

    answers: TaskAnswers | None
    name: str = "tr-0a/0b"
    sent: int = 0
    reused_from: list[str] = field(default_factory=list)
    refusal: Exception | None = None

    def admit(self) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.sent += 1

    def reused(self, paid_by: str) -> None:
        self.reused_from.append(paid_by)


def new_store(folder: Path, **settings: Any) -> AnswerStore:
    return AnswerStore(folder, **{"ttl": 3600.0, "max_bytes": 10**9, **settings})


class Attempts:
    """Attempts of one partition of a task, one after the other."""

    def __init__(self, store: AnswerStore, **settings: Any) -> None:
        self.store = store
        self.settings = Answers(**settings)
        self.call = ProgressingCall(None)
        self._reused = ReusedAnswers(lambda: self.call)

    def begin(self, partition: str = "0", job: str = "job") -> ProgressingCall:
        """Let the calls from here on be those of a new attempt."""
        self.store.flush(10)
        place = Place(job, "function", partition, "")
        answers = TaskAnswers(self.store, place, self.settings, b"key")
        self.call = ProgressingCall(answers)
        return self.call

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        patches = [
            Patch(SyncAPIClient, "request", self._reused.request),
            Patch(AsyncAPIClient, "request", self._reused.async_request),
        ]
        for patch in patches:
            patch.apply()
        try:
            yield
        finally:
            for patch in patches:
                patch.revert()
            self._reused.uninstall()
