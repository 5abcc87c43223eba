"""The ways of tracing the job that the demonstration compares, and how one is run."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import AbstractContextManager
from contextvars import copy_context
from typing import TypeVar

import jobs
import mlflow
from cluster import Cluster, documents_frame
from results import Outcome, read_outcome
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import OpenAIEndpoint

SPAN = "extract-entitlements"
T = TypeVar("T")
Extract = Callable[[jobs.Batches], jobs.Batches]


class Variants:
    """Runs the job over ``documents`` (name, text), each time with fresh worker processes.

    ``endpoint`` is the local model, or None when the calls go elsewhere.
    """

    def __init__(
        self,
        documents: list[tuple[str, str]],
        cluster: Cluster,
        endpoint: OpenAIEndpoint | None,
        console: Console,
    ) -> None:
        self._documents = documents
        self._cluster = cluster
        self._endpoint = endpoint
        self._console = console
        self._started = time.strftime("%Y-%m-%d %H:%M:%S")

    def published(self, title: str, tracking_uri: str, synchronous: bool) -> Outcome:
        """Set MLflow up inside the function, as published articles do."""
        experiment = self._experiment(title)
        extract = jobs.published_pattern(tracking_uri, experiment, synchronous)
        return self._run(title, experiment, extract)

    def one_line(self, title: str) -> Outcome:
        """Leave the function alone and enable this library on the driver."""
        return self._run(title, self._experiment(title), jobs.extract, ctx_autolog.enable)

    def _experiment(self, title: str) -> str:
        return f"{self._started} {title}"

    def _run(
        self,
        title: str,
        experiment: str,
        extract: Extract,
        tracing: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> Outcome:
        experiment_id = mlflow.set_experiment(experiment).experiment_id
        calls, tokens = self._counts()
        with self._progress(title) as progress, self._cluster.session(title) as spark:
            frame = documents_frame(spark, self._documents)
            with tracing(), mlflow.start_span(SPAN) as span:
                start = time.perf_counter()
                extracted = frame.mapInPandas(extract, jobs.SCHEMA)
                try:
                    rows = _in_thread(extracted.collect, progress)
                except Exception as error:
                    # Spark's exceptions ask the JVM for their text, and it ends soon.
                    raise RuntimeError(_cause(str(error))) from None
                seconds = time.perf_counter() - start
        calls_now, tokens_now = self._counts()
        return read_outcome(
            title=title,
            experiment_id=experiment_id,
            trace_id=span.trace_id,
            calls=calls_now - calls if self._endpoint else len(self._documents),
            tokens_billed=tokens_now - tokens if self._endpoint else None,
            seconds=seconds,
            rows=[(row.name, row.who, row.may, row.terms) for row in rows],
        )

    def _counts(self) -> tuple[int, int]:
        """Return the calls received and the tokens billed by the local endpoint so far."""
        endpoint = self._endpoint
        return (len(endpoint.requests), endpoint.total_tokens) if endpoint else (0, 0)

    @contextlib.contextmanager
    def _progress(self, title: str) -> Iterator[Callable[[], None]]:
        """Show the documents done; yields the function that brings the display up to date."""
        total = len(self._documents)
        if not self._console.is_terminal:
            self._console.print(f"Running: {title} ...")
            yield lambda: None
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn())
        with Progress(*columns, MofNCompleteColumn(), console=self._console) as progress:
            task = progress.add_task(title, total=total if self._endpoint else None)
            before, _ = self._counts()
            yield lambda: progress.update(task, completed=self._counts()[0] - before)
            progress.update(task, total=total, completed=total)


def _cause(text: str) -> str:
    """Pick the line of a failed job's message that names the error in the worker."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    causes = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Timeout)\b: ", line)]
    return (causes or lines or ["the job failed"])[-1 if causes else 0]


def _in_thread(work: Callable[[], T], meanwhile: Callable[[], None]) -> T:
    """Do ``work`` in another thread, so that Ctrl-C is not held up by the wait for Spark."""
    pool = ThreadPoolExecutor(max_workers=1)
    result: Future[T] = pool.submit(copy_context().run, work)
    pool.shutdown(wait=False)
    while True:
        try:
            return result.result(timeout=0.2)
        except NotYet:
            if result.done():
                raise
            meanwhile()
