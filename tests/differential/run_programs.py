"""Runs programs in one Spark session, with the library or without, and writes down their facts.

In a process of its own: one that has had a classic session cannot start Spark Connect.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support")]

from driver_facts import ActionFacts, session_facts  # noqa: E402
from job import CONNECT, PROGRAMS, Job, Program  # noqa: E402
from programs import callables, driver, errors, libraries, plans, streams, ways  # noqa: E402
from pyspark import cloudpickle  # noqa: E402
from pyspark.sql import SparkSession  # noqa: E402

from mlflow_ctx_autolog.testing import OpenAIEndpoint  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", required=True)
    parser.add_argument("--database", help="where to store traces; without, nothing is enabled")
    parser.add_argument("--output", required=True)
    parser.add_argument("names", nargs="+")
    options = parser.parse_args()
    faulthandler.dump_traceback_later(3000, exit=True)
    import functions
    import job
    import workload

    # Workers cannot import these.
    for module in (
        functions,
        workload,
        job,
        callables,
        driver,
        errors,
        libraries,
        plans,
        streams,
        ways,
    ):
        cloudpickle.register_pickle_by_value(module)
    spark = _session(options.engine)

    def tell(name: str, value: Any) -> None:
        # At once, for who waits for it, and in case that a later program ends the process.
        with Path(options.output).open("a") as output:
            output.write(json.dumps([name, value], default=repr) + "\n")

    with OpenAIEndpoint() as endpoint:
        run = Run(spark, endpoint, is_traced=options.database is not None)
        if options.database is not None:
            _enable(options.database)
        for name in options.names:
            print(name, flush=True)
            tell(f"program {name}", run.facts_of(PROGRAMS[name]))
        tell("session", session_facts(spark))
        tell("traced", run.traced_calls() if options.database is not None else {})
        tell("seconds", run.seconds)
        spark.stop()


def _session(engine: str) -> Any:
    os.environ["PYSPARK_PYTHON"] = sys.executable
    builder = SparkSession.builder.config("spark.ui.enabled", "false")
    settings = {
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.shuffle.partitions": "2",
        "spark.python.daemon.module": "mlflow_ctx_autolog.daemon",
        "spark.task.maxFailures": "1",
    }
    if engine == CONNECT:
        # The server is a process of its own, and knows of settings by this way only.
        given = " ".join(f"--conf {name}={value}" for name, value in settings.items())
        os.environ["PYSPARK_SUBMIT_ARGS"] = f"{given} pyspark-shell"
        # Has it listen on a free port, of which there may be several at once.
        os.environ["SPARK_TESTING"] = "on a free port"
        builder = builder.remote("local[2]")
    else:
        builder = builder.master("local[2]").config(map=settings)
    spark = builder.getOrCreate()
    if engine != CONNECT:
        spark.sparkContext.setLogLevel("OFF")
    return spark


def _enable(database: str) -> None:
    import mlflow

    import mlflow_ctx_autolog as ctx_autolog

    # What it says of itself is not among what is compared.
    logger = logging.getLogger("mlflow_ctx_autolog")
    logger.addHandler(logging.StreamHandler(sys.__stderr__))
    logger.propagate = False
    mlflow.set_tracking_uri(f"sqlite:///{database}")
    mlflow.set_experiment(experiment_id="0")
    ctx_autolog.enable()


class Run:
    """Runs programs one after the other, and keeps what was found."""

    def __init__(self, spark: Any, endpoint: OpenAIEndpoint, is_traced: bool) -> None:
        self._spark = spark
        self._endpoint = endpoint
        self._is_traced = is_traced
        self._spans: list[Any] = []
        self._of_programs: dict[str, tuple[int, list[Any]]] = {}
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def _span(self, name: str) -> Iterator[None]:
        if not self._is_traced:
            yield
            return
        import mlflow

        with mlflow.start_span(name) as span:
            self._spans.append(span)
            yield

    def facts_of(self, program: Program) -> dict[str, Any]:
        job = Job(self._spark, self._endpoint, self._span, self._is_traced)
        started, before = time.monotonic(), len(self._endpoint.requests)
        self._spans = []
        actions = ActionFacts(self._spark)
        span = self._span(program.name) if program.has_span else contextlib.nullcontext()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with span:
                    job.warned("program", lambda: program.run(job))
            except BaseException:
                # To be looked at: a program notes the errors that it is about.
                job.facts["failed"] = traceback.format_exc()
        job.facts["actions"] = actions.since_then()
        self._spark.catalog.clearCache()
        self._of_programs[program.name] = len(self._endpoint.requests) - before, self._spans
        self.seconds[program.name] = round(time.monotonic() - started, 1)
        return job.facts

    def traced_calls(self) -> dict[str, tuple[int, int]]:
        """Return, for each program, how many calls it made and how many its traces have."""
        import mlflow

        import mlflow_ctx_autolog as ctx_autolog

        ctx_autolog.flush()
        mlflow.flush_trace_async_logging()
        found = {}
        for name, (made, spans) in self._of_programs.items():
            traces = [mlflow.get_trace(span.trace_id) for span in spans]
            kinds = [each.span_type for trace in traces if trace for each in trace.data.spans]
            found[name] = made, kinds.count("CHAT_MODEL")
        return found


if __name__ == "__main__":
    main()
