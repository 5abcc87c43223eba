"""A stand-in for the tracing part of a Databricks workspace."""

from __future__ import annotations

import json
import re
from typing import Any

from .http import HTTPServer, Received, Reply

_EXPERIMENT = "/api/2.0/mlflow/experiments/get"
_TRACES = "/api/3.0/mlflow/traces"
_TRACE = re.compile(r"/api/[23]\.0/mlflow/traces/([^/?]+)(?:/([^?]*))?")
_INFO = re.compile(r"/api/4\.0/mlflow/traces/[^/]+/([0-9a-f]{32})/info")


class DatabricksWorkspace(HTTPServer):
    """Answers the requests that MLflow makes of a workspace whose traces are in an experiment.

    It was made from MLflow's client, and has never been compared with the real service. As there,
    a trace is stored in one piece: its info, and its spans as a file in a storage that takes
    signed addresses. With ``location``, as ``"catalog.schema.prefix"``, its experiment has a Unity
    Catalog trace location: spans are posted by OTLP, the info of a trace by itself. Give
    `environment` to the process that is to use it.

    It refuses what the documentation of the service says that it refuses: a token that has ended,
    another table than the location's own, what is no OTLP, a body that is too large, and more
    requests than it has time for. None of its limits is known to be the service's.

    Args:
        location: The location of the experiment's traces; None for the experiment itself.
        longest: Bytes of a body at most.
    """

    def __init__(self, location: str | None = None, longest: int = 10_000_000) -> None:
        self.location = location
        self.longest = longest
        self.experiment_id = "1001"
        self.token = "not-a-token"
        self._busy = 0
        self._spans: list[tuple[str, bytes]] = []
        self._infos: dict[str, dict[str, Any]] = {}
        self._files: dict[str, bytes] = {}
        super().__init__()

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which MLflow and the Databricks SDK find it and log in."""
        return {"DATABRICKS_HOST": self.uri, "DATABRICKS_TOKEN": self.token}

    def renew_token(self) -> str:
        """Take no more requests with the token of so far; return another one."""
        with self._lock:
            self.token = f"{self.token}-renewed"
            return self.token

    def throttle(self, requests: int) -> None:
        """Answer so many requests for spans with 429."""
        with self._lock:
            self._busy = requests

    @property
    def infos(self) -> dict[str, dict[str, Any]]:
        """The infos of traces, by the id of each, as JSON objects."""
        with self._lock:
            return dict(self._infos)

    @property
    def spans(self) -> list[tuple[str, bytes]]:
        """The OTLP messages that were posted to tables, each with the table's name."""
        with self._lock:
            return list(self._spans)

    def reply(self, request: Received) -> Reply:
        """See `HTTPServer`."""
        path = request.path.partition("?")[0]
        if path.startswith("/storage/"):
            return self._storage(request, path)
        if path.startswith("/.well-known/"):
            return Reply(404)
        if request.headers.get("authorization") != f"Bearer {self.token}":
            return _json({"error_code": "UNAUTHENTICATED", "message": "no token"}, 401)
        if path == _EXPERIMENT:
            return _json({"experiment": self._experiment()})
        if (request.method, path) == ("POST", _TRACES):
            return self._start_trace(json.loads(request.body)["trace"])
        if self.location is not None and path == "/api/2.0/otel/v1/traces":
            return self._take_spans(request)
        if self.location is not None and (found := _INFO.fullmatch(path)):
            info = self._infos[found[1]] = json.loads(request.body)
            return _json(info)
        if (found := _TRACE.fullmatch(path)) and found[1] in self._infos:
            return self._of_trace(found[1], found[2] or "", request.body)
        return _json({"error_code": "ENDPOINT_NOT_FOUND", "message": f"No API at {path}"}, 404)

    def _take_spans(self, request: Received) -> Reply:
        table = request.headers.get("x-databricks-uc-table-name")
        if table != f"{self.location}_otel_spans":
            return _json({"error_code": "TABLE_DOES_NOT_EXIST", "message": f"no {table}"}, 404)
        if request.headers.get("content-type") != "application/x-protobuf":
            return _json({"error_code": "BAD_REQUEST", "message": "no protobuf"}, 415)
        if len(request.body) > self.longest:
            return _json({"error_code": "REQUEST_LIMIT_EXCEEDED", "message": "too large"}, 413)
        if self._busy:
            self._busy -= 1
            reply = _json({"error_code": "RESOURCE_EXHAUSTED", "message": "too many"}, 429)
            reply.headers["Retry-After"] = "1"
            return reply
        self._spans.append((table, request.body))
        return Reply(200, b"", {"Content-Type": "application/x-protobuf"})

    def _experiment(self) -> dict[str, Any]:
        experiment: dict[str, Any] = {
            "experiment_id": self.experiment_id,
            "name": "/Shared/traces",
            "artifact_location": f"dbfs:/databricks/mlflow-tracking/{self.experiment_id}",
            "lifecycle_stage": "active",
        }
        if self.location is not None:
            tags = {
                "mlflow.experiment.databricksTraceDestinationPath": self.location,
                "mlflow.experiment.databricksTraceSpanStorageTable": f"{self.location}_otel_spans",
            }
            experiment["tags"] = [{"key": name, "value": value} for name, value in tags.items()]
        return experiment

    def _start_trace(self, trace: dict[str, Any]) -> Reply:
        info = trace["trace_info"]
        trace_id = info["trace_id"]
        location = f"dbfs:/databricks/mlflow-tracking/{self.experiment_id}/{trace_id}/artifacts"
        info.setdefault("tags", {})["mlflow.artifactLocation"] = location
        self._infos[trace_id] = info
        return _json({"trace": trace})

    def _of_trace(self, trace_id: str, what: str, body: bytes) -> Reply:
        if what.startswith("credentials-for-data"):
            signed = {"signed_uri": f"{self.uri}/storage/{trace_id}", "type": "AWS_PRESIGNED_URL"}
            return _json({"credential_info": signed})
        if what == "tags":
            tag = json.loads(body)
            self._infos[trace_id]["tags"][tag["key"]] = tag["value"]
            return _json({})
        return _json({"trace": {"trace_info": self._infos[trace_id]}})

    def _storage(self, request: Received, path: str) -> Reply:
        if request.method == "PUT":
            self._files[path] = request.body
            return Reply()
        content = self._files.get(path)
        return Reply(404) if content is None else Reply(200, content)


def _json(document: dict[str, Any], status: int = 200) -> Reply:
    return Reply(status, json.dumps(document).encode(), {"Content-Type": "application/json"})
