"""What a user may pick to trace the model calls of Spark workers, each as its documentation has it.

A contender prepares a function for mapInPandas on the driver, below the job's active span. What
goes to the workers imports what it needs there, and is pickled by value.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import mlflow
import pandas as pd

import mlflow_ctx_autolog as ctx_autolog

ASYNC_EXPORT = "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"

Function = Callable[[Iterable[pd.DataFrame]], Iterator[pd.DataFrame]]


def as_it_is(function: Function) -> Function:
    """Leave the function as it is."""
    return function


def set_up_inside(function: Function, asynchronous: bool = False) -> Function:
    """Set MLflow up inside the function, as the article does."""
    uri = mlflow.get_tracking_uri()
    experiment = mlflow.get_experiment(_experiment_id()).name

    def wrapped(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        import mlflow

        os.environ[ASYNC_EXPORT] = str(asynchronous).lower()
        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment(experiment)
        mlflow.openai.autolog()
        yield from function(batches)

    return wrapped


def headers_by_hand(function: Function, asynchronous: bool = False) -> Function:
    """Pass MLflow's tracing context in HTTP headers, beside setting MLflow up inside."""
    headers = _headers()
    inside = set_up_inside(function, asynchronous)

    def wrapped(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        from mlflow.tracing.distributed import set_tracing_context_from_http_request_headers

        with set_tracing_context_from_http_request_headers(headers):
            yield from inside(batches)

    return wrapped


def headers_and_async_export(function: Function) -> Function:
    """Do the same with MLflow's asynchronous export, which is its default."""
    return headers_by_hand(function, asynchronous=True)


def openinference(function: Function) -> Function:
    """Instrument by OpenInference."""
    return _instrumented(function, "openinference.instrumentation.openai")


def openllmetry(function: Function) -> Function:
    """Instrument by OpenLLMetry."""
    return _instrumented(function, "opentelemetry.instrumentation.openai")


def _instrumented(function: Function, package: str) -> Function:
    """Export by OTLP to the MLflow server, with the driver's context attached by hand."""
    headers = _headers()
    url = f"{mlflow.get_tracking_uri()}/v1/traces"
    experiment = {"x-mlflow-experiment-id": _experiment_id()}

    def wrapped(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        import importlib

        from opentelemetry import context
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        provider = TracerProvider()
        exporter = OTLPSpanExporter(endpoint=url, headers=experiment)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        importlib.import_module(package).OpenAIInstrumentor().instrument(tracer_provider=provider)
        context.attach(TraceContextTextMapPropagator().extract(headers))
        yield from function(batches)
        provider.force_flush()

    return wrapped


def _headers() -> dict[str, str]:
    from mlflow.tracing.distributed import get_tracing_context_headers_for_http_request

    headers: dict[str, str] = get_tracing_context_headers_for_http_request()
    return headers


def _experiment_id() -> str:
    from mlflow.tracking.fluent import _get_experiment_id

    return str(_get_experiment_id())


@dataclass(frozen=True)
class Contender:
    """How a job is traced.

    Args:
        prepare: What becomes of the job's function.
        settings: What `ctx_autolog.enable` is given; None where it is not called.
        daemon: The module that forks the Python workers.
        package: The distribution that must be installed, if it may be missing.
    """

    prepare: Callable[[Function], Function] = as_it_is
    settings: dict[str, Any] | None = None
    daemon: str = "pyspark.daemon"
    package: str = ""

    @property
    def environment(self) -> str:
        """By what jobs that may share a Spark session are recognised."""
        return f"{self.daemon} {'collector' if self.to_collector else 'server'}"

    @property
    def to_collector(self) -> bool:
        """Whether MLflow on the driver exports to an OpenTelemetry collector."""
        return self.settings == {"transport": "otlp"}

    @property
    def is_ours(self) -> bool:
        return self.settings is not None

    def enable(self) -> Any:
        return ctx_autolog.enable(**(self.settings or {}))


PRELOADING = "mlflow_ctx_autolog.daemon"
UNTRACED, ARTICLE = "no tracing", "the article's pattern"
OPENINFERENCE, OPENLLMETRY = "OpenInference", "OpenLLMetry"
OURS, OURS_PRELOADED = "ours, direct", "ours, direct, preloading daemon"
CONTENDERS = {
    UNTRACED: Contender(),
    ARTICLE: Contender(set_up_inside),
    "headers by hand, async off": Contender(headers_by_hand),
    "headers by hand, async on": Contender(headers_and_async_export),
    OPENINFERENCE: Contender(openinference, package="openinference-instrumentation-openai"),
    OPENLLMETRY: Contender(openllmetry, package="opentelemetry-instrumentation-openai"),
    OURS: Contender(settings={"transport": "direct"}),
    "ours, driver": Contender(settings={"transport": "driver"}),
    "ours, otlp": Contender(settings={"transport": "otlp"}),
    OURS_PRELOADED: Contender(settings={"transport": "direct"}, daemon=PRELOADING),
}
