"""The Spark tasks that this process is running, and which one a call belongs to."""

from __future__ import annotations

import contextvars
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from mlflow_ctx_autolog.answers.task_answers import TaskAnswers
from mlflow_ctx_autolog.context import DriverContext
from mlflow_ctx_autolog.delivery.spool import Destination
from mlflow_ctx_autolog.exceptions import warn_once
from mlflow_ctx_autolog.log_ins import safe_logger
from mlflow_ctx_autolog.prices import in_and_out, least_total
from mlflow_ctx_autolog.recorder.budget import Budget
from mlflow_ctx_autolog.spans.amounts import Amounts, Tally
from mlflow_ctx_autolog.spans.attributes import REUSED_CALLS
from mlflow_ctx_autolog.spans.call_sums import CallSums
from mlflow_ctx_autolog.spans.content import ContentPolicy
from mlflow_ctx_autolog.spans.record import OpenSpan, SpanContext
from mlflow_ctx_autolog.spans.trace_update import CONTENT, ROOM, bounded, latest

__all__ = [
    "Task",
    "Work",
    "current_task",
    "current_work",
    "driver_span",
    "driver_trace_id",
    "forget_tasks",
    "look_elsewhere",
    "note_starter",
    "open_tasks",
]

_logger = safe_logger(__name__)

T = TypeVar("T")

# Requests by which a task knows repeats: its receipt is to stay small, however many it makes.
_REQUESTS = 1000


def driver_span(context: DriverContext) -> SpanContext | None:
    """Return the driver's span that came with a context; None where there was none."""
    return SpanContext.from_headers(context.traceparent, context.tracestate)


def driver_trace_id(context: DriverContext) -> str | None:
    """Return MLflow's id of the driver's trace, if its spans are recorded."""
    span = driver_span(context)
    return span.mlflow_trace_id if span is not None and span.is_sampled else None


@dataclass(eq=False)
class Task:
    """One attempt of one function handed to Spark, while it runs in this process.

    Args:
        context: What came from the driver.
        content: Which content of its spans may leave this process.
        attempt_id: Spark's id of the task attempt; None outside Spark.
        stage: The number of its stage; None outside Spark.
        partition: Its number in the stage; 0 outside Spark.
        function: The name of its function.
        relay: A Spark accumulator for the task's receipt, and for spans that cannot be stored
            from here; None where there is none.
        is_relayed: Whether the driver stores its spans, rather than this process.
        span_processors: What the driver's MLflow has each span go through before it ends.
        span: The task's span.
        parent: What is active in the function when it begins, parent of what has no other: the
            task's span, or the driver's where that is not recorded.
        budget: What its calls may spend; None where there is no limit.
        placement: Decides where its spans are stored; None where all are in the trace of its span.
        linked: The trace for those that are not, once there is one.
        child_branches: Branches of spans that child processes have open, by the id of the top.
        sampled_out: Spans so far that are counted, and stored nowhere.
        calls: Model calls made so far.
        errors: Of these, those that have failed.
        answers: Answers that its calls may be given again; None where none are kept.
        reused: Calls so far that were given one.
        spent: US dollars that those which have ended have cost, as far as the budget knows.
        requests: Fingerprints of its requests, as many as are kept, where the driver is to know.
        repeats: Requests so far that were made before in the task.
        requests_untold: Requests so far that were not among those kept, when no more are.
        models: Of the calls that have ended and whose cost is not told, input and output tokens,
            and of how many calls these are known, by the model that was asked.
        rows_in: Rows that the function has taken from Spark so far.
        rows_out: Rows that it has handed back so far.
        usage: Tokens of the model calls that have ended.
        cost: Cost of these, where their spans say so.
        sums: What else these come to.
        trace_update: What was said of its trace besides spans, as far as it may be sent.
        is_open: Whether the task has begun and not ended.
        began: When it did, on the monotonic clock.
        elsewhere: The id of the task's span, where it is the parent process that runs it.
        hides_properties: Whether the platform hides from it what the driver says of its action.
    """

    context: DriverContext
    content: ContentPolicy
    attempt_id: int | None = None
    stage: int | None = None
    partition: int = 0
    function: str = ""
    relay: Any = None
    is_relayed: bool = False
    span_processors: Sequence[Callable[[Any], None]] = ()
    span: OpenSpan | None = None
    parent: SpanContext | None = None
    budget: Budget | None = None
    placement: Any = None
    linked: Any = None
    child_branches: dict[str, Any] = field(default_factory=dict)
    sampled_out: int = 0
    calls: int = 0
    errors: int = 0
    answers: TaskAnswers | None = None
    reused: int = 0
    spent: float = 0.0
    requests: set[str] = field(default_factory=set)
    repeats: int = 0
    requests_untold: int = 0
    models: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    rows_in: int = 0
    rows_out: int = 0
    usage: Tally = field(default_factory=Tally)
    cost: Tally = field(default_factory=Tally)
    sums: CallSums = field(default_factory=CallSums)
    trace_update: Mapping[str, str] = field(default_factory=dict)
    is_open: bool = False
    began: float = field(default_factory=time.monotonic)
    elsewhere: str | None = None
    hides_properties: bool = False
    # Holds the function's context variables from one step to the next, apart from Spark's own.
    _variables: contextvars.Context = field(default_factory=contextvars.copy_context)
    _thread: int = field(default_factory=threading.get_ident)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def destination(self) -> Destination:
        """Where this task's spans are stored."""
        uri, experiment_id = self.context.tracking_uri, self.context.experiment_id
        driver_id = self.context.process_id if uri is None or self.is_relayed else None
        return Destination(uri, experiment_id, driver_id, self.context.workspace)

    def run(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Run one step of the task's function with the context variables of its last step."""
        # For a UDF this is done for each row, hence without a context manager.
        owner = _owner.get(None)
        if owner is not None and owner.task is self:
            # A step of its own calls another one.
            return function(*args, **kwargs)
        variables = self._variables
        if threading.get_ident() != self._thread:
            # Spark can run a UDF on several threads; a context is entered by one at a time.
            variables = variables.copy()
        _running.append(self)
        try:
            return variables.run(function, *args, **kwargs)
        finally:
            _running.remove(self)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this the task of the code in a block, in the context that is current there."""
        token = _owner.set(Work(self))
        _running.append(self)
        try:
            yield
        finally:
            _running.remove(self)
            # A block inside a generator may be left in another context than it was entered in.
            with suppress(ValueError):
                _owner.reset(token)

    def open(self) -> None:
        """Enter the task into this process's book."""
        self.is_open = True
        _open.append(self)
        self._variables.run(_owner.set, Work(self))

    def close(self) -> None:
        """Strike the task off. Idempotent."""
        if self.is_open:
            self.is_open = False
            _open.remove(self)

    @property
    def span_id(self) -> str:
        """The id of the task's span."""
        if self.elsewhere is not None or self.span is None:
            return str(self.elsewhere)
        return self.span.context.span_id

    @property
    def trace_id(self) -> str:
        """MLflow's id of the trace that its span is in."""
        found = driver_trace_id(self.context)
        return found or ("" if self.span is None else self.span.mlflow_trace_id)

    @property
    def is_recorded(self) -> bool:
        """Whether its spans are made, rather than dropped by sampling."""
        return self.parent is None or self.parent.is_sampled

    def counts(self) -> dict[str, int]:
        """Return the counts so far as attributes of the task's span."""
        counts = {
            "llm.calls": self.calls,
            "spark.rows.in": self.rows_in,
            "spark.rows.out": self.rows_out,
        }
        if self.reused:
            counts[REUSED_CALLS] = self.reused
        return counts

    def count_span(
        self, span_id: str, parent_id: str | None, usage: Amounts, cost: Amounts
    ) -> None:
        """Add what a finished span reports to the task's totals, from any thread."""
        with self._lock:
            # A total that nobody has told is what is known of it.
            known = {**usage, "total_tokens": least_total(usage)} if usage else usage
            self.usage.ended(span_id, parent_id, known)
            self.cost.ended(span_id, parent_id, cost)

    def count_sampled_out(self) -> None:
        """Count a finished span that is not stored, from any thread."""
        with self._lock:
            self.sampled_out += 1

    def link(self, make: Callable[[], T]) -> T:
        """Return the trace linked to the task's, made once, from any thread."""
        with self._lock:
            if self.linked is None:
                self.linked = make()
            found: T = self.linked
            return found

    def count_call(self, number: int = 1) -> None:
        """Count model calls, from any thread."""
        with self._lock:
            self.calls += number

    def count_reused(self, number: int = 1) -> None:
        """Count model calls that were given an answer again, from any thread."""
        with self._lock:
            self.reused += number

    def count_request(self, fingerprint: str) -> None:
        """Count a request that is sent, from any thread."""
        with self._lock:
            if fingerprint in self.requests:
                self.repeats += 1
            elif len(self.requests) < _REQUESTS:
                self.requests.add(fingerprint)
            else:
                self.requests_untold += 1

    def count_answer(self, failed: bool, cost: float) -> None:
        """Count a model call that has ended, from any thread."""
        with self._lock:
            self.errors += failed
            self.spent += cost

    def count_tokens(self, model: str, usage: Amounts) -> None:
        """Count the tokens of a model's answer whose cost is not told, from any thread."""
        known = in_and_out(usage)
        sent, answered = known or (usage.get("input_tokens", 0), usage.get("output_tokens", 0))
        with self._lock:
            before = self.models.get(model, (0, 0, 0))
            self.models[model] = (
                before[0] + int(sent),
                before[1] + int(answered),
                before[2] + (known is not None),
            )

    def sum_up(self, attributes: Mapping[str, Any], seconds: float, *, failed: bool) -> None:
        """Add a model call that has ended to the sums, from any thread."""
        with self._lock:
            self.sums.add(attributes, seconds, failed=failed)

    def merge_sums(self, sums: CallSums) -> None:
        """Add the sums of a child process, from any thread."""
        with self._lock:
            self.sums.merge(sums)

    def say_of_trace(self, update: Mapping[str, str]) -> None:
        """Add what may be sent of what was said of its trace, from any thread."""
        said = {
            name: self.content.text(value) if name in CONTENT else value
            for name, value in update.items()
        }
        known = {name: value for name, value in said.items() if value is not None}
        with self._lock:
            self.trace_update, rest = bounded(latest([self.trace_update, known]))
        if rest:
            warn_once(
                _logger,
                "trace update",
                f"A task has said more of its trace than the {ROOM:,} characters that its receipt "
                f"has room for. Left out: {', '.join(rest[:3])}. Set it as an attribute of a span.",
            )

    def take_sums(self) -> CallSums:
        """Return the sums so far, for somebody else to add."""
        with self._lock:
            sums, self.sums = self.sums, CallSums()
            return sums

    def take_calls(self) -> tuple[int, int]:
        """Return how many calls, and reused ones, were counted, for somebody else to count."""
        with self._lock:
            counted, self.calls, self.reused = (self.calls, self.reused), 0, 0
        return counted


class Work(NamedTuple):
    """Something that is done for a task: on which thread or in which process does not matter.

    Args:
        task: The task.
        parent: What was active where the work was handed over, as :attr:`Task.parent`; None for
            that of the task.
    """

    task: Task
    parent: SpanContext | None = None

    @property
    def parent_or_task(self) -> SpanContext | None:
        """What new spans are below, where no span is active."""
        return self.task.parent if self.parent is None else self.parent

    def run(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Run a function as this work, in the context variables that are current here."""
        token = _owner.set(self)
        try:
            return function(*args, **kwargs)
        finally:
            _owner.reset(token)


def _nowhere() -> Work | None:
    return None


# A worker process runs its tasks on one thread; calls may come from any.
_open: list[Task] = []
_running: list[Task] = []
_owner: contextvars.ContextVar[Work | None] = contextvars.ContextVar("ctx_autolog_work")
_starters: weakref.WeakKeyDictionary[threading.Thread, Work] = weakref.WeakKeyDictionary()
_elsewhere: Callable[[], Work | None] = _nowhere


def _renew_locks() -> None:
    # Another thread of the parent may have held one, which nobody releases in a forked child.
    for task in _open:
        task._lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_locks)


def open_tasks() -> tuple[Task, ...]:
    """The tasks that have begun and not ended, oldest first."""
    return tuple(_open)


def current_task() -> Task | None:
    """The task that a call made here and now belongs to; see :func:`current_work`."""
    work = current_work()
    return None if work is None else work.task


def current_work() -> Work | None:
    """The work that is being done here and now, of a task that is open.

    That is the work that was handed to this thread, or the one that started it; for any other
    thread, the task whose function is being executed, else the one opened last. More than one
    task is open only where Spark pipelines several functions into one process.
    """
    owner = _owner.get(None) or _starters.get(threading.current_thread())
    if owner is not None and owner.task.is_open:
        return owner
    # Slices, since another thread may empty the lists between a look and a take.
    for task in _running[-1:] or _open[-1:]:
        if task.is_open:
            return Work(task)
    return _elsewhere()


def note_starter(thread: threading.Thread, work: Work) -> None:
    """Say which work starts a thread."""
    _starters[thread] = work


def look_elsewhere(elsewhere: Callable[[], Work | None]) -> None:
    """Say who knows which task this process works for, where it has none of its own."""
    global _elsewhere
    _elsewhere = elsewhere


def forget_tasks() -> None:
    """Strike all tasks off in a forked child: they are the parent's."""
    for task in open_tasks():
        task.close()
