"""One call of the client: from its arguments to the answer's last piece, and its span."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

from mlflow_ctx_autolog.answers.task_answers import TaskAnswers
from mlflow_ctx_autolog.exceptions import BudgetExceeded
from mlflow_ctx_autolog.prices import Pricing
from mlflow_ctx_autolog.recorder.answer import (
    answer_attributes,
    as_reused,
    document_of,
    error_in,
    outputs_of,
)
from mlflow_ctx_autolog.recorder.request import tools_attribute
from mlflow_ctx_autolog.recorder.streams import assembly_for
from mlflow_ctx_autolog.spans.amounts import Amounts
from mlflow_ctx_autolog.spans.attributes import (
    CHUNK_EVENT,
    CHUNK_VALUE,
    COST,
    EXCEPTION_EVENT,
    EXCEPTION_MESSAGE,
    EXCEPTION_TYPE,
    INFO,
    MODEL,
    NOT_SENT,
    OUTPUTS,
    RESEND_COUNT,
    REUSED_FROM,
    STREAM_OUTCOME,
    TIME_TO_FIRST_CHUNK,
    USAGE,
)
from mlflow_ctx_autolog.spans.quality import quality_attributes
from mlflow_ctx_autolog.spans.record import (
    MLFLOW_PREFIX,
    OpenSpan,
    SpanContext,
    SpanEvent,
    SpanLink,
    SpanRecord,
)
from mlflow_ctx_autolog.spans.values import dump

__all__ = ["Call", "CallOwner", "StreamedAnswer"]


class CallOwner(Protocol):
    """Whose a call is: it says what the call's span is below, and takes it when it has ended."""

    @property
    def fingerprint_key(self) -> str | None:
        """Key of the fingerprints of requests; None for none."""

    @property
    def propagates_headers(self) -> bool:
        """Whether calls take a ``traceparent`` along."""

    @property
    def names_calls_by(self) -> str | None:
        """The annotation whose value stands behind the name of a call's span; None for none."""

    @property
    def pricing(self) -> Pricing:
        """What its user says of prices."""

    def parent(self) -> SpanContext | None:
        """Return what a span that starts here and now is below.

        None for the root of a trace of its own. Below one that is not sampled there is no span.
        """

    def begins(self) -> None:
        """A call begins."""

    def started(self, span: OpenSpan) -> None:
        """Its span has started."""

    @property
    def answers(self) -> TaskAnswers | None:
        """Answers that its calls may be given again; None where none are kept."""

    def reused(self, *, was_sent: bool) -> None:
        """A call is given an answer again.

        Args:
            was_sent: Whether it was sent before, in vain.
        """

    def admit(self, model: str, fingerprint: str | None, *, is_first: bool) -> None:
        """A request is about to be sent.

        Args:
            model: Whom it asks.
            fingerprint: By what it is recognised.
            is_first: Whether it is the call's first.

        Raises:
            BudgetExceeded: It may not be sent.
        """

    def ended(self, span: SpanRecord) -> None:
        """A call's span has ended."""


class Call:
    """A call that is being made.

    Args:
        owner: Whose it is.
        api: Which of OpenAI's APIs it uses: ``chat``, ``responses``, ``embeddings``, and so on.
        arguments: Its keyword arguments.
        fingerprint: By what it is recognised; None where that is unknown.
        span: Its span; None where it is counted only.
    """

    def __init__(
        self,
        owner: CallOwner,
        api: str,
        arguments: Mapping[str, Any],
        fingerprint: str | None,
        span: OpenSpan | None,
    ) -> None:
        self.owner = owner
        self.api = api
        self.arguments = arguments
        self.span = span
        self.answers = owner.answers
        self._is_due = False
        self._is_reused = False
        self._fingerprint = fingerprint
        self._was_sent = False
        self._resent = 0
        # What the server has answered, as it was before the client parsed it.
        self._document: Any = None
        self._headers: Mapping[str, str] = {}

    @property
    def name(self) -> str:
        """What its span is called among all: ``trace_id/span_id``; "" where it has none."""
        span = self.span
        return "" if span is None else f"{span.mlflow_trace_id}/{span.context.span_id}"

    def sends(self) -> None:
        """A request is about to be sent, unless it was answered before.

        Raises:
            BudgetExceeded: It may not be.
        """
        self._is_due = True
        if self.answers is None:
            self.admit()

    def reused(self, paid_by: str) -> None:
        """It is given the answer that another call was given, and nothing is sent."""
        self._is_due = False
        self._is_reused = True
        self.owner.reused(was_sent=self._was_sent)
        self._was_sent = True
        if self.span is not None:
            self.span.update({REUSED_FROM: paid_by})
            trace_id, _, span_id = paid_by.rpartition("/")
            if trace_id:
                link = SpanLink(trace_id.removeprefix(MLFLOW_PREFIX), span_id)
                self.span.add_link(link)

    def admit(self) -> None:
        """A request is about to be sent. Does nothing for one that is part of the same.

        Raises:
            BudgetExceeded: It may not be.
        """
        if not self._is_due:
            # A redirect, or once more with a renewed log-in.
            return
        self._is_due = False
        is_first = not self._was_sent
        try:
            model = str(self.arguments.get("model"))
            self.owner.admit(model, self._fingerprint, is_first=is_first)
        except BudgetExceeded:
            if self.span is not None:
                self.span.update({NOT_SENT: True})
            raise
        self._was_sent = True

    def resends(self) -> None:
        """The request is about to be sent once more."""
        self._resent += 1
        if self.span is not None:
            self.span.update_json({RESEND_COUNT: str(self._resent)})

    def said(self, document: Any, headers: Mapping[str, str]) -> None:
        """The server has answered with a document."""
        self._document, self._headers = document, headers

    def answered(self, result: Any, headers: Mapping[str, str] | None = None) -> None:
        """End with an answer that is all there, and the headers it came with if not yet told."""
        if self.span is None:
            return
        self._headers = headers or self._headers
        document = self._document if self._document is not None else document_of(result)
        self._end(document, outputs_of(result))

    def failed(self, error: BaseException) -> None:
        """End with an error; the server may have answered all the same, and wants to be paid."""
        if self.span is None:
            return
        self.span.record_error(error)
        if self._document is None:
            self._end(None, None)
        else:
            self._end(self._document, dump(self._document), rejected=True)

    def end_stream(
        self,
        document: Any,
        outputs: str | None,
        *,
        rejected: bool = False,
        was_answered: bool = True,
        end: int | None = None,
    ) -> None:
        """End with what the pieces of a stream come to.

        Args:
            document: The answer; None where nothing has come.
            outputs: The same as JSON, as the client has it.
            rejected: Whether the client made nothing of it.
            was_answered: Whether there is an answer, which costs what it costs.
            end: When it ended, in nanoseconds since the epoch; None for now.
        """
        self._end(document, outputs, rejected=rejected, end=end, was_answered=was_answered)

    def _end(
        self,
        document: Any,
        outputs: str | None,
        *,
        rejected: bool = False,
        end: int | None = None,
        was_answered: bool = False,
    ) -> None:
        span = self.span
        if span is None:
            return
        try:
            if document is not None or was_answered:
                span.update_json(tools_attribute(self.arguments))
                attributes = answer_attributes(self.arguments, document)
                if self._is_reused:
                    attributes = as_reused(attributes)
                elif cost := self._cost(attributes):
                    attributes[COST] = cost
                span.update(attributes)
                span.update(
                    quality_attributes(
                        self.arguments,
                        document,
                        key=self.owner.fingerprint_key,
                        rejected=rejected,
                    )
                )
            if outputs is not None:
                span.update_json({OUTPUTS: outputs})
            if (error := error_in(document)) is not None:
                kind, message = error
                span.add_event(
                    SpanEvent(
                        EXCEPTION_EVENT,
                        time.time_ns(),
                        {EXCEPTION_TYPE: kind, EXCEPTION_MESSAGE: message},
                    )
                )
                span.fail()
        finally:
            record = span.finish(end=end, level=INFO)
            if record is not None:
                self.owner.ended(record)

    def _cost(self, answer: Mapping[str, Any]) -> Amounts:
        """Return what an answer has cost, where the user says so."""
        models = answer.get(MODEL), self.arguments.get("model")
        return self.owner.pricing.cost(models, answer.get(USAGE, {}), self._headers)


class StreamedAnswer:
    """An answer that is read after the call has returned, and the span that lasts as long.

    Args:
        call: The call.
        unread: All that are being read; it takes itself out when it ends.
    """

    def __init__(self, call: Call, unread: set[StreamedAnswer]) -> None:
        self.owner = call.owner
        self._call = call
        self._unread = unread
        self._assembly = assembly_for(call.api)
        self._document: Any = None
        self._headers: Mapping[str, str] = {}
        self._is_document_taken = True
        self._pieces: list[str] = []
        self._last: Any = None
        self._latest = time.time_ns()
        self._error: BaseException | None = None

    def said(self, document: Any, headers: Mapping[str, str]) -> None:
        self._document, self._headers, self._is_document_taken = document, headers, False

    def received(self, chunk: Any) -> None:
        span = self._call.span
        if self not in self._unread or span is None:
            return
        self._latest = time.time_ns()
        if not self._pieces:
            seconds = (self._latest - span.start) / 1e9
            span.update({TIME_TO_FIRST_CHUNK: seconds})
        text = outputs_of(chunk)
        span.add_event(
            SpanEvent(f"{CHUNK_EVENT}{len(self._pieces)}", self._latest, {CHUNK_VALUE: text})
        )
        self._pieces.append(text)
        self._last = chunk
        document = document_of(chunk) if self._is_document_taken else self._document
        self._is_document_taken = True
        if isinstance(document, Mapping):
            self._assembly.add(document)

    def answered(self, result: Any) -> None:
        if self._is_taken():
            if self._document is not None:
                self._call.said(self._document, self._headers)
            self._call.answered(result)

    def rejected(self, error: BaseException) -> None:
        self._error = error

    def ended(self) -> None:
        if self._is_taken():
            if self._error is not None and self._call.span is not None:
                self._call.span.record_error(self._error)
            self._end(rejected=self._error is not None)

    def failed(self, error: BaseException) -> None:
        if self._is_taken():
            if self._call.span is not None:
                self._call.span.record_error(error)
            self._end(was_answered=bool(self._pieces))

    def closed(self) -> None:
        if self._is_taken():
            if self._call.span is not None:
                self._call.span.update({STREAM_OUTCOME: "closed early"})
            # It may come to light long after the last chunk was read.
            self._end(end=self._latest)

    def _is_taken(self) -> bool:
        """Take the right to end the span, which may be claimed from several threads."""
        try:
            self._unread.remove(self)
        except KeyError:
            return False
        return True

    def _end(
        self, *, rejected: bool = False, was_answered: bool = True, end: int | None = None
    ) -> None:
        answer = self._assembly.answer() if self._pieces else None
        if answer is None and not self._pieces:
            # Read in one, if at all.
            answer = self._document
        outputs = None if answer is None else self._outputs(answer)
        self._call.end_stream(
            answer, outputs, rejected=rejected, was_answered=was_answered, end=end
        )

    def _outputs(self, answer: Any) -> str:
        api = self._call.api
        if api == "responses" and (response := getattr(self._last, "response", None)) is not None:
            # With what the client adds to it, where the server has sent all of it.
            if response.output:
                return outputs_of(response)
        elif api == "chat" and self._pieces:
            from openai.types.chat import ChatCompletion

            return outputs_of(ChatCompletion.construct(**answer))
        elif api not in ("completions", "responses") and self._pieces:
            return f"[{', '.join(self._pieces)}]"
        return dump(answer)
