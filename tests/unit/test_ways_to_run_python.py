"""Every way of PySpark's to run Python on workers is one that is known here, traced or not.

A release that brings another one fails these tests, until somebody has said which it is.
"""

from __future__ import annotations

from pathlib import Path

import pyspark
import pyspark.util
import pytest

from mlflow_ctx_autolog.driver.data_sources import DataSources

ROOT = Path(__file__).parents[2]
PYSPARK = Path(pyspark.__file__).parent

# Kinds of functions, by PySpark's own names, and a row of the table for each.
TRACED = {
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
# Programs that Spark starts on workers or beside the driver, and what of users' code each runs.
PROGRAMS = {
    "worker": "functions of all kinds above",
    "daemon": "none: it forks workers",
    "worker_message": "none: it reads what a worker is sent",
    "worker_util": "none",
    "sql/worker/analyze_udtf": "a table function's analyze(), which is no task",
    "sql/worker/commit_data_source_write": "a data source",
    "sql/worker/create_data_source": "a data source",
    "sql/worker/data_source_pushdown_filters": "a data source",
    "sql/worker/lookup_data_sources": "a data source",
    "sql/worker/plan_data_source_read": "a data source",
    "sql/worker/python_streaming_sink_runner": "a data source",
    "sql/worker/utils": "none",
    "sql/worker/write_into_data_source": "a data source",
    "sql/streaming/python_streaming_source_runner": "a data source",
    "sql/streaming/transform_with_state_driver_worker": "a processor's states, which is no task",
    "sql/connect/streaming/worker/foreach_batch_worker": "a function for foreachBatch",
    "sql/connect/streaming/worker/listener_worker": "a listener of queries, which is no task",
}


def test_every_kind_of_function_is_known() -> None:
    """Each has a row in the table of what is covered."""
    table = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
    kinds = {name for name in vars(pyspark.util.PythonEvalType) if name.isupper()}
    assert kinds <= set(TRACED)
    for row in TRACED.values():
        assert f"| {row} |" in table


def test_every_program_that_runs_python_is_known() -> None:
    """Those that run what is not traced are named where users look."""
    found = {
        str(path.relative_to(PYSPARK).with_suffix(""))
        for pattern in ("*worker*.py", "daemon.py", "sql/**/*worker*.py", "sql/**/worker/*.py")
        for path in PYSPARK.glob(pattern)
    } | {
        str(path.relative_to(PYSPARK).with_suffix("")) for path in PYSPARK.glob("sql/**/*runner.py")
    }
    found = {name for name in found if not name.endswith("__init__") and "/tests/" not in name}
    assert found <= set(PROGRAMS)


def test_what_is_not_traced_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Data sources run users' code on workers, which nobody hands to Spark as a function."""
    registration = pytest.importorskip("pyspark.sql.datasource").DataSourceRegistration
    before = vars(registration)["register"]
    sources = DataSources()
    sources.install()
    try:
        # Looking it up says so; what is called is PySpark's own.
        assert callable(registration(None).register)
    finally:
        sources.uninstall()
    assert vars(registration)["register"] is before
    assert "not traced" in caplog.text
    assert "Python data sources" in (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
