"""What the driver does: capture its trace context and send it along."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from mlflow_ctx_autolog import __version__, tracing
from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.context import BY_BROADCAST, BY_PROPERTY, ActionContext, DriverContext
from mlflow_ctx_autolog.delivery.receipts import Receipt, TaskReceipt
from mlflow_ctx_autolog.driver import exports
from mlflow_ctx_autolog.driver import spark as spark_api
from mlflow_ctx_autolog.driver.actions import Actions
from mlflow_ctx_autolog.driver.attempts import Attempt, silent_attempts
from mlflow_ctx_autolog.driver.books import Book
from mlflow_ctx_autolog.driver.carriers import Carriers
from mlflow_ctx_autolog.driver.earlier import EarlierFunctions
from mlflow_ctx_autolog.driver.executed_plans import ExecutedPlans
from mlflow_ctx_autolog.driver.instrumentor import FunctionUse, SparkInstrumentor, name_of
from mlflow_ctx_autolog.driver.job_facts import job_facts
from mlflow_ctx_autolog.driver.job_lines import cost_of_task, job_line, show_job
from mlflow_ctx_autolog.driver.ledger import Ledger
from mlflow_ctx_autolog.driver.marked import MarkedFunctions
from mlflow_ctx_autolog.driver.operations import book_of_operation
from mlflow_ctx_autolog.driver.progress import Progress
from mlflow_ctx_autolog.driver.propagation import ActionPropagator, BatchFunctions
from mlflow_ctx_autolog.driver.routes import (
    check_relay,
    is_relayed,
    spans_per_host,
    transport,
    warn,
)
from mlflow_ctx_autolog.driver.stops import SparkStops
from mlflow_ctx_autolog.driver.submitted import SubmittedFunction
from mlflow_ctx_autolog.driver.threads import SpanThreads
from mlflow_ctx_autolog.exceptions import UnsupportedStoreError, note_budget
from mlflow_ctx_autolog.log_ins import safe_logger
from mlflow_ctx_autolog.mlflow_bridge.flavors import autologs_in_force, traces_no_openai
from mlflow_ctx_autolog.recorder.request import new_key
from mlflow_ctx_autolog.spans.content import ContentPolicy
from mlflow_ctx_autolog.stores import databricks, otlp
from mlflow_ctx_autolog.stores import tracking_store as store
from mlflow_ctx_autolog.stores.sending import appends
from mlflow_ctx_autolog.worker.submission import process_id

__all__ = ["Driver", "captured", "driver", "settings"]

_logger = safe_logger(__name__)


class Driver:
    """The settings in force on the driver, and what it has been told to remember."""

    def __init__(self) -> None:
        self.config: Config | None = None
        self.warned_of_network = False
        self.enabled_at = 0.0
        # Whether there was a task from which the platform hid what the driver says of its action.
        self.hides_properties = False
        self.fingerprint_key = new_key()
        self.progress = Progress(lambda task: cost_of_task(task, settings().prices))
        self.ledger = Ledger(
            settings, self.spark_facts, self._task_ended, self.silent_attempts, self.show_job
        )
        self.instrumentor = SparkInstrumentor(self.submit, lambda rdd: self.earlier.say_of_rdd(rdd))
        self.earlier = EarlierFunctions(self.instrumentor.names, self._traces, warn)
        self.executed_plans = ExecutedPlans(self._functions_ran, self._request_ran)
        self.endings = exports.SpanEndings(self._filter)
        self.joined_trace = tracing.JoinedTrace()
        self.propagator = ActionPropagator(
            self._moment, self._tell, self.executed_plans.expect, self._settles
        )
        self.batches = BatchFunctions(self.propagator.heard, tracing.activate)
        self.actions = Actions(self.earlier.look_at)
        self._installed = (
            self.instrumentor,
            self.earlier,
            self.propagator,
            self.batches,
            self.actions,
            SpanThreads(),
            SparkStops(self.await_workers),
        )
        self._carriers = Carriers()
        self.last_shared: tuple[Any, DriverContext] | None = None
        self._session: Any = None
        self._functions: set[str] = set()
        self._marked = MarkedFunctions()

    def install(self) -> None:
        """Have the functions that Spark gets carry the context from now on. Idempotent."""
        self.executed_plans.watch(spark_api.active_session())
        for each in self._installed:
            each.install()

    def uninstall(self) -> None:
        """Undo :meth:`install`, but for functions that :func:`traced` was called with."""
        if not self._marked:
            for each in self._installed:
                each.uninstall()

    def await_workers(self) -> None:
        """Wait until the store has what workers have not sent yet, but may any moment."""
        self.ledger.await_workers(settings().flush_timeout)

    @contextlib.contextmanager
    def says_span(self) -> Iterator[None]:
        """Have Spark be told which span is active for a block, also while nothing is enabled."""
        was_on = self.propagator.is_on
        self.propagator.install()
        try:
            yield
        finally:
            if not was_on:
                self.propagator.uninstall()

    def _task_ended(self, receipt: TaskReceipt) -> None:
        self.progress.add(receipt)
        if receipt.hides_properties and self.propagator.is_on and not self.hides_properties:
            self.hides_properties = True
            _logger.warning(
                "Spark's tasks see no local properties here, so that they cannot be told which "
                "span their action is of, and its calls are in a trace of their own. What is "
                "handed to Spark from now on takes its span along in the broadcast; to have "
                'it so from the first job on, say propagation="broadcast".'
            )

    def mark(self, function: Any) -> None:
        """Have a function carry the context, also while nothing is enabled."""
        self._marked.add(function)
        self.install()

    def check_forwarding(self) -> None:
        """Raise or warn where what the settings send to the workers cannot or should not travel.

        Raises:
            ValueError: Functions that spans go through cannot be pickled.
        """
        session = spark_api.active_session()
        _pickled_filters(session)
        _warn_of_network(session)

    def _filter(self, span: Any) -> None:
        exports.filter_open_span(span, ContentPolicy(settings()))
        self.ledger.books.note_words(span)
        # That which ends the span, where it is left by one.
        note_budget(sys.exc_info()[1])

    def submit(self, use: FunctionUse) -> SubmittedFunction | None:
        """Return what Spark gets instead of a function; None where that is the function itself."""
        is_marked = use.users in self._marked or use.function in self._marked
        if not tracing.is_on() or (self.config is None and not is_marked):
            return None
        name = name_of(use.users)
        try:
            return self.submitted(
                use.function,
                spark_api.session_of(use.receiver),
                name=name,
                required=is_marked,
                repeated=use.repeated,
                on_driver=use.on_driver,
                has_broadcasts=not (use.asked_first or use.on_driver),
                data_source=use.data_source,
            )
        except UnsupportedStoreError as error:
            warn(f"The model calls of {name} will not be traced. {error}")
        except Exception as error:
            warn(
                f"The model calls of {name} will not be traced, since the trace "
                f"context could not be captured: {type(error).__name__}: {error}"
            )
        return None

    def _traces(self) -> bool:
        return self.config is not None and tracing.is_on()

    def submitted(
        self,
        function: Callable[..., Any],
        session: Any,
        *,
        name: str,
        required: bool,
        repeated: bool,
        on_driver: bool = False,
        has_broadcasts: bool = True,
        data_source: bool = False,
    ) -> SubmittedFunction:
        """Return ``function`` as Spark gets it.

        Args:
            function: The user's function, or PySpark's around it.
            session: The Spark session or context, if it is known.
            name: What its task spans are called.
            required: Raise on the worker where the context cannot be read.
            repeated: Whether Spark calls it many times in a task attempt.
            on_driver: Whether Spark calls it on the driver, or beside the server.
            has_broadcasts: Whether Spark has its broadcasts wherever it loads the function.
            data_source: Whether it is a data source's class.

        Raises:
            UnsupportedStoreError: The spans can reach the store neither directly nor by way of
                the driver.
        """
        self._session = session
        spark_api.tell_daemons_of(session)
        self.executed_plans.watch(session)
        self.executed_plans.hand_over()
        self._functions.add(name)
        relay = spark_api.relay_of(session, self.ledger.receive)
        by_property = self.uses_properties and not on_driver
        shared = _shared(session, BY_PROPERTY if by_property else BY_BROADCAST)
        if shared.tracking_uri is None:
            check_relay(settings(), has_accumulators=relay is not None)
        _open_trace(shared, receipts_come_home=relay is not None)
        options = {
            "name": name,
            "required": required,
            "repeated": repeated,
            "on_driver": on_driver,
            "version": __version__,
            "data_source": data_source,
        }
        if settings().reuse_answers is not None:
            options["function"] = _identity(function) or name
        of_spark = spark_api.spark_context(session) if has_broadcasts else None
        if by_property:
            carrier = self._carriers.of(
                shared, lambda: _with_active_span(shared, session), of_spark
            )
        else:
            context = _with_active_span(shared, session)
            carrier = self._carriers.of(context, lambda: context, of_spark)
        return SubmittedFunction(function, options, carrier, relay, _pickled_filters(session))

    @property
    def uses_properties(self) -> bool:
        """Whether tasks learn of their span by a property of Spark's, rather than by broadcast."""
        return settings().propagation != "broadcast" and not self.hides_properties

    def _settles(self, context: Any) -> bool:
        # What a budget has spent may change at any moment; so may what there is without a span.
        return tracing.has_span(context) and not settings().has_budget

    def _moment(self) -> object:
        span = tracing.active_otel_span()
        if not tracing.is_valid(span):
            span = self.actions.latest, tracing.active_run_id()
        acknowledged = self.ledger.acknowledgements.told()
        return span, self.ledger.spent() if settings().has_budget else None, acknowledged

    def _tell(self) -> str:
        headers = tracing.active_span_headers()
        session_id = None
        if headers and self._functions:
            # What the next action may bring belongs to a trace that was not handed over yet.
            if not store.exports_to_collector():
                self.ledger.open(receipts_come_home=True)
            session_id, _ = tracing.session_and_user()
        if headers:
            action = ActionContext(headers.get("traceparent"), session_id)
        else:
            action = ActionContext(action=self.actions.latest, run_id=tracing.active_run_id())
        spent = self.ledger.spent() if settings().has_budget else {}
        acknowledged = self.ledger.acknowledgements.told()
        return replace(action, spent=spent, acknowledged=acknowledged).to_text()

    def _functions_ran(self, functions: int) -> None:
        # On Spark Connect, where no receipt tells of their tasks.
        if not store.exports_to_collector():
            self.ledger.open(receipts_come_home=False, functions=functions)

    def _request_ran(self, request: Any) -> None:
        self.earlier.look_at_request(request)
        if self.last_shared and self.uses_properties and not tracing.active_span_headers():
            self.ledger.enter(book_of_operation(self.last_shared[1], str(request.operation_id)))

    def spark_facts(self, since: int) -> str | None:
        """Return what Spark knows of its jobs since then, in milliseconds, for a report to read."""
        if self._session is None:
            return None
        try:
            facts = job_facts(self._session, self._functions, since)
            if facts is None and (plans := self.executed_plans.since(since)):
                facts = {"plans": plans}
        except Exception as error:
            # Without, some causes of repetitions remain unknown.
            _logger.info("Spark does not say what jobs have run: %r", error)
            return None
        return None if facts is None else json.dumps(facts, separators=(",", ":"))

    def show_job(self, book: Book, receipt: Receipt) -> None:
        """Show what a job has come to that is over, in one line. Never raises."""
        if self.progress.ignores(book.trace_id):
            return
        try:
            self.progress.finish(book.trace_id)
            if self.config is not None and not self.config.quiet:
                show_job(job_line(book, receipt, self.config.prices))
        except Exception as error:
            _logger.debug("What a job has come to could not be shown: %r", error)

    def silent_attempts(self, book: Book) -> list[Attempt]:
        """Return the task attempts of a trace that have told nothing, as far as Spark knows."""
        if self._session is None or not book.receipts_come_home:
            return []
        told, others = self.ledger.books.told_stages(book)
        swept = {each.attempt for each in book.receipts.values() if each.swept}
        try:
            return silent_attempts(
                self._session, int(book.info.request_time), book.ended, told, swept, others
            )
        except Exception as error:
            # Which leaves what the store has been asked for.
            _logger.info("Spark does not say which task attempts it has begun: %r", error)
            return []


def _identity(function: Callable[..., Any]) -> str | None:
    """Return what names a function whenever it is the same: by what it is pickled to."""
    try:
        return hashlib.blake2b(spark_api.pickled(function), digest_size=16).hexdigest()
    except Exception:
        # Which is for Spark to say.
        return None


def settings() -> Config:
    """Return the settings in force on the driver."""
    return driver.config or Config.from_env()


driver = Driver()


# What tracing in a worker should do as it does on the driver. None of them is secret.
_TRACING_FLAGS = (
    "MLFLOW_TRACE_SAMPLING_RATIO",
    "MLFLOW_USE_DEFAULT_TRACER_PROVIDER",
    "MLFLOW_TRACE_PROPAGATE_TO_OTEL_CONTEXT",
    "MLFLOW_ENABLE_OTEL_GENAI_SEMCONV",
)


def _environment() -> dict[str, str]:
    names = (*_TRACING_FLAGS, *settings().forward_env)
    return {name: os.environ[name] for name in names if name in os.environ}


def _warn_of_network(session: Any) -> None:
    """Warn, once, where settings let something secret travel that others could read."""
    sends = []
    if settings().forward_env:
        sends.append(f"forward_env sends {', '.join(settings().forward_env)} to the workers")
    if not (settings().answers_key or "$").startswith("$"):
        sends.append("answers_key is sent to the workers")
    if session is None or not sends or driver.warned_of_network:
        return
    is_private = spark_api.is_private_network(session)
    if not is_private:
        driver.warned_of_network = True
        state = "Spark's network encryption is off"
        if is_private is None:
            state = "it cannot be told whether Spark's network encryption is on"
        warn(
            f"{', '.join(sends)}, and {state}: "
            "others on the network could read them. Set spark.authenticate and "
            "spark.network.crypto.enabled, or configure on the workers what they need."
        )


def _pickled_filters(session: Any) -> bytes | None:
    """Return the user's functions that spans go through before they are sent, if there are any."""
    redact, token = settings().redact, settings().databricks_token
    span_processors = exports.span_processors()
    if session is None or (redact is None and token is None and not span_processors):
        return None
    filters = redact, tuple(span_processors), token
    try:
        if filters not in _pickles:
            _pickles[filters] = spark_api.pickled((redact, span_processors, token))
        return _pickles[filters]
    except Exception as error:
        raise ValueError(
            "redact, databricks_token or MLflow's span processors cannot be sent to the workers, "
            f"since they cannot be pickled: {type(error).__name__}: {error}. Let them refer to "
            "nothing that cannot, such as locks and connections."
        ) from error


# Of functions that spans go through: pickled once, so that all functions that Spark gets are alike.
_pickles: dict[tuple[Any, ...], bytes] = {}


def captured(session: Any) -> DriverContext:
    """Return the trace context of this moment, for a session."""
    shared = _shared(session, BY_BROADCAST)
    _open_trace(shared, receipts_come_home=False)
    return _with_active_span(shared, session)


def _shared(session: Any, propagation: str) -> DriverContext:
    """Return what of the context of this moment does not depend on the active span.

    To find it out takes longer than Spark needs for a column, so that the last one is used again
    where all that it is made of is as it was.
    """
    here = tracing.current_context()
    # With a span, store, experiment and workspace are those of its trace.
    key = (
        here,
        settings(),
        session,
        propagation,
        driver.fingerprint_key,
        store.exports_to_collector(),
        store.trace_destination(),
        store.current_tracking_uri(),
        tracing.declared_traces(),
        autologs_in_force(),
        driver.config is not None and traces_no_openai(),
        exports.span_processors(),
        _environment(),
    )
    if driver.last_shared and driver.last_shared[0] == key and tracing.has_span(here):
        return driver.last_shared[1]
    driver.last_shared = key, _new_shared(session, propagation)
    return driver.last_shared[1]


def _new_shared(session: Any, propagation: str) -> DriverContext:
    tracking_uri, _ = transport(settings(), session)
    _warn_of_network(session)
    tags, metadata = tracing.declared_traces()
    return DriverContext(
        tracking_uri=tracking_uri,
        experiment_id=_place(tracking_uri),
        workspace=tracing.active_workspace(),
        tags=tags,
        metadata=metadata,
        application_id=None if session is None else spark_api.application_id(session),
        process_id=process_id(),
        autologs=autologs_in_force(),
        records_no_calls=driver.config is not None and traces_no_openai(),
        environment=_environment(),
        redacts=settings().redact is not None,
        has_span_processors=bool(exports.span_processors()),
        fingerprint_key=driver.fingerprint_key,
        propagation=propagation,
        speculation=session and spark_api.setting(session, "spark.speculation", "false"),
        max_result_bytes=None if session is None else spark_api.max_result_bytes(session),
        config=settings(),
    )


def _with_active_span(shared: DriverContext, session: Any) -> DriverContext:
    """Return the context with the span that is active now, and how large its trace may become."""
    headers = tracing.active_span_headers()
    session_id, user = tracing.session_and_user() if headers else (None, None)
    context = replace(
        shared,
        traceparent=headers.get("traceparent"),
        tracestate=headers.get("tracestate"),
        session_id=session_id,
        user=user,
        spans_per_host=None
        if appends(shared.tracking_uri)
        else spans_per_host(settings(), session),
    )
    if shared.propagation == BY_PROPERTY:
        return context
    spent = driver.ledger.spent() if settings().has_budget else {}
    return context.under(ActionContext(context.traceparent, session_id, spent=spent))


def _place(tracking_uri: str | None) -> str:
    """Return what of a store takes the spans: its experiment, or its table."""
    if otlp.is_collector(tracking_uri):
        # There may be no tracking server to ask.
        return ""
    if databricks.is_table(tracking_uri):
        return str(store.span_table())
    return tracing.current_experiment_id()


def _open_trace(shared: DriverContext, *, receipts_come_home: bool) -> None:
    stores_for_them = is_relayed(settings(), shared.tracking_uri)
    driver.ledger.meet_workers(process_id(), stores_for_them=stores_for_them)
    if not otlp.is_collector(shared.tracking_uri):
        driver.ledger.open(receipts_come_home=receipts_come_home)
