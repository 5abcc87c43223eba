"""What a process finds out about itself, be it the driver or a worker of the cluster.

It travels to workers by value, so that one without this library can say so: until that is known,
the standard library has to do. What a process says of itself is JSON, and holds no secret.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import socket
import sys
import time
import urllib.parse
import urllib.request
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from typing import Any

__all__ = ["call_stand_in", "facts_of_process", "tell", "tell_time", "without_secrets"]

# Seconds that a model endpoint may take to let itself be connected to.
_CONNECT_TIME = 5.0


def tell(question: str) -> str:
    """Return the facts of this process.

    Args:
        question: The JSON of what :func:`facts_of_process` takes.

    Returns:
        The JSON of what it returns.
    """
    return json.dumps(facts_of_process(**json.loads(question)))


def facts_of_process(
    packages: list[str] = (),  # type: ignore[assignment]
    variables: list[str] = (),  # type: ignore[assignment]
    model_url: str | None = None,
    default_model_url: str | None = None,
    **asked: Any,
) -> dict[str, Any]:
    """Return what this process is and what it can do. Never raises.

    Args:
        packages: Import names of packages whose versions are asked for.
        variables: Environment variables whose values may be told.
        model_url: The model endpoint that this process has to reach; None for its own
            ``OPENAI_BASE_URL``.
        default_model_url: The one where it has none; None not to try.
        **asked: What :func:`_facts_by_the_library` takes.

    Returns:
        ``had_mlflow``: whether it was loaded here before; ``host``, ``executable``, ``python``;
        ``packages``: for each the ``version`` or the
        ``error``; ``variables``: those that are set; ``credentials``: names of variables that are
        set and log in; ``model``: what prevents a connection, None if nothing does; and the facts
        of :func:`_facts_by_the_library`, or ``library_error``.
    """
    facts: dict[str, Any] = {
        "had_mlflow": "mlflow" in sys.modules,
        "host": socket.gethostname(),
        "executable": sys.executable,
        "python": ".".join(str(number) for number in sys.version_info[:3]),
        "packages": {package: _version_of(package) for package in packages},
        "variables": {name: os.environ[name] for name in variables if name in os.environ},
        "credentials": sorted(name for name in os.environ if _logs_in(name)),
    }
    url = model_url or (default_model_url and os.environ.get("OPENAI_BASE_URL", default_model_url))
    if url:
        facts["model"] = _connection_problem(url)
    try:
        facts.update(_facts_by_the_library(**asked))
    except Exception as error:
        # Not installed, of another release, or broken.
        facts["library_error"] = f"{type(error).__name__}: {error}"
    return {name: without_secrets(fact) for name, fact in facts.items()}


def _facts_by_the_library(
    has_spool: bool = True,
    spool_directory: str | None = None,
    tracking_uri: str | None = None,
    experiment_id: str | None = None,
    trace_id: str | None = None,
    workspace: str | None = None,
) -> dict[str, Any]:
    """Return what it takes this library to find out.

    Args:
        has_spool: Whether finished spans are kept on the disk.
        spool_directory: Where; None for the default.
        tracking_uri: The tracking store that this process has to reach; None not to try.
        experiment_id: The experiment that it has to write to, if known.
        trace_id: The trace that it is to write a span to; None not to try.
        workspace: The server's workspace that the experiment is in.

    Returns:
        ``tracing``, ``no_store`` and, if there is one, ``spool``: what is wrong with them, None
        if nothing is;
        ``sampling_ratio``; ``why_mlflow``: who had a task here load MLflow first, if it is known;
        ``layers``: modules of others on the OpenAI client's calls; in a task, ``sees_action``:
        whether it sees what the driver says of its action; ``store``: see
        :func:`mlflow_ctx_autolog.stores.access.access`; ``span_id``: of the span that was
        written.
    """
    from mlflow_ctx_autolog.delivery.spool import directory_problem
    from mlflow_ctx_autolog.recorder.layers import layers_on_calls
    from mlflow_ctx_autolog.stores.access import access
    from mlflow_ctx_autolog.stores.tracking_store import span_record
    from mlflow_ctx_autolog.tracing import lone_span, sampling_ratio, tracing_problem
    from mlflow_ctx_autolog.worker.process import worker_process
    from mlflow_ctx_autolog.worker.spark_task import action_text, in_spark_task

    facts: dict[str, Any] = {
        "tracing": tracing_problem(),
        "no_store": _missing_store(),
        "sampling_ratio": sampling_ratio(),
        "why_mlflow": worker_process().mlflow.why,
        "layers": layers_on_calls(),
    }
    if in_spark_task():
        facts["sees_action"] = action_text() is not None
    if has_spool:
        directory = None if spool_directory is None else Path(spool_directory)
        facts["spool"] = directory_problem(directory)
    if tracking_uri is not None:
        path = Path(tracking_uri.removeprefix("sqlite:///"))
        if tracking_uri.startswith("sqlite:///") and not path.exists():
            # Which MLflow would make, on this host alone.
            facts["store"] = {"reach": f"the file {path} does not exist on this host"}
            return facts
        span = None if trace_id is None else lone_span("mlflow-ctx-autolog doctor", trace_id)
        records = [] if span is None else [span_record(span)]
        facts["store"] = access(tracking_uri, experiment_id, records, workspace)
        facts["span_id"] = None if span is None else span.span_id
    return facts


def _missing_store() -> str | None:
    """Return why MLflow cannot open the store that it is configured for; None where it can."""
    from mlflow_ctx_autolog.stores.tracking_store import current_tracking_uri, exports_to_collector

    uri = current_tracking_uri()
    kind = re.match("(sqlite|postgresql|mysql|mssql)[+:]", uri)
    # What these take is asked for by name, since importing it takes seconds.
    needed = ("sqlalchemy", "alembic", "sqlparse")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if kind is None or not missing or exports_to_collector():
        return None
    return f"the tracking URI is {uri}, and this MLflow has no store of its own for {kind[1]}"


def tell_time(_: str) -> str:
    """Return the JSON of this host's name and its clock, in seconds since 1970."""
    return json.dumps([socket.gethostname(), time.time()])


def call_stand_in(_: str) -> str:
    """Make one model call, as a user's function does, to a stand-in in this very process.

    Returns:
        This host's name.
    """
    from openai import DefaultHttpxClient, OpenAI

    from mlflow_ctx_autolog.testing.endpoint import OpenAIEndpoint

    with OpenAIEndpoint() as endpoint:
        # No proxy stands between a process and itself.
        http_client = DefaultHttpxClient(trust_env=False)
        client = OpenAI(
            base_url=endpoint.base_url, api_key="none", max_retries=0, http_client=http_client
        )
        client.chat.completions.create(
            model="stand-in", messages=[{"role": "user", "content": "Do you hear me?"}]
        )
    return socket.gethostname()


def _version_of(package: str) -> dict[str, str | None]:
    try:
        module = importlib.import_module(package)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    version = getattr(module, "__version__", None)
    if version is None:
        try:
            version = importlib.metadata.version(package.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            # A folder that happens to have the name.
            return {"error": f"there is no version of it in {getattr(module, '__path__', '?')}"}
    return {"version": str(version)}


def _connection_problem(url: str) -> str | None:
    """Connect to the host of a URL, by TLS where that is asked for, and say nothing to it."""
    parts = urllib.parse.urlsplit(url)
    host, is_secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if is_secure else 80)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy is not None and not urllib.request.proxy_bypass(host):
        # Whom to ask for the rest of the way is the proxy's secret.
        parts = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
        host, port, is_secure = parts.hostname or "", parts.port or 80, parts.scheme == "https"
    connection = (HTTPSConnection if is_secure else HTTPConnection)(
        host, port, timeout=_CONNECT_TIME
    )
    try:
        connection.connect()
    except (OSError, ValueError) as error:
        return f"{host}:{port} cannot be connected to: {error}"
    finally:
        connection.close()
    return None


_OURS = ("MLFLOW_", "DATABRICKS_", "OPENAI_", "AZURE_OPENAI_")


def _logs_in(name: str) -> bool:
    has_log_in = _is_secret(name) or re.search("USERNAME|CERT", name) is not None
    return has_log_in and name.startswith(_OURS)


def _is_secret(name: str) -> bool:
    return re.search("TOKEN|PASSWORD|SECRET|KEY", name) is not None


def without_secrets(fact: Any) -> Any:
    """Return a fact without what secret variables of this process hold.

    Of URIs, user, password and query are left out, too.
    """
    if isinstance(fact, dict):
        return {name: without_secrets(value) for name, value in fact.items()}
    if isinstance(fact, list):
        return [without_secrets(each) for each in fact]
    if not isinstance(fact, str):
        return fact
    for name, value in os.environ.items():
        if _is_secret(name) and len(value) > 3:
            fact = fact.replace(value, "***")
    fact = re.sub(r"(?<=//)[^/@\s\"']+@", "***@", fact)
    return re.sub(r"(//[^\s?\"']+)\?[^\s\"']*", r"\1", fact)
