"""The ways to hand a function to Spark, each as a job that makes one call for each of six rows."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pandas as pd
import pyspark
import pytest
from coverage_table import SPARK, case
from pyspark.sql import DataFrame, functions
from workload import ask

ROWS = 6
Job = Callable[[DataFrame, Callable[[int], str]], list[Any]]


def asker(url: str) -> Callable[[int], str]:
    """Return a function that makes one call, with one client for each process."""
    clients: list[Any] = []

    def call(number: int) -> str:
        from openai import OpenAI

        if not clients:
            clients.append(OpenAI(base_url=url, api_key="not-a-key", max_retries=0))
        return ask(clients[0], int(number))

    return call


def map_in_pandas(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            yield batch.assign(answer=[call(number) for number in batch["id"]])

    return list(frame.mapInPandas(extract, "id long, answer string").collect())


def map_in_arrow(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(batches: Iterator[Any]) -> Iterator[Any]:
        import pyarrow

        for batch in batches:
            numbers = batch.column("id").to_pylist()
            answers = [call(number) for number in numbers]
            yield pyarrow.RecordBatch.from_pydict({"id": numbers, "answer": answers})

    return list(frame.mapInArrow(extract, "id long, answer string").collect())


def apply_in_pandas(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(group: pd.DataFrame) -> pd.DataFrame:
        return group.assign(answer=[call(number) for number in group["id"]])

    grouped = frame.groupBy((frame["id"] % 2).alias("parity"))
    return list(grouped.applyInPandas(extract, "id long, answer string").collect())


def apply_in_pandas_with_key(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(key: tuple[int], group: pd.DataFrame) -> pd.DataFrame:
        return group.assign(answer=[f"{key} {call(number)}" for number in group["id"]])

    grouped = frame.groupBy((frame["id"] % 2).alias("parity"))
    return list(grouped.applyInPandas(extract, "id long, answer string").collect())


def apply_in_arrow(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(table: Any) -> Any:
        import pyarrow

        numbers = table.column("id").to_pylist()
        return pyarrow.table({"id": numbers, "answer": [call(number) for number in numbers]})

    grouped = frame.groupBy((frame["id"] % 2).alias("parity"))
    return list(grouped.applyInArrow(extract, "id long, answer string").collect())


def cogroup_apply_in_pandas(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(left: pd.DataFrame, right: pd.DataFrame) -> pd.DataFrame:
        return left.assign(answer=[call(number) for number in right["id"]])

    cogrouped = frame.groupBy("id").cogroup(frame.groupBy("id"))
    return list(cogrouped.applyInPandas(extract, "id long, answer string").collect())


def pandas_udf(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    @functions.pandas_udf("string")
    def extract(numbers: pd.Series) -> pd.Series:
        return numbers.map(call)

    return list(frame.select("id", extract("id")).collect())


def iterator_pandas_udf(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        for numbers in batches:
            yield numbers.map(call)

    # As a string's annotation would not say so to Spark.
    extract.__annotations__ = {"batches": Iterator[pd.Series], "return": Iterator[pd.Series]}
    return list(frame.select("id", functions.pandas_udf(extract, "string")("id")).collect())


def grouped_aggregate_pandas_udf(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(numbers: pd.Series) -> str:
        return " ".join(sorted(call(number) for number in numbers))

    extract.__annotations__ = {"numbers": pd.Series, "return": str}
    aggregate = functions.pandas_udf(extract, "string")
    return list(frame.groupBy((frame["id"] % 2).alias("parity")).agg(aggregate("id")).collect())


def udf(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    @functions.udf("string")
    def extract(number: int) -> str:
        return call(number)

    return list(frame.select("id", extract("id")).collect())


def arrow_optimised_udf(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    @functions.udf("string", useArrow=True)
    def extract(number: int) -> str:
        return call(number)

    return list(frame.select("id", extract("id")).collect())


def arrow_udf(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(numbers: Any) -> Any:
        import pyarrow

        return pyarrow.array([call(number) for number in numbers.to_pylist()])

    import pyarrow

    extract.__annotations__ = {"numbers": pyarrow.Array, "return": pyarrow.Array}
    return list(frame.select("id", functions.arrow_udf(extract, "string")("id")).collect())


def foreach(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(row: Any) -> None:
        call(row.id)

    frame.foreach(extract)
    return []


def foreach_partition(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(rows: Iterable[Any]) -> None:
        for row in rows:
            call(row.id)

    frame.foreachPartition(extract)
    return []


def cogroup_apply_in_arrow(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(left: Any, right: Any) -> Any:
        import pyarrow

        numbers = right.column("id").to_pylist()
        return pyarrow.table({"id": numbers, "answer": [call(number) for number in numbers]})

    cogrouped = frame.groupBy("id").cogroup(frame.groupBy("id"))
    return list(cogrouped.applyInArrow(extract, "id long, answer string").collect())


def registered_function(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(number: int) -> str:
        return call(number)

    frame.sparkSession.udf.register("extract_function", extract)
    return list(frame.selectExpr("id", "extract_function(id)").collect())


def registered_udf(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    @functions.pandas_udf("string")
    def extract(numbers: pd.Series) -> pd.Series:
        return numbers.map(call)

    frame.sparkSession.udf.register("extract_column", extract)
    frame.createOrReplaceTempView("documents")
    query = "SELECT id, extract_column(id) FROM documents"
    return list(frame.sparkSession.sql(query).collect())


def table_function(call: Callable[[int], str], **options: Any) -> Any:
    """Return a UDTF that makes a call for each row, a number or a row that has one."""

    class Extract:
        def __init__(self) -> None:
            self.seen = 0

        def eval(self, number: Any) -> Iterator[tuple[int, str]]:
            self.seen += 1
            number = getattr(number, "id", number)
            yield number, call(number)

        def terminate(self) -> Iterator[tuple[int, str]]:
            yield -self.seen, "seen"

    Extract.__name__ = "extract"
    return functions.udtf(Extract, returnType="number long, answer string", **options)


def udtf(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    return list(table_function(call)(frame.asTable()).collect())


def registered_udtf(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    frame.sparkSession.udtf.register("extract_rows", table_function(call))
    frame.createOrReplaceTempView("documents")
    query = "SELECT * FROM documents, LATERAL extract_rows(id)"
    return list(frame.sparkSession.sql(query).collect())


def arrow_optimised_udtf(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    frame.sparkSession.udtf.register("extract_arrow", table_function(call, useArrow=True))
    frame.createOrReplaceTempView("documents")
    query = "SELECT * FROM documents, LATERAL extract_arrow(id)"
    return list(frame.sparkSession.sql(query).collect())


def pandas_api(frame: DataFrame) -> Any:
    """Return a frame of the pandas API, also of a release that has it without ANSI mode only."""
    import pyspark.pandas as ps

    with suppress(ps.config.OptionError):
        ps.set_option("compute.fail_on_ansi_mode", False)
    return frame.pandas_api()


def pandas_api_apply(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(row: pd.Series) -> str:
        return call(row["id"])

    # Without a type, Spark calls the function on the driver to see what it returns.
    extract.__annotations__["return"] = str
    return list(pandas_api(frame).apply(extract, axis=1).to_numpy())


def pandas_api_series_apply(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(number: int) -> str:
        return call(number)

    extract.__annotations__["return"] = str
    return list(pandas_api(frame)["id"].apply(extract).to_numpy())


def pandas_api_transform(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    import pyspark.pandas as ps

    def extract(numbers: pd.Series) -> Any:
        return numbers.map(call)

    extract.__annotations__["return"] = ps.Series[str]
    return list(pandas_api(frame).transform(extract)["id"].to_numpy())


def pandas_api_group_apply(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    import pyspark.pandas as ps

    def extract(group: pd.DataFrame) -> Any:
        return pd.DataFrame({"answer": group["id"].map(call)})

    extract.__annotations__["return"] = ps.DataFrame["answer":str]
    parities = pandas_api(frame.withColumn("parity", frame["id"] % 2)).groupby("parity")
    return list(parities.apply(extract)["answer"].to_numpy())


@contextmanager
def stream_of(frame: DataFrame) -> Iterator[DataFrame]:
    """Give the rows of a frame as a stream."""
    with tempfile.TemporaryDirectory() as folder:
        frame.write.parquet(f"{folder}/source")
        yield frame.sparkSession.readStream.schema("id long").parquet(f"{folder}/source")


def drained(stream: DataFrame, **options: Any) -> list[Any]:
    """Run a query until the stream has no more, and return the rows that it made."""
    spark, name = stream.sparkSession, f"rows_{uuid.uuid4().hex}"
    writer = stream.writeStream.format("memory").queryName(name).trigger(availableNow=True)
    writer.options(**options).outputMode("update").start().awaitTermination()
    return list(spark.table(name).collect())


def stream_map_in_pandas(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            yield batch.assign(answer=[call(number) for number in batch["id"]])

    with stream_of(frame) as stream:
        return drained(stream.mapInPandas(extract, "id long, answer string"))


def stream_foreach(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(row: Any) -> None:
        call(row.id)

    with stream_of(frame) as stream:
        stream.writeStream.foreach(extract).trigger(availableNow=True).start().awaitTermination()
    return []


def stream_foreach_object(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    class Writer:
        def open(self, partition_id: int, epoch_id: int) -> bool:
            self.is_open = True
            return True

        def process(self, row: Any) -> None:
            assert self.is_open
            call(row.id)

        def close(self, error: Exception | None) -> None:
            self.is_open = False

    Writer.__name__ = "extract"
    with stream_of(frame) as stream:
        stream.writeStream.foreach(Writer()).trigger(availableNow=True).start().awaitTermination()
    return []


def apply_in_pandas_with_state(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(
        key: tuple[int], batches: Iterator[pd.DataFrame], state: Any
    ) -> Iterator[pd.DataFrame]:
        for batch in batches:
            yield batch[["id"]].assign(answer=[call(number) for number in batch["id"]])
        state.update((1,))

    schema = "id long, answer string"
    with stream_of(frame) as stream:
        grouped = stream.groupBy("id")
        return drained(
            grouped.applyInPandasWithState(extract, schema, "n long", "update", "NoTimeout")
        )


def _processor(call: Callable[[int], str], in_pandas: bool) -> Any:
    from pyspark.sql import Row
    from pyspark.sql.streaming import StatefulProcessor

    class Processor(StatefulProcessor):
        def init(self, handle: Any) -> None:
            self.seen = handle.getValueState("seen", "n long")

        def handleInputRows(self, key: Any, rows: Any, timer_values: Any) -> Any:  # noqa: N802
            for each in rows:
                numbers = list(each["id"]) if in_pandas else [each.id]
                answers = [call(number) for number in numbers]
                if in_pandas:
                    yield pd.DataFrame({"id": numbers, "answer": answers})
                else:
                    yield Row(id=numbers[0], answer=answers[0])
            self.seen.update((1,))

        def close(self) -> None:
            pass

    Processor.__name__ = "extract"
    return Processor()


@contextmanager
def _rocksdb(spark: Any) -> Iterator[None]:
    key = "spark.sql.streaming.stateStore.providerClass"
    package = "org.apache.spark.sql.execution.streaming.state"
    spark.conf.set(key, f"{package}.RocksDBStateStoreProvider")
    try:
        yield
    finally:
        spark.conf.unset(key)


def _with_state(frame: DataFrame, method: str, processor: Any) -> list[Any]:
    with stream_of(frame) as stream, _rocksdb(frame.sparkSession):
        transform = getattr(stream.groupBy("id"), method)
        return drained(transform(processor, "id long, answer string", "Update", "None"))


def transform_with_state_in_pandas(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    return _with_state(frame, "transformWithStateInPandas", _processor(call, True))


def transform_with_state(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    return _with_state(frame, "transformWithState", _processor(call, False))


def data_source(call: Callable[[int], str]) -> Any:
    """Return a Python data source: read, it makes a call for each partition; written, for a row."""
    from pyspark.sql import datasource

    class Reader(datasource.DataSourceReader):
        def partitions(self) -> Any:
            return [datasource.InputPartition(number) for number in range(ROWS)]

        def read(self, partition: Any) -> Iterator[tuple[int, str]]:
            yield partition.value, call(partition.value)

    class StreamReader(datasource.DataSourceStreamReader):
        def initialOffset(self) -> dict[str, int]:  # noqa: N802
            return {"next": 0}

        def latestOffset(self) -> dict[str, int]:  # type: ignore[override]  # noqa: N802
            return {"next": ROWS}

        def partitions(self, start: dict[str, int], end: dict[str, int]) -> Any:
            return [datasource.InputPartition(n) for n in range(start["next"], end["next"])]

        def read(self, partition: Any) -> Iterator[tuple[int, str]]:
            yield partition.value, call(partition.value)

    class Writer(datasource.DataSourceWriter, datasource.DataSourceStreamWriter):
        def write(self, rows: Iterator[Any]) -> Any:
            for row in rows:
                call(row.id)
            return datasource.WriterCommitMessage()

        def commit(self, *of_batch: Any) -> None:
            pass

        def abort(self, *of_batch: Any) -> None:
            pass

    class Extract(datasource.DataSource):
        @classmethod
        def name(cls) -> str:
            return "answers"

        def schema(self) -> str:
            return "id long, answer string"

        def reader(self, schema: Any) -> Any:
            return Reader()

        def streamReader(self, schema: Any) -> Any:  # noqa: N802
            return StreamReader()

        def writer(self, schema: Any, overwrite: bool) -> Any:
            return Writer()

        def streamWriter(self, schema: Any, overwrite: bool) -> Any:  # noqa: N802
            return Writer()

    Extract.__name__ = "extract"
    return Extract


def data_source_read(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    frame.sparkSession.dataSource.register(data_source(call))
    return list(frame.sparkSession.read.format("answers").load().collect())


def data_source_write(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    frame.sparkSession.dataSource.register(data_source(call))
    frame.write.format("answers").mode("append").save()
    return []


def data_source_stream_read(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    frame.sparkSession.dataSource.register(data_source(call))
    return drained(frame.sparkSession.readStream.format("answers").load())


def data_source_stream_write(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    frame.sparkSession.dataSource.register(data_source(call))
    with stream_of(frame) as stream, tempfile.TemporaryDirectory() as folder:
        writer = stream.writeStream.format("answers").option("checkpointLocation", folder)
        writer.trigger(availableNow=True).start().awaitTermination()
    return []


def rdd_map(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(row: Any) -> tuple[int, str]:
        return row.id, call(row.id)

    return list(frame.rdd.map(extract).collect())


def rdd_foreach(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(row: Any) -> None:
        call(row.id)

    frame.rdd.foreach(extract)
    return []


def rdd_map_partitions(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(rows: Iterable[Any]) -> Iterator[tuple[int, str]]:
        for row in rows:
            yield row.id, call(row.id)

    return list(frame.rdd.mapPartitions(extract).collect())


def rdd_foreach_partition(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(rows: Iterable[Any]) -> None:
        for row in rows:
            call(row.id)

    frame.rdd.foreachPartition(extract)
    return []


def rdd_flat_map(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(row: Any) -> list[tuple[int, str]]:
        return [(row.id, call(row.id))] * 2

    return list(frame.rdd.flatMap(extract).collect())


def rdd_filter(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(row: Any) -> bool:
        return bool(call(row.id)) and row.id > 2

    return list(frame.rdd.filter(extract).collect())


def rdd_map_values(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(number: int) -> str:
        return call(number)

    pairs = [(str(number), number) for number in range(ROWS)]
    return list(frame.sparkSession.sparkContext.parallelize(pairs, 2).mapValues(extract).collect())


def rdd_map_partitions_with_index(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(index: int, rows: Iterable[Any]) -> Iterator[tuple[int, int, str]]:
        for row in rows:
            yield index, row.id, call(row.id)

    return list(frame.rdd.mapPartitionsWithIndex(extract).collect())


def rdd_barrier(frame: DataFrame, call: Callable[[int], str]) -> list[Any]:
    def extract(rows: Iterable[Any]) -> Iterator[tuple[int, str]]:
        for row in rows:
            yield row.id, call(row.id)

    return list(frame.rdd.barrier().mapPartitions(extract).collect())


ON_FRAMES: dict[str, Job] = {
    "`DataFrame.mapInPandas`": map_in_pandas,
    "`DataFrame.mapInArrow`": map_in_arrow,
    "`DataFrame.foreach`": foreach,
    "`DataFrame.foreachPartition`": foreach_partition,
    "`groupBy().applyInPandas`": apply_in_pandas,
    "`groupBy().applyInPandas` with key": apply_in_pandas_with_key,
    "`groupBy().applyInArrow`": apply_in_arrow,
    "`cogroup().applyInPandas`": cogroup_apply_in_pandas,
    "`cogroup().applyInArrow`": cogroup_apply_in_arrow,
    "`pandas_udf`": pandas_udf,
    "`pandas_udf` over iterators": iterator_pandas_udf,
    "`pandas_udf`, grouped aggregate": grouped_aggregate_pandas_udf,
    "`udf`": udf,
    "`udf`, Arrow-optimised": arrow_optimised_udf,
    "`arrow_udf`": arrow_udf,
    "`spark.udf.register`, a function": registered_function,
    "`spark.udf.register`, a UDF, in `spark.sql`": registered_udf,
    "`udtf`, a table as its argument": udtf,
    "`spark.udtf.register`, in `spark.sql`": registered_udtf,
    "`udtf`, Arrow-optimised, in `spark.sql`": arrow_optimised_udtf,
    "pandas API, `DataFrame.apply`": pandas_api_apply,
    "pandas API, `DataFrame.transform`": pandas_api_transform,
    "pandas API, `Series.apply`": pandas_api_series_apply,
    "pandas API, `groupby().apply`": pandas_api_group_apply,
    "stream, `mapInPandas`": stream_map_in_pandas,
    "stream, `writeStream.foreach`, a function": stream_foreach,
    "stream, `writeStream.foreach`, an object": stream_foreach_object,
    "stream, `applyInPandasWithState`": apply_in_pandas_with_state,
    "stream, `transformWithStateInPandas`": transform_with_state_in_pandas,
    "stream, `transformWithState`": transform_with_state,
    "Python data source, its `read`": data_source_read,
    "Python data source, its `write`": data_source_write,
    "stream, a Python data source's `read`": data_source_stream_read,
    "stream, a Python data source's `write`": data_source_stream_write,
}

ON_RDDS: dict[str, Job] = {
    "`RDD.map`": rdd_map,
    "`RDD.flatMap`": rdd_flat_map,
    "`RDD.filter`": rdd_filter,
    "`RDD.mapValues`": rdd_map_values,
    "`RDD.mapPartitions`": rdd_map_partitions,
    "`RDD.mapPartitionsWithIndex`": rdd_map_partitions_with_index,
    "`RDD.barrier().mapPartitions`": rdd_barrier,
    "`RDD.foreach`": rdd_foreach,
    "`RDD.foreachPartition`": rdd_foreach_partition,
}

# The release of Spark that brought it, where that is not in all that are supported.
SINCE = {
    "`groupBy().applyInArrow`": (4, 0),
    "`cogroup().applyInArrow`": (4, 0),
    "`arrow_udf`": (4, 1),
    "`udtf`, a table as its argument": (4, 0),
    "stream, `transformWithStateInPandas`": (4, 0),
    "stream, `transformWithState`": (4, 1),
    "Python data source, its `read`": (4, 0),
    "Python data source, its `write`": (4, 0),
    "stream, a Python data source's `read`": (4, 0),
    "stream, a Python data source's `write`": (4, 0),
}
# The same for Spark Connect, where it was later.
SINCE_ON_CONNECT = {"stream, `transformWithStateInPandas`": (4, 1)}


def is_there(way: str, *, on_connect: bool = False) -> bool:
    """Whether the installed Spark has it."""
    since = {**SINCE, **SINCE_ON_CONNECT} if on_connect else SINCE
    return tuple(map(int, pyspark.__version__.split(".")[:2])) >= since.get(way, ())


def covered(column: str, ways: Iterable[str]) -> list[Any]:
    """Return cases of a test that shows that functions handed over in these ways are traced."""
    cases = []
    for way in ways:
        release = ".".join(map(str, SINCE.get(way, ())))
        note = f"from Spark {release}" if release else ""
        skip = pytest.mark.skipif(not is_there(way), reason=note) if release else None
        cases.append(case(way, SPARK, way, column, skip=skip, note=note))
    return cases
