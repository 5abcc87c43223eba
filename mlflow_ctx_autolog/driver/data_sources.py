"""Python data sources, whose readers and writers run on workers and are not traced."""

from __future__ import annotations

from typing import Any

from mlflow_ctx_autolog.driver.instrumentor import find_class
from mlflow_ctx_autolog.exceptions import warn_once
from mlflow_ctx_autolog.log_ins import safe_logger
from mlflow_ctx_autolog.patching import Redirect

__all__ = ["DataSources"]

_logger = safe_logger(__name__)

_PLACES = ("pyspark.sql.datasource", "pyspark.sql.connect.datasource")


class DataSources:
    """Says, where a data source is registered, that calls it makes itself are not traced.

    Spark runs its code in programs of their own, to which no function is handed.
    """

    def __init__(self) -> None:
        self._redirects: list[Redirect] = []

    def install(self) -> None:
        """Idempotent."""
        if not self._redirects:
            for module in _PLACES:
                owner = find_class((module,), "DataSourceRegistration", "register")
                if owner is not None:
                    self._redirects.append(Redirect(owner, "register", self._say))
        for redirect in self._redirects:
            redirect.apply()

    def uninstall(self) -> None:
        """Idempotent."""
        for redirect in self._redirects:
            redirect.revert()

    def _say(self, registration: Any) -> Any:
        warn_once(
            _logger,
            "data source",
            "A Python data source is registered. Model calls that its reader or writer makes are "
            "not traced, since Spark hands them no function: make them in mapInPandas(), on what "
            "was read or is to be written.",
        )
        return registration
