"""What happens in a worker process, task by task."""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from mlflow_ctx_autolog.context import DriverContext
from mlflow_ctx_autolog.delivery.receipts import TaskReceipt
from mlflow_ctx_autolog.delivery.sender import Counts, Delivery
from mlflow_ctx_autolog.exceptions import CarrierError, users_traceback, warn_once
from mlflow_ctx_autolog.model_calls.openai_calls import autolog_is_on
from mlflow_ctx_autolog.task import Task, current_task, open_tasks
from mlflow_ctx_autolog.tracing import (
    active_context,
    is_recorded,
    parent_activated,
    task_span_activated,
    trace_id_of,
    tracing_problem,
)
from mlflow_ctx_autolog.worker.placement import open_placement
from mlflow_ctx_autolog.worker.process import budget_of, content_policy, worker_process
from mlflow_ctx_autolog.worker.spark_task import (
    context_of_query,
    in_spark_task,
    is_batch,
    on_task_end,
    row_count,
    skips_rest,
    task_attributes,
)

__all__ = ["attach", "process_id", "read_carrier", "task_runner"]

_logger = logging.getLogger(__name__)

# How long the end of a task whose spans can go home waits for the store: a share of the time that
# the task took, and at least so many seconds, unless the last task has waited in vain.
_SHARE_OF_TASK, _PATIENCE = 0.05, 1.0

_process_token = uuid.uuid4().hex


def process_id() -> str:
    """Return a text that names this process among all processes of a cluster."""
    return f"{_process_token}-{os.getpid()}"


def read_carrier(carrier: object) -> DriverContext:
    """Return the context that a carrier holds.

    Args:
        carrier: A Spark broadcast of a :class:`DriverContext`'s JSON, that JSON, or the context.

    Raises:
        CarrierError: It is none of these, damaged, or of a newer version.
    """
    if isinstance(carrier, DriverContext):
        return carrier
    text = carrier
    if not isinstance(carrier, str):
        try:
            text = carrier.value  # type: ignore[attr-defined]
        except Exception as error:
            raise CarrierError(
                f"no driver context can be read from {type(carrier).__name__!r}: {error}"
            ) from error
    if not isinstance(text, str):
        raise CarrierError(f"the carrier holds {type(text).__name__!r}, not the JSON of a context")
    return _parse(text)


_parse = functools.lru_cache(maxsize=64)(DriverContext.from_json)


def attach(
    carrier: object, name: str | None = None, redact: Callable[[Any], Any] | None = None
) -> AbstractContextManager[DriverContext]:
    """Run a block of a worker under the driver's trace.

    Inside the block, model calls are children of a span for this task attempt, which is a child
    of the driver's span. On leaving it, also by an exception, the spans are handed to the store.
    In the driver's own process, the driver's span becomes the active one and nothing else
    happens. Inside a function that carries the same context already, nothing happens.

    Args:
        carrier: What :func:`~mlflow_ctx_autolog.broadcast` or
            :func:`~mlflow_ctx_autolog.capture` returned, or its JSON.
        name: The name of the task's span; by default that of the calling function.
        redact: Takes the place of the setting of that name, which does not travel in a carrier.

    Raises:
        CarrierError: The carrier is damaged, of a newer version, or no carrier.
    """
    context = read_carrier(carrier)
    if redact is not None:
        context = replace(context, config=replace(context.config, redact=redact))
    return _attached(context, name or sys._getframe(1).f_code.co_name)


@contextmanager
def _attached(context: DriverContext, name: str) -> Iterator[DriverContext]:
    surrounding = current_task()
    if context.process_id == process_id():
        with parent_activated(context):
            yield context
    elif surrounding is not None and surrounding.context == context:
        yield context
    else:
        with (
            _opened(context, name) as task,
            task.active(),
            task_span_activated(task.span, context),
        ):
            yield context


def task_runner(
    name: str,
    carrier: object,
    *,
    required: bool,
    repeated: bool,
    follows: bool = False,
    way_home: Any = None,
    filters: bytes | None = None,
) -> Callable[..., Callable[..., Any]]:
    """Return a decorator that runs functions handed to Spark as one task attempt.

    Iterators among the arguments, and one that is returned, are passed on item by item, so that
    the task's span lasts as long as the function does. An exception of the function marks the
    span and passes through. If tracing cannot begin, the function runs all the same, with one
    warning.

    The decorator takes a function and whether its arguments are rows. Those that it decorates, such
    as the methods of one object, share the task.

    Args:
        name: The name of the task's span.
        carrier: See :func:`read_carrier`.
        required: Raise where the carrier cannot be read, rather than run untraced.
        repeated: Whether the task attempt calls the functions many times, and ends when Spark
            says so; else one is called once, and the attempt ends with it.
        follows: Whether the context that the driver has set for the query goes before the carrier.
        way_home: A Spark accumulator for spans that cannot be stored from here.
        filters: The user's functions that spans go through, as Spark pickles them: ``redact``,
            and MLflow's span processors.

    Raises:
        CarrierError: When called, if the carrier cannot be read and ``required`` is true.
    """
    begin = functools.partial(
        _begin_or_warn, carrier, name, required, repeated, follows, way_home, filters
    )
    if repeated:
        return functools.partial(_repeated, _SharedTask(begin))
    return lambda function, _: functools.partial(_run_once, function, begin)


def _repeated(
    shared: _SharedTask, function: Callable[..., Any], takes_rows: bool
) -> Callable[..., Any]:
    return _RepeatedCalls(shared, function, takes_rows).call


def _begin_or_warn(
    carrier: object,
    name: str,
    required: bool,
    repeated: bool,
    follows: bool,
    way_home: Any,
    filters: bytes | None,
) -> Task | None:
    """Begin a task; return None, and say so, where that is not possible."""
    if repeated and not in_spark_task():
        # Tried out on the driver, or asked by Spark for its state in a process without tasks.
        return None
    context = None
    try:
        context = read_carrier((context_of_query() if follows else None) or carrier)
        if repeated:
            on_task_end(_finish_open_tasks)
        return _begin(context, name, way_home, filters)
    except CarrierError as error:
        if required:
            raise
        problem = str(error)
    except Exception as error:
        problem = f"tracing could not begin: {type(error).__name__}: {error}"
    warn_once(_logger, "begin", f"This worker's calls are not traced, since {problem}")
    if way_home is not None:
        # Nobody reads the log of a worker.
        trace_id = None if context is None else trace_id_of(context)
        receipt = TaskReceipt(trace_id or "", uuid.uuid4().hex, made=0, silence=problem)
        way_home.add([(receipt.to_json(), None, "", [])])
    return None


def _run_once(
    function: Callable[..., Any],
    begin: Callable[[], Task | None],
    # The user's own parameters may have any name.
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    task = begin()
    if task is None:
        return function(*args, **kwargs)
    try:
        result = task.run(function, *(_counted(task, arg) for arg in args), **kwargs)
    except BaseException as error:
        _finish(task, error)
        raise
    if isinstance(result, Iterator) or _is_lazy(result):
        return _steps(task, iter(result), ends_task=True)
    task.rows_out += _rows_of(result)
    _finish(task)
    return result


class _SharedTask:
    """The task that repeated calls are made in, begun with the first of them."""

    def __init__(self, begin: Callable[[], Task | None]) -> None:
        self._begin = begin
        self.task: Task | None = None
        self.cannot_begin = False
        self._starting = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        # Called on the driver before it is handed to Spark, where it begins anew.
        return _SharedTask, (self._begin,)

    def start(self) -> Task | None:
        # Spark can call a UDF from several threads.
        with self._starting:
            if self.task is None or not self.task.is_open:
                self.task = self._begin()
                self.cannot_begin = self.task is None
            return self.task


class _RepeatedCalls:
    """Runs the calls that one task attempt makes of one function, all in one task."""

    def __init__(self, shared: _SharedTask, function: Callable[..., Any], takes_rows: bool) -> None:
        self._shared = shared
        self._function = function
        self._takes_rows = takes_rows
        self._row_by_row = False

    def call(self, /, *args: Any, **kwargs: Any) -> Any:
        # Called for each row of a UDF: what is not needed there is elsewhere.
        task = self._shared.task
        if task is None or not task.is_open:
            task = None if self._shared.cannot_begin else self._shared.start()
            if task is None:
                return self._function(*args, **kwargs)
        if not self._row_by_row:
            return self._call_in_general(task, args, kwargs)
        task.rows_in += 1
        try:
            result = task.run(self._function, *args, **kwargs)
        except BaseException as error:
            _finish(task, error)
            raise
        task.rows_out += 1
        return result

    def _call_in_general(self, task: Task, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            result = task.run(self._function, *(_counted(task, arg) for arg in args), **kwargs)
        except BaseException as error:
            if not skips_rest(error):
                _finish(task, error)
            raise
        is_partition = any(isinstance(arg, (Iterator, range)) for arg in args)
        batches = [row_count(arg) for arg in args if is_batch(arg)]
        if self._takes_rows and not is_partition:
            task.rows_in += max(batches, default=1)
        if isinstance(result, Iterator):
            return _steps(task, result, ends_task=False)
        if self._takes_rows:
            task.rows_out += row_count(result)
            self._row_by_row = not is_partition and not batches
        return result


def _finish_open_tasks(completed: bool) -> None:
    for task in open_tasks():
        _finish(task, None if completed else GeneratorExit())


@contextmanager
def _opened(context: DriverContext, name: str) -> Iterator[Task]:
    task = _begin(context, name)
    try:
        yield task
    except BaseException as error:
        _finish(task, error)
        raise
    else:
        _finish(task)


def _begin(
    context: DriverContext, name: str, way_home: Any = None, filters: bytes | None = None
) -> Task:
    worker = worker_process()
    attributes = task_attributes()
    content, span_processors = content_policy(context, filters)
    task = Task(
        context,
        content,
        attempt_id=attributes.get("spark.task.attempt_id"),
        way_home=way_home,
        span_processors=span_processors,
        budget=budget_of(context),
    )
    for other in open_tasks():
        # A Python worker runs one task attempt at a time, so this one was dropped unfinished.
        if other.attempt_id != task.attempt_id:
            _finish(other, GeneratorExit())
    if context.application_id is not None:
        attributes["spark.application.id"] = context.application_id
    if context.handover_id is not None:
        attributes["spark.handover.id"] = context.handover_id
    if context.speculation is not None:
        attributes["spark.speculation"] = context.speculation
    attributes["spark.task.outcome"] = "running"
    worker.switch_on(task)
    task.open()
    try:
        task.span = task.run(worker.tracing.start_task_span, name, context, attributes)
        task.parent = task.run(active_context)
        task.placement = open_placement(context, trace_id_of(context) or str(task.span.trace_id))
        worker.announce(task)
    except BaseException:
        task.close()
        worker.switch_off()
        raise
    return task


def _finish(task: Task, error: BaseException | None = None) -> None:
    """End the task's span and see its spans off. Never raises. Idempotent."""
    if not task.is_open:
        return
    worker = worker_process()
    delivery = worker.deliveries.to(task.destination)
    silence = None
    try:
        worker.settle(task)
        made = delivery.counts(task.span_id).made + 1
        silence = _reason_for_silence(task, made)
        receipt = TaskReceipt.attributes(
            made, task.usage.total, task.cost.total, silence, task.sampled_out
        )
        task.span.set_attributes({**task.counts(), **receipt})
        if error is None:
            task.span.set_attribute("spark.task.outcome", "completed")
            task.span.end()
        elif isinstance(error, GeneratorExit):
            # Spark had all the rows it wanted.
            task.span.set_attribute("spark.task.outcome", "closed early")
            task.span.end()
        else:
            task.span.set_attribute("spark.task.outcome", "failed")
            task.span.record_exception(error)
            task.span.end(status="ERROR")
    except Exception as failure:
        warn_once(_logger, "end", f"The span of a task could not be ended: {failure!r}")
    finally:
        task.close()
    try:
        _see_off(task, delivery, error, silence)
    finally:
        # Not before: the log-in at the store may be among what the task has set.
        worker.switch_off()


def _see_off(
    task: Task, delivery: Delivery, error: BaseException | None, silence: str | None
) -> None:
    """Store what a task that has ended has made, or hand it on to those who can."""
    # From a task that fails or is closed early, Spark takes nothing home.
    goes_home = task.way_home is not None and error is None
    started = time.monotonic()
    timeout = task.context.config.flush_timeout
    if goes_home:
        # Rather than hold up a job for a store that is slow, let the driver wait for it.
        patience = 0.0 if delivery.store_is_down else _PATIENCE
        timeout = min(timeout, max(patience, _SHARE_OF_TASK * (started - task.began)))
    is_stored = delivery.flush(timeout, give_up=goes_home or delivery.store_is_down)
    seconds = time.monotonic() - started
    counts = delivery.counts(task.span_id)
    delivery.forget(task.span_id)
    if goes_home:
        _send_home(task, delivery, counts, seconds, is_stored, silence)
    elif not is_stored:
        warn_once(
            _logger,
            "flush",
            f"{delivery.waiting} finished spans of this worker are not stored at the end of the "
            "task. They are sent later if this worker lives on; else the next task on this host, "
            "or mlflow-ctx-autolog recover, sends them from the spool.",
        )


def _reason_for_silence(task: Task, made: int) -> str | None:
    """Return why the task's model calls left no span, if they may have left none for a reason.

    A function that calls no model is none.

    Args:
        task: The task.
        made: Spans that it has made, its own among them.
    """
    trace_id = trace_id_of(task.context)
    if not is_recorded(task.span):
        is_expected = task.context.traceparent is not None and trace_id is None
        return None if is_expected else (tracing_problem() or "sampling dropped the task's span")
    if made > 1:
        return None
    if task.calls:
        # Else they have not returned yet.
        problem = tracing_problem()
        return None if problem is None else f"{task.calls} calls were made, but {problem}"
    return None if autolog_is_on() else "MLflow's OpenAI autolog is switched off in the worker"


def _send_home(
    task: Task,
    delivery: Delivery,
    counts: Counts,
    seconds: float,
    is_stored: bool,
    silence: str | None,
) -> None:
    """Hand back the task's receipt, and what this worker could not store, along with the task."""
    receipt = TaskReceipt(
        trace_id=trace_id_of(task.context) or str(task.span.trace_id),
        task_span_id=task.span_id,
        made=counts.made,
        delivered=counts.delivered,
        waiting=counts.waiting,
        lost=counts.lost,
        first_error=None if is_stored else delivery.first_error,
        seconds_waiting=seconds,
        usage=task.usage.total,
        cost=task.cost.total,
        calls=task.calls,
        errors=task.errors,
        spent=task.spent,
        requests=task.requests,
        silence=silence,
        sampled_out=task.sampled_out,
        rows=task.rows_in,
        sums=task.sums.to_dict(),
    )
    arrivals = [_arrival(receipt.to_json(), delivery, is_stored)]
    for other in worker_process().deliveries.all():
        # Left by workers that are gone, and only this driver can store it.
        if other is not delivery and _is_for_driver_of(task, other) and other.waiting:
            arrivals.append(_arrival(None, other, False))
    task.way_home.add(arrivals)


def _is_for_driver_of(task: Task, delivery: Delivery) -> bool:
    destination = delivery.destination
    return destination.tracking_uri is None and (destination.driver_id == task.context.process_id)


def _arrival(receipt: str | None, delivery: Delivery, is_stored: bool) -> Any:
    destination = delivery.destination
    records = [] if is_stored else [tuple(record[:3]) for record in delivery.take()]
    return receipt, destination.tracking_uri, destination.experiment_id, records


_END = object()


def _steps(task: Task, iterator: Iterator[Any], *, ends_task: bool) -> Iterator[Any]:
    """Pass on what the function returned, each item made within the task."""
    try:
        while (item := task.run(next, iterator, _END)) is not _END:
            task.rows_out += row_count(item)
            yield item
    except GeneratorExit as closed:
        try:
            task.run(_close, iterator)
        finally:
            if ends_task:
                _finish(task, closed)
        raise
    except BaseException as error:
        if not skips_rest(error):
            _finish(task, error)
        raise error.with_traceback(users_traceback(error))  # noqa: B904 - the same error
    else:
        if ends_task:
            _finish(task)


def _close(iterator: Iterator[Any]) -> None:
    if (close := getattr(iterator, "close", None)) is not None:
        close()


def _counted(task: Task, argument: Any) -> Any:
    """Return an argument so that the rows which the function takes from it are counted."""
    if isinstance(argument, range):
        # A partition of parallelize(range(n)) is no iterator but a range.
        task.rows_in += len(argument)
    return _counted_items(task, argument) if isinstance(argument, Iterator) else argument


def _counted_items(task: Task, items: Iterator[Any]) -> Iterator[Any]:
    for item in items:
        task.rows_in += row_count(item)
        yield item


def _rows_of(result: object) -> int:
    if isinstance(result, (list, tuple)):
        return sum(row_count(item) for item in result)
    return 0 if result is None else row_count(result)


def _is_lazy(result: object) -> bool:
    return hasattr(result, "__iter__") and not hasattr(result, "__len__")
