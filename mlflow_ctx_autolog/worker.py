"""What happens in a worker process, task by task."""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from mlflow_ctx_autolog.context import DriverContext
from mlflow_ctx_autolog.delivery import Delivery, Destination
from mlflow_ctx_autolog.exceptions import CarrierError
from mlflow_ctx_autolog.openai_calls import OpenAICalls
from mlflow_ctx_autolog.spark_task import rows_in, task_attributes
from mlflow_ctx_autolog.task import Task, current_task, open_tasks
from mlflow_ctx_autolog.tracing import (
    WorkerTracing,
    parent_activated,
    send_spans,
    snapshot,
    task_span_activated,
)

__all__ = ["attach", "flush", "process_id", "read_carrier", "remove", "run_traced"]

_logger = logging.getLogger(__name__)


def _task_environment(context: DriverContext) -> dict[str, str | None]:
    """Return the environment variables of a process while it runs a task; None removes one."""
    return {
        "MLFLOW_TRACKING_URI": context.tracking_uri,
        # Left over from the driver when it started Spark; our default experiment provider gives
        # the driver's experiment of today.
        "MLFLOW_EXPERIMENT_ID": None,
        "MLFLOW_EXPERIMENT_NAME": None,
        # MLflow would take images and audio out of the messages and upload them with the trace's
        # root, which is in another process; here they stay in the messages.
        "MLFLOW_TRACE_EXTRACT_ATTACHMENTS": "false",
    }


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


def attach(carrier: object, name: str | None = None) -> AbstractContextManager[DriverContext]:
    """Run a block of a worker under the driver's trace.

    Inside the block, model calls are children of a span for this task attempt, which is a child
    of the driver's span. On leaving it, also by an exception, the spans are handed to the store.
    In the driver's own process, the driver's span becomes the active one and nothing else
    happens. Inside a function that carries the same context already, nothing happens.

    Args:
        carrier: What :func:`~mlflow_ctx_autolog.broadcast` or
            :func:`~mlflow_ctx_autolog.capture` returned, or its JSON.
        name: The name of the task's span; by default that of the calling function.

    Raises:
        CarrierError: The carrier is damaged, of a newer version, or no carrier.
    """
    context = read_carrier(carrier)
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


def run_traced(
    function: Callable[..., Any],
    name: str,
    carrier: object,
    required: bool,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> Any:
    """Run a function handed to Spark as one task attempt, and return what it returns.

    Iterators among the arguments, and one that is returned, are passed on item by item, so that
    the task's span lasts as long as the function does. An exception of the function marks the
    span and passes through. If tracing cannot begin, the function runs all the same, with one
    warning.

    Args:
        function: The user's function.
        name: The name of the task's span.
        carrier: See :func:`read_carrier`.
        required: Raise where the carrier cannot be read, rather than run untraced.
        args: The function's arguments.
        kwargs: The function's keyword arguments.

    Raises:
        CarrierError: The carrier cannot be read, and ``required`` is true.
    """
    try:
        task = _begin(read_carrier(carrier), name)
    except CarrierError as error:
        if required:
            raise
        _warn_once("carrier", f"This worker's calls are not traced: {error}")
        return function(*args, **kwargs)
    except Exception as error:
        _warn_once(
            "begin",
            f"This worker's calls are not traced, since tracing could not begin: "
            f"{type(error).__name__}: {error}",
        )
        return function(*args, **kwargs)
    try:
        result = task.run(function, *(_counted(task, arg) for arg in args), **kwargs)
    except BaseException as error:
        _finish(task, error)
        raise
    if isinstance(result, Iterator):
        return _steps(task, result)
    if _is_lazy(result):
        return _steps(task, iter(result))
    _finish(task)
    return result


def flush(timeout: float = 30.0) -> bool:
    """Send this process's finished spans now.

    Args:
        timeout: Seconds to wait at most.

    Returns:
        Whether everything that had finished is stored.
    """
    return _worker().flush(timeout) if _is_set_up() else True


def remove() -> None:
    """Take back what running tasks has set up in this process, if anything. Idempotent."""
    if _is_set_up() and not open_tasks():
        _worker().remove()


class _Worker:
    """What a worker process sets up once, and switches on while tasks are open."""

    def __init__(self) -> None:
        self._deliveries: dict[Destination, Delivery[Any]] = {}
        self.tracing = WorkerTracing(self._submit, _current_destination)
        self._openai_calls = OpenAICalls(only_in_tasks=True)
        self._environment: dict[str, str | None] = {}

    def delivery(self, destination: Destination) -> Delivery[Any]:
        # setdefault, since two threads may ask for the first time at once.
        return self._deliveries.get(destination) or self._deliveries.setdefault(
            destination, Delivery(destination, send_spans, _open_task_spans)
        )

    def _submit(self, destination: Destination, span: Any) -> None:
        self.delivery(destination).submit(span)

    def flush(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        deliveries = list(self._deliveries.values())
        flushed = [d.flush(max(0.0, deadline - time.monotonic())) for d in deliveries]
        return all(flushed)

    def switch_on(self, task: Task) -> None:
        self.delivery(task.destination).config = task.context.config
        if not open_tasks():
            self._environment = _set_environment(_task_environment(task.context))
        self.tracing.install()
        self._openai_calls.install()

    def switch_off(self) -> None:
        if not open_tasks():
            # The patches of autolog stay, asleep: to make them anew for each task costs more.
            _set_environment(self._environment)
            self._environment = {}
            self.tracing.uninstall()

    def remove(self) -> None:
        self._openai_calls.uninstall()
        self.switch_off()


@functools.lru_cache(maxsize=1)
def _worker() -> _Worker:
    return _Worker()


def _is_set_up() -> bool:
    return _worker.cache_info().currsize > 0


def _current_destination() -> Destination | None:
    task = current_task()
    return None if task is None else task.destination


def _open_task_spans(destination: Destination) -> list[Any]:
    spans = []
    for task in open_tasks():
        if task.destination == destination and task.span is not None:
            _record_counts(task)
            spans.append(snapshot(task.span))
    return [span for span in spans if span is not None]


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


def _begin(context: DriverContext, name: str) -> Task:
    worker = _worker()
    task = Task(context)
    attributes = task_attributes()
    if context.application_id is not None:
        attributes["spark.application.id"] = context.application_id
    attributes["spark.task.outcome"] = "running"
    worker.switch_on(task)
    task.open()
    try:
        task.span = task.run(worker.tracing.start_task_span, name, context, attributes)
    except BaseException:
        task.close()
        worker.switch_off()
        raise
    return task


def _finish(task: Task, error: BaseException | None = None) -> None:
    """End the task's span and see its spans off. Never raises."""
    worker = _worker()
    try:
        _record_counts(task)
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
        _warn_once("end", f"The span of a task could not be ended: {failure!r}")
    finally:
        task.close()
        worker.switch_off()
    delivery = worker.delivery(task.destination)
    if not delivery.flush(task.context.config.flush_timeout):
        _warn_once(
            "flush",
            f"{delivery.waiting} finished spans of this worker are not stored yet; the "
            "tracking store did not take them before the end of the task. They are sent when it "
            "does, and lost if Spark ends this worker first.",
        )


def _record_counts(task: Task) -> None:
    task.span.set_attributes(
        {
            "llm.calls": task.calls,
            "spark.rows.in": task.rows_in,
            "spark.rows.out": task.rows_out,
        }
    )


_END = object()


def _steps(task: Task, iterator: Iterator[Any]) -> Iterator[Any]:
    try:
        while (item := task.run(next, iterator, _END)) is not _END:
            task.rows_out += rows_in(item)
            yield item
    except GeneratorExit as closed:
        try:
            task.run(_close, iterator)
        finally:
            _finish(task, closed)
        raise
    except BaseException as error:
        _finish(task, error)
        raise
    else:
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
        task.rows_in += rows_in(item)
        yield item


def _is_lazy(result: object) -> bool:
    return hasattr(result, "__iter__") and not hasattr(result, "__len__")


def _set_environment(variables: dict[str, str | None]) -> dict[str, str | None]:
    """Set environment variables, None removing one; return what they were."""
    before = {name: os.environ.get(name) for name in variables}
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return before


_warned: set[str] = set()
_warned_lock = threading.Lock()


def _warn_once(subject: str, message: str) -> None:
    with _warned_lock:
        if subject in _warned:
            return
        _warned.add(subject)
    _logger.warning("%s", message)
