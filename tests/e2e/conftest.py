"""Spark with real worker processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import calls
import functions
import pytest
import repeats
import workload
from pyspark import cloudpickle
from pyspark.sql import SparkSession

# Workers cannot import the tests' modules.
cloudpickle.register_pickle_by_value(workload)
cloudpickle.register_pickle_by_value(repeats)
cloudpickle.register_pickle_by_value(functions)
cloudpickle.register_pickle_by_value(calls)


@pytest.fixture(scope="module")
def spark(request: pytest.FixtureRequest) -> Iterator[SparkSession]:
    """A classic Spark session; its master is the module's MASTER, ``local[2]`` by default.

    A module's CONF has settings of its own. With IS_PRELOADED, its workers are forked from a
    process that has imported what they need, which saves each of them seconds.
    """
    os.environ["PYSPARK_PYTHON"] = sys.executable
    # Also the defaults, since settings of the first session of a process stay with its JVM.
    builder = (
        SparkSession.builder.master(getattr(request.module, "MASTER", "local[2]"))
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.speculation", "false")
        .config("spark.python.worker.reuse", "true")
        .config("spark.eventLog.enabled", "false")
        .config("spark.sql.shuffle.partitions", "2")
        # Several batches a partition, so that a function is suspended between them.
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", "3")
    )
    is_preloaded = getattr(request.module, "IS_PRELOADED", False)
    daemon = "mlflow_ctx_autolog.daemon" if is_preloaded else "pyspark.daemon"
    builder = builder.config("spark.python.daemon.module", daemon)
    session = builder.config(map=getattr(request.module, "CONF", {})).getOrCreate()
    session.sparkContext.setLogLevel("OFF")
    yield session
    session.stop()
