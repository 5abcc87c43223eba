"""When a batch goes to a store, how large it is, and which record the store fails over."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable

from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.exceptions import StoreError

__all__ = ["Pacing"]


class Pacing:
    """Says when the next batch goes and how large it is, by how the last ones went.

    Not for several threads at once.

    Args:
        config: Sizes and times.

    Attributes:
        failures: Attempts that failed, one after the other.
        retry_at: When to try again after them, on the monotonic clock.
        must_wait: Whether that is what the store has asked for.
    """

    # The pause after the first failed attempt, and the longest one, in seconds.
    first_pause, longest_pause = 0.5, 30.0
    # The longest interval between batches, in seconds, of a long task or a slow store.
    longest_interval = 60.0
    # The share of its time that this process may keep the store busy.
    share_of_store = 0.1
    # How often the store may fail over a batch before the batch is suspected rather than the store,
    # and over one record, besides once, before that is to blame.
    failures_of_store, failures_of_one = 3, 1
    # Attempts in a row that it may take to find that one.
    attempts_to_find = 12

    def __init__(self, config: Config) -> None:
        self.config = config
        self.failures = 0
        self.retry_at = 0.0
        self.must_wait = False
        self._batches = 0
        self._batch_limit: int | None = None
        self._oldest_since = 0.0
        self._last_sent = 0.0
        self._sending_since: float | None = None
        self._latest = math.inf
        self._answer_seconds = 0.0
        # By key: records stored when it was suspected first, and how often it has failed alone.
        self._suspects: dict[str, tuple[int, int]] = {}

    def batch_size(self) -> int:
        """Return how many records go in one request: more, where the store is slow."""
        if self._batch_limit is not None:
            return self._batch_limit
        return self.config.batch_size * min(10, 1 + int(2 * self._answer_seconds))

    def expected_seconds(self) -> float:
        """Return what the store's last answer took, or what the next has taken already."""
        since = self._sending_since
        return max(self._answer_seconds, 0.0 if since is None else time.monotonic() - since)

    def expect_less(self) -> None:
        """Lest one slow answer be the last that is waited for."""
        self._answer_seconds /= 2

    def due_at(self, waiting: int, *, hurries: bool) -> float:
        """Return when the next batch is to be sent, on the monotonic clock.

        Args:
            waiting: Records that there are.
            hurries: Whether somebody waits for them to be stored.
        """
        if self.failures or hurries:
            return self.retry_at
        # Sent less and less often by a process that lasts, and never so often as to crowd the
        # store.
        breath = min(self._answer_seconds / self.share_of_store, self.longest_interval)
        not_before = self._last_sent + breath
        if waiting >= self.batch_size():
            return not_before
        interval = self.config.send_interval * 2.0 ** min(self._batches, 16)
        due = min(self._oldest_since + min(interval, self.longest_interval), self._latest)
        return max(not_before, due)

    def soon(self) -> bool:
        """Send within the first interval, however long it is now; return whether that is new."""
        is_new = self._latest == math.inf
        self._latest = min(self._latest, time.monotonic() + self.config.send_interval)
        return is_new

    def begin_anew(self) -> None:
        """All is stored: what comes next is sent as soon as the first was."""
        self._batches = 0
        self._batch_limit = None

    def first_came(self) -> None:
        """There is something again, after there was nothing."""
        self._oldest_since = max(self._oldest_since, time.monotonic())

    def sending(self) -> float:
        """A batch is on its way; return since when, on the monotonic clock."""
        self._sending_since = time.monotonic()
        self._latest = math.inf
        return self._sending_since

    def answered(self) -> None:
        """It is no more, one way or the other."""
        self._sending_since = None

    def stored(self, seconds: float, keys: Iterable[str]) -> None:
        """A batch with these keys was stored, which took some seconds."""
        self.failures = 0
        self.retry_at = 0.0
        self.must_wait = False
        self._batches += 1
        self._answer_seconds = seconds
        self._last_sent = self._oldest_since = time.monotonic()
        for key in keys:
            self._suspects.pop(key, None)
        self._grow()

    def out_of_the_way(self, key: str) -> None:
        """A record is no more sent that the store did not take."""
        self.failures = 0
        self._suspects.pop(key, None)
        self._grow()

    def failed(self, error: StoreError, *, alone: bool) -> None:
        """An attempt has failed.

        Args:
            error: The store's.
            alone: Whether there was nothing else to be sent.
        """
        self.failures += 1
        # Apart from those of other processes, which have all seen the store return.
        scatter = random.uniform(0.75, 1.25)
        failures, first_pause = self.failures, self.first_pause
        if self._suspects and error.failed and not alone:
            # To find the record that it fails over is a matter of a few attempts.
            failures = max(1, failures - self.attempts_to_find)
            first_pause /= 5 if failures == 1 else 1
        pause = min(first_pause * 2.0 ** min(failures - 1, 16), self.longest_pause) * scatter
        if error.retry_after is not None:
            pause = error.retry_after + scatter
        self.must_wait = error.retry_after is not None
        self.retry_at = time.monotonic() + pause

    def suspects(self, error: StoreError) -> bool:
        """Whether a failure may be that of a record rather than of the store."""
        return error.failed and (self.failures >= self.failures_of_store or bool(self._suspects))

    def halve(self, keys: Iterable[str], delivered: int | None) -> None:
        """Send half as many records at once.

        Args:
            keys: Those of the batch that was too many.
            delivered: Records stored so far, where the store did not say that they are to blame.
        """
        keys = list(keys)
        self._batch_limit = math.ceil(len(keys) / 2)
        if delivered is not None:
            for key in keys:
                self._suspects.setdefault(key, (delivered, 0))

    def is_to_blame(self, key: str, delivered: int) -> bool:
        """Whether the store has failed over a record alone while it has taken others.

        Args:
            key: The record's, over which it has failed once more.
            delivered: Records stored so far.
        """
        stored_then, failures = self._suspects.get(key, (delivered, 0))
        self._suspects[key] = (stored_then, failures + 1)
        return delivered > stored_then and failures >= self.failures_of_one

    def forget_suspects(self) -> None:
        """Somebody else has all records."""
        self._suspects.clear()

    def _grow(self) -> None:
        if self._batch_limit is not None:
            self._batch_limit = min(2 * self._batch_limit, self.config.batch_size)
