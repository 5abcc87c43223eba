"""A PySpark daemon whose Python workers have, when they are forked, imported what tracing needs.

Set ``spark.python.daemon.module=mlflow_ctx_autolog.daemon`` before Spark starts, on a cluster that
has this library on every node. The seconds and the memory that importing MLflow and the OpenAI
client take are then spent once on each executor, not once in each worker.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import traceback

from pyspark.daemon import manager

__all__ = ["main", "preload"]

# What the first call of a traced task would import; the client loads these as they are used.
_MODULES = (
    "mlflow_ctx_autolog.worker.runner",
    "openai.resources.chat.completions",
    "openai.resources.completions",
    "openai.resources.embeddings",
    "openai.resources.images",
    "openai.resources.responses",
)
# A thread would not be there in the forked workers, nor what it holds. Arrow's allocator starts one
# when it is imported. So does NumPy's where Spark gives a task more than one processor
# (OMP_NUM_THREADS), and ends them by itself before a fork.
_ARROW_OPTIONS = "JE_ARROW_MALLOC_CONF"


def preload() -> None:
    """Import what workers need, starting no thread, and set it aside from garbage collection.

    Raises:
        ImportError: Something is missing; what was imported stays.
    """
    options = os.environ.get(_ARROW_OPTIONS)
    os.environ[_ARROW_OPTIONS] = ",".join(filter(None, (options, "background_thread:false")))
    try:
        for module in _MODULES:
            importlib.import_module(module)
    finally:
        # The user's functions see the environment as it was.
        del os.environ[_ARROW_OPTIONS]
        if options is not None:
            os.environ[_ARROW_OPTIONS] = options
    os.register_at_fork(after_in_child=_reseed)
    # Lest the collection that follows each task touch, and thereby copy, the pages that are shared.
    gc.collect()
    gc.freeze()


def _reseed() -> None:
    # Python's own generator sees to itself. NumPy's would draw the same numbers in every worker.
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()


def main() -> None:
    """Preload, and serve as PySpark's daemon; as the plain one where preloading fails."""
    try:
        preload()
    except Exception:
        print(
            "mlflow-ctx-autolog could not be imported before the Python workers are forked, so "
            "each of them imports it by itself:",
            file=sys.stderr,
        )
        traceback.print_exc()
    manager()


if __name__ == "__main__":
    main()
