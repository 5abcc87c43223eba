"""Functions that are marked, and stay as they are."""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import Any

__all__ = ["MarkedFunctions"]


class MarkedFunctions:
    """A set of objects by what they are, not by what they equal; it keeps none alive if it can."""

    def __init__(self) -> None:
        self._marked: dict[int, Any] = {}

    def add(self, function: Any) -> None:
        """Mark an object until it is gone."""
        name = id(function)
        kept: Any = function
        # Some cannot be referred to weakly, and stay.
        with suppress(TypeError):
            kept = weakref.ref(function, lambda _: self._marked.pop(name, None))
        self._marked[name] = kept

    def __contains__(self, function: Any) -> bool:
        kept = self._marked.get(id(function))
        return (kept() if isinstance(kept, weakref.ref) else kept) is function is not None

    def __bool__(self) -> bool:
        return bool(self._marked)
