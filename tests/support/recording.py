"""Somebody who owns calls, and keeps what the recorder makes of them."""

from __future__ import annotations

from mlflow_ctx_autolog.answers.task_answers import TaskAnswers
from mlflow_ctx_autolog.prices import Pricing
from mlflow_ctx_autolog.spans.record import OpenSpan, SpanContext, SpanRecord


class Keeper:
    """Owns all calls of this process, and keeps their spans."""

    def __init__(self) -> None:
        self.fingerprint_key: str | None = "key"
        self.propagates_headers = True
        self.begun = 0
        self.started_spans: list[OpenSpan] = []
        self.sent: list[tuple[str, str | None, bool]] = []
        self.spans: list[SpanRecord] = []
        self.refusal: Exception | None = None
        self.answers: TaskAnswers | None = None
        self.reuses: list[bool] = []
        self.pricing = Pricing()
        self.names_calls_by: str | None = None
        self.above = SpanContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")

    def parent(self) -> SpanContext | None:
        return self.above

    def begins(self) -> None:
        self.begun += 1

    def started(self, span: OpenSpan) -> None:
        self.started_spans.append(span)

    def admit(self, model: str, fingerprint: str | None, *, is_first: bool) -> None:
        self.sent.append((model, fingerprint, is_first))
        if self.refusal is not None:
            raise self.refusal

    def reused(self, *, was_sent: bool) -> None:
        self.reuses.append(was_sent)

    def ended(self, span: SpanRecord) -> None:
        self.spans.append(span)
