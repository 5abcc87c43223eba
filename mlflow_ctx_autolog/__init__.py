"""Trace the OpenAI calls of Spark workers under the driver's MLflow trace.

On the driver::

    import mlflow, mlflow_ctx_autolog as ctx_autolog

    ctx_autolog.enable()
    with mlflow.start_span("extract-entitlements"):
        contracts.mapInPandas(extract, schema).write.parquet(out)

Each ``chat.completions.create`` that ``extract`` makes is then a span in the trace of
``extract-entitlements``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.context import DriverContext
from mlflow_ctx_autolog.exceptions import (
    CarrierError,
    CtxAutologError,
    CtxAutologWarning,
    DiagnosisError,
    IncompleteTraceError,
    UnsupportedStoreError,
    UnsupportedVersionError,
)
from mlflow_ctx_autolog.receipts import Receipt

if TYPE_CHECKING:
    from mlflow_ctx_autolog.annotations import annotate, last_call
    from mlflow_ctx_autolog.autolog import Handle, disable, enable
    from mlflow_ctx_autolog.call_report import CallReport, report
    from mlflow_ctx_autolog.diagnosis import Diagnosis, doctor
    from mlflow_ctx_autolog.driver import broadcast, capture, flush, receipt, traced
    from mlflow_ctx_autolog.worker import attach

__all__ = [
    "CallReport",
    "CarrierError",
    "Config",
    "CtxAutologError",
    "CtxAutologWarning",
    "Diagnosis",
    "DiagnosisError",
    "DriverContext",
    "Handle",
    "IncompleteTraceError",
    "Receipt",
    "UnsupportedStoreError",
    "UnsupportedVersionError",
    "annotate",
    "attach",
    "broadcast",
    "capture",
    "disable",
    "doctor",
    "enable",
    "flush",
    "last_call",
    "receipt",
    "report",
    "traced",
]

# MLflow imports this package, for its plugin, while it is being imported itself; whatever needs
# MLflow is therefore imported on first use.
_LAZY = {
    "Diagnosis": "diagnosis",
    "CallReport": "call_report",
    "Handle": "autolog",
    "annotate": "annotations",
    "attach": "worker",
    "broadcast": "driver",
    "capture": "driver",
    "disable": "autolog",
    "doctor": "diagnosis",
    "enable": "autolog",
    "flush": "driver",
    "last_call": "annotations",
    "receipt": "driver",
    "report": "call_report",
    "traced": "driver",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
