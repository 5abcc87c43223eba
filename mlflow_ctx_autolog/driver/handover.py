"""What the driver does: capture its trace context and send it along."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from mlflow_ctx_autolog import __version__, tracing, versions
from mlflow_ctx_autolog.arguments import check_function, check_number, check_spark, check_type
from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.context import BY_BROADCAST, BY_PROPERTY, ActionContext, DriverContext
from mlflow_ctx_autolog.delivery.receipts import Receipt
from mlflow_ctx_autolog.driver import spark as spark_api
from mlflow_ctx_autolog.driver.actions import Actions
from mlflow_ctx_autolog.driver.carriers import Carriers
from mlflow_ctx_autolog.driver.executed_plans import ExecutedPlans
from mlflow_ctx_autolog.driver.instrumentor import FunctionUse, SparkInstrumentor, name_of
from mlflow_ctx_autolog.driver.job_facts import job_facts
from mlflow_ctx_autolog.driver.ledger import Ledger
from mlflow_ctx_autolog.driver.marked import MarkedFunctions
from mlflow_ctx_autolog.driver.progress import Progress
from mlflow_ctx_autolog.driver.propagation import ActionPropagator, BatchFunctions
from mlflow_ctx_autolog.driver.stops import SparkStops
from mlflow_ctx_autolog.driver.submitted import SubmittedFunction
from mlflow_ctx_autolog.driver.threads import SpanThreads
from mlflow_ctx_autolog.exceptions import (
    CtxAutologWarning,
    IncompleteTraceError,
    UnsupportedStoreError,
    note_budget,
)
from mlflow_ctx_autolog.log_ins import without_credentials, without_log_ins
from mlflow_ctx_autolog.mlflow_bridge.flavors import autologs_in_force, traces_no_openai
from mlflow_ctx_autolog.recorder.request import new_key
from mlflow_ctx_autolog.spans.content import ContentPolicy
from mlflow_ctx_autolog.stores import otlp
from mlflow_ctx_autolog.stores import tracking_store as store
from mlflow_ctx_autolog.stores.sending import is_database
from mlflow_ctx_autolog.stores.tracking_server import redirect_of
from mlflow_ctx_autolog.worker import process
from mlflow_ctx_autolog.worker.spark_task import in_spark_task
from mlflow_ctx_autolog.worker.submission import process_id

__all__ = [
    "Driver",
    "broadcast",
    "capture",
    "describe_transport",
    "flush",
    "receipt",
    "settings",
    "traced",
    "transport",
    "warn",
    "warn_of_old_store",
]

_logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])


class Driver:
    """The settings in force on the driver, and what it has been told to remember."""

    def __init__(self) -> None:
        self.config: Config | None = None
        self.warned_of_network = False
        self.enabled_at = 0.0
        # Whether a task was seen that could not read what the driver says of its action.
        self.hides_properties = False
        self.fingerprint_key = new_key()
        self.progress = Progress()
        self.ledger = Ledger(settings, self.spark_facts, self.progress.add)
        self.executed_plans = ExecutedPlans()
        self.endings = tracing.SpanEndings(self._filter)
        self.joined_trace = tracing.JoinedTrace()
        self.instrumentor = SparkInstrumentor(self.submit)
        self.propagator = ActionPropagator(self._moment, self._tell, self.executed_plans.expect)
        self.batches = BatchFunctions(self.propagator.heard, tracing.activate)
        self.actions = Actions()
        self.threads = SpanThreads()
        self.stops = SparkStops(self.await_workers)
        self._carriers = Carriers()
        self._session: Any = None
        self._functions: set[str] = set()
        self._marked = MarkedFunctions()

    def install(self) -> None:
        """Have the functions that Spark gets carry the context from now on. Idempotent."""
        self.instrumentor.install()
        self.propagator.install()
        self.batches.install()
        self.actions.install()
        self.threads.install()
        self.stops.install()

    def uninstall(self) -> None:
        """Undo :meth:`install`, but for functions that :func:`traced` was called with."""
        if not self._marked:
            self.instrumentor.uninstall()
            self.propagator.uninstall()
            self.batches.uninstall()
            self.actions.uninstall()
            self.threads.uninstall()
            self.stops.uninstall()

    def await_workers(self) -> None:
        """Wait until the store has what workers have not sent yet, but may any moment."""
        self.ledger.await_workers(settings().flush_timeout)

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
        tracing.filter_open_span(span, ContentPolicy(settings()))
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
            )
        except UnsupportedStoreError as error:
            warn(f"The model calls of {name} will not be traced. {error}")
        except Exception as error:
            warn(
                f"The model calls of {name} will not be traced, since the trace "
                f"context could not be captured: {type(error).__name__}: {error}"
            )
        return None

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

        Raises:
            UnsupportedStoreError: The spans can reach the store neither directly nor by way of
                the driver.
        """
        self._session = session
        spark_api.tell_daemons_of(session)
        self.executed_plans.watch(session)
        self._functions.add(name)
        relay = spark_api.relay_of(session, self.ledger.receive)
        by_property = self.uses_properties and not on_driver
        shared = _shared(session, BY_PROPERTY if by_property else BY_BROADCAST)
        if shared.tracking_uri is None:
            _check_relay(relay is not None)
        _open_trace(shared, receipts_come_home=relay is not None, functions=1)
        options = {
            "name": name,
            "required": required,
            "repeated": repeated,
            "on_driver": on_driver,
            "version": __version__,
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


def describe_transport() -> str:
    """Return a sentence that says how spans reach the store, and why.

    Raises:
        UnsupportedStoreError: They cannot.
    """
    uri, reason = transport()
    if uri is not None and _is_relayed(uri):
        way = f"with the task to the driver, which stores them in {uri}"
        return f"Spans travel {way}: a worker would have to load MLflow to write to a database."
    if uri is None:
        place = without_credentials(store.current_tracking_uri())
        way = f"with the task to the driver, which stores them in {place}"
    else:
        way = f"from the workers to {uri}"
    return f"Spans travel {way}: {reason}."


def _is_relayed(uri: str | None) -> bool:
    """Whether workers that see this driver's directory leave it to the driver to store spans."""
    return uri is None or (is_database(uri) and settings().transport != "direct")


def warn_of_old_store() -> None:
    """Warn of a release of MLflow whose store cannot end a trace that workers have written to.

    And of a server that sends elsewhere, where nothing is sent.
    """
    uri = store.current_tracking_uri()
    target = redirect_of(uri)
    if target is not None:
        warn(
            f"The tracking server at {without_log_ins(uri)} sends to {without_log_ins(target)}, "
            "and spans are not sent where nobody has said to. If that is your server, say "
            f"mlflow.set_tracking_uri({without_log_ins(target)!r})."
        )
        return
    try:
        version = store.store_version()
    except Exception:
        # Whether the store can be reached is not the question here.
        return
    if version is not None and versions.is_older(version, than="3.10"):
        warn(
            f"The traces are kept by MLflow {version}, which fails when a trace ends that workers "
            "have stored calls in: the end of the driver's span then waits for minutes. The calls "
            "themselves are kept. Upgrade the tracking server to 3.10 or newer."
        )


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
    redact, span_processors = settings().redact, tracing.span_processors()
    if session is None or (redact is None and not span_processors):
        return None
    filters = redact, tuple(span_processors)
    try:
        if filters not in _pickles:
            _pickles[filters] = spark_api.pickled((redact, span_processors))
        return _pickles[filters]
    except Exception as error:
        raise ValueError(
            "The redact function or MLflow's span processors cannot be sent to the workers, since "
            f"they cannot be pickled: {type(error).__name__}: {error}. Let them refer to nothing "
            "that cannot, such as locks and connections."
        ) from error


# Of functions that spans go through: pickled once, so that all functions that Spark gets are alike.
_pickles: dict[tuple[Any, ...], bytes] = {}


def _check_relay(has_accumulators: bool) -> None:
    if not has_accumulators:
        raise UnsupportedStoreError(
            f"Spans would have to come home to the driver, since {transport()[1]}; Spark Connect "
            "has no way for them. Use a tracking server that its workers can reach."
        )


def transport(session: Any = None) -> tuple[str | None, str]:
    """Return where workers send spans, None where these come home; and why.

    Args:
        session: A Spark session or context; the active session by default.

    Raises:
        UnsupportedStoreError: Spans can take neither way.
    """
    wanted = settings().transport
    session = spark_api.active_session() if session is None else session
    exports_to_collector = store.exports_to_collector()
    if wanted == "otlp" or (wanted == "auto" and exports_to_collector):
        collector = otlp.collector_uri()
        if not exports_to_collector:
            raise UnsupportedStoreError(
                "The transport is set to 'otlp', but MLflow on the driver stores its spans in "
                "another place, so that calls would be apart from the span they belong to. Unset "
                "MLflow's trace destination, MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT and "
                "MLFLOW_ENABLE_OTLP_EXPORTER."
            )
        return collector, "MLflow on the driver exports to an OTLP endpoint"
    if exports_to_collector:
        raise UnsupportedStoreError(
            f"The transport is set to {wanted!r}, but MLflow on the driver sends its spans to the "
            "OTLP endpoint that OpenTelemetry's variables name. Set the transport to 'otlp', or "
            "MLFLOW_ENABLE_OTLP_EXPORTER=false."
        )
    uri, reason = store.worker_tracking_uri()
    if wanted == "driver":
        return None, "the transport is set to 'driver'"
    if wanted == "direct" and uri is None:
        raise UnsupportedStoreError(f"The transport is set to 'direct', but {reason}.")
    is_here = uri is not None and store.is_of_this_host(uri)
    if wanted == "auto" and is_here and spark_api.has_workers_elsewhere(session):
        return None, f"workers on other hosts cannot reach {uri}"
    return uri, reason


def flush(timeout: float = 30.0) -> bool:
    """Send finished spans now: on a worker its own, on the driver those that came home.

    Args:
        timeout: Seconds to wait at most.

    Returns:
        Whether everything that had finished is stored. What the driver's own code traces is
        MLflow's to flush, with ``mlflow.flush_trace_async_logging()``.
    """
    check_number("timeout", timeout, "seconds, at least 0")
    deadline = time.monotonic() + timeout
    own = process.flush(timeout)
    return driver.ledger.flush(max(0.0, deadline - time.monotonic())) and own


def receipt(trace_id: str | None = None, timeout: float | None = None) -> Receipt:
    """Return what became of the spans of a trace, having asked the store.

    On Spark Connect, and for attempts of tasks that failed, it is the store that knows what a
    task has made; elsewhere each task tells the driver.

    Args:
        trace_id: A trace whose context was handed to Spark; by default the last one. Where no
            span was active, so that each task is a trace of its own, the receipt is of all
            these, and adds up what they have told, without asking the store. So is that of a
            trace which goes to a collector, without the driver's own spans.
        timeout: Seconds to wait at most for what is on its way; by default ``flush_timeout``.

    Raises:
        ValueError: The trace was not handed to Spark by this process.
        TypeError: An argument is of the wrong type.
        IncompleteTraceError: With ``strict=True``, the store does not have all spans.
    """
    takes = "the id of a trace that this process has handed to Spark, or None for the last one"
    check_type("trace_id", trace_id, (str, type(None)), takes)
    seconds = settings().flush_timeout if timeout is None else timeout
    check_number("timeout", seconds, "seconds, at least 0, or None for flush_timeout")
    try:
        found = driver.ledger.receipt(trace_id, seconds)
    except KeyError:
        raise ValueError(
            f"trace_id={trace_id!r} is not known here; receipt() takes {takes}. Of any trace in "
            "the store, report() tells."
        ) from None
    if settings().strict and not found.complete:
        raise IncompleteTraceError(driver.ledger.explain(found), found)
    return found


def capture() -> DriverContext:
    """Return the trace context of this moment: the active span, and where its trace is stored.

    Raises:
        UnsupportedStoreError: Spans of workers cannot reach the tracking store.
    """
    return _capture(spark_api.active_session())


def broadcast(spark: Any = None) -> Any:
    """Capture the trace context of this moment and send it to the workers.

    Args:
        spark: A Spark session or context; the active session by default.

    Returns:
        A carrier for :func:`attach`: a Spark broadcast of the serialised
        :class:`DriverContext`; on Spark Connect, which has no broadcasts, that text itself.

    Raises:
        TypeError: That is no session.
        ValueError: None is active.
        UnsupportedStoreError: Spans of workers cannot reach the tracking store.
    """
    check_spark("spark", spark)
    session = spark_api.active_session() if spark is None else spark
    if session is None:
        raise ValueError(
            "spark=None stands for the active Spark session, and none is active; start one, or "
            "pass it. Without Spark, capture().to_json() is a carrier."
        )
    context = _capture(session)
    if context.tracking_uri is None:
        raise UnsupportedStoreError(
            f"Spans would have to come home to the driver, since {transport()[1]}; those of "
            "attach() cannot. Use enable() or traced()."
        )
    context_of_spark = spark_api.spark_context(session)
    text = context.to_json()
    return text if context_of_spark is None else context_of_spark.broadcast(text)


def traced(function: F, spark: Any = None) -> F:
    """Have Spark get ``function`` with the trace context, also where nothing is enabled.

    For those who want to see it where :func:`enable` does it unseen::

        with mlflow.start_span("extract"):
            df.mapInPandas(ctx_autolog.traced(extract), schema).collect()

    Args:
        function: Any function that Spark can run.
        spark: A Spark session; the active one by default.

    Returns:
        The function itself: only what Spark makes of it is another.

    Raises:
        TypeError: That is no function, or no session.
        UnsupportedStoreError: Spans of workers cannot reach the tracking store.
    """
    check_function("function", function)
    check_spark("spark", spark)
    # A module that marks its functions at import is imported on the workers, too.
    if not in_spark_task() and tracing.is_on():
        transport(spark)
        driver.mark(function)
    return function


def _capture(session: Any) -> DriverContext:
    shared = _shared(session, BY_BROADCAST)
    _open_trace(shared, receipts_come_home=False)
    return _with_active_span(shared, session)


def _shared(session: Any, propagation: str) -> DriverContext:
    """Return what of the context of this moment does not depend on the active span."""
    tracking_uri, _ = transport(session)
    _warn_of_network(session)
    tags, metadata = tracing.declared_traces()
    return DriverContext(
        tracking_uri=tracking_uri,
        # A collector has none, and there may be no tracking server to ask.
        experiment_id="" if otlp.is_collector(tracking_uri) else tracing.current_experiment_id(),
        workspace=tracing.active_workspace(),
        tags=tags,
        metadata=metadata,
        application_id=None if session is None else spark_api.application_id(session),
        process_id=process_id(),
        autologs=autologs_in_force(),
        records_no_calls=driver.config is not None and traces_no_openai(),
        environment=_environment(),
        redacts=settings().redact is not None,
        has_span_processors=bool(tracing.span_processors()),
        fingerprint_key=driver.fingerprint_key,
        propagation=propagation,
        speculation=_speculation(session),
        max_result_bytes=None if session is None else spark_api.max_result_bytes(session),
        config=settings(),
    )


def _with_active_span(shared: DriverContext, session: Any) -> DriverContext:
    """Return the context with the span that is active now, and how large its trace may become."""
    headers = tracing.active_span_headers()
    session_id, user = tracing.session_and_user() if headers else (None, None)
    is_collector = otlp.is_collector(shared.tracking_uri)
    context = replace(
        shared,
        traceparent=headers.get("traceparent"),
        tracestate=headers.get("tracestate"),
        session_id=session_id,
        user=user,
        spans_per_host=None if is_collector else _spans_per_host(session),
    )
    if shared.propagation == BY_PROPERTY:
        return context
    spent = driver.ledger.spent() if settings().has_budget else {}
    return context.under(ActionContext(context.traceparent, session_id, spent=spent))


def _open_trace(shared: DriverContext, *, receipts_come_home: bool, functions: int = 0) -> None:
    driver.ledger.meet_workers(process_id(), stores_for_them=_is_relayed(shared.tracking_uri))
    if not otlp.is_collector(shared.tracking_uri):
        driver.ledger.open(receipts_come_home=receipts_come_home, functions=functions)


def _spans_per_host(session: Any) -> int | None:
    """Return how many spans below tasks a trace takes on each host; None for all."""
    limit = settings().max_spans_per_trace
    # A store for whole traces takes them from the driver, which holds them until the root ends.
    if limit is None or not store.store_takes_spans() or store.span_table() is not None:
        return None
    hosts = 1 if session is None else spark_api.executor_hosts(session)
    # A part for each host, but not so small that a job of few partitions has no use of it, unless
    # the whole became too large.
    return max(1, limit // hosts, min(limit // 10, 2 * limit // hosts))


def _speculation(session: Any) -> str | None:
    return None if session is None else spark_api.setting(session, "spark.speculation", "false")


def warn(message: str) -> None:
    """Warn at the line of the user's that led here."""
    frame, depth = sys._getframe(1), 2
    ours = ("mlflow_ctx_autolog", "pyspark")
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ours:
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, CtxAutologWarning, stacklevel=depth)
