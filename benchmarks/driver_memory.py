"""What the driver needs to store the spans of its workers: its memory, and whether all arrive.

With ``transport="driver"`` every span comes home with its task. Prints one row of a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator

import mlflow
import pandas as pd
from peak_memory import peak_memory
from quiet_spark import quiet_spark

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.testing import TrackingServer


def make_spans(size: int) -> object:
    """Return a function for mapInPandas that makes one span of ``size`` bytes for each row."""

    def make(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            for number in batch["id"]:
                with mlflow.start_span("call") as span:
                    span.set_inputs({"number": int(number), "text": "x" * size})
            yield batch

    return make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spans", type=int, default=50_000)
    parser.add_argument("--size", type=int, default=5_000, help="bytes of one span")
    parser.add_argument("--tasks", type=int, default=50)
    given = parser.parse_args()
    os.environ["PYSPARK_PYTHON"] = sys.executable
    spark = quiet_spark("local[2]")
    with tempfile.TemporaryDirectory() as spools, TrackingServer() as server:
        mlflow.set_tracking_uri(server.uri)
        mlflow.set_experiment("driver-memory")
        settings = {"transport": "driver", "spool_directory": spools, "flush_timeout": 600}
        with ctx_autolog.enable(**settings):
            with mlflow.start_span("warm-up"):
                spark.range(2).mapInPandas(make_spans(10), "id long").count()
            mlflow.flush_trace_async_logging()
            before, started = peak_memory(), time.monotonic()
            with mlflow.start_span("job"):
                frame = spark.range(0, given.spans, 1, given.tasks)
                frame.mapInPandas(make_spans(given.size), "id long").count()
            job = time.monotonic() - started
            mlflow.flush_trace_async_logging()
            receipt = ctx_autolog.receipt(timeout=600)
            stored = time.monotonic() - started
        print("| spans | bytes each | tasks | MB more | job, s | all stored, s | receipt |")
        print("|---|---|---|---|---|---|---|")
        print(
            f"| {given.spans:,} | {given.size:,} | {given.tasks} | {peak_memory() - before:.0f} "
            f"| {job:.0f} | {stored:.0f} | {receipt} |"
        )
    spark.stop()


if __name__ == "__main__":
    main()
