"""What a worker process sets up once, and switches on while it runs tasks."""

from __future__ import annotations

import base64
import functools
import logging
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from mlflow_ctx_autolog.content import ContentPolicy
from mlflow_ctx_autolog.context import DriverContext
from mlflow_ctx_autolog.delivery.recovery import Recovery
from mlflow_ctx_autolog.delivery.sender import Deliveries, Delivery
from mlflow_ctx_autolog.delivery.spool import Destination, Record
from mlflow_ctx_autolog.exceptions import StoreError
from mlflow_ctx_autolog.model_calls.budget import Budget, open_budget
from mlflow_ctx_autolog.model_calls.flavors import Autologs
from mlflow_ctx_autolog.model_calls.openai_calls import OpenAICalls
from mlflow_ctx_autolog.spans.call_sums import SUMMED, CallSums
from mlflow_ctx_autolog.stores.otlp import is_collector, otlp_record
from mlflow_ctx_autolog.stores.tracking_store import send, span_record, spans_of, trace_record
from mlflow_ctx_autolog.task import (
    Task,
    Work,
    current_task,
    current_work,
    forget_tasks,
    look_elsewhere,
    open_tasks,
)
from mlflow_ctx_autolog.tracing import (
    active_context,
    context_of,
    cost_of,
    deactivate_spans,
    filter_open_span,
    filtered,
    for_collector,
    has_failed,
    headers_of,
    is_client_call,
    list_price,
    model_asked,
    priced,
    snapshot,
    trace_id_of,
    usage_of,
)
from mlflow_ctx_autolog.usage import Amounts, parse_amounts
from mlflow_ctx_autolog.worker.children import Children, Parent
from mlflow_ctx_autolog.worker.linked_trace import LinkedTrace, lifted
from mlflow_ctx_autolog.worker.placement import Place
from mlflow_ctx_autolog.worker.threads import ThreadHandovers
from mlflow_ctx_autolog.worker.tracing import Branch, WorkerTracing, info_of_own_trace

__all__ = [
    "WorkerProcess",
    "budget_of",
    "content_policy",
    "flush",
    "join",
    "remove",
    "worker_process",
]

_logger = logging.getLogger(__name__)


class WorkerProcess:
    """This process's tracing and its way to the stores, shared by all tasks that it runs."""

    def __init__(self) -> None:
        self.deliveries = Deliveries(lambda destination: Delivery(destination, send))
        self.tracing: WorkerTracing[Task] = WorkerTracing(
            self._submit, current_task, self._change, _parent_of_new_spans
        )
        self._recovery = Recovery(self._adopt)
        self._openai_calls = OpenAICalls(only_in_tasks=True)
        self._autologs = Autologs()
        self._threads = ThreadHandovers(_work_here)
        self._parent: Parent | None = None
        self._children = Children(_work_here, self._answer_child, join, lambda: self._parent)
        self._environment: dict[str, str | None] = {}

    def switch_on(self, task: Task) -> None:
        """Prepare for a task that is about to be opened."""
        delivery = self.deliveries.to(task.destination)
        delivery.configure(task.context.config)
        self._recovery.start(task.context.config.spool_directory)
        if not open_tasks():
            self._environment = _set_environment(_task_environment(task.context))
        self._install(task.context)

    def _install(self, context: DriverContext) -> None:
        self.tracing.install()
        self._openai_calls.install()
        self._autologs.install(context.autologs)
        self._threads.install()
        self._children.install()

    def announce(self, task: Task) -> None:
        """Send the task's span ahead, so that what lies beneath it is never an orphan."""
        span = snapshot(task.span)
        if span is not None:
            self._send_ahead(task, task.content, span)

    def settle(self, task: Task) -> None:
        """See to the task's spans that are open when it ends.

        Those of streams that it has left unread end. The others, of calls that have not returned,
        are sent ahead as they are, lest they be lost with the process.
        """
        self._openai_calls.close_answers(task)
        content = _unprocessed_content(task)

        def send_ahead(span: Any, branch: Branch) -> None:
            if task.placement is None or task.placement.place_open(branch) is Place.MAIN:
                self._send_ahead(task, content, span)

        self.tracing.show_open(task, task.span, send_ahead)
        if task.placement is not None:
            task.placement.close()
        if task.linked is not None:
            self._submit_linked_trace(task, task.linked, is_over=True)

    def _send_ahead(self, task: Task, content: ContentPolicy, span: Any) -> None:
        # A collector takes a span that is sent again for another one.
        if not is_collector(task.context.tracking_uri):
            # Not counted: it is sent, and counted, when it ends.
            record = span_record(filtered(span, content))
            self.deliveries.to(task.destination).submit(record)

    def _submit(self, task: Task, span: Any, branch: Branch | None) -> None:
        # What the store never sees, it cannot price.
        is_sampled = task.context.config.sampling is not None
        usage, cost = usage_of(span), priced(span) if is_sampled else cost_of(span)
        # No span goes through the driver's processors after the end of its task.
        sent = filtered(span, task.content if task.is_open else _unprocessed_content(task))
        self._count_answer(task, span, usage, cost)
        if task.elsewhere is not None and branch is not None:
            self._submit_to_parent(task, span, usage, cost, _record(task, sent), branch)
            return
        task.count_span(span.span_id, span.parent_id, usage, cost)
        if branch is None:
            delivery = self.deliveries.to(task.destination)
            delivery.submit(_record(task, sent))
            info = info_of_own_trace(span, task.context)
            if info is not None and not is_collector(task.context.tracking_uri):
                delivery.submit(trace_record(info))
        else:
            seconds = (span.end_time_ns - span.start_time_ns) / 1e9
            self._store(task, sent.span_id, branch, has_failed(span), seconds, lambda: sent)

    def _store(
        self,
        task: Task,
        span_id: str,
        branch: Branch,
        failed: bool,
        seconds: float,
        span: Callable[[], Any],
        record: Record | None = None,
    ) -> None:
        """Store a span below a task's where that is decided."""
        place = Place.MAIN
        if task.placement is not None:
            place = task.placement.place(branch, span_id, failed=failed, seconds=seconds)
        if place is Place.NOWHERE:
            task.count_sampled_out()
            return
        around = branch.outer if span_id == branch.top else branch
        has_parent = around is not None and around.place is place
        if place is Place.LINKED:
            linked = task.link(lambda: self._new_linked_trace(task))
            record = _record(task, linked.moved(span(), is_top=not has_parent))
        elif around is not None and task.placement is not None and not has_parent:
            record = _record(task, lifted(span(), task.span))
        self.deliveries.to(task.destination).submit(record or _record(task, span()))

    def _new_linked_trace(self, task: Task) -> LinkedTrace:
        linked = LinkedTrace(task.span, task.context)
        # So that both are known of each other, whatever becomes of the task.
        if task.is_open:
            self.announce(task)
        self._submit_linked_trace(task, linked, is_over=not task.is_open)
        return linked

    def _submit_linked_trace(self, task: Task, linked: LinkedTrace, *, is_over: bool) -> None:
        delivery = self.deliveries.to(task.destination)
        delivery.submit(span_record(linked.root(), task.span_id if is_over else ""))
        delivery.submit(trace_record(linked.info(is_over=is_over)))

    def _count_answer(self, task: Task, span: Any, usage: Amounts, cost: Amounts) -> None:
        if not is_client_call(span):
            return
        failed, paid = has_failed(span), 0.0
        if task.budget is not None and not failed:
            paid = task.budget.paid(model_asked(span), usage, cost.get("total_cost"))
        task.count_answer(failed, paid)
        seconds = (span.end_time_ns - span.start_time_ns) / 1e9
        attributes = {name: span.get_attribute(name) for name in SUMMED}
        task.sum_up(attributes, seconds, failed=failed)

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

    def join(self, parent: Parent) -> None:
        """Take part in the tasks of another process, whose child this one is."""
        forget_tasks()
        deactivate_spans()
        self._parent = parent
        look_elsewhere(functools.partial(_ask_parent, parent))
        if (work := current_work()) is not None:
            self._install(work.task.context)

    def _submit_to_parent(
        self,
        task: Task,
        span: Any,
        usage: Amounts,
        cost: Amounts,
        record: Record,
        branch: Branch,
    ) -> None:
        """Have the parent count and deliver a span, so that it is in the task's receipt."""
        message = {
            "task": task.span_id,
            "calls": task.take_calls(),
            "span": [span.span_id, span.parent_id, usage, cost],
            "branch": [branch.top, branch.above, branch.outer and branch.outer.top],
            "failed": has_failed(span),
            "seconds": (span.end_time_ns - span.start_time_ns) / 1e9,
            "sums": task.take_sums().to_dict(),
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
        if work is None or not work.task.is_open:
            work = current_work()
        if work is None:
            return None
        headers = headers_of(work.parent_or_task)
        context = replace(
            work.task.context,
            traceparent=headers.get("traceparent"),
            tracestate=headers.get("tracestate"),
        )
        return {"task": work.task.span_id, "context": context.to_json()}

    def _submit_for_child(self, message: dict[str, Any]) -> bool:
        for task in open_tasks():
            if task.span_id == message["task"]:
                span_id, parent_id, usage, cost = message["span"]
                payload = base64.b64decode(message["payload"])
                task.count_call(int(message["calls"]))
                task.count_span(span_id, parent_id, parse_amounts(usage), parse_amounts(cost))
                task.merge_sums(CallSums.from_dict(message.get("sums")))
                record = Record("span", span_id, payload, task.span_id)
                self._store(
                    task,
                    span_id,
                    self._branch_of_child(task, span_id, *message["branch"]),
                    bool(message["failed"]),
                    float(message["seconds"]),
                    functools.partial(_span_of, record),
                    record,
                )
                return True
        return False

    def _branch_of_child(
        self, task: Task, span_id: str, top: str, above: str | None, outer: str | None
    ) -> Branch:
        """Return the branch that a child's span lies in, by what the child knows of it."""
        found: Branch | None = task.child_branches.get(top)
        if found is None:
            branch = self.tracing.branch_below(top, above)
            branch.outer = branch.outer or task.child_branches.get(outer or "")
            # Unless a thread that answers the same child was faster.
            found = cast(Branch, task.child_branches.setdefault(top, branch))
        self.tracing.count_below(above)
        if span_id == top:
            del task.child_branches[top]
        return found

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
            self._autologs.uninstall()
            self._threads.uninstall()
            self._children.uninstall()
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
            redact, span_processors = pickle.loads(filters)
        except Exception as error:
            reason = (
                "The driver's redact function or span processors cannot be unpickled on this "
                f"worker ({type(error).__name__}: {error}), so content of spans is withheld. "
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
    return open_budget(
        context.config,
        job=trace_id_of(context) or str(context.session_id),
        handover=str(context.handover_id),
        known=context.spent,
        price_of=lambda model: prices.get(model) or list_price(model),
    )


def _work_here() -> Work | None:
    """Return the work of this moment, to be handed over with the span that is active."""
    work = current_work()
    return None if work is None else work._replace(parent=active_context())


def _parent_of_new_spans() -> Any:
    work = current_work()
    return None if work is None else work.parent_or_task


def _ask_parent(parent: Parent) -> Work | None:
    answer = parent.ask({})
    return None if answer is None else _work_elsewhere(answer["task"], answer["context"])


@functools.lru_cache(maxsize=64)
def _work_elsewhere(span_id: str, text: str) -> Work:
    context = DriverContext.from_json(text)
    # The user's functions stay with the parent; where spans must go through them, content is
    # withheld here.
    content, _ = content_policy(context)
    task = Task(context, content, elsewhere=span_id, is_open=True, parent=context_of(context))
    task.budget = budget_of(context)
    return Work(task)


def flush(timeout: float) -> bool:
    """Send this process's finished spans now; return whether they are stored in time."""
    return worker_process().deliveries.flush(timeout) if _is_set_up() else True


def remove() -> None:
    """Take back what running tasks has set up in this process, if anything. Idempotent."""
    if _is_set_up():
        worker_process().remove()


def _span_of(record: Record) -> Any:
    (span,) = spans_of([record])
    return span


def _record(task: Task, span: Any) -> Record:
    if is_collector(task.context.tracking_uri):
        return otlp_record(for_collector(span), task.span_id)
    return span_record(span, task.span_id)


def _unprocessed_content(task: Task) -> ContentPolicy:
    """Return what may be sent of a span that the driver's span processors have not seen."""
    if not task.span_processors:
        return task.content
    return ContentPolicy(task.context.config.updated({"capture_content": False}))


def _is_set_up() -> bool:
    return worker_process.cache_info().currsize > 0


def _task_environment(context: DriverContext) -> dict[str, str | None]:
    """Return the environment variables of a process while it runs a task; None removes one."""
    uri = context.tracking_uri
    store = {} if uri is None or is_collector(uri) else {"MLFLOW_TRACKING_URI": uri}
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
