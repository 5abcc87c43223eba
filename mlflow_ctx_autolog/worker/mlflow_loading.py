"""MLflow in a worker: found when somebody else loads it, and loaded where it is wanted."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from mlflow_ctx_autolog.context import DriverContext
from mlflow_ctx_autolog.exceptions import warn_once
from mlflow_ctx_autolog.imports import when_imported
from mlflow_ctx_autolog.log_ins import safe_logger
from mlflow_ctx_autolog.spans.amounts import Amounts
from mlflow_ctx_autolog.spans.record import SpanContext, SpanRecord
from mlflow_ctx_autolog.task import Task, current_work

__all__ = ["MLflowInWorker"]

_logger = safe_logger(__name__)

_BRIDGE = "mlflow_ctx_autolog.mlflow_bridge"

# Why it is loaded.
_IMPORTED = "a function that imports it"
_PRICES = "the price of a model"
_PROCESSORS = "span processors of mlflow.tracing.configure()"
_CONVENTIONS = "MLFLOW_ENABLE_OTEL_GENAI_SEMCONV"

Started = Callable[[Task, str, "str | None", Callable[[], "SpanRecord | None"]], None]


class MLflowInWorker:
    """What is to be known of MLflow in a process that need not have it.

    Args:
        started: Is told of MLflow's spans that start in tasks.
        ended: Takes those that end.
    """

    def __init__(self, started: Started, ended: Callable[[SpanRecord], None]) -> None:
        self._started = started
        self._ended = ended
        self._lock = threading.RLock()
        self._loaded: _Loaded | None = None
        self._context: DriverContext | None = None
        self._is_watching = False
        # Why it was loaded first, for whoever diagnoses.
        self.why: str | None = None

    def install(self, context: DriverContext) -> None:
        """Have MLflow's spans of tasks come here, as soon as MLflow is there. Idempotent."""
        with self._lock:
            self._context = context
            if not self._is_watching:
                self._is_watching = True
                when_imported("mlflow", lambda _: self._arrived())
                # Which MLflow's OpenAI autolog traces as well.
                when_imported("agents", self._agents_arrived)
            if context.autologs:
                self.load(f"its autologs on at the driver ({', '.join(sorted(context.autologs))})")
            if _is_loaded("mlflow"):
                self._take_over()
                if _is_loaded("agents"):
                    self._agents_arrived(sys.modules["agents"])

    def _arrived(self) -> None:
        with self._lock:
            if self._context is not None:
                self._take_over()

    def _take_over(self) -> None:
        context = self._context
        if context is not None:
            try:
                self.load(_IMPORTED).install(context)
            except Exception as error:
                warn_once(
                    _logger,
                    "mlflow",
                    "Spans that MLflow makes on this worker are not in the task's trace, since "
                    f"{type(error).__name__}: {error}. Calls of the OpenAI client are.",
                )

    def _agents_arrived(self, module: Any) -> None:
        # A user's own module may have that name.
        with self._lock:
            context = self._context
            is_sdk = hasattr(module, "set_trace_processors")
            if context is not None and is_sdk and not context.records_no_calls:
                self.load("a function that uses the OpenAI Agents SDK")
                self._take_over()
                self.load(_IMPORTED).openai_autolog.turn_on()

    def uninstall(self) -> None:
        """Idempotent."""
        with self._lock:
            self._context = None
            if self._loaded is not None:
                self._loaded.uninstall()

    def load(self, why: str) -> _Loaded:
        """Load MLflow, if it is not there.

        Args:
            why: Who wants it.
        """
        with self._lock:
            self.why = self.why or why
            if self._loaded is None:
                # With MLflow, whose arrival calls this again: not while a module is half imported.
                importlib.import_module(_BRIDGE)
            if self._loaded is None:
                self._loaded = _Loaded(self._started, self._ended)
            return self._loaded

    def active(self) -> SpanContext | None:
        """Return the span of MLflow's that is active here and now; None for none."""
        return None if self._loaded is None else self._loaded.tracer.active()

    def deactivate_spans(self) -> None:
        """Leave no span of MLflow's active in this execution context."""
        if self._loaded is not None:
            self._loaded.tracer.deactivate()

    def said_of(self, task: Task) -> SpanRecord | None:
        """Return a task's span as the user's function has changed it; None where it has not."""
        return None if self._loaded is None else self._loaded.tracer.said_of(task)

    def note_call(self, task: Task) -> None:
        """Note what the user's function has declared to MLflow where a call starts."""
        if self._loaded is not None:
            self._loaded.tracer.note_call(task)

    def said_of_trace(self, task: Task) -> dict[str, str]:
        """Return what was said here of a task's trace, since this was asked last."""
        if self._loaded is None:
            return {}
        try:
            return dict(self._loaded.tracer.said_of_trace(task))
        except Exception as error:
            # Of a value that cannot be written as a text, for one.
            warn_once(_logger, "words", f"What a task has said of its trace is lost: {error!r}")
            return {}

    def problem(self) -> str | None:
        """Return why calls are not to be recorded here and now; None if they are."""
        if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
            return "OTEL_SDK_DISABLED is true"
        if self._context is not None and self._context.records_no_calls:
            return "MLflow's OpenAI autolog is switched off at the driver"
        if self._loaded is None:
            return None
        if self._loaded.is_switched_off():
            return "mlflow.tracing.disable() was called"
        if self._loaded.openai_autolog.is_switched_off:
            return "MLflow's OpenAI autolog is switched off in the worker"
        return None

    # What only MLflow can do with a span.

    def priced(self, span: SpanRecord) -> Amounts:
        """Return what a call cost, as the store would find it."""
        amounts: Amounts = self.load(_PRICES).conversion.priced(span)
        return amounts

    def price_of(self, model: str) -> tuple[float, float] | None:
        """Return US dollars for a million input and output tokens of a model, if MLflow knows."""
        price: tuple[float, float] | None = self.load(_PRICES).conversion.price_of(model)
        return price

    def processed(
        self, span: SpanRecord, processors: Iterable[Callable[[Any], None]]
    ) -> SpanRecord:
        """Return a span as MLflow's span processors leave it. What they raise, it raises."""
        record: SpanRecord = self.load(_PROCESSORS).conversion.processed(span, processors)
        return record

    def for_collector(self, span: SpanRecord) -> SpanRecord:
        """Return a span by OpenTelemetry's conventions, where MLflow exports by these."""
        asked = os.environ.get("MLFLOW_ENABLE_OTEL_GENAI_SEMCONV", "").lower()
        if asked not in ("true", "1"):
            return span
        record: SpanRecord = self.load(_CONVENTIONS).conversion.by_genai_conventions(span)
        return record


class _Loaded:
    """MLflow, and our ways to it."""

    def __init__(self, started: Started, ended: Callable[[SpanRecord], None]) -> None:
        self.conversion: Any = importlib.import_module(f"{_BRIDGE}.conversion")
        tracer: Any = importlib.import_module(f"{_BRIDGE}.tracer")
        autolog: Any = importlib.import_module(f"{_BRIDGE}.own_autolog")
        flavors: Any = importlib.import_module(f"{_BRIDGE}.flavors")
        self.tracer = tracer.WorkerTracer(current_work, started, ended)
        self.is_switched_off = tracer.is_switched_off
        self.openai_autolog = autolog.OpenAIAutolog(lambda: current_work() is not None)
        self._autologs = flavors.Autologs()

    def install(self, context: DriverContext) -> None:
        self.tracer.install()
        self.openai_autolog.install()
        self._autologs.install(context.autologs)

    def uninstall(self) -> None:
        self._autologs.uninstall()
        self.openai_autolog.uninstall()
        self.tracer.uninstall()


def _is_loaded(name: str) -> bool:
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    return module is not None and not getattr(spec, "_initializing", False)
