"""From a finished span to the store: a bounded buffer, batches, one sender thread a process."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from mlflow_ctx_autolog.config import Config

__all__ = ["Delivery", "Destination"]

_logger = logging.getLogger(__name__)

SpanT = TypeVar("SpanT")
_SentT = TypeVar("_SentT", contravariant=True)


@dataclass(frozen=True)
class Destination:
    """Where a span is stored: a tracking store and an experiment in it."""

    tracking_uri: str
    experiment_id: str


class Send(Protocol[_SentT]):
    """Stores spans, or raises. Storing a span again must leave one."""

    def __call__(self, destination: Destination, spans: Sequence[_SentT], /) -> None: ...


class Delivery(Generic[SpanT]):
    """Stores finished spans from a thread of its own, so that no caller waits for the store.

    - :meth:`submit` never blocks and never raises. Beyond ``config.max_waiting`` the new span is
      dropped and counted in :attr:`lost`.
    - Spans are sent in batches, in the order they finished: when ``config.batch_size`` have
      gathered, when the oldest has waited ``config.send_interval``, or at :meth:`flush`.
    - A batch that the store does not take stays at the head and is tried again, with a growing
      pause. One warning names the reason; another says when the store is back.
    - A forked child starts with an empty buffer: the parent still has, and sends, what it held.

    Args:
        send: Stores one batch, or raises.
        accompany: Called before each batch is sent; the spans it returns for the batch's
            destination go along, and are not counted. For spans that are still open, so that
            what lies beneath them is never an orphan in the store.
        config: Sizes and times; may be replaced at any time through :attr:`config`.
    """

    # The pause after the first failed attempt, and the longest one, in seconds.
    _first_pause = 0.5
    _longest_pause = 30.0
    # How long a flush waits, in seconds, while the store is known to be down.
    _patience = 1.0

    def __init__(
        self,
        send: Send[SpanT],
        accompany: Callable[[Destination], Sequence[SpanT]] = lambda _: (),
        config: Config | None = None,
    ) -> None:
        self._send = send
        self._accompany = accompany
        self.config = config or Config()
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Destination, SpanT]] = deque()
        self._oldest_since = 0.0
        self._flushes = 0
        self._failures = 0
        self._retry_at = 0.0
        self._store_is_down = False
        self._thread: threading.Thread | None = None
        self.lost = 0
        self.delivered = 0

    @property
    def waiting(self) -> int:
        """Finished spans that are not stored yet."""
        return len(self._waiting)

    def submit(self, destination: Destination, span: SpanT) -> None:
        """Take a finished span. Returns at once."""
        with self._changed:
            if len(self._waiting) >= self.config.max_waiting:
                self.lost += 1
                if self.lost == 1:
                    _logger.warning(
                        "%d finished spans wait for the tracking store, the most that "
                        "max_waiting allows; further spans of this worker are lost until it "
                        "takes some. Raise max_waiting, or see the earlier warning for why the "
                        "store does not take them.",
                        len(self._waiting),
                    )
                return
            if not self._waiting:
                self._oldest_since = time.monotonic()
            self._waiting.append((destination, span))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="mlflow-ctx-autolog-delivery", daemon=True
                )
                self._thread.start()
            # Waking the sender for each span would cost more than storing it.
            if len(self._waiting) in (1, self.config.batch_size):
                self._changed.notify_all()

    def flush(self, timeout: float) -> bool:
        """Send all that waits now; return whether it was stored within ``timeout`` seconds.

        The full timeout is given to a store once. While it is known not to answer, a flush waits
        ``_patience`` at most: a store that is down must not hold up the end of every task.
        """
        with self._changed:
            if self._store_is_down:
                timeout = min(timeout, self._patience)
            self._flushes += 1
            self._retry_at = 0.0
            self._changed.notify_all()
            stored = self._changed.wait_for(lambda: not self._waiting, timeout)
            self._flushes -= 1
            self._store_is_down = not stored
            return stored

    def _run(self) -> None:
        while True:
            with self._changed:
                while (pause := self._seconds_until_due()) is None or pause > 0:
                    self._changed.wait(pause)
                destination, spans = self._next_batch()
            self._attempt(destination, spans)

    def _seconds_until_due(self) -> float | None:
        """Seconds until the next batch is to be sent; None where nothing waits."""
        if not self._waiting:
            return None
        now = time.monotonic()
        due = self._retry_at
        if not self._flushes and len(self._waiting) < self.config.batch_size:
            due = max(due, self._oldest_since + self.config.send_interval)
        return due - now

    def _next_batch(self) -> tuple[Destination, list[SpanT]]:
        destination = self._waiting[0][0]
        spans: list[SpanT] = []
        for other, span in self._waiting:
            if other != destination or len(spans) == self.config.batch_size:
                break
            spans.append(span)
        return destination, spans

    def _attempt(self, destination: Destination, spans: list[SpanT]) -> None:
        try:
            self._send(destination, [*spans, *self._accompany(destination)])
        except Exception as error:
            self._failed(destination, error)
        else:
            self._stored(destination, len(spans))

    def _failed(self, destination: Destination, error: Exception) -> None:
        with self._changed:
            self._failures += 1
            pause = min(self._first_pause * 2 ** (self._failures - 1), self._longest_pause)
            self._retry_at = time.monotonic() + pause
            self._changed.notify_all()
        if self._failures == 1:
            _logger.warning(
                "The tracking store %s did not take %d finished spans: %s: %s. They are kept and "
                "sent again; check that this worker can reach the store and may write to "
                "experiment %s.",
                destination.tracking_uri,
                len(self._waiting),
                type(error).__name__,
                error,
                destination.experiment_id,
            )

    def _stored(self, destination: Destination, count: int) -> None:
        with self._changed:
            if self._failures:
                _logger.warning(
                    "The tracking store %s takes spans again after %d failed attempts.",
                    destination.tracking_uri,
                    self._failures,
                )
            for _ in range(count):
                self._waiting.popleft()
            self.delivered += count
            self._failures = 0
            self._retry_at = 0.0
            self._store_is_down = False
            self._oldest_since = time.monotonic()
            self._changed.notify_all()
