"""Real servers for tests and demonstrations: an OpenAI endpoint, MLflow's, a collector.

Importing this package needs the standard library only; `TrackingServer` runs the installed
``mlflow`` as a separate process. `UnreliableProxy` stands before such a server and fails on
command. `DatabricksWorkspace` stands in for one.
"""

from .collector import Collector
from .databricks import DatabricksWorkspace
from .endpoint import OpenAIEndpoint
from .model import Answer, EndpointError, Request, ToolCall, script
from .proxy import Slow, Status, UnreliableProxy
from .server import TrackingServer

__all__ = [
    "Answer",
    "Collector",
    "DatabricksWorkspace",
    "EndpointError",
    "OpenAIEndpoint",
    "Request",
    "Slow",
    "Status",
    "ToolCall",
    "TrackingServer",
    "UnreliableProxy",
    "script",
]
