"""From a finished span to the spool: by the call that ended it, or by a thread for a slow disk."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from mlflow_ctx_autolog.delivery.records import Record

__all__ = ["Intake", "start_thread"]

# Bytes that any disk should take in a second.
_SPEED = 50e6


class Intake:
    """Has records written, so that no call waits for a slow disk.

    A call writes its record itself, which takes less than waking a thread would. Once a write takes
    long, a thread writes for a while, and records wait in memory for it.

    Args:
        add: Writes records within a time, or without limit for -1; returns those that there is no
            room for, None where it was not in time.
        limit: Returns how many bytes of records may wait in memory, unless one is larger.
        written: Is told that a number of records were written.
        lose: Is given those that there is no room for.
    """

    # How long a caller waits for others that are writing, in seconds, to have its span safe on the
    # disk; and for room in memory, where the disk is slow and memory full.
    patience_with_disk = 0.001
    patience_without_room = 1.0
    # A write that takes longer, in seconds, is one of a slow disk; callers stay away from it then.
    slow_write = 0.02
    time_of_slow_disk = 5.0
    # How long the thread stays, in seconds, when there is nothing to do.
    idle_time = 60.0

    def __init__(
        self,
        add: Callable[[Sequence[Record], float], list[Record] | None],
        limit: Callable[[], int],
        written: Callable[[int], None],
        lose: Callable[[Sequence[Record]], None],
    ) -> None:
        self._add = add
        self._limit = limit
        self._tell_written = written
        self._lose = lose
        self._lock = threading.Lock()
        self._came = threading.Condition(self._lock)  # What the thread waits for.
        self._written = threading.Condition(self._lock)  # What callers wait for.
        self._incoming: deque[Record] = deque()
        self._being_written = 0
        self._slow_until = 0.0
        self._waiters = 0
        self._thread: threading.Thread | None = None
        self.bytes = 0

    @property
    def pending(self) -> int:
        """Records that are not written yet."""
        return len(self._incoming) + self._being_written

    def put(self, record: Record) -> None:
        """Have a record written, for a call that waits: now, or soon where the disk is slow."""
        with self._lock:
            # Nor is one overtaken that goes by the thread.
            is_prompt = not self._incoming and time.monotonic() >= self._slow_until
            self._being_written += 1
        try:
            if not (is_prompt and self._write(record)):
                self.put_later([record], self.patience_without_room)
        finally:
            with self._lock:
                self._being_written -= 1
                if self._waiters:
                    self._written.notify_all()

    def put_later(self, records: Sequence[Record], patience: float) -> None:
        """Have the thread write records; lose those that memory has no room for in time.

        Args:
            records: What to write.
            patience: Seconds to wait for room at most, for all of them.
        """
        deadline = time.monotonic() + patience
        for record in records:
            size = len(record.payload)
            with self._lock:
                if not self._wait(lambda size=size: self._has_room(size), deadline):  # type: ignore[misc]
                    has_room = False
                else:
                    has_room = True
                    self._incoming.append(record)
                    self.bytes += size
                    if self._thread is None:
                        self._thread = start_thread(self._write_all, "writer")
                    self._came.notify()
            if not has_room:
                self._lose([record])

    def wait(self, timeout: float) -> bool:
        """Wait until all is written; return whether it is, in time."""
        with self._lock:
            return self._wait(lambda: not self.pending, time.monotonic() + timeout)

    def _wait(self, condition: Callable[[], bool], deadline: float) -> bool:
        self._waiters += 1
        try:
            return self._written.wait_for(condition, max(0.0, deadline - time.monotonic()))
        finally:
            self._waiters -= 1

    def _has_room(self, size: int) -> bool:
        return not self._incoming or self.bytes + size <= self._limit()

    def _write(self, record: Record) -> bool:
        """Write a record in this thread; return whether others have let it."""
        began = time.monotonic()
        rejected = self._add([record], self.patience_with_disk)
        if rejected is None:
            return False
        self._note([record], rejected, time.monotonic() - began)
        return True

    def _write_all(self) -> None:
        while True:
            with self._lock:
                if not self._came.wait_for(lambda: self._incoming, self.idle_time):
                    self._thread = None
                    return
                records = list(self._incoming)
            began = time.monotonic()
            rejected = self._add(records, -1)
            seconds = time.monotonic() - began
            with self._lock:
                for record in records:
                    self._incoming.popleft()
                    self.bytes -= len(record.payload)
                self._written.notify_all()
            self._note(records, rejected or [], seconds)

    def _note(self, records: Sequence[Record], rejected: Sequence[Record], seconds: float) -> None:
        if seconds > self.slow_write + sum(len(record.payload) for record in records) / _SPEED:
            self._slow_until = time.monotonic() + self.time_of_slow_disk
        if rejected:
            self._lose(rejected)
        self._tell_written(len(records))


def start_thread(run: Callable[[], None], role: str) -> threading.Thread | None:
    """Start a thread of ours; return None where this process may have none, as when it is ending.

    Args:
        run: What it does.
        role: What it is, for its name.
    """
    thread = threading.Thread(target=run, name=f"mlflow-ctx-autolog-{role}", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread
