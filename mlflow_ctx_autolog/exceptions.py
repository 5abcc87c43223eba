"""The errors and the warning that this library raises."""

from __future__ import annotations

import logging
import os
import threading
from types import TracebackType
from typing import Any

from mlflow_ctx_autolog.log_ins import without_log_ins

__all__ = [
    "BudgetExceeded",
    "CarrierError",
    "CtxAutologError",
    "CtxAutologWarning",
    "DiagnosisError",
    "IncompleteTraceError",
    "StoreError",
    "UnsupportedStoreError",
    "UnsupportedVersionError",
    "shortened",
    "warn_once",
    "without_own_frames",
]

_warned: set[tuple[str, str]] = set()
_warned_lock = threading.Lock()


def _forget_lock() -> None:
    # Another thread of the parent may have held it.
    global _warned_lock
    _warned_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_lock)


def shortened(text: str) -> str:
    """Return a text as long as a message can bear."""
    return text if len(text) <= 200 else f"{text[:197]}..."


def warn_once(logger: logging.Logger, subject: str, message: str) -> None:
    """Log a warning, unless this process has warned of the same subject."""
    with _warned_lock:
        if (logger.name, subject) in _warned:
            return
        _warned.add((logger.name, subject))
    logger.warning("%s", without_log_ins(message))


def without_own_frames(error: BaseException) -> None:
    """Take the frames of this library out of the tracebacks of an error, and of all it holds."""
    seen: set[int] = set()
    found: list[BaseException | None] = [error]
    while found:
        each = found.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        found += [each.__cause__, each.__context__]
        # Of a group, which Python has from 3.11 on.
        found += [one for one in getattr(each, "exceptions", ()) if isinstance(one, BaseException)]
        traceback = _of_others(each.__traceback__)
        if traceback is not None:
            each.__traceback__ = traceback
        while traceback is not None:
            traceback.tb_next = _of_others(traceback.tb_next)
            traceback = traceback.tb_next


def _of_others(traceback: TracebackType | None) -> TracebackType | None:
    """Return a traceback from the first frame on that is not this library's."""
    while traceback is not None and _is_ours(traceback):
        traceback = traceback.tb_next
    return traceback


def _is_ours(traceback: TracebackType) -> bool:
    name = traceback.tb_frame.f_globals.get("__name__", "")
    return str(name).partition(".")[0] == __name__.partition(".")[0]


class CtxAutologError(Exception):
    """Base of every error of this library. Errors of your own code are never wrapped in it."""


class UnsupportedVersionError(CtxAutologError):
    """An installed mlflow, openai or pyspark is outside the range that can be patched safely."""


class UnsupportedStoreError(CtxAutologError):
    """The tracking store cannot take spans from Spark workers."""


class CarrierError(CtxAutologError, ValueError):
    """A carrier cannot be read: damaged, of a newer version, or no carrier at all."""


class StoreError(CtxAutologError):
    """The tracking store did not take what it was sent, or did not answer.

    Args:
        message: What happened.
        refused: Whether it answered that it will not have this, rather than not now.
        retry_after: Seconds that it asks to be left alone, if it does.
        unsupported: Whether it does not know what it was asked: an old release, a file store.
        failed: Whether it answered that it failed over this, as over one span among many.
        redirect: The address that it sends to instead, where nothing was sent.
        rejected: How many of the spans it has refused for good, having taken the others.
    """

    def __init__(
        self,
        message: str,
        *,
        refused: bool = False,
        retry_after: float | None = None,
        unsupported: bool = False,
        failed: bool = False,
        redirect: str | None = None,
        rejected: int = 0,
    ) -> None:
        super().__init__(without_log_ins(message))
        self.refused = refused
        self.retry_after = retry_after
        self.unsupported = unsupported
        self.failed = failed
        self.redirect = redirect
        self.rejected = rejected


class BudgetExceeded(CtxAutologError):  # noqa: N818 - what it is, rather than what went wrong
    """In a worker: a model call was not made, since the job has spent what it may.

    Args:
        message: Which limit is reached, what was spent on what, and what to do.
        spent: ``calls``, ``repeats`` and ``cost`` (in US dollars) so far.
    """

    def __init__(self, message: str, spent: Any = None) -> None:
        super().__init__(message)
        self.spent = dict(spent or {})


class IncompleteTraceError(CtxAutologError):
    """With ``strict=True``: the store does not have all spans that were made.

    Args:
        message: What is missing, why, and what to do.
        receipt: The :class:`Receipt` of the trace.
    """

    def __init__(self, message: str, receipt: Any = None) -> None:
        super().__init__(message)
        self.receipt = receipt


class DiagnosisError(CtxAutologError):
    """With ``strict=True``: something on the driver will make spans go missing.

    Args:
        message: What was found, and what to do.
        findings: The :class:`Finding` of each check that did not pass.
    """

    def __init__(self, message: str, findings: Any = ()) -> None:
        super().__init__(message)
        self.findings = tuple(findings)


class CtxAutologWarning(UserWarning):
    """Category of every warning of this library, for ``warnings.filterwarnings``."""
