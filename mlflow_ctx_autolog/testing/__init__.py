"""Real servers for tests and demonstrations: an OpenAI endpoint, MLflow's, a collector.

Importing this package needs the standard library only; `TrackingServer` runs the installed
``mlflow`` as a separate process. `UnreliableProxy` stands before such a server and fails on
command. `DatabricksWorkspace` stands in for one. `StoredTrace` is what a
store has, with assertions. With pytest, `ctx_autolog_endpoint`, `ctx_autolog_store`,
`ctx_autolog_server` and `ctx_autolog_server_store` are fixtures of these.
"""

from .collector import Collector
from .databricks import DatabricksWorkspace
from .endpoint import OpenAIEndpoint
from .model import Answer, EndpointError, Request, ToolCall, script
from .proxy import Slow, Status, UnreliableProxy
from .server import TrackingServer
from .traces import StoredTrace, TrackingStore, stored_trace, stored_traces

__all__ = [
    "Answer",
    "Collector",
    "DatabricksWorkspace",
    "EndpointError",
    "OpenAIEndpoint",
    "Request",
    "Slow",
    "Status",
    "StoredTrace",
    "ToolCall",
    "TrackingServer",
    "TrackingStore",
    "UnreliableProxy",
    "script",
    "stored_trace",
    "stored_traces",
]
