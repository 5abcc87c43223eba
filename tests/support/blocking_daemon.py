"""A PySpark daemon whose Python workers cannot import MLflow.

Set ``spark.python.daemon.module=blocking_daemon``, and ``PRELOADS=1`` for the workers to have
imported what this library's own daemon imports.
"""

from __future__ import annotations

import os
import sys
from typing import Any

BLOCKED = ("mlflow", "opentelemetry.sdk", "pandas", "pyarrow")


class Blocker:
    """Has the import of MLflow and of what it brings along fail, as if it were not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if any(name == each or name.startswith(f"{each}.") for each in BLOCKED):
            raise ModuleNotFoundError(f"No module named {name!r}: it is blocked", name=name)


if __name__ == "__main__":
    sys.meta_path.insert(0, Blocker())
    if os.environ.get("PRELOADS") == "1":
        from mlflow_ctx_autolog.daemon import main

        main()
    else:
        from pyspark.daemon import manager

        manager()
