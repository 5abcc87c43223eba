"""What a worker process sets up once, and switches on while it runs tasks."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

from mlflow_ctx_autolog.content import ContentPolicy
from mlflow_ctx_autolog.context import DriverContext
from mlflow_ctx_autolog.delivery import Deliveries, Delivery
from mlflow_ctx_autolog.exceptions import StoreError
from mlflow_ctx_autolog.openai_calls import OpenAICalls
from mlflow_ctx_autolog.otlp import is_collector, otlp_record
from mlflow_ctx_autolog.recovery import Recovery
from mlflow_ctx_autolog.spool import Destination, Record
from mlflow_ctx_autolog.store import send, span_record
from mlflow_ctx_autolog.task import Task, current_task, open_tasks
from mlflow_ctx_autolog.tracing import (
    WorkerTracing,
    cost_of,
    filter_open_span,
    filtered,
    for_collector,
    snapshot,
    usage_of,
)

__all__ = ["WorkerProcess", "flush", "remove", "worker_process"]


class WorkerProcess:
    """This process's tracing and its way to the stores, shared by all tasks that it runs."""

    def __init__(self) -> None:
        self.deliveries = Deliveries(lambda destination: Delivery(destination, send))
        self.tracing: WorkerTracing[Task] = WorkerTracing(self._submit, current_task, self._change)
        self._recovery = Recovery(self._adopt)
        self._openai_calls = OpenAICalls(only_in_tasks=True)
        self._environment: dict[str, str | None] = {}

    def switch_on(self, task: Task) -> None:
        """Prepare for a task that is about to be opened."""
        delivery = self.deliveries.to(task.destination)
        delivery.configure(task.context.config)
        self._recovery.start(task.context.config.spool_directory)
        if not open_tasks():
            self._environment = _set_environment(_task_environment(task.context))
        self.tracing.install()
        self._openai_calls.install()

    def announce(self, task: Task) -> None:
        """Send the task's span ahead, so that what lies beneath it is never an orphan."""
        span = snapshot(task.span)
        if span is not None:
            self._send_ahead(task, span)

    def settle(self, task: Task) -> None:
        """See to the task's spans that are open when it ends.

        Those of streams that it has left unread end. The others, of calls that have not returned,
        are sent ahead as they are, lest they be lost with the process.
        """
        self._openai_calls.close_answers(task)
        self.tracing.show_open(task, task.span, functools.partial(self._send_ahead, task))

    def _send_ahead(self, task: Task, span: Any) -> None:
        # A collector takes a span that is sent again for another one.
        if not is_collector(task.context.tracking_uri):
            # Not counted: it is sent, and counted, when it ends.
            record = span_record(filtered(span, task.content))
            self.deliveries.to(task.destination).submit(record)

    def _submit(self, task: Task, span: Any) -> None:
        task.count_span(span.span_id, span.parent_id, usage_of(span), cost_of(span))
        sent = filtered(span, task.content)
        if is_collector(task.context.tracking_uri):
            record = otlp_record(for_collector(sent), task.span_id)
        else:
            record = span_record(sent, task.span_id)
        self.deliveries.to(task.destination).submit(record)

    def _change(self, task: Task, span: Any) -> None:
        """Have a span go through what the driver's MLflow has its own spans go through."""
        for processor in task.span_processors:
            try:
                processor(span)
            except Exception as error:
                reason = (
                    f"A span processor of the driver raised {type(error).__name__} on a worker, "
                    "so the content of that span is withheld."
                )
                filter_open_span(span, ContentPolicy(task.context.config, withholds=reason))

    def _adopt(self, destination: Destination, records: Sequence[Record]) -> None:
        if destination.tracking_uri is not None:
            send(destination, records)
        elif any(task.destination.driver_id == destination.driver_id for task in open_tasks()):
            # Home with the task that is running.
            self.deliveries.to(destination).submit_all(records)
        else:
            raise StoreError("only the driver that they belong to can store them")

    def switch_off(self) -> None:
        """Give the process back as it was, unless a task is open."""
        if not open_tasks():
            # The patches of autolog stay, asleep: to make them anew for each task costs more.
            _set_environment(self._environment)
            self._environment = {}
            self.tracing.uninstall()

    def remove(self) -> None:
        """Take back everything, unless a task is open."""
        if not open_tasks():
            self._openai_calls.uninstall()
            self.switch_off()


@functools.lru_cache(maxsize=1)
def worker_process() -> WorkerProcess:
    """Return this process's set-up, made on first use."""
    return WorkerProcess()


def flush(timeout: float) -> bool:
    """Send this process's finished spans now; return whether they are stored in time."""
    return worker_process().deliveries.flush(timeout) if _is_set_up() else True


def remove() -> None:
    """Take back what running tasks has set up in this process, if anything. Idempotent."""
    if _is_set_up():
        worker_process().remove()


def _is_set_up() -> bool:
    return worker_process.cache_info().currsize > 0


def _task_environment(context: DriverContext) -> dict[str, str | None]:
    """Return the environment variables of a process while it runs a task; None removes one."""
    uri = context.tracking_uri
    store = {} if uri is None or is_collector(uri) else {"MLFLOW_TRACKING_URI": uri}
    return {
        **context.environment,
        **store,
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
