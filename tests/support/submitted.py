"""Functions as they arrive on a worker, in a test's own process."""

from __future__ import annotations

from typing import Any

import mlflow_ctx_autolog
from mlflow_ctx_autolog.worker.runner import load_submitted

__all__ = ["arrived"]


def arrived(
    function: Any,
    carrier: object,
    *,
    required: bool,
    repeated: bool = False,
    relay: Any = None,
    name: str | None = None,
) -> Any:
    """Return a function as a worker gets it."""
    options = {
        "name": name or getattr(function, "__name__", "function"),
        "required": required,
        "repeated": repeated,
        "version": mlflow_ctx_autolog.__version__,
    }
    return load_submitted(function, options, carrier, relay)
