"""A Spark session that says nothing of its own."""

from __future__ import annotations

from pyspark.sql import SparkSession


def quiet_spark(master: str, settings: dict[str, str] | None = None) -> SparkSession:
    """Return a session without UI, progress bar and log, in this process."""
    quiet = {"spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false"}
    builder = SparkSession.builder.master(master)
    for name, value in {**quiet, **(settings or {})}.items():
        builder = builder.config(name, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("OFF")
    return spark
