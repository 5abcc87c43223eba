"""MLflow's own client: asking a store, with whatever log-in it makes, and within a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

from mlflow.exceptions import MlflowException, MlflowNotImplementedException
from mlflow.tracing.client import TracingClient
from mlflow.utils.rest_utils import http_request

from mlflow_ctx_autolog.delivery.records import Destination
from mlflow_ctx_autolog.exceptions import StoreError
from mlflow_ctx_autolog.stores.answers import Answer, excerpt, failure, root_cause
from mlflow_ctx_autolog.stores.http import untraced
from mlflow_ctx_autolog.stores.tracking_server import LOG_IN, json_object

try:
    from mlflow.utils.workspace_context import ServerWorkspaceContext
except ImportError:
    # Of a release without workspaces, whose name nobody sets.
    ServerWorkspaceContext = None

__all__ = [
    "ask",
    "client_of",
    "exchange_with",
    "in_its_workspace",
    "is_remote",
    "own_errors",
    "request",
    "store_of",
]

P = ParamSpec("P")
T = TypeVar("T")

# Seconds that the store may take to answer one request.
_ANSWER_TIME = 30.0


def in_its_workspace(
    ask: Callable[Concatenate[Destination, P], T],
) -> Callable[Concatenate[Destination, P], T]:
    """Have MLflow speak of the destination's workspace, on whatever thread it is asked."""

    @functools.wraps(ask)
    def asks(destination: Destination, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if destination.workspace is None or ServerWorkspaceContext is None:
            return ask(destination, *args, **kwargs)
        with ServerWorkspaceContext(destination.workspace):
            return ask(destination, *args, **kwargs)

    return asks


@functools.lru_cache(maxsize=8)
def client_of(tracking_uri: str) -> TracingClient:
    """Return MLflow's client of a store."""
    return TracingClient(tracking_uri)


def store_of(destination: Destination) -> Any:
    """Return MLflow's own access to a store."""
    with own_errors():
        return client_of(str(destination.tracking_uri)).store


def is_remote(store: Any) -> bool:
    """Whether a store is a server, spoken to by HTTP."""
    return hasattr(store, "get_host_creds")


@contextmanager
def own_errors() -> Iterator[None]:
    """Turn what MLflow raises into a :class:`StoreError`."""
    try:
        yield
    except StoreError:
        raise
    except (NotImplementedError, MlflowNotImplementedException) as error:
        raise StoreError(str(error), unsupported=True) from error
    except Exception as error:
        refused = isinstance(error, MlflowException) and error.get_http_status_code() == 400
        text = f"{type(error).__name__}: {excerpt(str(error))}"
        raise StoreError(text, refused=refused) from error


def ask(store: Any, method: str, path: str, **content: Any) -> dict[str, Any]:
    """Make one request whose answer is a JSON object, and return that."""
    document = json_object(request(store, method, path, **content))
    if document is None:
        raise StoreError(f"{store.get_host_creds().host} did not answer in JSON to {path}")
    return document


def exchange_with(
    store: Any, method: str, path: str, *, timeout: float = _ANSWER_TIME, **content: Any
) -> Answer:
    """Make one request, with MLflow's own log-in, and without its retries of several minutes."""
    try:
        with untraced():
            answer = http_request(
                host_creds=store.get_host_creds(),
                endpoint=path,
                method=method,
                max_retries=0,
                raise_on_status=False,
                timeout=timeout,
                # What is sent is for this host alone.
                allow_redirects=False,
                **content,
            )
    except MlflowException as error:
        raise StoreError(f"it cannot be reached: {root_cause(error)}") from error
    return Answer(answer.status_code, answer.reason, answer.headers, answer.content)


def request(store: Any, method: str, path: str, **content: Any) -> Answer:
    """Make one request that has to succeed."""
    answer = exchange_with(store, method, path, **content)
    if answer.status == 200:
        return answer
    raise failure(answer, LOG_IN, f"{store.get_host_creds().host}{path}")
