"""A patch that can be taken back, also when others have patched on top of it."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

from mlflow_ctx_autolog.exceptions import UnsupportedVersionError

__all__ = ["Patch"]

Replacement = Callable[..., Any]


class Patch:
    """Replaces one function of a module or class, and puts it back.

    ``replacement`` is called as ``replacement(original, *args, **kwargs)``.

    - :meth:`apply` and :meth:`revert` are idempotent and take effect at once, on references taken
      earlier too.
    - :meth:`revert` removes only its own layer. If somebody has patched on top meanwhile, theirs
      stays, and the layer beneath passes every call through.
    - What was inherited is inherited again: nothing is left in the namespace.
    """

    def __init__(self, owner: Any, name: str, replacement: Replacement) -> None:
        self.owner = owner
        self.name = name
        self._replacement = replacement
        self._lock = threading.Lock()
        self._active = False
        self._original: Any = None
        self._layer: Callable[..., Any] | None = None
        self._was_inherited = False

    @property
    def active(self) -> bool:
        """Whether calls go through the replacement."""
        return self._active

    def apply(self) -> None:
        """Install the replacement, or wake the layer that is still there.

        Raises:
            UnsupportedVersionError: There is no such function to replace.
        """
        with self._lock:
            if self._layer is None or not self._is_on_top(self._layer):
                self._install()
            self._active = True

    def revert(self) -> None:
        """Stop replacing, and remove the layer unless somebody else's lies on top of it."""
        with self._lock:
            self._active = False
            if self._layer is None or not self._is_on_top(self._layer):
                return
            if self._was_inherited:
                delattr(self.owner, self.name)
            else:
                setattr(self.owner, self.name, self._original)

    def _install(self) -> None:
        try:
            original = inspect.getattr_static(self.owner, self.name)
        except AttributeError:
            # A class names its module, and a module itself.
            module = getattr(self.owner, "__module__", self.owner.__name__)
            raise UnsupportedVersionError(
                f"{self.owner.__name__} has no {self.name}; this release of "
                f"{module.partition('.')[0]} cannot be patched. "
                "Install a release that mlflow-ctx-autolog supports."
            ) from None
        if self._layer is None or original is not self._original:
            # A layer that somebody has buried stays inert for good; a new one replaces it.
            self._layer = self._layer_over(original)
            self._original = original
        self._was_inherited = self.name not in vars(self.owner)
        setattr(self.owner, self.name, self._layer)

    def _layer_over(self, original: Any) -> Any:
        if isinstance(original, staticmethod):
            return staticmethod(self._layer_over(original.__func__))

        @functools.wraps(original)
        def layer(*args: Any, **kwargs: Any) -> Any:
            if self._active and self._is_current(layer):
                return self._replacement(original, *args, **kwargs)
            return original(*args, **kwargs)

        return layer

    def _is_current(self, layer: Callable[..., Any]) -> bool:
        return layer in (self._layer, getattr(self._layer, "__func__", None))

    def _is_on_top(self, layer: Callable[..., Any]) -> bool:
        return vars(self.owner).get(self.name) is layer
