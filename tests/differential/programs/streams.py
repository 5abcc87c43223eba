"""Streams, besides the ways to hand them a function."""

from __future__ import annotations

import tempfile
from typing import Any

from functions import drained, stream_of
from job import CLASSIC, Job, program
from pyspark.sql import functions as f


@program()
def a_stream_with_a_udf(job: Job) -> None:
    ask = job.ask()
    column = f.udf(lambda number: ask(number), "string")
    with stream_of(job.documents()) as stream:
        answers = stream.select("id", column("id").alias("a"), column("id").alias("b"))
        job.note("schema", answers.schema.simpleString())
        rows = job.calls("drained", lambda: drained(answers))
    job.note("rows", sorted(map(repr, rows)))


@program(engines=(CLASSIC,))
def a_batch_function_that_hands_on_functions(job: Job) -> None:
    ask = job.ask()
    column = f.udf(lambda number: ask(number), "string")
    seen: list[Any] = []

    def batch(frame: Any, number: int) -> None:
        seen.extend(sorted(frame.select(column("id")).collect()))
        seen.append(ask(100 + number))

    with stream_of(job.documents()) as stream:
        writer = stream.writeStream.foreachBatch(batch).trigger(availableNow=True)
        job.calls("batches", lambda: writer.start().awaitTermination())
    job.note("seen", list(map(repr, seen)))


@program(engines=(CLASSIC,))
def a_batch_function_that_fails(job: Job) -> None:
    def batch(frame: Any, number: int) -> None:
        raise ValueError(f"of batch {number}")

    with stream_of(job.documents()) as stream:
        query = stream.writeStream.foreachBatch(batch).trigger(availableNow=True).start()
        job.error("failing", query.awaitTermination)


@program()
def a_stream_that_fails(job: Job) -> None:
    def failing(number: int) -> str:
        raise ValueError("in a stream")

    column = f.udf(failing, "string")
    with stream_of(job.documents(2, 1)) as stream, tempfile.TemporaryDirectory() as folder:
        writer = stream.select(column("id").alias("a")).writeStream.format("parquet")
        writer = writer.option("checkpointLocation", f"{folder}/at").trigger(availableNow=True)
        query = writer.start(f"{folder}/out")
        job.error("failing", query.awaitTermination)


@program(engines=(CLASSIC,))
def what_listeners_hear_of_a_stream(job: Job) -> None:
    from pyspark.sql.streaming import StreamingQueryListener

    heard: list[str] = []

    class Listener(StreamingQueryListener):
        def onQueryStarted(self, event: Any) -> None:  # noqa: N802
            heard.append(f"started {event.name is not None}")

        def onQueryProgress(self, event: Any) -> None:  # noqa: N802
            heard.append(f"progress {event.progress.numInputRows}")

        def onQueryIdle(self, event: Any) -> None:  # noqa: N802
            pass

        def onQueryTerminated(self, event: Any) -> None:  # noqa: N802
            heard.append(f"terminated {event.exception}")

    ask = job.ask()
    listener = Listener()
    job.spark.streams.addListener(listener)
    try:
        with stream_of(job.documents()) as stream:
            drained(stream.select(f.udf(lambda number: ask(number), "string")("id")))
        job.spark.sparkContext._jsc.sc().listenerBus().waitUntilEmpty(10_000)
    finally:
        job.spark.streams.removeListener(listener)
    job.note("heard", heard)
