"""Patches that can be taken back, also when others have patched on top of them."""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import threading
from collections.abc import Callable
from typing import Any

from mlflow_ctx_autolog.exceptions import UnsupportedVersionError
from mlflow_ctx_autolog.log_ins import safe_logger

__all__ = ["Patch", "Redirect"]

_logger = safe_logger(__name__)

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
        original = _static(self.owner, self.name)
        if self._layer is None or original is not self._original:
            # A layer that somebody has buried stays inert for good; a new one replaces it.
            self._layer = self._layer_over(original)
            self._original = original
        self._was_inherited = self.name not in vars(self.owner)
        setattr(self.owner, self.name, self._layer)

    def _layer_over(self, original: Any) -> Any:
        if isinstance(original, (classmethod, staticmethod)):
            return type(original)(self._layer_over(original.__func__))

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


class Redirect:
    """Has a method of a class run on another receiver than the one it is asked of.

    It acts when the method is looked up, and is done before the method runs. So no frame of ours is
    in the traceback of what the method raises, and its signature stays as it is.

    Args:
        owner: The class.
        name: Its method or property.
        receiver: Returns the receiver that takes the place of the one it is given. What it raises
            is logged, and changes nothing.
        is_idle: Whether the receiver would be the one that it is given; quick, and never raises.
    """

    def __init__(
        self,
        owner: type,
        name: str,
        receiver: Callable[[Any], Any],
        is_idle: Callable[[], bool] = lambda: False,
    ) -> None:
        self.owner = owner
        self.name = name
        self._receiver = receiver
        self.is_idle = is_idle
        self.active = False
        self._original: Any = None
        self._layer: _Redirected | property | None = None
        # Attributes of the class that a property needs.
        self._helpers: tuple[str, ...] = ()
        self._was_inherited = False

    def apply(self) -> None:
        """Idempotent.

        Raises:
            UnsupportedVersionError: There is no such method.
        """
        if not self._is_on_top():
            self._original = _static(self.owner, self.name)
            self._layer = self._layer_over(self._original)
            self._was_inherited = self.name not in vars(self.owner)
            setattr(self.owner, self.name, self._layer)
        self.active = True

    def revert(self) -> None:
        """Redirect no more, and leave nothing unless somebody else's lies on top. Idempotent."""
        self.active = False
        if self._is_on_top():
            if self._was_inherited:
                delattr(self.owner, self.name)
            else:
                setattr(self.owner, self.name, self._original)
            for helper in self._helpers:
                delattr(self.owner, helper)

    def _layer_over(self, original: Any) -> _Redirected | property:
        if not isinstance(original, property):
            return _Redirected(original, self)
        # A property runs as it is looked up: only what is not written in Python leaves no frame.
        number = next(_numbers)
        self._helpers = receiver, redirected = f"_receiver_{number}", f"_redirected_{number}"
        setattr(self.owner, receiver, property(self.receiver))
        setattr(self.owner, redirected, original)
        getter = operator.attrgetter(f"{receiver}.{redirected}")
        return property(getter, original.fset, original.fdel, original.__doc__)

    def _is_on_top(self) -> bool:
        return self._layer is not None and vars(self.owner).get(self.name) is self._layer

    def receiver(self, instance: Any) -> Any:
        """Return what a method that is looked up on ``instance`` is to run on."""
        if not self.active:
            return instance
        try:
            return self._receiver(instance)
        except Exception:
            _logger.warning("%s.%s runs untraced", self.owner.__name__, self.name, exc_info=True)
            return instance


_numbers = itertools.count()


class _Redirected:
    """What stands in a class instead of a redirected method."""

    def __init__(self, original: Any, redirect: Redirect) -> None:
        self.original = original
        self._redirect = redirect

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self.original.__get__(None, owner)
        # Without a call where there is nothing to do, as some methods are looked up all the time.
        redirect = self._redirect
        if redirect.active and not redirect.is_idle():
            instance = redirect.receiver(instance)
        return self.original.__get__(instance, owner)


def _static(owner: Any, name: str) -> Any:
    try:
        return inspect.getattr_static(owner, name)
    except AttributeError:
        # A class names its module, and a module itself.
        module = getattr(owner, "__module__", owner.__name__)
        raise UnsupportedVersionError(
            f"{owner.__name__} has no {name}; this release of "
            f"{module.partition('.')[0]} cannot be patched. "
            "Install a release that mlflow-ctx-autolog supports."
        ) from None
