"""Libraries that make UDFs of functions, and functions that Spark runs elsewhere than in tasks."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator
from typing import Any

import pandas as pd
from functions import pandas_api
from job import CLASSIC, Job, program


@program(fast=True)
def pandas_on_spark(job: Job) -> None:
    import pyspark.pandas as ps

    ask = job.ask()

    def by_row(row: pd.Series) -> str:
        return ask(row["id"])

    def by_column(numbers: pd.Series) -> Any:
        return numbers.map(ask)

    by_row.__annotations__["return"] = str
    by_column.__annotations__["return"] = ps.Series[str]
    frame = pandas_api(job.documents())
    job.calls("rows", lambda: job.note("rows", sorted(frame.apply(by_row, axis=1).to_numpy())))
    job.calls(
        "column", lambda: job.note("column", sorted(frame.transform(by_column)["id"].to_numpy()))
    )
    # Without a type: it is called on the driver first.
    job.calls("untyped", lambda: job.note("untyped", sorted(frame["id"].map(str).to_numpy())))
    job.note("plan", frame.apply(by_row, axis=1).to_frame().spark.frame().schema.simpleString())


@program(engines=(CLASSIC,))
def predict_batch_udf(job: Job) -> None:
    import numpy as np
    from pyspark.ml.functions import predict_batch_udf as batch_udf
    from pyspark.sql.types import StringType

    ask = job.ask()

    def make_predict() -> Any:
        def predict(numbers: Any) -> Any:
            return np.array([ask(int(number)) for number in numbers])

        return predict

    column = batch_udf(make_predict, return_type=StringType(), batch_size=2)
    job.rows("predicted", job.documents().select(column("id")))
    twice = job.documents().select(column("id").alias("a"), column("id").alias("b"))
    job.rows("twice", twice)


@program(engines=(CLASSIC,))
def a_model_as_a_udf(job: Job) -> None:
    import mlflow
    from mlflow.pyfunc import PythonModel, spark_udf

    url = job.url

    class Model(PythonModel):
        def predict(self, context: Any, model_input: Any, params: Any = None) -> Any:
            from openai import OpenAI

            client = OpenAI(base_url=url, api_key="none", max_retries=0)
            asked = [[{"role": "user", "content": str(number)}] for number in model_input["id"]]
            replies = [
                client.chat.completions.create(model="gpt-test", messages=each) for each in asked
            ]
            return [str(reply.choices[0].message.content) for reply in replies]

    with tempfile.TemporaryDirectory() as folder:
        mlflow.pyfunc.save_model(f"{folder}/model", python_model=Model(), pip_requirements=[])
        predict = spark_udf(job.spark, f"{folder}/model", result_type="string", env_manager="local")
        from pyspark.sql.functions import struct

        job.rows("predicted", job.documents(2, 1).select(predict(struct("id")).alias("a")))


@program(engines=(CLASSIC,))
def a_python_transformer(job: Job) -> None:
    from pyspark.ml import Pipeline, Transformer
    from pyspark.sql.functions import udf

    ask = job.ask()

    class Asking(Transformer):
        def _transform(self, dataset: Any) -> Any:
            return dataset.withColumn("a", udf(lambda number: ask(number), "string")("id"))

    model = Pipeline(stages=[Asking()]).fit(job.documents())
    job.rows("transformed", model.transform(job.documents()))


# From Spark 4.0 on.
@program()
def data_sources(job: Job) -> None:
    try:
        from pyspark.sql import datasource
    except ImportError:
        return
    from functions import data_source
    from pyspark.sql.functions import udf

    plain = data_source(job.ask())

    class Source(plain):
        def schema(self) -> str:
            # What it is to itself, in a program of Spark's that makes an instance of it.
            return f"id long, answer string, itself_{type(self) is Source} string"

        def reader(self, schema: Any) -> Any:
            return Reader(type(self) is Source, type(self).__qualname__)

        def writer(self, schema: Any, overwrite: bool) -> Any:
            return Writer()

    class Reader(datasource.DataSourceReader):
        def __init__(self, *seen: Any) -> None:
            self.seen = *seen, type(self) is Reader, sorted(vars(type(self)))[-3:]

        def partitions(self) -> Any:
            return [datasource.InputPartition(number) for number in range(2)]

        def read(self, partition: Any) -> Iterator[tuple[Any, ...]]:
            now = type(self) is Reader, sorted(vars(self))
            yield partition.value, ask(partition.value), repr((self.seen, now))

    class Writer(datasource.DataSourceWriter):
        def write(self, rows: Iterator[Any]) -> Any:
            for row in rows:
                if ask(row.id) and row.id > 2:
                    raise ValueError(f"row {row.id}")
            return datasource.WriterCommitMessage()

    ask = job.ask()
    job.spark.dataSource.register(Source)
    job.rows("read", job.spark.read.format("answers").load())
    column = udf(lambda text: text.upper(), "string")
    job.rows("and a UDF", job.spark.read.format("answers").load().select(column("answer")))
    frame = job.spark.read.format("answers").load()
    job.calls("twice", frame.union(frame).count)
    job.same("read", lambda: job.spark.read.format("answers").load())

    def write(rows: int) -> None:
        job.documents(rows, 1).write.format("answers").mode("append").save()

    job.calls("write", lambda: write(2))
    job.error("write", lambda: write(4))


# From Spark 4.0 on. Each ends in an error, before there is a task or in one.
@program(is_traced=False)
def errors_of_data_sources(job: Job) -> None:
    try:
        from pyspark.sql import datasource
    except ImportError:
        return

    def fail(*of: Any) -> Any:
        raise ValueError("as said")

    class Reader(datasource.DataSourceReader):
        def read(self, partition: Any) -> Any:
            yield 1 // 0, ""

    class Lazy(datasource.DataSourceReader):
        def read(self, partition: Any) -> Any:
            return [(1, "")]

    class Locked(datasource.DataSourceReader):
        def __init__(self) -> None:
            import threading

            self.lock = threading.Lock()

        def read(self, partition: Any) -> Any:
            yield 1, ""

    def source(name: str, **methods: Any) -> Any:
        own = {"name": classmethod(lambda cls: name), "schema": lambda self: "id long, a string"}
        return type(name, (datasource.DataSource,), {**own, **methods})

    sources = {
        "schema": source("of_schema", schema=fail),
        "reader": source("of_reader", reader=fail),
        "read": source("of_read", reader=lambda self, schema: Reader()),
        "no iterator": source("of_list", reader=lambda self, schema: Lazy()),
        "no reader": source("of_none", reader=lambda self, schema: None),
        "a lock": source("of_lock", reader=lambda self, schema: Locked()),
        "an option": source("of_options", __init__=fail),
    }
    for name, each in sources.items():
        job.spark.dataSource.register(each)
        load = job.spark.read.format(each.name()).load
        job.error(name, lambda load=load: load().collect())
    job.error("no class", lambda: job.spark.dataSource.register(3), "mlflow_ctx_autolog")
    signature = str(inspect.signature(job.spark.dataSource.register))
    job.note("signature", signature)


@program()
def table_functions(job: Job) -> None:
    from functions import table_function
    from pyspark.sql.functions import lit

    ask = job.ask()
    table = table_function(ask)
    job.rows("called", table(lit(1)))
    job.same("called", lambda: table(lit(1)))
    job.spark.udtf.register("asked_rows", table)
    job.documents(2, 1).createOrReplaceTempView("documents")
    query = "SELECT d.id, a.answer FROM documents d, LATERAL asked_rows(d.id) a"
    job.rows("in a view", job.spark.sql(query))


@program()
def resources_and_files(job: Job) -> None:
    """A function that reads what the user has sent along."""
    if job.is_connect:
        return
    from pyspark import SparkFiles
    from pyspark.sql.functions import udf

    ask = job.ask()
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("sent along")
        file.flush()
        job.spark.sparkContext.addFile(file.name)
        name = file.name.rpartition("/")[2]

        def read(number: int) -> str:
            with open(SparkFiles.get(name)) as sent:
                return sent.read() + ask(number)

        job.rows("read", job.documents(2, 1).select(udf(read, "string")("id").alias("a")))
