"""The driver's end of the way home: spans that workers could not store themselves."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Sequence
from typing import Any

from mlflow_ctx_autolog.delivery import Deliveries, Delivery, Destination
from mlflow_ctx_autolog.tracing import (
    add_to_trace,
    current_tracking_uri,
    send_spans,
    span_from_bytes,
    store_takes_spans,
)

__all__ = ["Arrivals", "Arrived"]

_logger = logging.getLogger(__name__)

# Tracking URI (None: only the driver can store it), experiment id, the span's bytes, and why the
# worker did not store it.
Arrived = tuple[str | None, str, bytes, str]


class Arrivals:
    """Stores what comes home.

    Where the tracking store takes single spans, they are delivered to it as on a worker; where it
    does not, they join the driver's own open trace, and MLflow stores them with its root.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deliveries: Deliveries[Any] = Deliveries(self._new_delivery)
        self._warned: set[str] = set()

    def receive(self, arrived: Sequence[Arrived]) -> None:
        """Take the spans of one task. Never raises: Spark calls this."""
        try:
            for tracking_uri, experiment_id, payload, reason in arrived:
                span = span_from_bytes(payload)
                if tracking_uri is not None:
                    self._warn(
                        f"unreachable {tracking_uri}",
                        f"Workers could not store spans in {tracking_uri}, so they come home and "
                        f"the driver stores them: {reason}",
                    )
                if store_takes_spans():
                    uri = tracking_uri or current_tracking_uri()
                    self._deliveries.submit(Destination(uri, experiment_id), span)
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
        return self._deliveries.flush(timeout)

    def _new_delivery(self, destination: Destination) -> Delivery[Any]:
        # Once is enough, however many destinations there are.
        atexit.unregister(self.flush)
        atexit.register(self.flush, 30.0)
        return Delivery(destination, send_spans)

    def _warn(self, subject: str, message: str) -> None:
        with self._lock:
            if subject in self._warned:
                return
            self._warned.add(subject)
        _logger.warning("%s", message)
