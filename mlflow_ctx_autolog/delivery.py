"""From a finished span to the store: a bounded buffer, batches, a sender thread of its own."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

from mlflow_ctx_autolog.config import Config

__all__ = ["Deliveries", "Delivery", "Destination"]

_logger = logging.getLogger(__name__)

SpanT = TypeVar("SpanT")


@dataclass(frozen=True)
class Destination:
    """Where a span is stored: a tracking store and an experiment in it.

    Without a tracking URI, only the driver can store it.
    """

    tracking_uri: str | None
    experiment_id: str


class Delivery(Generic[SpanT]):
    """Stores finished spans from a thread of its own, so that no caller waits for the store.

    - :meth:`submit` never blocks and never raises. Beyond ``config.max_waiting`` the new span is
      dropped and counted in :attr:`lost`.
    - Spans are sent in batches, in the order they finished: when ``config.batch_size`` have
      gathered, when the oldest has waited ``config.send_interval``, or at :meth:`flush`.
    - A batch that the store does not take stays at the head and is tried again, with a growing
      pause. One warning names the reason; another says when the store is back.
    - Spans that only the driver can store are kept until :meth:`take`.
    - A forked child starts with an empty buffer: the parent still has, and sends, what it held.

    Args:
        destination: Where all spans of this delivery go; another one needs another delivery, so
            that a store that is down holds up nobody else's spans.
        send: Stores a batch there, or raises. Storing a span again must leave one.
        accompany: Returns spans that go along with each batch and are not counted: those that
            are still open, so that what lies beneath them is never an orphan in the store.
        config: Sizes and times; may be replaced at any time through :attr:`config`.
    """

    # The pause after the first failed attempt, and the longest one, in seconds.
    _first_pause = 0.5
    _longest_pause = 30.0
    # How long a flush waits, in seconds, while the store is known to be down.
    _patience = 1.0
    # How long the thread stays, in seconds, when there is nothing to send.
    _idle_time = 60.0

    def __init__(
        self,
        destination: Destination,
        send: Callable[[Destination, Sequence[SpanT]], None],
        accompany: Callable[[Destination], Sequence[SpanT]] = lambda _: (),
        config: Config | None = None,
    ) -> None:
        self.destination = destination
        self.config = config or Config()
        self._send = send
        self._accompany = accompany
        self._reset()
        _deliveries.add(self)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[SpanT] = deque()
        self._oldest_since = 0.0
        self._flushes = 0
        self._failures = 0
        self._retry_at = 0.0
        self._store_is_down = False
        self._is_full = False
        self._thread: threading.Thread | None = None
        self.lost = 0
        self.delivered = 0
        self.last_error: Exception | None = None

    @property
    def waiting(self) -> int:
        """Finished spans that are not stored yet."""
        return len(self._waiting)

    def submit(self, span: SpanT) -> None:
        """Take a finished span. Returns at once."""
        with self._changed:
            if len(self._waiting) >= self.config.max_waiting:
                self._lose()
                return
            if not self._waiting:
                self._oldest_since = time.monotonic()
            self._waiting.append(span)
            if self._thread is None and self.destination.tracking_uri is not None:
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
        a second at most: a store that is down must not hold up the end of every task.
        """
        with self._changed:
            if self.destination.tracking_uri is None:
                return not self._waiting
            goal = self.delivered + len(self._waiting)
            if self._store_is_down:
                timeout = min(timeout, self._patience)
            self._flushes += 1
            self._retry_at = 0.0
            self._changed.notify_all()
            stored = self._changed.wait_for(lambda: self.delivered >= goal, timeout)
            self._flushes -= 1
            self._store_is_down = not stored
            return stored

    def take(self) -> list[SpanT]:
        """Give up what waits, for somebody else to deliver. A batch on its way may yet arrive."""
        with self._changed:
            taken = list(self._waiting)
            self._waiting = deque()
            self._is_full = False
            return taken

    def _lose(self) -> None:
        self.lost += 1
        if not self._is_full:
            self._is_full = True
            _logger.warning(
                "%d finished spans wait for the tracking store %s, the most that max_waiting "
                "allows; further spans of this worker are lost until it takes some. An earlier "
                "warning says why it does not; max_waiting can be raised.",
                len(self._waiting),
                self.destination.tracking_uri,
            )

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._waiting, self._idle_time):
                    self._thread = None
                    return
                while self._waiting and (pause := self._due_at() - time.monotonic()) > 0:
                    self._changed.wait(pause)
                if not self._waiting:
                    continue
                waiting = self._waiting
                spans = list(islice(waiting, self.config.batch_size))
            try:
                self._send(self.destination, [*spans, *self._accompany(self.destination)])
            except Exception as error:
                self._failed(error)
            else:
                self._stored(waiting, len(spans))

    def _due_at(self) -> float:
        """Return when the next batch is to be sent, on the monotonic clock."""
        batch_is_full = len(self._waiting) >= self.config.batch_size
        if self._failures or self._flushes or batch_is_full:
            return self._retry_at
        return self._oldest_since + self.config.send_interval

    def _failed(self, error: Exception) -> None:
        with self._changed:
            self._failures += 1
            self.last_error = error
            pause = min(self._first_pause * 2 ** (self._failures - 1), self._longest_pause)
            self._retry_at = time.monotonic() + pause
        if self._failures == 1:
            _logger.warning(
                "The tracking store %s did not take %d finished spans: %s: %s. They are kept and "
                "sent again; check that this worker can reach the store and may write to "
                "experiment %s.",
                self.destination.tracking_uri,
                len(self._waiting),
                type(error).__name__,
                error,
                self.destination.experiment_id,
            )

    def _stored(self, waiting: deque[SpanT], count: int) -> None:
        if self._failures:
            _logger.warning(
                "The tracking store %s takes spans again after %d failed attempts.",
                self.destination.tracking_uri,
                self._failures,
            )
        with self._changed:
            # Other than the one of today where the spans were taken meanwhile.
            for _ in range(count):
                waiting.popleft()
            self.delivered += count
            self._failures = 0
            self._retry_at = 0.0
            self._store_is_down = False
            self._is_full = False
            self._oldest_since = time.monotonic()
            self._changed.notify_all()


class Deliveries(Generic[SpanT]):
    """A process's deliveries, one for each destination, made on first use."""

    def __init__(self, make: Callable[[Destination], Delivery[SpanT]]) -> None:
        self._make = make
        self._by_destination: dict[Destination, Delivery[SpanT]] = {}

    def to(self, destination: Destination) -> Delivery[SpanT]:
        """Return the delivery to a destination."""
        found = self._by_destination.get(destination)
        # setdefault, since two threads may ask for the first time at once.
        return found or self._by_destination.setdefault(destination, self._make(destination))

    def submit(self, destination: Destination, span: SpanT) -> None:
        """Take a finished span. Returns at once."""
        self.to(destination).submit(span)

    def flush(self, timeout: float) -> bool:
        """Send all that waits; return whether it was stored within ``timeout`` seconds in all."""
        deadline = time.monotonic() + timeout
        deliveries = list(self._by_destination.values())
        flushed = [each.flush(max(0.0, deadline - time.monotonic())) for each in deliveries]
        return all(flushed)


_deliveries: weakref.WeakSet[Delivery[Any]] = weakref.WeakSet()


def _reset_all() -> None:
    for delivery in _deliveries:
        delivery._reset()


os.register_at_fork(after_in_child=_reset_all)
