"""How long it takes to build a plan of many columns with a UDF, with tracing and without, in turns.

Prints a Markdown table: seconds of either, by the clock and of the driver's CPU, without Spark's,
their ratio in the median of the rounds, and how many broadcasts, each a file, the traced builds
have left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import mlflow
from pyspark.sql.functions import udf
from quiet_spark import quiet_spark

import mlflow_ctx_autolog as ctx_autolog


def with_columns(spark: Any, columns: int) -> Any:
    """Use one UDF in one column after the other, ten of which stay."""
    shout, frame = (
        udf(lambda text: text.upper(), "string"),
        spark.range(2).selectExpr("'a' AS text"),
    )
    for number in range(columns):
        frame = frame.withColumn(f"c{number % 10}", shout("text"))
    return frame


def selected(spark: Any, columns: int) -> Any:
    """Use one UDF in many columns of one select."""
    shout = udf(lambda text: text.upper(), "string")
    frame = spark.range(2).selectExpr("'a' AS text")
    return frame.select([shout("text").alias(f"c{number}") for number in range(columns)])


def separate_functions(spark: Any, columns: int) -> Any:
    """Select columns, each by a UDF of its own."""
    functions = [udf(lambda text, number=number: f"{text}{number}") for number in range(columns)]
    frame = spark.range(2).selectExpr("'a' AS text")
    return frame.select([function("text") for function in functions])


SHAPES = {
    "one UDF, `withColumn`": with_columns,
    "one UDF, `select`": selected,
    "as many UDFs, `select`": separate_functions,
}


def seconds(spark: Any, build: Callable[[Any, int], Any], columns: int) -> tuple[float, float]:
    started = time.perf_counter(), time.process_time()
    build(spark, columns)
    return time.perf_counter() - started[0], time.process_time() - started[1]


def broadcasts(spark: Any) -> int:
    """Return how many files of broadcasts there are: PySpark writes one for each."""
    return sum(len(names) for _, _, names in os.walk(spark.sparkContext._temp_dir))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--columns", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    os.environ["PYSPARK_PYTHON"] = sys.executable
    spark = quiet_spark("local[2]")
    print("| columns | without, s | with, s | ratio | CPU without, s | with, s | broadcasts |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        mlflow.set_experiment(experiment_id="0")
        for shape, build in SHAPES.items():
            before = broadcasts(spark)
            # The first of each warms up.
            times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
            for _ in range(given.rounds + 1):
                for is_traced in (False, True):
                    with contextlib.ExitStack() as stack:
                        if is_traced:
                            stack.enter_context(ctx_autolog.enable(spool_directory=folder))
                            stack.enter_context(mlflow.start_span("job"))
                        times[is_traced].append(seconds(spark, build, given.columns))
            without, with_ = times[False][1:], times[True][1:]
            ratio = statistics.median(b[0] / a[0] for a, b in zip(without, with_, strict=True))
            (wall, cpu), (wall_with, cpu_with) = (
                [statistics.median(each) for each in zip(*rounds, strict=True)]
                for rounds in (without, with_)
            )
            print(
                f"| {given.columns}, {shape} | {wall:.2f} | {wall_with:.2f} | {ratio:.2f} "
                f"| {cpu:.2f} | {cpu_with:.2f} | {broadcasts(spark) - before} |"
            )
        mlflow.flush_trace_async_logging()
    spark.stop()


if __name__ == "__main__":
    main()
