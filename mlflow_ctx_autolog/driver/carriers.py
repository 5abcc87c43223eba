"""The carriers that the driver has made: few, since functions and actions share them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

from mlflow_ctx_autolog.context import DriverContext

__all__ = ["Carriers"]


class Carriers:
    """Keeps one carrier for each Spark application and all that is the same for its functions.

    It is kept until the application ends: a registered function, or a plan that was cached, may
    need it long after Python has forgotten both.
    """

    def __init__(self) -> None:
        self._texts: dict[Hashable, str] = {}
        self._broadcasts: weakref.WeakKeyDictionary[Any, dict[str, Any]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, shared: DriverContext, whole: Callable[[], DriverContext], spark: Any) -> Any:
        """Return the carrier of a context: a Spark broadcast of its JSON.

        Args:
            shared: What of the context is the same for all functions and actions.
            whole: Returns all of it, with the span that is active now. Called where there is no
                carrier yet; one that was made before serves for all that share as much with it.
            spark: The SparkContext that broadcasts it; None for the text itself.
        """
        # Looked up at each use of a function, where to write the JSON would take too long.
        key = shared, shared.propagation, frozenset(shared.spent.items())
        text = self._texts.get(key)
        if text is None:
            text = self._texts[key] = whole().to_json()
        if spark is None:
            return text
        broadcasts = self._broadcasts.setdefault(spark, {})
        if text not in broadcasts:
            broadcasts[text] = spark.broadcast(text)
        return broadcasts[text]
