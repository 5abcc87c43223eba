"""What the driver shows of its jobs, and what it lets be read back and profiled."""

from __future__ import annotations

import inspect
import re
import threading
from typing import Any

import pyspark
from job import CLASSIC, CONNECT, Job, printed, program, settings
from pyspark.sql import functions as f


@program(engines=(CLASSIC,), fast=True)
def descriptions_groups_and_tags(job: Job) -> None:
    ask, context = job.ask(), job.spark.sparkContext
    column = f.udf(lambda number: ask(number), "string")
    frame = job.documents().select(column("id"))
    context.setJobDescription("the user's description")
    frame.collect()
    context.setJobDescription(None)  # type: ignore[arg-type]
    context.setJobGroup("the group", "of the group")
    frame.count()
    context.setLocalProperty("of.the.user", "value")
    context.addJobTag("of-the-user")
    frame.collect()
    job.note("job tags", sorted(context.getJobTags()))
    context.clearJobTags()
    job.note("property", context.getLocalProperty("of.the.user"))
    job.note("group", context.getLocalProperty("spark.jobGroup.id"))
    context.setLocalProperty("spark.jobGroup.id", None)  # type: ignore[arg-type]
    context.setLocalProperty("spark.job.description", None)  # type: ignore[arg-type]
    context.setLocalProperty("of.the.user", None)  # type: ignore[arg-type]
    frame.foreach(lambda row: None)
    context.parallelize([1], 1).map(ask).collect()


@program(engines=(CLASSIC,))
def local_properties_of_tasks(job: Job) -> None:
    from pyspark import TaskContext

    ask, context = job.ask(), job.spark.sparkContext
    names = ("of.the.user", "spark.jobGroup.id", "spark.job.tags", "callSite.short")

    def properties(number: int) -> list[Any]:
        ask(number)
        return [TaskContext.get().getLocalProperty(name) for name in names]

    context.setLocalProperty("of.the.user", "value")
    job.note("properties", context.parallelize([1], 1).map(properties).collect())
    context.setLocalProperty("of.the.user", None)  # type: ignore[arg-type]


@program(fast=True)
def tags_of_the_session(job: Job) -> None:
    if pyspark.__version__.startswith("3.") and hasattr(job.spark, "_jsparkSession"):
        # Spark 3.5 has them on Connect alone.
        return
    ask = job.ask()
    column = f.udf(lambda number: ask(number), "string")
    job.spark.addTag("of-the-user")
    job.documents().select(column("id")).collect()
    job.note("while set", sorted(job.spark.getTags()))
    job.spark.removeTag("of-the-user")
    job.note("afterwards", sorted(job.spark.getTags()))
    job.note("interrupted", job.spark.interruptTag("of-the-user"))


@program()
def observations_and_accumulators(job: Job) -> None:
    from pyspark.sql import Observation

    ask = job.ask()
    column = f.udf(lambda number: ask(number), "string")
    observation = Observation("rows")
    frame = job.documents().withColumn("a", column("id"))
    frame.observe(observation, f.count(f.lit(1)).alias("rows")).collect()
    job.note("observed", observation.get)
    if not job.is_connect:
        counted = job.spark.sparkContext.accumulator(0)
        job.documents().foreach(lambda row: counted.add(len(ask(row.id))))
        job.note("counted", counted.value)


@program(engines=(CLASSIC,))
def broadcasts_of_the_user(job: Job) -> None:
    ask, table = job.ask(), job.spark.sparkContext.broadcast({0: "a", 1: "b"})
    column = f.udf(lambda number: table.value.get(number, ask(number)), "string")
    job.rows("used", job.documents().select(column("id"), column("id").alias("again")))
    job.same("used", lambda: job.documents().select(column("id")))
    table.unpersist()
    job.rows("again", job.documents().select(column("id")))


def _profiled(job: Job, kind: str) -> None:
    ask = job.ask()

    def by_row(number: int) -> str:
        answer = ask(number)
        return answer.upper()

    def by_batch(batches: Any) -> Any:
        for batch in batches:
            batch["id"] = batch["id"] + len(ask(1))
            yield batch

    lines = {function.__name__: len(inspect.getsource(function)) for function in (by_row, by_batch)}
    job.note("functions", lines)
    for name, frame in (
        ("rows", lambda: job.documents(2, 1).select(f.udf(by_row, "string")("id"))),
        ("batches", lambda: job.documents(2, 1).mapInPandas(by_batch, "id long")),
    ):
        job.spark.profile.clear()
        with settings(job.spark, **{"spark.sql.pyspark.udf.profiler": kind}):
            frame().collect()
        text = printed(lambda: job.spark.profile.show(type=kind))
        job.note(f"{name}: users", sorted({each for each in lines if each in text}))
        job.note(f"{name}: the user's line", "ask(" in text or "by_" in text)
        if kind == "memory":
            # Numbers come first, then the line.
            told = [line.split("  ")[-1].strip() for line in text.splitlines() if "ask" in line]
            job.note(f"{name}: files", sorted(re.findall(r"Filename: (.*)", text)))
            job.note(f"{name}: lines", told)
            job.note(f"{name}: length", len(text.splitlines()))


@program()
def the_profiler_of_times(job: Job) -> None:
    if hasattr(job.spark, "profile"):
        _profiled(job, "perf")


@program()
def the_profiler_of_memory(job: Job) -> None:
    try:
        import memory_profiler  # noqa: F401
    except ImportError:
        return
    if hasattr(job.spark, "profile"):
        _profiled(job, "memory")


# Spark does not hand a span on to plain threads.
@program(is_traced=False)
def threads_of_the_driver(job: Job) -> None:
    ask = job.ask()
    column = f.udf(lambda number: ask(number), "string")
    frame, found = job.documents().select(column("id")), []

    def act() -> None:
        found.append(len(frame.collect()))

    threads = [threading.Thread(target=act) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    job.note("found", found)


@program(engines=(CONNECT,), has_span=False)
def another_application_on_the_server(job: Job) -> None:
    from pyspark.sql.connect.client.core import DefaultChannelBuilder
    from pyspark.sql.connect.session import SparkSession

    ask = job.ask()
    port = DefaultChannelBuilder.default_port()
    other = SparkSession.builder.remote(f"sc://localhost:{port}").create()
    try:
        column = f.udf(lambda number: ask(number), "string")
        with job.span("one"):
            job.rows("one", job.documents().select(column("id")))
            job.rows("other, same span", other.range(0, 4, 1, 2).select(column("id")))
        with job.span("another"):
            job.rows("other", other.range(0, 4, 1, 2).select(column("id")))
        other.udf.register("ask_of_other", lambda number: ask(number))
        with job.span("by name"):
            job.rows("by name", other.sql("SELECT ask_of_other(id) FROM range(2)"))
        job.error("unknown here", lambda: job.spark.sql("SELECT ask_of_other(1)").collect())
    finally:
        other.client.close()
