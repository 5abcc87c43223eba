"""The driver's end of the way home: spans that workers could not store themselves."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Sequence
from typing import Any

from mlflow_ctx_autolog.delivery import Delivery, Destination
from mlflow_ctx_autolog.tracing import add_to_trace, send_spans, span_from_bytes

__all__ = ["Arrivals", "Arrived"]

_logger = logging.getLogger(__name__)

# Tracking URI (None: only the driver can store it), experiment id, the span's bytes, and why the
# worker did not store it.
Arrived = tuple[str | None, str, bytes, str]


class Arrivals:
    """Stores what comes home: in the driver's open trace, or in the store that workers missed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deliveries: dict[Destination, Delivery[Any]] = {}
        self._warned: set[str] = set()

    def receive(self, arrived: Sequence[Arrived]) -> None:
        """Take the spans of one task. Never raises: Spark calls this."""
        try:
            for tracking_uri, experiment_id, payload, reason in arrived:
                span = span_from_bytes(payload)
                if tracking_uri is not None:
                    self._deliver(Destination(tracking_uri, experiment_id), span, reason)
                elif not add_to_trace(span):
                    self._warn(
                        "late",
                        f"Spans of trace {span.trace_id} came home after the driver's span had "
                        "ended, and are lost. Run the action inside the span.",
                    )
        except Exception as error:
            self._warn("broken", f"Spans that came home could not be read: {error!r}")

    def flush(self, timeout: float) -> bool:
        """Store what can be stored within the timeout; return whether nothing waits."""
        with self._lock:
            deliveries = list(self._deliveries.values())
        flushed = [delivery.flush(timeout) for delivery in deliveries]
        return all(flushed)

    def _deliver(self, destination: Destination, span: Any, reason: str) -> None:
        self._warn(
            f"unreachable {destination}",
            f"Workers could not store spans in {destination.tracking_uri}, so they come home and "
            f"the driver stores them: {reason}",
        )
        with self._lock:
            if not self._deliveries:
                atexit.register(self.flush, 30.0)
            if destination not in self._deliveries:
                self._deliveries[destination] = Delivery(destination, send_spans)
        self._deliveries[destination].submit(span)

    def _warn(self, subject: str, message: str) -> None:
        with self._lock:
            if subject in self._warned:
                return
            self._warned.add(subject)
        _logger.warning("%s", message)
