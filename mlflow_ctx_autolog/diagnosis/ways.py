"""PySpark's ways to run Python on workers: which of them are traced, and which are not."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

__all__ = ["KINDS", "PROGRAMS", "untraced_ways"]

# Kinds of functions, by PySpark's names, and what the table of what is covered calls them.
KINDS = {
    "NON_UDF": "`RDD.map`",
    "SQL_BATCHED_UDF": "`udf`",
    "SQL_ARROW_BATCHED_UDF": "`udf`, Arrow-optimised",
    "SQL_SCALAR_PANDAS_UDF": "`pandas_udf`",
    "SQL_SCALAR_PANDAS_ITER_UDF": "`pandas_udf` over iterators",
    "SQL_GROUPED_AGG_PANDAS_UDF": "`pandas_udf`, grouped aggregate",
    "SQL_GROUPED_AGG_PANDAS_ITER_UDF": "`pandas_udf`, grouped aggregate",
    "SQL_WINDOW_AGG_PANDAS_UDF": "`pandas_udf`, grouped aggregate",
    "SQL_GROUPED_MAP_PANDAS_UDF": "`groupBy().applyInPandas`",
    "SQL_GROUPED_MAP_PANDAS_ITER_UDF": "`groupBy().applyInPandas`",
    "SQL_GROUPED_MAP_ARROW_UDF": "`groupBy().applyInArrow`",
    "SQL_GROUPED_MAP_ARROW_ITER_UDF": "`groupBy().applyInArrow`",
    "SQL_COGROUPED_MAP_PANDAS_UDF": "`cogroup().applyInPandas`",
    "SQL_COGROUPED_MAP_ARROW_UDF": "`cogroup().applyInArrow`",
    "SQL_MAP_PANDAS_ITER_UDF": "`DataFrame.mapInPandas`",
    "SQL_MAP_ARROW_ITER_UDF": "`DataFrame.mapInArrow`",
    "SQL_GROUPED_MAP_PANDAS_UDF_WITH_STATE": "stream, `applyInPandasWithState`",
    "SQL_TRANSFORM_WITH_STATE_PANDAS_UDF": "stream, `transformWithStateInPandas`",
    "SQL_TRANSFORM_WITH_STATE_PANDAS_INIT_STATE_UDF": "stream, `transformWithStateInPandas`",
    "SQL_TRANSFORM_WITH_STATE_PYTHON_ROW_UDF": "stream, `transformWithState`",
    "SQL_TRANSFORM_WITH_STATE_PYTHON_ROW_INIT_STATE_UDF": "stream, `transformWithState`",
    "SQL_SCALAR_ARROW_UDF": "`arrow_udf`",
    "SQL_SCALAR_ARROW_ITER_UDF": "`arrow_udf`",
    "SQL_GROUPED_AGG_ARROW_UDF": "`arrow_udf`",
    "SQL_GROUPED_AGG_ARROW_ITER_UDF": "`arrow_udf`",
    "SQL_WINDOW_AGG_ARROW_UDF": "`arrow_udf`",
    "SQL_TABLE_UDF": "`spark.udtf.register`, in `spark.sql`",
    "SQL_ARROW_TABLE_UDF": "`udtf`, Arrow-optimised, in `spark.sql`",
    "SQL_ARROW_UDTF": "`udtf`, Arrow-optimised, in `spark.sql`",
}
# Programs that Spark starts on workers or beside the driver, and what each runs of users' code that
# is not traced, since it is no task; "" where there is nothing.
PROGRAMS = {
    # Runs functions of all kinds above, and the methods of data sources that read and write.
    "worker": "",
    "worker_message": "",
    "worker_util": "",
    "daemon": "",
    "sql/worker/utils": "",
    "sql/worker/analyze_udtf": "a table function's analyze()",
    "sql/worker/create_data_source": "a data source's schema()",
    "sql/worker/plan_data_source_read": "a data source's partitions()",
    "sql/worker/data_source_pushdown_filters": "a data source's pushFilters()",
    "sql/worker/write_into_data_source": "a data source's writer()",
    "sql/worker/commit_data_source_write": "a data source's commit() and abort()",
    "sql/worker/python_streaming_sink_runner": "a data source's commit() and abort()",
    "sql/worker/lookup_data_sources": "data sources in modules that Spark finds itself (pyspark_*)",
    "sql/streaming/python_streaming_source_runner": "a data source's simpleStreamReader()",
    "sql/streaming/transform_with_state_driver_worker": "a stateful processor's init() beforehand",
    # Runs the function, which is attached to the driver's span.
    "sql/connect/streaming/worker/foreach_batch_worker": "",
    "sql/connect/streaming/worker/listener_worker": "a listener of queries on Spark Connect",
}


def untraced_ways() -> list[str]:
    """Return what of users' code the installed PySpark runs untraced; empty where there is none.

    Of a release that is newer than this one of the library, also kinds of functions that it does
    not know.
    """
    spec = importlib.util.find_spec("pyspark")
    if spec is None or spec.origin is None:
        return []
    root = Path(spec.origin).parent
    runs = [what for name, what in PROGRAMS.items() if (root / f"{name}.py").exists()]
    kinds = vars(importlib.import_module("pyspark.util").PythonEvalType)
    unknown = [name for name in kinds if name.isupper() and name not in KINDS]
    return [*dict.fromkeys(filter(None, runs)), *unknown]
