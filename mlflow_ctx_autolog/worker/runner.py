"""What happens in a worker process, task by task."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from typing import Any

from mlflow_ctx_autolog import __version__
from mlflow_ctx_autolog.context import DriverContext
from mlflow_ctx_autolog.delivery.receipts import TaskReceipt
from mlflow_ctx_autolog.exceptions import CarrierError, warn_once
from mlflow_ctx_autolog.log_ins import safe_logger
from mlflow_ctx_autolog.task import Task, current_task, driver_trace_id, open_tasks
from mlflow_ctx_autolog.worker import attempt
from mlflow_ctx_autolog.worker.spark_task import (
    hide_own_frames,
    in_spark_task,
    is_batch,
    on_task_end,
    row_count,
    skips_rest,
)
from mlflow_ctx_autolog.worker.submission import Submission, process_id, read_carrier

__all__ = ["attach", "load_submitted"]

_logger = safe_logger(__name__)


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
        # In child processes, which do not have the function, content is withheld then.
        context = replace(context, redacts=True, config=replace(context.config, redact=redact))
    return _attached(context, name or sys._getframe(1).f_code.co_name)


@contextmanager
def _attached(context: DriverContext, name: str) -> Iterator[DriverContext]:
    surrounding = current_task()
    if context.process_id == process_id():
        from mlflow_ctx_autolog.tracing import parent_activated

        with parent_activated(context):
            yield context
    elif surrounding is not None and surrounding.context.is_of_span(context):
        yield context
    else:
        with _opened(context, name) as task, task.active():
            yield context


def load_submitted(
    function: Any,
    options: Mapping[str, Any],
    carrier: object,
    relay: Any = None,
    filters: bytes | None = None,
) -> Any:
    """Return the user's function so that it runs as a traced task attempt; of a class, a subclass.

    Iterators among the arguments, and one that is returned, are passed on item by item, so that
    the task's span lasts as long as the function does. An exception of the function marks the
    span and passes through. If tracing cannot begin, the function runs all the same, with one
    warning.

    Args:
        function: The user's function, or PySpark's own around it, or a table function's class.
        options: The fields of :class:`Submission` that are plain values; ``on_driver``, whether it
            runs beside the driver rather than in a task; and ``version``, that of this library
            there. Others, of later releases, are ignored.
        carrier: See :func:`read_carrier`.
        relay: See :class:`Submission`.
        filters: See :class:`Submission`.
    """
    if options.get("version") != __version__:
        warn_once(
            _logger,
            "version",
            f"mlflow-ctx-autolog is {__version__} on this worker and {options.get('version')} on "
            "the driver. What both know is traced; install the same on every node.",
        )
    hide_own_frames()
    submission = Submission(
        str(options["name"]),
        carrier,
        bool(options.get("required", False)),
        bool(options.get("repeated", True)),
        relay,
        filters,
        str(options.get("function") or ""),
    )
    if options.get("on_driver"):
        return _AttachedFunction(function, submission)
    begin = functools.partial(_begin_or_warn, submission)
    if isinstance(function, type):
        return _traced_class(function, _SharedTask(begin))
    if submission.repeated:
        return _RepeatedFunction(function, _SharedTask(begin))
    return _OneCallFunction(function, begin)


def _begin_or_warn(submission: Submission) -> Task | None:
    """Begin a task; return None, and say so, where that is not possible."""
    if submission.repeated and not in_spark_task():
        # Tried out on the driver, or asked by Spark for its state in a process without tasks.
        return None
    context = None
    try:
        context = submission.context()
        if submission.repeated:
            on_task_end(_finish_open_tasks)
        task = attempt.begin(
            context,
            submission.name,
            submission.relay,
            submission.filters,
            submission.function or submission.name,
        )
        if task.answers is not None:
            task.answers.arrived(submission.arrived)
        return task
    except CarrierError as error:
        if submission.required:
            raise
        problem = str(error)
    except Exception as error:
        problem = f"tracing could not begin: {type(error).__name__}: {error}"
    warn_once(_logger, "begin", f"This worker's calls are not traced, since {problem}")
    if submission.relay is not None:
        # Nobody reads the log of a worker.
        trace_id = None if context is None else driver_trace_id(context)
        receipt = TaskReceipt(trace_id or "", uuid.uuid4().hex, made=0, silence=problem)
        submission.relay.add([(receipt.to_json(), None, "", [])])
    return None


class _TracedFunction:
    """A function of the user's, run in a task. It looks like the function to whoever asks."""

    def __init__(self, function: Callable[..., Any]) -> None:
        # What an object holds besides is its own business.
        functools.update_wrapper(self, function, updated=())  # type: ignore[arg-type]
        self._function = function
        # Spark asks for parameters without looking through wrappers, its profilers for the code.
        with suppress(TypeError, ValueError):
            self.__signature__ = inspect.signature(function)
        with suppress(AttributeError):
            self.__code__ = function.__code__


class _AttachedFunction(_TracedFunction):
    """Runs below the span that its carrier names, where there is no task."""

    def __init__(self, function: Callable[..., Any], submission: Submission) -> None:
        super().__init__(function)
        self._submission = submission

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        with attach(self._submission.carrier, self._submission.name):
            return self._function(*args, **kwargs)


class _OneCallFunction(_TracedFunction):
    """Is called once in a task attempt, which ends with it."""

    def __init__(self, function: Callable[..., Any], begin: Callable[[], Task | None]) -> None:
        super().__init__(function)
        self._begin = begin

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return _run_once(self._function, self._begin, *args, **kwargs)


class _RepeatedFunction(_TracedFunction):
    """Is called many times in a task attempt, which ends when Spark says so."""

    def __init__(
        self, function: Callable[..., Any], shared: _SharedTask, takes_rows: bool = True
    ) -> None:
        super().__init__(function)
        self._calls = _RepeatedCalls(shared, function, takes_rows)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._calls.call(*args, **kwargs)


def _traced_class(function: type, shared: _SharedTask) -> type:
    """Return a subclass of a table function's class, the methods of which run in one task."""

    def traced(method: Callable[..., Any], takes_rows: bool) -> Callable[..., Any]:
        calls = _RepeatedCalls(shared, method, takes_rows)

        @functools.wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            return calls.call(*args, **kwargs)

        return run

    methods = {
        method: traced(vars(owner)[method], takes_rows=method == "eval")
        for method in ("__init__", "eval", "terminate", "cleanup")
        for owner in [next((each for each in function.__mro__ if method in vars(each)), object)]
        if inspect.isfunction(vars(owner).get(method))
    }
    names = {key: getattr(function, key) for key in ("__module__", "__qualname__", "__doc__")}
    return type(function.__name__, (function,), {**names, **methods})


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
        if task.answers is not None and args and type(args[0]) is int:
            # Of an RDD, the partition of itself, whichever it is of the stage.
            task.answers.locate(args[0])
        result = task.run(function, *(_counted(task, arg) for arg in args), **kwargs)
    except BaseException as error:
        attempt.finish(task, error)
        raise
    if isinstance(result, Iterator) or _is_lazy(result):
        return _Steps(result, _steps(task, iter(result), ends_task=True))
    task.rows_out += _rows_of(result)
    attempt.finish(task)
    return result


class _SharedTask:
    """The task that repeated calls are made in, begun with the first of them."""

    def __init__(self, begin: Callable[[], Task | None]) -> None:
        self._begin = begin
        self.task: Task | None = None
        self.cannot_begin = False
        self._starting = threading.Lock()

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
            attempt.finish(task, error)
            raise
        task.rows_out += 1
        return result

    def _call_in_general(self, task: Task, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            result = task.run(self._function, *(_counted(task, arg) for arg in args), **kwargs)
        except BaseException as error:
            if not skips_rest(error):
                attempt.finish(task, error)
            raise
        is_partition = any(isinstance(arg, (Iterator, range)) for arg in args)
        batches = [row_count(arg) for arg in args if is_batch(arg)]
        if self._takes_rows and not is_partition:
            task.rows_in += max(batches, default=1)
        if isinstance(result, Iterator):
            return _Steps(result, _steps(task, result, ends_task=False))
        if self._takes_rows:
            task.rows_out += row_count(result)
            self._row_by_row = not is_partition and not batches
        return result


def _finish_open_tasks(completed: bool) -> None:
    for task in open_tasks():
        attempt.finish(task, None if completed else GeneratorExit())


@contextmanager
def _opened(context: DriverContext, name: str) -> Iterator[Task]:
    task = attempt.begin(context, name)
    try:
        yield task
    except BaseException as error:
        attempt.finish(task, error)
        raise
    else:
        attempt.finish(task)


class _Steps:
    """An iterator that looks like the generator of the user's to Spark's memory profiler."""

    def __init__(self, users: Any, steps: Iterator[Any]) -> None:
        self._steps = steps
        with suppress(AttributeError):
            self.gi_code = users.gi_code

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._steps)

    def close(self) -> None:
        _close(self._steps)


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
                attempt.finish(task, closed)
        raise
    except BaseException as error:
        if not skips_rest(error):
            attempt.finish(task, error)
        raise
    else:
        if ends_task:
            attempt.finish(task)


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
