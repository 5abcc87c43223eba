"""Real servers for tests and demonstrations: an OpenAI endpoint and an MLflow tracking server.

Importing this package needs the standard library only; `TrackingServer` runs the installed
``mlflow`` as a separate process. `UnreliableProxy` stands before such a server and fails on
command.
"""

from .endpoint import EndpointError, OpenAIEndpoint, Request
from .proxy import Slow, Status, UnreliableProxy
from .server import TrackingServer

__all__ = [
    "EndpointError",
    "OpenAIEndpoint",
    "Request",
    "Slow",
    "Status",
    "TrackingServer",
    "UnreliableProxy",
]
