"""What an HTTP answer means that is no success."""

from __future__ import annotations

import email.utils
import time
from typing import Any

from mlflow_ctx_autolog.exceptions import StoreError, shortened

__all__ = ["excerpt", "failure", "root_cause"]

# A store does not get to silence a worker for longer than this, in seconds.
_LONGEST_RETRY_AFTER = 300.0


def failure(answer: Any, log_in: str) -> StoreError:
    """Return an answer that is no success as an error.

    Args:
        answer: Of the ``requests`` library.
        log_in: What to set, and where, for the log-in to be another one.
    """
    if answer.status_code in (401, 403):
        return StoreError(f"it answered {answer.status_code} to this process's log-in; {log_in}")
    text = excerpt(answer.text).rstrip(".")
    return StoreError(
        f"it answered {answer.status_code} {answer.reason}: {text}",
        refused=answer.status_code in (400, 413, 422),
        retry_after=_seconds(answer.headers.get("Retry-After")),
        unsupported=answer.status_code in (404, 405, 501),
    )


def root_cause(error: BaseException) -> str:
    """Return what happened, without what each layer of the HTTP client has to say of it."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return excerpt(str(error)) or type(error).__name__


def excerpt(text: str) -> str:
    """Return a text on one line, as long as a message can bear."""
    return shortened(" ".join(text.split()))


def _seconds(retry_after: str | None) -> float | None:
    """Return what an HTTP ``Retry-After`` header says, a number or a date, in seconds."""
    if not retry_after:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER)
