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

if TYPE_CHECKING:
    from mlflow_ctx_autolog.answers_settings import Answers
    from mlflow_ctx_autolog.autolog import Handle, disable, enable
    from mlflow_ctx_autolog.config import Config
    from mlflow_ctx_autolog.context import DriverContext
    from mlflow_ctx_autolog.delivery.receipts import Receipt
    from mlflow_ctx_autolog.diagnosis.diagnosis import Diagnosis
    from mlflow_ctx_autolog.diagnosis.doctor import doctor
    from mlflow_ctx_autolog.driver.answers import forget_answers
    from mlflow_ctx_autolog.driver.api import broadcast, capture, flush, receipt, traced
    from mlflow_ctx_autolog.exceptions import (
        BudgetExceeded,
        CarrierError,
        CtxAutologError,
        CtxAutologWarning,
        DiagnosisError,
        IncompleteTraceError,
        UnsupportedStoreError,
        UnsupportedVersionError,
    )
    from mlflow_ctx_autolog.recorder.annotations import annotate, last_call
    from mlflow_ctx_autolog.reporting.call_report import CallReport
    from mlflow_ctx_autolog.reporting.comparison import Comparison, compare
    from mlflow_ctx_autolog.reporting.history import History, history
    from mlflow_ctx_autolog.reporting.reading import report
    from mlflow_ctx_autolog.worker.runner import attach

__all__ = [
    "Answers",
    "BudgetExceeded",
    "CallReport",
    "CarrierError",
    "Comparison",
    "Config",
    "CtxAutologError",
    "CtxAutologWarning",
    "Diagnosis",
    "DiagnosisError",
    "DriverContext",
    "Handle",
    "History",
    "IncompleteTraceError",
    "Receipt",
    "UnsupportedStoreError",
    "UnsupportedVersionError",
    "annotate",
    "attach",
    "broadcast",
    "capture",
    "compare",
    "disable",
    "doctor",
    "enable",
    "flush",
    "forget_answers",
    "history",
    "last_call",
    "receipt",
    "report",
    "traced",
]

__version__ = "0.1.0"

# MLflow imports this package, for its plugin, while it is being imported itself; whatever needs
# MLflow, or time, is therefore imported on first use.
_LAZY = {
    "Answers": "answers_settings",
    "BudgetExceeded": "exceptions",
    "CallReport": "reporting.call_report",
    "CarrierError": "exceptions",
    "Comparison": "reporting.comparison",
    "Config": "config",
    "CtxAutologError": "exceptions",
    "CtxAutologWarning": "exceptions",
    "Diagnosis": "diagnosis.diagnosis",
    "DiagnosisError": "exceptions",
    "DriverContext": "context",
    "Handle": "autolog",
    "IncompleteTraceError": "exceptions",
    "History": "reporting.history",
    "Receipt": "delivery.receipts",
    "UnsupportedStoreError": "exceptions",
    "UnsupportedVersionError": "exceptions",
    "annotate": "recorder.annotations",
    "attach": "worker.runner",
    "broadcast": "driver.api",
    "capture": "driver.api",
    "compare": "reporting.comparison",
    "disable": "autolog",
    "doctor": "diagnosis.doctor",
    "enable": "autolog",
    "flush": "driver.api",
    "forget_answers": "driver.answers",
    "history": "reporting.history",
    "last_call": "recorder.annotations",
    "receipt": "driver.api",
    "report": "reporting.reading",
    "traced": "driver.api",
}


if not TYPE_CHECKING:
    # Else a type checker would take any name for one of ours.
    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    # What completion shows; modules that were imported are attributes, too, and nobody's business.
    return __all__
