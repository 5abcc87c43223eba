"""Being told when a module has been imported, by whomever."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from mlflow_ctx_autolog.log_ins import safe_logger

__all__ = ["when_imported"]

_logger = safe_logger(__name__)

Callback = Callable[[ModuleType], None]


def when_imported(name: str, callback: Callback) -> None:
    """Call back when a module has been imported: now, if it has been, else right after it is.

    Called back once for each registration, in the thread that imports it, before whoever imports
    it goes on. What the callback raises is logged.

    Args:
        name: The module's full name. It need not exist.
        callback: Takes the module.
    """
    with _finder.lock:
        module = sys.modules.get(name)
        spec = getattr(module, "__spec__", None)
        if module is None or getattr(spec, "_initializing", False):
            _finder.waiting.setdefault(name, []).append(callback)
            if _finder not in sys.meta_path:
                sys.meta_path.insert(0, _finder)
            return
    _call(callback, module)


def _call(callback: Callback, module: ModuleType) -> None:
    try:
        callback(module)
    except Exception:
        _logger.warning("%s is imported, but not watched", module.__name__, exc_info=True)


class _Finder:
    """Finds nothing by itself: it has the finders behind it find what is waited for."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.waiting: dict[str, list[Callback]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.waiting:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader, self._loaded)  # type: ignore[assignment]
                return spec
        return None

    def _loaded(self, module: ModuleType) -> None:
        with self.lock:
            callbacks = self.waiting.pop(module.__name__, [])
        for callback in callbacks:
            _call(callback, module)


class _Loader:
    """Stands in for a module's loader until the module has been executed."""

    def __init__(self, loader: Any, loaded: Callback) -> None:
        self._loader = loader
        self._loaded = loaded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        # The module sees its own loader, as ever.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._loaded(module)


_finder: Any = _Finder()
