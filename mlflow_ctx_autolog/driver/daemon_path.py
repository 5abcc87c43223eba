"""Where Python daemons find this library that is sent along with a job, ``--py-files``.

Such files lie beside an executor when its daemon starts, but only workers look for modules there.
With ``spark.python.daemon.module=mlflow_ctx_autolog.daemon`` the daemon could not start, and the
job would fail.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from mlflow_ctx_autolog.log_ins import safe_logger

__all__ = ["tell_daemons"]

_logger = safe_logger(__name__)
_MODULE = "mlflow_ctx_autolog.daemon"
_PATH = "PYTHONPATH"


def tell_daemons(context: Any, settings: Mapping[str, str]) -> None:
    """Have the daemons that run later functions of a SparkContext look beside themselves.

    Nothing where the daemon is another one, or the library is not among the job's files.

    Args:
        context: A SparkContext, whose ``environment`` Spark sets for Python processes.
        settings: What it was started with, which the JVM takes its time to tell.
    """
    if settings.get("spark.python.daemon.module") != _MODULE:
        return
    sent = settings.get("spark.submit.pyFiles", "").split(",")
    sent += getattr(context, "_python_includes", [])
    names = [PurePosixPath(path).name for path in sent]
    ours = [name for name in names if name.startswith("mlflow_ctx_autolog")]
    known = context.environment.get(_PATH, "").split(":")
    if missing := [name for name in dict.fromkeys(ours) if name not in known]:
        context.environment[_PATH] = ":".join(filter(None, (*known, *missing)))
        _logger.info("Python daemons look for this library in %s, too.", ", ".join(missing))
