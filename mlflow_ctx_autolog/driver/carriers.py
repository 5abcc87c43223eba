"""The carriers that the driver has made: few, since functions and actions share them."""

from __future__ import annotations

import weakref
from typing import Any

from mlflow_ctx_autolog.context import DriverContext

__all__ = ["Carriers"]


class Carriers:
    """Keeps one carrier for each Spark application and all that is the same for its functions.

    It is kept until the application ends: a registered function, or a plan that was cached, may
    need it long after Python has forgotten both.
    """

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._broadcasts: weakref.WeakKeyDictionary[Any, dict[str, Any]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, context: DriverContext, spark_context: Any) -> Any:
        """Return the carrier of a context: a Spark broadcast of its JSON.

        Args:
            context: As captured now. A carrier that was made before serves for all that follow, as
                long as they differ in nothing but the span that was active.
            spark_context: Where to broadcast it; None for the text itself.
        """
        text = self._texts.setdefault(context.shared().to_json(), context.to_json())
        if spark_context is None:
            return text
        broadcasts = self._broadcasts.setdefault(spark_context, {})
        if text not in broadcasts:
            broadcasts[text] = spark_context.broadcast(text)
        return broadcasts[text]
