"""What an HTTP answer of a store means."""

from __future__ import annotations

import email.utils
import math
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin

from mlflow_ctx_autolog.exceptions import StoreError, shortened

__all__ = ["Answer", "excerpt", "failure", "root_cause"]

# A store does not get to silence a worker for longer than this, in seconds.
_LONGEST_RETRY_AFTER = 300.0


@dataclass(frozen=True)
class Answer:
    """What a server has answered.

    Args:
        status: HTTP's, such as 200.
        reason: The words beside it.
        headers: What has ``get``, by name; whether upper or lower case is no matter.
        content: The body.
    """

    status: int
    reason: str
    headers: Any
    content: bytes

    @property
    def kind(self) -> str:
        """The content's type, such as ``application/json``; ``nothing`` where none is named."""
        named = str(self.headers.get("Content-Type") or "nothing")
        return named.partition(";")[0].strip().lower()

    @property
    def text(self) -> str:
        """The content as a text, as well as it can be read."""
        return self.content.decode(errors="replace")


def failure(answer: Answer, log_in: str, url: str = "") -> StoreError:
    """Return an answer that is no success as an error.

    Args:
        answer: The answer.
        log_in: What to set, and where, for the log-in to be another one.
        url: What was asked, for a redirection to be named in full.
    """
    if answer.status in (401, 403):
        return StoreError(f"it answered {answer.status} to this process's log-in; {log_in}")
    if 300 <= answer.status < 400:
        target = urljoin(url, answer.headers.get("Location") or "an address that it does not name")
        return StoreError(
            f"it answered {answer.status} and sends to {target}, where nothing was sent; if that "
            "is the store, set its address, up to the path of the request, in place of this one",
            redirect=target,
        )
    text = excerpt(answer.text).rstrip(".")
    return StoreError(
        f"it answered {answer.status} {answer.reason}: {text}",
        refused=answer.status in (400, 413, 422),
        failed=answer.status >= 500 and answer.status not in (501, 502, 503, 504),
        retry_after=_seconds(answer.headers.get("Retry-After")),
        unsupported=answer.status in (404, 405, 501),
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
    """Return what an HTTP ``Retry-After`` header says, a number or a date, in seconds.

    Nothing where it says no moment to come.
    """
    if not retry_after:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (OverflowError, TypeError, ValueError):
            return None
    if math.isnan(seconds) or seconds <= 0:
        return None
    return min(seconds, _LONGEST_RETRY_AFTER)
