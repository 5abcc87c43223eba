"""Real servers for tests and demonstrations: an OpenAI endpoint and an MLflow tracking server.

Importing this package needs the standard library only; `TrackingServer` runs the installed
``mlflow`` as a separate process.
"""

from .endpoint import EndpointError, OpenAIEndpoint, Request
from .server import TrackingServer

__all__ = ["EndpointError", "OpenAIEndpoint", "Request", "TrackingServer"]
