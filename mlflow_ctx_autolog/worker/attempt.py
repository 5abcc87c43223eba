"""A task attempt, from the begin of its span to what becomes of the spans below it."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow_ctx_autolog.context import BY_PROPERTY, DriverContext
from mlflow_ctx_autolog.delivery.outbox import Outbox
from mlflow_ctx_autolog.delivery.receipts import Counts, TaskReceipt
from mlflow_ctx_autolog.delivery.relay import driver_is_here, relay_bytes
from mlflow_ctx_autolog.delivery.sender import Delivery
from mlflow_ctx_autolog.exceptions import warn_once
from mlflow_ctx_autolog.log_ins import safe_logger
from mlflow_ctx_autolog.spans.attributes import (
    DEBUG,
    FUNCTION,
    OUTCOME,
    PARTITION,
    RUNNING,
)
from mlflow_ctx_autolog.spans.record import OpenSpan, SpanEvent
from mlflow_ctx_autolog.stores.sending import appends, is_database, needs_mlflow
from mlflow_ctx_autolog.task import Task, driver_span, driver_trace_id, open_tasks
from mlflow_ctx_autolog.worker.action_trace import root_of
from mlflow_ctx_autolog.worker.answers import answers_of
from mlflow_ctx_autolog.worker.placement import open_placement
from mlflow_ctx_autolog.worker.process import budget_of, content_policy, worker_process
from mlflow_ctx_autolog.worker.spark_task import is_reused, sees_properties, task_attributes

__all__ = ["acknowledge", "begin", "finish"]

_logger = safe_logger(__name__)

_TASK = "TASK"

# A trace's session and tags can be written through attributes of its root span, which spares a
# request of their own. Older servers keep the tags as plain attributes.
_TAG_PREFIX = "mlflow.traceTag."
_TRACE_NAME = f"{_TAG_PREFIX}mlflow.traceName"
_SESSION, _USER = "session.id", "user.id"

# How long the end of a task whose spans can go home waits for the store: a share of the time that
# the task took, and at least so many seconds, unless the last task has waited in vain.
_SHARE_OF_TASK, _PATIENCE = 0.05, 1.0
# Seconds in which a process that lives on waits for the store but once.
_LULL = 5.0
# What variables that hold a log-in, or say how to store, begin with.
_OF_LOG_INS = ("MLFLOW_", "OTEL_")


def begin(
    context: DriverContext,
    name: str,
    relay: Any = None,
    filters: bytes | None = None,
    function: str | None = None,
) -> Task:
    """Begin a task attempt: its span is open, and what runs in it is recorded.

    Args:
        context: What came from the driver.
        name: The name of its function, which that of its span begins with.
        relay: A Spark accumulator for its receipt and spans; None where there is none.
        filters: The user's functions that spans go through, as Spark pickles them.
        function: What names the function whenever it is the same; by default its name.
    """
    worker = worker_process()
    attributes = task_attributes()
    content, span_processors = content_policy(context, filters)
    task = Task(
        context,
        content,
        attempt_id=attributes.get("spark.task.attempt_id"),
        # Which Spark does not tell any more when the task ends.
        stage=attributes.get("spark.stage.id"),
        partition=int(attributes.get(PARTITION, 0)),
        relay=relay,
        is_relayed=_is_relayed(context, relay),
        function=name,
        span_processors=span_processors,
        budget=budget_of(context),
        answers=answers_of(context, name, function or name, attributes),
        hides_properties=context.propagation == BY_PROPERTY and not sees_properties(),
    )
    for other in open_tasks():
        # A Python worker runs one task attempt at a time, so this one was dropped unfinished.
        if other.attempt_id != task.attempt_id:
            finish(other, GeneratorExit())
    if context.application_id is not None:
        attributes["spark.application.id"] = context.application_id
    if context.speculation is not None:
        attributes["spark.speculation"] = context.speculation
    attributes["spark.function.id"] = function or name
    attributes[FUNCTION] = name
    attributes[OUTCOME] = RUNNING
    worker.switch_on(task)
    if task.is_relayed:
        worker.deliveries.to(task.destination).is_shared = _driver_is_here(context)
    task.open()
    try:
        parent = driver_span(context)
        task.span = OpenSpan(_span_name(name, context, attributes), _TASK, parent)
        task.span.update({**attributes, **_of_own_trace(name, context)})
        is_sampled = parent.is_sampled if parent is not None else _is_sampled()
        # Below a span that sampling has dropped, its calls are dropped with it.
        task.parent = task.span.context._replace(is_sampled=is_sampled)
        task.placement = open_placement(context, task.trace_id)
        worker.task_started(task)
    except BaseException:
        task.close()
        worker.switch_off()
        raise
    return task


def _span_name(name: str, context: DriverContext, attributes: Mapping[str, Any]) -> str:
    """Return what tells a task's span from those beside it."""
    partition = attributes.get(PARTITION)
    # The root of a trace is called what the trace is, by which jobs are found.
    is_root = context.traceparent is None
    return name if is_root or partition is None else f"{name} [{partition}]"


def acknowledge(told: Mapping[str, int]) -> None:
    """Forget what the driver says that it has, of what earlier tasks of this process gave it."""
    if told:
        for each in worker_process().deliveries.all():
            each.acknowledge(told)


def _of_own_trace(name: str, context: DriverContext) -> Mapping[str, Any]:
    """Return what a task's span says of its trace, where it is the root of one."""
    if context.traceparent is not None:
        return {}
    said = {_TRACE_NAME: name, _SESSION: context.session_id, _USER: context.user}
    found = {name: value for name, value in said.items() if value is not None}
    return {**found, **{f"{_TAG_PREFIX}{tag}": value for tag, value in context.tags.items()}}


def _is_sampled() -> bool:
    """Whether a trace that begins here is recorded, as MLflow samples traces."""
    try:
        ratio = float(os.environ.get("MLFLOW_TRACE_SAMPLING_RATIO", "1"))
    except ValueError:
        ratio = 1.0
    # Not from the generator that the user may have seeded.
    return not 0.0 <= ratio < 1.0 or random.SystemRandom().random() < ratio


def finish(task: Task, error: BaseException | None = None) -> None:
    """End the task's span and see its spans off. Never raises. Idempotent."""
    if not task.is_open or task.span is None:
        return
    worker = worker_process()
    delivery = worker.deliveries.to(task.destination)
    silence = None
    try:
        worker.settle(task)
        made = delivery.counts(task.span_id).made + 1
        silence = _reason_for_silence(task, made)
        _end_span(task, task.span, made, silence, error)
    except Exception as failure:
        warn_once(_logger, "end", f"The span of a task could not be ended: {failure!r}")
    finally:
        task.close()
    if task.answers is not None:
        task.answers.close()
    try:
        _see_off(task, delivery, error, silence)
    finally:
        # Not before: the log-in at the store may be among what the task has set.
        worker.switch_off()


def _end_span(
    task: Task, span: OpenSpan, made: int, silence: str | None, error: BaseException | None
) -> None:
    worker = worker_process()
    if (said := worker.mlflow.said_of(task)) is not None:
        # By the user's function, to which it was MLflow's active span.
        span.update_json({name: text for name, text in said.attributes.items() if name != OUTCOME})
        for event in said.events:
            span.add_event(event)
    task.say_of_trace(worker.mlflow.said_of_trace(task))
    receipt = TaskReceipt.attributes(
        made, task.usage.total, task.cost.total, silence, task.sampled_out, task.trace_update
    )
    span.update({**task.counts(), **receipt})
    if error is None:
        span.update({OUTCOME: "completed"})
    elif isinstance(error, GeneratorExit):
        # Spark had all the rows it wanted.
        span.update({OUTCOME: "closed early"})
    else:
        span.update({OUTCOME: "failed"})
        event = SpanEvent.of_exception(error)
        span.add_event(event)
        span.fail(f"{type(error).__name__}: {event.attributes['exception.message']}")
    record = span.finish(level=DEBUG)
    if record is not None and task.is_recorded:
        worker.task_ended(record)
        if task.relay is None or error is not None:
            failed = error is not None and not isinstance(error, GeneratorExit)
            worker.router.close_action(task, failed=failed)


def _see_off(
    task: Task, delivery: Outbox, error: BaseException | None, silence: str | None
) -> None:
    """Store what a task that has ended has made, or hand it on to those who can."""
    # From a task that fails or is closed early, Spark takes nothing home.
    goes_home = task.relay is not None and error is None
    # What keeps a span as often as it is sent gets all from here, and nothing from the driver.
    is_sent_once = appends(delivery.destination.tracking_uri)
    started = time.monotonic()
    if isinstance(delivery, Delivery):
        is_seen_to = _send(task, delivery, goes_home, patiently=is_sent_once)
    else:
        is_seen_to = delivery.is_shared
    seconds = time.monotonic() - started
    counts = delivery.counts(task.span_id)
    delivery.forget(task.span_id)
    if goes_home:
        _relay(task, delivery, counts, seconds, is_seen_to or is_sent_once, silence)
    if delivery.is_shared:
        delivery.release()
    elif not is_seen_to and (is_sent_once or not goes_home):
        warn_once(
            _logger,
            "flush",
            f"{delivery.waiting} finished spans of this worker are not stored at the end of the "
            "task. They are sent later if this worker lives on; else the next task on this host, "
            "or mlflow-ctx-autolog recover, sends them from the spool.",
        )


def _send(task: Task, delivery: Delivery, goes_home: bool, *, patiently: bool) -> bool:
    """Send what waits; return whether it is stored, or will be soon.

    A process that lives on after the task waits for the store only once in a while. The driver, to
    which the task's receipt goes, waits in its place.
    """
    if goes_home and delivery.was_flushed(_LULL) and _is_sent_later(task):
        delivery.send_soon()
        return True
    timeout = task.context.config.flush_timeout
    if goes_home and not patiently:
        # Rather than hold up a job for a store that is slow, let the driver wait for it.
        patience = 0.0 if delivery.store_is_down else _PATIENCE
        timeout = min(timeout, max(patience, _SHARE_OF_TASK * (time.monotonic() - task.began)))
    give_up = delivery.store_is_down or (goes_home and not patiently)
    return delivery.flush(timeout, give_up=give_up)


def _is_sent_later(task: Task) -> bool:
    """Whether a task's spans can be sent as well once it has ended."""
    # Variables for a log-in are kept for that; others, as for proxies, hold during the task alone.
    has_log_in_alone = all(name.startswith(_OF_LOG_INS) for name in task.context.environment)
    is_by_mlflow = needs_mlflow(task.destination.tracking_uri)
    return is_reused() and has_log_in_alone and not is_by_mlflow


def _reason_for_silence(task: Task, made: int) -> str | None:
    """Return why the task's model calls left no span, if they may have left none for a reason.

    A function that calls no model is none.

    Args:
        task: The task.
        made: Spans that it has made, its own among them.
    """
    problem = worker_process().mlflow.problem()
    if not task.is_recorded:
        is_expected = driver_span(task.context) is not None
        is_expected = is_expected and driver_trace_id(task.context) is None
        return None if is_expected else (problem or "sampling dropped the task's span")
    # The user has said so on the driver, and need not be told.
    if made > 1 or problem is None or task.context.records_no_calls:
        return None
    return f"{task.calls} calls were made, but {problem}" if task.calls else problem


def _relay(
    task: Task,
    delivery: Outbox,
    counts: Counts,
    seconds: float,
    is_seen_to: bool,
    silence: str | None,
) -> None:
    """Hand back the task's receipt, and what this worker could not store, along with the task."""
    receipt = TaskReceipt(
        trace_id=task.trace_id,
        task_span_id=task.span_id,
        made=counts.made,
        delivered=counts.delivered,
        waiting=counts.waiting,
        lost=counts.lost,
        losses={loss.value: count for loss, count in counts.losses.items()},
        first_error=delivery.first_error if counts.waiting or counts.lost else None,
        seconds_waiting=seconds,
        usage=task.usage.total,
        cost=task.cost.total,
        calls=task.calls,
        errors=task.errors,
        spent=task.spent,
        requests=sorted(task.requests),
        repeats=task.repeats,
        requests_untold=task.requests_untold,
        function=task.function,
        silence=silence,
        sampled_out=task.sampled_out,
        set_aside=counts.set_aside,
        rows=task.rows_in,
        sums=task.sums.to_dict(),
        root=None if task.span is None else root_of(task.context, task.span.start),
        hides_properties=task.hides_properties,
        attempt=task.attempt_id,
        models=task.models,
        stage=task.stage,
        trace_update=task.trace_update,
        swept=worker_process().recovery.has_swept_since(task.began),
    )
    share = relay_bytes(task.context.max_result_bytes, task.partition)
    batches = [_batch(receipt.to_json(), delivery, 0 if is_seen_to else share)]
    for other in worker_process().deliveries.all():
        # Left by workers that are gone, and only this driver can store it.
        if other is not delivery and _is_for_driver_of(task, other) and not other.is_shared:
            batches.append(_batch(None, other, share))
    task.relay.add([batch for batch in batches if batch[0] is not None or batch[3]])


def _is_for_driver_of(task: Task, delivery: Outbox) -> bool:
    driver_id = delivery.destination.driver_id
    return driver_id is not None and driver_id == task.context.process_id


def _is_relayed(context: DriverContext, relay: Any) -> bool:
    """Whether the driver stores a task's spans, since it would take MLflow to do so from here."""
    uri = context.tracking_uri
    if uri is None or not is_database(uri):
        return uri is None
    if context.config.transport == "direct":
        return False
    return relay is not None or _driver_is_here(context)


def _driver_is_here(context: DriverContext) -> bool:
    """Whether the driver takes from a directory what it stores, at no cost to the job."""
    directory = context.config.spool_directory
    folder = None if directory is None else Path(directory)
    return driver_is_here(folder, str(context.process_id))


def _batch(receipt: str | None, delivery: Outbox, max_bytes: int) -> tuple[Any, ...]:
    """Return what goes home with the task; the rest is left to the driver, or to later tasks."""
    destination = delivery.destination
    token, number, records = delivery.hand_over(max_bytes) if max_bytes else ("", 0, [])
    # What the driver stores by design goes where its trace is.
    uri = None if destination.driver_id is not None else destination.tracking_uri
    plain = [tuple(record[:3]) for record in records]
    return receipt, uri, destination.experiment_id, plain, (token, number)
