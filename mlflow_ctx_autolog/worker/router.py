"""Where the spans of tasks go: counted, filtered, placed in a trace, and delivered."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from mlflow_ctx_autolog.delivery.deliveries import Deliveries
from mlflow_ctx_autolog.delivery.records import Record
from mlflow_ctx_autolog.recorder.estimate import estimated_usage
from mlflow_ctx_autolog.spans.amounts import Amounts, parse_amounts
from mlflow_ctx_autolog.spans.attributes import COST, INPUTS, OUTPUTS, REUSED_FROM, USAGE
from mlflow_ctx_autolog.spans.call_sums import SUMMED
from mlflow_ctx_autolog.spans.content import ContentPolicy
from mlflow_ctx_autolog.spans.otlp import encode
from mlflow_ctx_autolog.spans.record import OpenSpan, SpanRecord
from mlflow_ctx_autolog.spans.trace_info import trace_document
from mlflow_ctx_autolog.spans.values import dump
from mlflow_ctx_autolog.stores.otlp import is_collector
from mlflow_ctx_autolog.stores.sending import appends
from mlflow_ctx_autolog.task import Task
from mlflow_ctx_autolog.worker.action_trace import ActionTraces
from mlflow_ctx_autolog.worker.linked_trace import LinkedTrace, reparented
from mlflow_ctx_autolog.worker.open_spans import Branch, OpenSpans
from mlflow_ctx_autolog.worker.placement import Place

__all__ = ["SpanTransforms", "TraceRouter"]


class SpanTransforms(Protocol):
    """What only MLflow can do with a span, which is loaded for it."""

    def priced(self, span: SpanRecord) -> Amounts:
        """Return what a call cost, as the store would find it."""

    def processed(self, span: SpanRecord, processors: Any) -> SpanRecord:
        """Return a span as MLflow's span processors leave it. What they raise, it raises."""

    def for_collector(self, span: SpanRecord) -> SpanRecord:
        """Return a span by OpenTelemetry's conventions, where MLflow exports by these."""


class TraceRouter:
    """Takes the spans of this process's tasks as they end.

    Args:
        deliveries: The ways to the stores.
        open_spans: What is open.
        transforms: What needs MLflow.
        submit_to_parent: Has the process that this one is a child of take a span: a task, the
            span, its record and its branch, and its usage and cost.
    """

    def __init__(
        self,
        deliveries: Deliveries,
        open_spans: OpenSpans,
        transforms: SpanTransforms,
        submit_to_parent: Callable[[Task, SpanRecord, Record, Branch, Amounts, Amounts], None],
    ) -> None:
        self._deliveries = deliveries
        self._open_spans = open_spans
        self._transforms = transforms
        self._submit_to_parent = submit_to_parent
        self._actions = ActionTraces()

    def announce(self, task: Task) -> None:
        """Send the task's span ahead, so that what lies beneath it is never an orphan."""
        if task.span is not None and task.is_recorded:
            self._submit_all(task, self._actions.announce(task.context))
            self._send_ahead(task, task.content, task.span.snapshot())

    def close_action(self, task: Task, *, failed: bool) -> None:
        """Close the trace of a task's action, where the driver is not told of the task."""
        if task.is_recorded:
            closing = self._actions.close(task.context, task.trace_update, failed=failed)
            self._submit_all(task, closing)

    def _submit_all(self, task: Task, records: Sequence[Record]) -> None:
        for record in records:
            self._deliveries.to(task.destination).submit(record)

    def settle(self, task: Task) -> None:
        """See to the task's spans that are open when it ends.

        Those of calls that have not returned are sent ahead as they are, lest they be lost with
        the process.
        """
        content = _unprocessed_content(task)

        def send_ahead(span: SpanRecord, branch: Branch) -> None:
            if task.placement is None or task.placement.place_open(branch) is Place.MAIN:
                self._send_ahead(task, content, span)

        self._open_spans.show(task, send_ahead)
        if task.placement is not None:
            task.placement.close()
        if task.linked is not None:
            self._submit_linked_trace(task, task.linked, is_over=True)

    def _send_ahead(self, task: Task, content: ContentPolicy, span: SpanRecord) -> None:
        if not appends(task.context.tracking_uri):
            # Not counted: it is sent, and counted, when it ends.
            record = replace(content.record(span), status="UNSET")
            self._deliveries.to(task.destination).submit(
                Record("span", span.span_id, encode(record))
            )

    def take(self, span: SpanRecord, *, is_call: bool = False) -> None:
        """Take a span that has ended, if it is one of a task's.

        Args:
            span: The span.
            is_call: Whether it is that of a call of the OpenAI client.
        """
        found = self._open_spans.ended(span.span_id)
        if found is not None:
            task, branch = found
            self._submit(task, span, branch, is_call=is_call)

    def _submit(
        self, task: Task, span: SpanRecord, branch: Branch | None, *, is_call: bool
    ) -> None:
        usage, cost = parse_amounts(span.get(USAGE)), parse_amounts(span.get(COST))
        if task.context.config.sampling is not None and usage and not cost:
            # What the store never sees, it cannot price.
            cost = self._transforms.priced(span)
        sent = self._filtered(task, span)
        if is_call:
            _count_answer(task, span, usage, cost)
        if task.elsewhere is not None and branch is not None:
            record = self._record(task, sent)
            self._submit_to_parent(task, span, record, branch, usage, cost)
            return
        task.count_span(span.span_id, span.parent_id, usage, cost)
        if branch is None:
            delivery = self._deliveries.to(task.destination)
            delivery.submit(self._record(task, _with_numbers(task, sent)))
            if (info := _info_of_own_trace(task, span)) is not None:
                delivery.submit(info)
        else:
            self.store(
                task,
                span.span_id,
                branch,
                failed=span.has_failed,
                seconds=span.seconds,
                span=lambda: sent,
            )

    def _filtered(self, task: Task, span: SpanRecord) -> SpanRecord:
        if not task.is_open:
            # No span goes through the driver's processors after the end of its task.
            return _unprocessed_content(task).record(span)
        content = task.content
        if task.span_processors:
            try:
                span = self._transforms.processed(span, task.span_processors)
            except Exception as error:
                reason = (
                    f"A span processor of the driver raised {type(error).__name__} on a worker, "
                    "so the content of that span is withheld."
                )
                content = ContentPolicy(task.context.config, withholds=reason)
        return content.record(span)

    def store(
        self,
        task: Task,
        span_id: str,
        branch: Branch,
        *,
        failed: bool,
        seconds: float,
        span: Callable[[], SpanRecord],
        record: Record | None = None,
    ) -> None:
        """Store a span below a task's where that is decided.

        Args:
            task: Whose it is.
            span_id: Its id.
            branch: Its branch.
            failed: Whether it ended with an error.
            seconds: How long it took.
            span: Returns it, with the content that may be sent.
            record: The same for the store, if there is one already.
        """
        place = Place.MAIN
        if task.placement is not None:
            place = task.placement.place(branch, span_id, failed=failed, seconds=seconds)
        if place is Place.NOWHERE:
            task.count_sampled_out()
            return
        around = branch.outer if span_id == branch.top else branch
        has_parent = around is not None and around.place is place
        if place is Place.LINKED and task.span is not None:
            task_span = task.span
            linked = task.link(lambda: self._new_linked_trace(task, task_span))
            record = self._record(task, linked.relocated(span(), is_top=not has_parent))
        elif (
            around is not None
            and task.placement is not None
            and not has_parent
            and task.span is not None
        ):
            record = self._record(task, reparented(span(), task.span))
        self._deliveries.to(task.destination).submit(record or self._record(task, span()))

    def _new_linked_trace(self, task: Task, task_span: OpenSpan) -> LinkedTrace:
        linked = LinkedTrace(task_span, task.context)
        # So that both are known of each other, whatever becomes of the task.
        if task.is_open:
            self.announce(task)
        self._submit_linked_trace(task, linked, is_over=not task.is_open)
        return linked

    def _submit_linked_trace(self, task: Task, linked: LinkedTrace, *, is_over: bool) -> None:
        delivery = self._deliveries.to(task.destination)
        root = linked.root()
        owner = task.span_id if is_over else ""
        delivery.submit(Record("span", root.span_id, encode(root), owner))
        delivery.submit(Record("trace", linked.trace_id, linked.info(is_over=is_over)))

    def _record(self, task: Task, span: SpanRecord) -> Record:
        if is_collector(task.context.tracking_uri):
            exported = self._transforms.for_collector(span)
            follows_conventions = exported is not span
            payload = encode(exported, all_texts=not follows_conventions, plain=follows_conventions)
        else:
            payload = encode(span)
        return Record("span", span.span_id, payload, task.span_id)


def _with_numbers(task: Task, span: SpanRecord) -> SpanRecord:
    """Return a task's span with how much went in and out, where the user has said nothing else.

    Numbers are no content, so that no setting withholds them.
    """
    numbers = {
        INPUTS: dump({"rows": task.rows_in}),
        OUTPUTS: dump({"rows": task.rows_out, "calls": task.calls, "errors": task.errors}),
    }
    return replace(span, attributes={**numbers, **span.attributes})


def _count_answer(task: Task, span: SpanRecord, usage: Amounts, cost: Amounts) -> None:
    if span.get(REUSED_FROM) is not None:
        # It was paid for, and counted, before.
        return
    paid = 0.0
    if task.budget is not None and (usage or not span.has_failed):
        # What was asked, whatever the answer says of it: so was the request admitted.
        estimate = functools.partial(estimated_usage, span)
        paid = task.budget.paid(str(span.get("model")), usage, cost.get("total_cost"), estimate)
    task.count_answer(span.has_failed, paid)
    if usage and not cost:
        task.count_tokens(str(span.get("model")), usage)
    attributes = {name: span.get(name) for name in SUMMED}
    task.sum_up(attributes, span.seconds, failed=span.has_failed)


def _unprocessed_content(task: Task) -> ContentPolicy:
    """Return what may be sent of a span that the driver's span processors have not seen."""
    if not task.span_processors:
        return task.content
    return ContentPolicy(task.context.config.updated({"capture_content": False}))


def _info_of_own_trace(task: Task, span: SpanRecord) -> Record | None:
    """Return what is known of a task's own trace, with metadata, which its root cannot carry."""
    context = task.context
    if context.traceparent is not None or not (context.metadata or task.trace_update):
        return None
    if appends(context.tracking_uri):
        return None
    info = trace_document(
        span.mlflow_trace_id,
        context.experiment_id,
        began=span.start,
        ended=span.end,
        state="ERROR" if span.has_failed else "OK",
        metadata=context.metadata,
        tags=context.tags,
        update=task.trace_update,
    )
    return Record("trace", span.mlflow_trace_id, info)
