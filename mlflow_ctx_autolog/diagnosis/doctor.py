"""``doctor``: asks driver, workers and store all that can make a trace go missing."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from mlflow_ctx_autolog import autolog, tracing
from mlflow_ctx_autolog.arguments import check_spark, check_url
from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.delivery.spool import Destination
from mlflow_ctx_autolog.diagnosis import probe
from mlflow_ctx_autolog.diagnosis.check import SPARK_SETTINGS, VARIABLES, Facts, Finding
from mlflow_ctx_autolog.diagnosis.checks import examine
from mlflow_ctx_autolog.diagnosis.diagnosis import Diagnosis
from mlflow_ctx_autolog.diagnosis.ways import untraced_ways
from mlflow_ctx_autolog.driver import exports
from mlflow_ctx_autolog.driver import spark as spark_api
from mlflow_ctx_autolog.driver.handover import driver, settings
from mlflow_ctx_autolog.driver.mlflow_traces import is_task
from mlflow_ctx_autolog.driver.routes import transport
from mlflow_ctx_autolog.exceptions import StoreError, UnsupportedStoreError, shortened
from mlflow_ctx_autolog.log_ins import without_credentials
from mlflow_ctx_autolog.mlflow_bridge.flavors import autologs_in_force
from mlflow_ctx_autolog.stores import tracking_store as store
from mlflow_ctx_autolog.stores.access import access
from mlflow_ctx_autolog.stores.databricks import is_table
from mlflow_ctx_autolog.stores.otlp import is_collector
from mlflow_ctx_autolog.stores.sending import is_database, needs_mlflow
from mlflow_ctx_autolog.versions import SUPPORTED

__all__ = ["diagnose", "doctor"]

_NAME = "mlflow-ctx-autolog doctor"
_OPENAI = "https://api.openai.com/v1"


def doctor(spark: Any = None, *, model_url: str | None = None) -> Diagnosis:
    """Check on the driver, on the workers and in the store what can make traces go missing.

    It runs three small Spark jobs, and makes one call to a stand-in for a model inside a task.
    It leaves nothing behind: its traces are deleted, or tagged ``mlflow_ctx_autolog.probe`` where
    that is not allowed. It spends no token, and shows no secret.

    Args:
        spark: A Spark session, classic or Connect; by default the active one. Without any, only
            the driver is examined.
        model_url: The endpoint that your functions call; by default each process's
            ``OPENAI_BASE_URL``, else OpenAI's.

    Returns:
        A table of findings: print it, show it in a notebook, or read ``failures``.

    Raises:
        TypeError: That is no session, or no address.
        ValueError: That is no address, or a ``MLFLOW_CTX_AUTOLOG_*`` variable cannot be read.
    """
    check_spark("spark", spark)
    check_url("model_url", model_url)
    session = spark_api.active_session() if spark is None else spark
    return diagnose(session, model_url=model_url)


def diagnose(
    session: Any,
    *,
    model_url: str | None = None,
    session_error: str | None = None,
) -> Diagnosis:
    """See :func:`doctor`.

    Args:
        session: A Spark session; None where there is none.
        model_url: See :func:`doctor`.
        session_error: Why there is no session, where there should be one.
    """
    started = time.monotonic()
    examination = _Examination(session, model_url, session_error)
    findings = examination.run()
    shown = (replace(each, found=probe.without_secrets(each.found)) for each in findings)
    return Diagnosis(tuple(shown), time.monotonic() - started, tuple(untraced_ways()))


class _Examination:
    """Collects the facts, and puts them to the checks."""

    def __init__(
        self,
        session: Any,
        model_url: str | None,
        session_error: str | None,
    ) -> None:
        self._session = session
        self._config = settings()
        self._uri = store.current_tracking_uri()
        self._experiment_id: str | None = None
        self._experiment_error: str | None = None
        self._facts = Facts(
            driver={},
            workers_error=session_error,
            tracking_uri=without_credentials(self._uri) or "",
            propagation=self._config.propagation,
            model_url_was_named=(model_url or os.environ.get("OPENAI_BASE_URL")) is not None,
            takes_spans=store.store_takes_spans(),
        )
        self._question: dict[str, Any] = {
            "packages": [*(supported.package for supported in SUPPORTED), "mlflow_ctx_autolog"],
            "variables": list(VARIABLES),
            "has_spool": self._config.spool_max_bytes > 0,
            "spool_directory": self._config.spool_directory,
        }
        self._model_url = model_url
        self._worker_uri: str | None = None

    def run(self) -> list[Finding]:
        """Return the findings of all checks."""
        facts = self._facts
        worker_uri = None
        try:
            worker_uri, facts.transport_reason = transport(self._config, self._session)
            self._worker_uri = worker_uri
            facts.transport = "driver" if worker_uri is None else "direct"
            if store.exports_to_collector():
                # Which takes spans, and cannot be asked for any.
                facts.transport, worker_uri = "otlp", None
        except UnsupportedStoreError as error:
            facts.transport_reason = str(error)
        if facts.transport in ("direct", "driver"):
            self._find_experiment()
        self._gather(worker_uri)
        facts.mlflow_wanted = self._reasons_for_mlflow()
        facts.round_trip_skipped = self._reason_to_stay(examine(facts))
        if facts.round_trip_skipped is None:
            facts.round_trip = self._make_round_trip()
        return examine(facts)

    def _reasons_for_mlflow(self) -> list[str]:
        """Return what of the driver's settings has workers load MLflow."""
        config, uri = self._config, self._worker_uri
        found = []
        if autologs := autologs_in_force():
            found.append(f"its autologs on at the driver ({', '.join(sorted(autologs))})")
        if exports.span_processors():
            found.append("span processors of mlflow.tracing.configure()")
        if config.max_cost is not None or config.sampling is not None:
            found.append("the price of a model that prices= does not name")
        if is_collector(uri) and _is_true("MLFLOW_ENABLE_OTEL_GENAI_SEMCONV"):
            found.append("MLFLOW_ENABLE_OTEL_GENAI_SEMCONV")
        if is_database(uri):
            if config.transport == "direct":
                found.append('a database that workers write to (transport="direct")')
        elif needs_mlflow(uri):
            found.append("the store, or a log-in there, that only MLflow can speak to")
        return found

    def _gather(self, worker_uri: str | None) -> None:
        """Ask the driver's process and those of workers, and look at what they have stored."""
        facts = self._facts
        # MLflow's form of an id that OpenTelemetry has made up.
        trace_id = f"tr-{uuid.uuid4().hex}" if self._experiment_id and facts.takes_spans else None
        asked_of_store: dict[str, Any] = {
            "experiment_id": self._experiment_id,
            "trace_id": trace_id,
            "workspace": tracing.active_workspace(),
        }
        try:
            asks_store = facts.transport in ("direct", "driver")
            own = {"tracking_uri": self._uri, **asked_of_store} if asks_store else {}
            facts.driver = probe.facts_of_process(**self._question, **own)
            if self._experiment_error is not None and "store" in facts.driver:
                facts.driver["store"]["experiment"] = self._experiment_error
            if self._session is not None:
                theirs = asked_of_store
                if worker_uri is not None:
                    theirs = {**asked_of_store, "tracking_uri": worker_uri}
                if is_table(worker_uri):
                    theirs["experiment_id"] = store.span_table()
                self._ask_workers({**self._question, **theirs})
            if trace_id is not None:
                with suppress(StoreError):
                    _, spans = store.read_trace(self._destination(), trace_id)
                    facts.spans_found = [span.span_id for span in spans]
        finally:
            if trace_id is not None:
                self._delete(trace_id)

    def _find_experiment(self) -> None:
        # Only where the store answers: MLflow asks it for minutes where it does not.
        if all(problem is None for problem in access(self._uri).values()):
            try:
                self._experiment_id = tracing.current_experiment_id()
            except Exception as error:
                self._experiment_error = _excerpt(error)

    def _ask_workers(self, question: dict[str, Any]) -> None:
        facts, session = self._facts, self._session
        facts.spark = spark_api.settings_of(session, SPARK_SETTINGS)
        facts.has_accumulators = spark_api.spark_context(session) is not None
        question["model_url"] = self._model_url
        question["default_model_url"] = _OPENAI
        try:
            with driver.says_span():
                answers = spark_api.run_on_workers(session, probe.tell, json.dumps(question))
            facts.workers = [json.loads(answer) for answer in answers]
            if any(worker.get("sees_action") is False for worker in facts.workers):
                driver.hides_properties = True
            # In a job of its own, since what is known of a clock is no more exact than a job is
            # short.
            before = time.time()
            told = spark_api.run_on_workers(session, probe.tell_time, "")
            after = time.time()
        except Exception as error:
            facts.workers_error = _excerpt(error)
            return
        clocks = [json.loads(text) for text in told]
        facts.clock_difference = max(
            ((host, max(before - clock, clock - after, 0.0)) for host, clock in clocks),
            key=lambda difference: difference[1],
        )

    def _reason_to_stay(self, findings: Sequence[Finding]) -> str | None:
        if self._session is None:
            return "there is no Spark session"
        if self._facts.transport == "otlp":
            return "a collector cannot be asked what it has"
        if any(finding.level == "fail" for finding in findings):
            return "something else has to be put right first"
        if is_table(self._worker_uri):
            return "a Unity Catalog table cannot be asked what it has without a SQL warehouse"
        if self._experiment_id is None:
            return "the experiment is not known"
        if self._facts.driver["sampling_ratio"] < 1:
            return "sampling may drop it"
        return None

    def _make_round_trip(self) -> str | None:
        """Make a call in a task, and return why it is not in the store; None where it is."""
        before = driver.config
        try:
            if before is None:
                autolog.switch_on(Config.from_env(strict=False))
            return self._call_and_look()
        except Exception as error:
            return _excerpt(error)
        finally:
            if before is None:
                autolog.disable()

    def _call_and_look(self) -> str | None:
        problem = None
        with tracing.new_trace(_NAME) as trace_id:
            driver.progress.ignore(trace_id)
            try:
                function = driver.submitted(
                    probe.call_stand_in,
                    self._session,
                    name=probe.call_stand_in.__name__,
                    required=True,
                    repeated=True,
                )
                spark_api.run_on_workers(self._session, function, "", tasks=1)
            except Exception as error:
                problem = _excerpt(error)
        try:
            receipt = driver.ledger.receipt(trace_id, self._config.flush_timeout)
            _, spans = store.read_trace(self._destination(), trace_id)
        finally:
            driver.ledger.forget(trace_id)
            self._delete(trace_id)
            exports.do_not_display(trace_id)
        tasks = {span.span_id for span in spans if is_task(span)}
        if problem is not None or any(span.parent_id in tasks for span in spans):
            return problem
        reason = receipt.first_error or "no process has said why"
        return f"the call is not among the {len(spans)} spans in the store: {receipt}; {reason}"

    def _destination(self) -> Destination:
        workspace = tracing.active_workspace()
        return Destination(self._uri, str(self._experiment_id), workspace=workspace)

    def _delete(self, trace_id: str) -> None:
        # Where neither deleting nor tagging is allowed, the trace's name says what it is.
        with suppress(StoreError):
            store.delete_trace(self._destination(), trace_id)


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1")


def _excerpt(error: BaseException) -> str:
    """Return what went wrong in one line: the last of a Python traceback, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raised = [line for line in lines if "Error: " in line and not line.startswith("at ")]
    return shortened([type(error).__name__, *lines[:1], *raised][-1])
