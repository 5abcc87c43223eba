"""What a worker process sets up once, and switches on while it runs tasks."""

from __future__ import annotations

import base64
import functools
import os
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlflow_ctx_autolog.context import DriverContext
from mlflow_ctx_autolog.delivery.deliveries import Deliveries
from mlflow_ctx_autolog.delivery.outbox import Outbox
from mlflow_ctx_autolog.delivery.records import Destination, Record
from mlflow_ctx_autolog.delivery.recovery import Recovery
from mlflow_ctx_autolog.delivery.relay import driver_is_here
from mlflow_ctx_autolog.delivery.sender import Delivery
from mlflow_ctx_autolog.exceptions import StoreError
from mlflow_ctx_autolog.log_ins import safe_logger
from mlflow_ctx_autolog.prices import Price
from mlflow_ctx_autolog.recorder.budget import Budget, open_budget
from mlflow_ctx_autolog.spans.amounts import Amounts, parse_amounts
from mlflow_ctx_autolog.spans.call_sums import CallSums
from mlflow_ctx_autolog.spans.content import ContentPolicy
from mlflow_ctx_autolog.spans.otlp import decode
from mlflow_ctx_autolog.spans.record import OpenSpan, SpanContext, SpanRecord
from mlflow_ctx_autolog.spans.trace_update import parse_update
from mlflow_ctx_autolog.stores.databricks import provide_token
from mlflow_ctx_autolog.stores.sending import appends, needs_mlflow, send
from mlflow_ctx_autolog.task import (
    Task,
    Work,
    current_work,
    driver_span,
    driver_trace_id,
    forget_tasks,
    look_elsewhere,
    open_tasks,
)
from mlflow_ctx_autolog.worker.answers import answers_of_parents, take_turn
from mlflow_ctx_autolog.worker.children import Children, Parent
from mlflow_ctx_autolog.worker.mlflow_loading import MLflowInWorker
from mlflow_ctx_autolog.worker.open_spans import Branch, OpenSpans
from mlflow_ctx_autolog.worker.router import TraceRouter
from mlflow_ctx_autolog.worker.spark_task import task_attributes
from mlflow_ctx_autolog.worker.task_calls import CallRecording
from mlflow_ctx_autolog.worker.threads import ThreadHandovers

__all__ = [
    "WorkerProcess",
    "budget_of",
    "content_policy",
    "flush",
    "join",
    "remove",
    "worker_process",
]

_logger = safe_logger(__name__)


class WorkerProcess:
    """This process's tracing and its way to the stores, shared by all tasks that it runs."""

    def __init__(self) -> None:
        self.deliveries = Deliveries(self._new_delivery)
        # By destination, the variables of the last task with spans there.
        self._variables: dict[Destination, Mapping[str, str | None]] = {}
        self.open_spans = OpenSpans()
        self.mlflow = MLflowInWorker(self.open_spans.started, self._ended)
        self.router = TraceRouter(
            self.deliveries, self.open_spans, self.mlflow, self._submit_to_parent
        )
        self.calls = CallRecording(
            self.active_span, self.mlflow.problem, self._call_started, self._call_ended
        )
        self.recovery = Recovery(self._adopt, _is_left_to_driver)
        self._threads = ThreadHandovers(self._work_here)
        self._parent: Parent | None = None
        self._children = Children(self._work_here, self._answer_child, join, lambda: self._parent)
        self._environment: dict[str, str | None] = {}

    def active_span(self) -> SpanContext | None:
        """Return what a span that starts here and now is below; None for nothing.

        That is the span of MLflow's that is active, if there is one, since tasks and calls have
        none of their own between; else that of the work that is done here.
        """
        found = self.mlflow.active()
        if found is None and (work := current_work()) is not None:
            found = work.parent_or_task
        return found

    def switch_on(self, task: Task) -> None:
        """Prepare for a task that is about to be opened."""
        delivery = self.deliveries.to(task.destination)
        delivery.configure(task.context.config)
        # Of a task that is tried again, the attempt before may have been killed here.
        is_retry = bool(task_attributes().get("spark.task.attempt_number"))
        self.recovery.start(task.context.config.spool_directory, anew=is_retry)
        variables = self._variables[task.destination] = _task_environment(task.context)
        if not open_tasks():
            self._environment = _set_environment(variables)
        self._install(task.context)

    def _install(self, context: DriverContext) -> None:
        self.calls.install()
        self.mlflow.install(context)
        self._threads.install()
        self._children.install()

    def _new_delivery(self, destination: Destination) -> Outbox:
        if destination.driver_id is not None:
            return Outbox(destination)
        return Delivery(destination, self._send)

    def _send(self, destination: Destination, records: Sequence[Record]) -> None:
        # The task whose log-in it is may have ended.
        environ = {**os.environ, **self._variables.get(destination, {})}
        found = {name: value for name, value in environ.items() if value is not None}
        send(destination, records, found)

    def task_started(self, task: Task) -> None:
        """Enter a task's span, and send it ahead."""
        if task.span is not None and task.is_recorded:
            span = task.span
            context = span.context
            self.open_spans.started(
                task, context.span_id, span.parent_id, span.snapshot, is_tasks=True
            )
            self.router.announce(task)

    def settle(self, task: Task) -> None:
        """See to the spans of a task that are open when it ends; those of unread streams end."""
        self.calls.close_unread(task)
        self.router.settle(task)

    def task_ended(self, span: SpanRecord) -> None:
        """Take a task's span that has ended."""
        self._ended(span)

    def _ended(self, span: SpanRecord) -> None:
        self.router.take(span)

    def _call_started(self, task: Task, span: OpenSpan) -> None:
        self.mlflow.note_call(task)
        self.open_spans.started(task, span.context.span_id, span.parent_id, span.snapshot)

    def _call_ended(self, span: SpanRecord) -> None:
        self.router.take(span, is_call=True)

    def _work_here(self) -> Work | None:
        """Return the work of this moment, to be handed over with the span that is active."""
        work = current_work()
        return None if work is None else work._replace(parent=self.active_span())

    def join(self, parent: Parent) -> None:
        """Take part in the tasks of another process, whose child this one is."""
        forget_tasks()
        self.mlflow.deactivate_spans()
        self._parent = parent
        look_elsewhere(functools.partial(_ask_parent, parent))
        if (work := current_work()) is not None:
            self._install(work.task.context)

    def _submit_to_parent(
        self,
        task: Task,
        span: SpanRecord,
        record: Record,
        branch: Branch,
        usage: Amounts,
        cost: Amounts,
    ) -> None:
        """Have the parent count and deliver a span, so that it is in the task's receipt."""
        calls, reused = task.take_calls()
        message = {
            "task": task.span_id,
            "calls": calls,
            "reused": reused,
            "span": [span.span_id, span.parent_id, usage, cost],
            "branch": [branch.top, branch.above, branch.outer and branch.outer.top],
            "failed": span.has_failed,
            "seconds": span.seconds,
            "sums": task.take_sums().to_dict(),
            "trace_update": self.mlflow.said_of_trace(task),
            "payload": base64.b64encode(record.payload).decode(),
        }
        if self._parent is None or not self._parent.ask(message):
            # The task is over, or its process is gone.
            delivery = self.deliveries.to(task.destination)
            delivery.configure(task.context.config)
            delivery.submit(record._replace(owner=""))

    def _answer_child(self, work: Work | None, question: dict[str, Any]) -> Any:
        if "span" in question:
            return self._submit_for_child(question)
        if "request" in question:
            return take_turn(question)
        if work is None or not work.task.is_open:
            work = current_work()
        if work is None:
            return None
        parent = work.parent_or_task
        headers = {} if parent is None else parent.headers
        context = replace(
            work.task.context,
            traceparent=headers.get("traceparent"),
            tracestate=headers.get("tracestate"),
        )
        answers = work.task.answers
        return {
            "task": work.task.span_id,
            "context": context.to_json(),
            "answers": None if answers is None else answers.located(),
        }

    def _submit_for_child(self, message: dict[str, Any]) -> bool:
        for task in open_tasks():
            if task.span_id == message["task"]:
                span_id, parent_id, usage, cost = message["span"]
                payload = base64.b64decode(message["payload"])
                task.count_call(int(message["calls"]))
                task.count_reused(int(message["reused"]))
                task.count_span(span_id, parent_id, parse_amounts(usage), parse_amounts(cost))
                task.merge_sums(CallSums.from_dict(message.get("sums")))
                task.say_of_trace(parse_update(message.get("trace_update")))
                if message["calls"] and usage and not cost:
                    model = str(_span_of(payload).get("model"))
                    task.count_tokens(model, parse_amounts(usage))
                self.router.store(
                    task,
                    span_id,
                    self._branch_of_child(task, span_id, *message["branch"]),
                    failed=bool(message["failed"]),
                    seconds=float(message["seconds"]),
                    span=functools.partial(_span_of, payload),
                    record=Record("span", span_id, payload, task.span_id),
                )
                return True
        return False

    def _branch_of_child(
        self, task: Task, span_id: str, top: str, above: str | None, outer: str | None
    ) -> Branch:
        """Return the branch that a child's span lies in, by what the child knows of it."""
        found: Branch | None = task.child_branches.get(top)
        if found is None:
            branch = self.open_spans.branch_below(top, above)
            branch.outer = branch.outer or task.child_branches.get(outer or "")
            # Unless a thread that answers the same child was faster.
            found = task.child_branches.setdefault(top, branch)
        self.open_spans.count_below(above)
        if span_id == top:
            del task.child_branches[top]
        return found

    def _adopt(self, destination: Destination, records: Sequence[Record]) -> None:
        uri = destination.tracking_uri
        driver_id = destination.driver_id
        drivers = {each.destination.driver_id for each in self.deliveries.all()}
        if driver_id is not None and driver_id in drivers:
            # With the task that is running, or the next one.
            outbox = self.deliveries.to(destination)
            for record in records:
                outbox.submit(record)
        elif uri is not None:
            if needs_mlflow(uri) and "mlflow" not in sys.modules:
                # Not for the sake of others: a worker or a driver that has it will come.
                raise StoreError("only a process that has loaded MLflow can store them")
            send(destination, records)
        else:
            raise StoreError("only the driver that they belong to can store them")

    def switch_off(self) -> None:
        """Give the process back as it was, unless a task is open."""
        if not open_tasks():
            # The patches of the client stay, asleep: to make them anew for each task costs more.
            _set_environment(self._environment)
            self._environment = {}
            self.mlflow.uninstall()
            self._threads.uninstall()
            self._children.uninstall()

    def remove(self) -> None:
        """Take back everything, unless a task is open."""
        if not open_tasks():
            self.calls.uninstall()
            self.switch_off()


@functools.lru_cache(maxsize=1)
def worker_process() -> WorkerProcess:
    """Return this process's set-up, made on first use."""
    return WorkerProcess()


def join(port: int, token: str) -> None:
    """Make this process, a child of one that runs a task, take part in it. Never raises.

    Args:
        port: Where the parent listens on this host.
        token: The child's name there.
    """
    try:
        worker_process().join(Parent(port, token))
    except Exception as error:
        _logger.warning(
            "The calls of this child process of a task are not traced, since tracing could not "
            "begin: %r",
            error,
        )


def content_policy(
    context: DriverContext, filters: bytes | None = None
) -> tuple[ContentPolicy, Sequence[Callable[[Any], None]]]:
    """Return what content of a task's spans may be sent, and the driver's span processors."""
    redact = context.config.redact
    span_processors: Sequence[Callable[[Any], None]] = ()
    reason = None
    if filters is not None:
        try:
            # What Spark pickled along with the function, and with no less trust.
            redact, span_processors, token = pickle.loads(filters)
            provide_token(token)
        except Exception as error:
            reason = (
                "The driver's redact, databricks_token or span processors cannot be unpickled on "
                f"this worker ({type(error).__name__}: {error}), so content of spans is withheld. "
                "Install the modules that they need on every node."
            )
    elif context.has_span_processors or (context.redacts and redact is None):
        reason = (
            "The driver redacts spans with functions that do not travel in a carrier, so content "
            "of spans is withheld. Use enable() or traced(), or give redact to attach()."
        )
    return ContentPolicy(context.config, redact, reason), span_processors


def budget_of(context: DriverContext) -> Budget | None:
    """Return what the calls of a task may spend; None where the settings set no limit."""
    prices = context.config.prices

    @functools.lru_cache(maxsize=256)
    def list_price(model: str) -> Price | None:
        return worker_process().mlflow.price_of(model)

    return open_budget(
        context.config,
        job=driver_trace_id(context) or str(context.session_id),
        # What the driver knew is so for all tasks of an action.
        handover=str(sorted(context.spent.items())),
        known=context.spent,
        price_of=lambda model: prices.get(model) or list_price(model),
    )


def _ask_parent(parent: Parent) -> Work | None:
    answer = parent.ask({})
    if answer is None:
        return None
    return _work_elsewhere(parent, answer["task"], answer["context"], answer.get("answers"))


@functools.lru_cache(maxsize=64)
def _work_elsewhere(parent: Parent, span_id: str, text: str, place: str | None) -> Work:
    context = DriverContext.from_json(text)
    # The user's functions stay with the parent; where spans must go through them, content is
    # withheld here.
    content, _ = content_policy(context)
    task = Task(context, content, elsewhere=span_id, is_open=True, parent=driver_span(context))
    task.budget = budget_of(context)
    if place is not None:
        task.answers = answers_of_parents(context, place, parent.ask, span_id)
    return Work(task)


def flush(timeout: float) -> bool:
    """Send this process's finished spans now; return whether they are stored in time."""
    return worker_process().deliveries.flush(timeout) if _is_set_up() else True


def remove() -> None:
    """Take back what running tasks has set up in this process, if anything. Idempotent."""
    if _is_set_up():
        worker_process().remove()


def _is_left_to_driver(destination: Destination, directory: Path | None) -> bool:
    driver_id = destination.driver_id
    return driver_id is not None and driver_is_here(directory, driver_id)


def _span_of(payload: bytes) -> SpanRecord:
    return next(decode(payload))


def _is_set_up() -> bool:
    return worker_process.cache_info().currsize > 0


def _task_environment(context: DriverContext) -> dict[str, str | None]:
    """Return the environment variables of a process while it runs a task; None removes one."""
    uri = context.tracking_uri
    store = {} if uri is None or appends(uri) else {"MLFLOW_TRACKING_URI": uri}
    return {
        **context.environment,
        **store,
        "MLFLOW_WORKSPACE": context.workspace,
        # Left over from the driver when it started Spark; our default experiment provider gives
        # the driver's experiment of today.
        "MLFLOW_EXPERIMENT_ID": None,
        "MLFLOW_EXPERIMENT_NAME": None,
        # MLflow would take images and audio out of the messages and upload them with the trace's
        # root, which is in another process; here they stay in the messages.
        "MLFLOW_TRACE_EXTRACT_ATTACHMENTS": "false",
    }


def _set_environment(variables: dict[str, str | None]) -> dict[str, str | None]:
    """Set environment variables, None removing one; return what they were."""
    before = {name: os.environ.get(name) for name in variables}
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return before
