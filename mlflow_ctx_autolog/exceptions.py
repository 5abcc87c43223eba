"""The errors and the warning that this library raises."""

from __future__ import annotations

__all__ = [
    "CarrierError",
    "CtxAutologError",
    "CtxAutologWarning",
    "UnsupportedStoreError",
    "UnsupportedVersionError",
]


class CtxAutologError(Exception):
    """Base of every error of this library. Errors of your own code are never wrapped in it."""


class UnsupportedVersionError(CtxAutologError):
    """An installed mlflow, openai or pyspark is outside the range that can be patched safely."""


class UnsupportedStoreError(CtxAutologError):
    """The tracking store cannot take spans from Spark workers."""


class CarrierError(CtxAutologError, ValueError):
    """A carrier cannot be read: damaged, of a newer version, or no carrier at all."""


class CtxAutologWarning(UserWarning):
    """Category of every warning of this library, for ``warnings.filterwarnings``."""
