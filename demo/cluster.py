"""A Spark cluster on this machine whose executors are processes of their own."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jobs
import signals
from pyspark import SparkContext, find_spark_home
from pyspark.sql import DataFrame, SparkSession

MASTER = "local-cluster[2,1,1024]"
PARTITIONS = 6


class Cluster:
    """Starts one Spark application after the other; `close` ends every process of them.

    Executors inherit this process's environment as it is when the first session starts.
    """

    def __init__(self, folder: Path) -> None:
        self._log = folder / "spark.log"
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
        os.environ["PYSPARK_PYTHON"] = sys.executable
        # An interrupted call is reported by its exception; Py4J also logs it, to the root logger.
        logging.getLogger("py4j").setLevel(logging.CRITICAL)
        logging.getLogger().addFilter(lambda record: "py4j" not in record.pathname)

    @contextlib.contextmanager
    def session(self, name: str) -> Iterator[SparkSession]:
        """Run one application with fresh, warmed-up worker processes.

        Raises RuntimeError when Spark does not start.
        """
        try:
            with _standard_error_to(self._log):
                spark = (
                    SparkSession.builder.master(MASTER)
                    .appName(name)
                    .config("spark.ui.enabled", "false")
                    .config("spark.ui.showConsoleProgress", "false")
                    .config("spark.driver.host", "127.0.0.1")
                    .getOrCreate()
                )
        except Exception as error:
            raise RuntimeError(f"Spark did not start; see {self._log}. {error}") from error
        # Spark's own handler talks to the JVM, which may be busy; ours is enough.
        signals.handle()
        context = spark.sparkContext
        context.setLogLevel("ERROR")
        context.addPyFile(jobs.__file__)
        application = context.applicationId
        try:
            documents_frame(spark, [("", "")]).mapInPandas(jobs.warm_up, jobs.SCHEMA).collect()
            yield spark
        except BaseException:
            self.close()
            raise
        else:
            spark.stop()
        finally:
            home = Path(find_spark_home._find_spark_home())
            shutil.rmtree(home / "work" / application, ignore_errors=True)

    def close(self) -> None:
        """End the JVM, and with it the executors and the Python workers. Idempotent."""
        gateway = SparkContext._gateway
        if gateway is None:
            return
        process: subprocess.Popen[bytes] = gateway.proc
        if process.poll() is not None:
            return
        # PySpark's threads report the loss of the JVM on standard error.
        with _standard_error_to(self._log):
            process.terminate()
            try:
                process.wait(timeout=8)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            time.sleep(0.2)


def documents_frame(spark: SparkSession, rows: list[tuple[str, str]]) -> DataFrame:
    """Spread (name, text) rows over the partitions."""
    return spark.createDataFrame(rows, "name string, text string").repartition(PARTITIONS)


@contextlib.contextmanager
def _standard_error_to(path: Path) -> Iterator[None]:
    """Send what this process and its new children write to standard error to a file."""
    saved = os.dup(2)
    with path.open("ab") as log:
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
