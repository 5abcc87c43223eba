"""A threaded TCP server whose open connections can be dropped."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from typing import Any


class DroppingServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Serves each connection on a thread of its own, and forgets none of them."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1024

    def __init__(
        self, address: tuple[str, int], handler: type[socketserver.BaseRequestHandler]
    ) -> None:
        self._connections: set[socket.socket] = set()
        self._connections_lock = threading.Lock()
        super().__init__(address, handler)

    @property
    def port(self) -> int:
        """Where it listens on this host."""
        return int(self.server_address[1])

    def start(self, name: str) -> None:
        """Serve on a thread of that name, until `stop`."""
        self._thread = threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.02}, name=name, daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Stop listening, and cut the connections that are open."""
        self.shutdown()
        self.server_close()
        self._drop_connections()
        self._thread.join()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._connections_lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._connections_lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def _drop_connections(self) -> None:
        # In the middle of a reply if need be.
        with self._connections_lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):  # The client may have closed it first.
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent: clients that go away are expected here."""
