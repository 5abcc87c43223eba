"""What Spark makes of plans: common expressions, caches, joins, and how it is asked to plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
from job import CLASSIC, Job, program, settings
from pyspark.sql import functions as f


def _classify(job: Job) -> Any:
    ask = job.ask()

    @f.udf("struct<label: string, score: int>")
    def classify(number: int) -> tuple[str, int]:
        return ask(number), number

    return classify


def _ask_all(job: Job) -> Any:
    ask = job.ask()

    @f.pandas_udf("string")
    def ask_all(numbers: pd.Series) -> pd.Series:
        return numbers.map(ask)

    return ask_all


def _ask_one(job: Job, deterministic: bool = True) -> Any:
    ask = job.ask()

    @f.udf("string")
    def ask_one(number: int) -> str:
        return ask(number)

    return ask_one if deterministic else ask_one.asNondeterministic()


def _extract(job: Job) -> Callable[[Any], Any]:
    ask = job.ask()

    def extract(batches: Any) -> Any:
        for batch in batches:
            yield batch.assign(answer=[ask(number) for number in batch["id"]])

    return extract


SCHEMA = "id long, answer string"


@program(fast=True)
def two_fields_of_one_call(job: Job) -> None:
    classify = _classify(job)
    job.rows("fields", job.documents().select(classify("id")["label"], classify("id")["score"]))
    frame = job.documents().withColumn("r", classify("id")).select("r.label", "r.score")
    job.rows("column", frame)


@program(fast=True)
def the_same_expression_twice(job: Job) -> None:
    ask = _ask_all(job)
    job.rows("twice", job.documents().select(ask("id").alias("a"), ask("id").alias("b")))
    job.rows("filter", job.documents().withColumn("a", ask("id")).filter("a is not null"))
    job.same("select", lambda: job.documents().select(ask("id")))
    one = _ask_one(job)
    job.rows("row by row", job.documents().select(one("id").alias("a"), one("id").alias("b")))
    job.rows("nested", job.documents().select(f.upper(one("id")), f.length(one("id"))))


@program()
def the_same_expression_of_one_that_is_not_deterministic(job: Job) -> None:
    one = _ask_one(job, deterministic=False)
    job.rows("twice", job.documents().select(one("id").alias("a"), one("id").alias("b")))
    job.same("select", lambda: job.documents().select(one("id")))


@program(fast=True, has_span=False)
def a_cache_found_by_plans_built_anew(job: Job) -> None:
    ask, extract = _ask_all(job), _extract(job)

    def with_column() -> Any:
        return job.documents().withColumn("a", ask("id"))

    def mapped() -> Any:
        return job.documents().mapInPandas(extract, SCHEMA)

    with job.span("first"):
        for name, build in (("column", with_column), ("mapped", mapped)):
            job.calls(f"{name}, cached", lambda build=build: build().cache().count())
            job.rows(f"{name}, same span", build())
            job.rows(f"{name}, filtered", build().filter("id > 1"))
    for name, build in (("column", with_column), ("mapped", mapped)):
        with job.span("second"):
            job.rows(f"{name}, another span", build())
        job.rows(f"{name}, no span", build())
        job.same(f"{name}, no span", build)


@program(engines=(CLASSIC,), has_span=False)
def a_cache_found_from_another_session(job: Job) -> None:
    ask = _ask_all(job)
    with job.span("first"):
        job.calls("cached", lambda: job.documents().withColumn("a", ask("id")).cache().count())
        other = job.spark.newSession()
        job.rows("same span", other.range(0, 4, 1, 2).withColumn("a", ask("id")))
    with job.span("second"):
        job.rows(
            "another span", job.spark.newSession().range(0, 4, 1, 2).withColumn("a", ask("id"))
        )


@program(has_span=False, is_traced=False)
def a_cache_made_under_no_span(job: Job) -> None:
    ask = _ask_one(job)
    job.documents(rows=2).withColumn("a", ask("id")).cache().count()
    with job.span("later"):
        job.rows("later", job.documents(rows=2).withColumn("a", ask("id")))


# Its first calls are made under no span.
@program(has_span=False, is_traced=False)
def one_frame_under_several_spans(job: Job) -> None:
    frame = job.documents().withColumn("a", _ask_one(job)("id"))
    job.rows("none", frame)
    for name in ("first", "second"):
        with job.span(name):
            job.rows(name, frame)


@program(fast=True)
def joins(job: Job) -> None:
    ask = _ask_all(job)
    asked = job.documents().withColumn("a", ask("id"))
    job.rows("self", asked.alias("l").join(asked.alias("r"), f.col("l.id") == f.col("r.id")))
    job.rows("other", asked.join(job.documents(rows=2), "id"))
    job.rows("broadcast", asked.join(f.broadcast(job.documents(rows=2)), "id", "left"))


@program()
def unions_and_repeated_subplans(job: Job) -> None:
    ask = _ask_one(job)

    def asked() -> Any:
        return job.documents().withColumn("a", ask("id"))

    job.rows("union", asked().union(asked()))
    job.rows("exchange", asked().repartition(2, "a").union(asked().repartition(2, "a")))
    job.rows("except", asked().exceptAll(asked().limit(1)))


@program()
def windows_and_explode(job: Job) -> None:
    from pyspark.sql.window import Window

    ask = _ask_one(job)
    asked = job.documents().withColumn("a", ask("id"))
    window = Window.partitionBy(f.col("id") % 2).orderBy("a")
    job.rows("window", asked.withColumn("n", f.row_number().over(window)))
    job.rows("explode", asked.select("id", f.explode(f.split("a", " ")).alias("word")))


@program()
def grouped_by_an_answer(job: Job) -> None:
    ask = _ask_all(job)
    job.rows("group", job.documents().groupBy(ask("id").alias("a")).count())
    job.rows("distinct", job.documents().select(ask("id").alias("a")).distinct())
    job.rows("ordered", job.documents().orderBy(ask("id").desc()).limit(2))


@program()
def aggregate_over_a_window(job: Job) -> None:
    from pyspark.sql.window import Window

    ask = job.ask()

    def join(numbers: pd.Series) -> str:
        return " ".join(ask(number) for number in numbers)

    join.__annotations__ = {"numbers": pd.Series, "return": str}
    over = Window.partitionBy(f.col("id") % 2)
    column = f.pandas_udf(join, "string")("id").over(over)
    job.rows("window", job.documents().withColumn("all", column))


@program()
def adaptive_planning_off_and_on(job: Job) -> None:
    ask = _ask_all(job)
    for value in ("false", "true"):
        with settings(job.spark, **{"spark.sql.adaptive.enabled": value}):
            asked = job.documents().withColumn("a", ask("id"))
            job.rows(f"AQE {value}", asked.groupBy("a").count().join(asked, "a"))


@program()
def limits(job: Job) -> None:
    frame = job.documents(rows=8, partitions=4).mapInPandas(_extract(job), SCHEMA)
    job.calls("take", lambda: job.note("taken", len(frame.take(1))))
    job.calls("first", lambda: job.note("first", repr(frame.first())))
    job.calls("head", lambda: job.note("head", len(frame.limit(3).collect())))
    job.calls("empty", lambda: job.note("empty", frame.isEmpty()))


@program(fast=True)
def functions_in_sql(job: Job) -> None:
    ask = job.ask()
    job.spark.udf.register("ask_in_sql", lambda number: ask(number), "string")
    job.spark.udf.register("ask_column", _ask_all(job))
    job.note(
        "functions",
        [
            [each.name, each.className, each.isTemporary]
            for each in job.spark.catalog.listFunctions()
            if each.name.startswith("ask_")
        ],
    )
    query = "SELECT ask_in_sql(id) AS a, ask_in_sql(id) AS b, ask_column(id) AS c FROM range(3)"
    job.rows("text", job.spark.sql(query))
    job.same("text", lambda: job.spark.sql(query))
    job.documents().selectExpr("id", "ask_in_sql(id) AS a").createOrReplaceTempView("asked")
    job.rows("view", job.spark.sql("SELECT * FROM asked WHERE id > 1"))
    job.spark.sql("CREATE OR REPLACE TEMPORARY VIEW again AS SELECT ask_column(id) AS c FROM asked")
    job.rows("view of a view", job.spark.table("again"))
    job.spark.sql("CACHE TABLE asked")
    job.rows("cached view", job.spark.sql("SELECT a FROM asked"))
    job.spark.sql("UNCACHE TABLE asked")


@program(engines=(CLASSIC,))
def rdds_in_a_chain(job: Job) -> None:
    ask = job.ask()
    rows = job.spark.sparkContext.parallelize(range(4), 2)
    asked = rows.map(ask).filter(bool).map(lambda answer: (answer, 1))
    job.note("lineage", asked.toDebugString().decode())
    job.calls("count", lambda: job.note("count", asked.count()))
    job.calls(
        "reduce", lambda: job.note("reduced", sorted(asked.reduceByKey(int.__add__).collect()))
    )
    asked.cache().count()
    job.calls("cached", lambda: job.note("again", asked.count()))


@program(engines=(CLASSIC,))
def checkpoints_and_written_results(job: Job) -> None:
    import tempfile

    frame = job.documents().mapInPandas(_extract(job), SCHEMA)
    job.calls("checkpoint", lambda: job.rows("checkpointed", frame.localCheckpoint()))
    with tempfile.TemporaryDirectory() as folder:
        job.calls("written", lambda: frame.write.parquet(f"{folder}/out"))
        job.rows("read", job.spark.read.parquet(f"{folder}/out"))
