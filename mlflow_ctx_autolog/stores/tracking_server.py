"""An MLflow tracking server, told of spans and traces by plain HTTP, without MLflow.

With the log-in that MLflow's own client would use, of variables, the user's credentials file, the
address and ``.netrc``. What only MLflow can make, :func:`speaks_to` knows.
"""

from __future__ import annotations

import configparser
import functools
import importlib.metadata
import json
import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from mlflow_ctx_autolog.delivery.records import Destination, Record
from mlflow_ctx_autolog.exceptions import StoreError
from mlflow_ctx_autolog.stores.answers import Answer, failure
from mlflow_ctx_autolog.stores.http import TLS, basic_log_in, exchange, speaks_to_proxy

__all__ = [
    "LOG_IN",
    "check_has_spans",
    "check_has_trace",
    "json_object",
    "send_to_server",
    "speaks_to",
]

# What to do where a log-in is not enough.
LOG_IN = "set MLflow's MLFLOW_TRACKING_TOKEN, or _USERNAME and _PASSWORD, where this process runs"

_SPANS_PATH = "/v1/traces"
_TRACES_PATH = "/api/3.0/mlflow/traces"
_CREDENTIALS = "~/.mlflow/credentials"
# Seconds that the server may take for one exchange.
_ANSWER_TIME = 30.0
_PROTOBUF, _JSON = "application/x-protobuf", "application/json"


def speaks_to(uri: str | None) -> bool:
    """Whether an address is a tracking server's that this process can send to without MLflow."""
    if uri is None or urlsplit(uri).scheme not in ("http", "https"):
        return False
    makes_its_own = os.environ.get("MLFLOW_TRACKING_AUTH") or _flag("MLFLOW_TRACKING_AWS_SIGV4")
    return not makes_its_own and not _has_header_plugins() and speaks_to_proxy(uri)


def send_to_server(destination: Destination, records: Sequence[Record]) -> None:
    """Store records: spans in one request, then what is known of each trace.

    Raises:
        StoreError: The server does not answer, or refuses them.
    """
    spans = [record.payload for record in records if record.kind == "span"]
    if spans:
        headers = {
            "Content-Type": _PROTOBUF,
            "x-mlflow-experiment-id": destination.experiment_id,
        }
        # OTLP messages one after the other are one message with the spans of all.
        check_has_spans(_post(destination, _SPANS_PATH, b"".join(spans), headers))
    for record in records:
        if record.kind == "trace":
            document = {"trace": {"trace_info": _info(record.payload)}}
            body = json.dumps(document).encode()
            answer = _post(destination, _TRACES_PATH, body, {"Content-Type": _JSON})
            check_has_trace(answer)


def check_has_spans(answer: Answer) -> None:
    """Raise where an answer is not what MLflow says of spans that it has stored.

    Raises:
        StoreError: It is somebody else's, such as the log-in page of a proxy.
    """
    is_own = answer.kind == _PROTOBUF and answer.content.lstrip()[:1] != b"<"
    if answer.kind == _JSON:
        document = json_object(answer)
        is_own = document is not None and set(document) <= {"partialSuccess", "partial_success"}
    if not is_own:
        raise StoreError(f"it answered with {answer.kind}, as no MLflow server does")


def check_has_trace(answer: Answer) -> None:
    """Raise where an answer is not what MLflow says of a trace that it has stored.

    Raises:
        StoreError: It is not in JSON, or of something else.
    """
    document = json_object(answer)
    if document is None or not isinstance(document.get("trace"), dict):
        raise StoreError("it did not answer in JSON, as an MLflow server does that has a trace")


def json_object(answer: Answer) -> dict[str, Any] | None:
    """Return the JSON object of an answer; None where it is none."""
    try:
        document = json.loads(answer.content)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _post(destination: Destination, path: str, body: bytes, headers: dict[str, str]) -> Answer:
    url = f"{str(destination.tracking_uri).rstrip('/')}{path}"
    workspace = destination.workspace or os.environ.get("MLFLOW_WORKSPACE", "").strip()
    if workspace:
        headers["X-MLFLOW-WORKSPACE"] = workspace
    answer = exchange(
        "POST",
        url,
        headers={"User-Agent": _user_agent(), **headers, **_log_in()},
        body=body,
        seconds=_ANSWER_TIME,
        tls=_tls(),
    )
    if answer.status != 200:
        raise failure(answer, LOG_IN, url)
    return answer


def _info(payload: bytes) -> dict[str, Any]:
    """Return the JSON of a ``TraceInfo`` as the server's interface has it."""
    try:
        info: dict[str, Any] = dict(json.loads(payload))
    except (TypeError, ValueError) as error:
        raise StoreError(f"this is no trace: {error}", refused=True) from error
    milliseconds = info.pop("execution_duration_ms", None)
    if milliseconds is not None:
        seconds, rest = divmod(int(milliseconds), 1000)
        info["execution_duration"] = f"{seconds}.{rest:03}s"
    return info


def _log_in() -> dict[str, str]:
    of_file = _of_credentials_file()
    user = os.environ.get("MLFLOW_TRACKING_USERNAME") or of_file.get("mlflow_tracking_username")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD") or of_file.get("mlflow_tracking_password")
    if user and password:
        return basic_log_in(user, password)
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _of_credentials_file() -> dict[str, str]:
    path = os.path.expanduser(_CREDENTIALS)
    if not os.path.exists(path):
        return {}
    parser = configparser.ConfigParser()
    try:
        parser.read(path)
        return dict(parser["mlflow"])
    except (KeyError, OSError, configparser.Error):
        return {}


def _tls() -> TLS:
    bundle = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or None
    is_unsafe = _flag("MLFLOW_TRACKING_INSECURE_TLS")
    if is_unsafe and bundle is not None:
        raise StoreError(
            "MLFLOW_TRACKING_INSECURE_TLS and MLFLOW_TRACKING_SERVER_CERT_PATH are both set where "
            "this process runs; MLflow takes but one of them"
        )
    return TLS(bundle or not is_unsafe, os.environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH") or None)


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1")


@functools.lru_cache(maxsize=1)
def _user_agent() -> str:
    return f"mlflow-ctx-autolog/{importlib.metadata.version('mlflow-ctx-autolog')}"


@functools.lru_cache(maxsize=1)
def _has_header_plugins() -> bool:
    # They need MLflow to say what else each request has to carry.
    return bool(importlib.metadata.entry_points(group="mlflow.request_header_provider"))
