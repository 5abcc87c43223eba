"""A Unity Catalog table of spans: where a workspace takes them by OTLP, and the log-in for it."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from mlflow_ctx_autolog.delivery.records import Record
from mlflow_ctx_autolog.exceptions import StoreError, UnsupportedStoreError
from mlflow_ctx_autolog.stores.answers import Answer, failure
from mlflow_ctx_autolog.stores.http import exchange
from mlflow_ctx_autolog.stores.otlp import check_all_were_taken

__all__ = [
    "TOKEN_VARIABLE",
    "is_table",
    "provide_token",
    "send_to_table",
    "table_access",
    "table_uri",
]

TOKEN_VARIABLE = "DATABRICKS_TOKEN"

# Before the workspace's own address, which so is told from a tracking server's.
_SCHEME = "databricks+"
# https://docs.databricks.com/aws/en/mlflow3/genai/tracing/trace-unity-catalog, and
# DatabricksTracingRestStore.log_spans of MLflow, which sends the same.
_PATH, _TABLE_HEADER = "/api/2.0/otel/v1/traces", "X-Databricks-UC-Table-Name"
# Seconds that the workspace may take for one exchange.
_ANSWER_TIME = 30.0
_ADVICE = (
    f"name {TOKEN_VARIABLE} in forward_env, give databricks_token= a function that returns one, "
    "or install databricks-sdk where this process runs and configure its log-in there"
)


def is_table(uri: str | None) -> bool:
    """Whether an address is what :func:`table_uri` returns."""
    return uri is not None and uri.startswith(_SCHEME)


def table_uri(host: str) -> str:
    """Return the address of a workspace's tables of spans, for :func:`send_to_table`.

    Args:
        host: The workspace's, such as ``https://adb-1234.5.azuredatabricks.net``.

    Raises:
        UnsupportedStoreError: It is none that spans can be sent to from workers.
    """
    parts = urlsplit(host)
    if parts.scheme not in ("http", "https") or "@" in parts.netloc or not parts.hostname:
        # Without the address, which may hold a password.
        raise UnsupportedStoreError(
            "The Databricks workspace's address must be an http or https address without user "
            "name and password."
        )
    return f"{_SCHEME}{parts.scheme}://{parts.netloc}"


def provide_token(function: Callable[[], str] | None) -> None:
    """Have this process log in with the tokens that a function returns; None for no function."""
    _tokens.set_source(function)


def send_to_table(
    uri: str, table: str, records: Sequence[Record], environ: Mapping[str, str] = os.environ
) -> None:
    """Append spans to a table in one request. It keeps each as often as it is sent.

    Args:
        uri: The workspace's, as :func:`table_uri` returns it.
        table: The table's full name, ``catalog.schema.prefix_otel_spans``.
        records: The spans; nothing is sent where there are none.
        environ: Where the variables of the log-in are.

    Raises:
        StoreError: The workspace does not answer, or does not take them all.
    """
    if not records:
        return
    host = uri.removeprefix(_SCHEME)
    url = f"{host}{_PATH}"
    answer = _post(host, url, table, b"".join(record.payload for record in records), environ)
    if not 200 <= answer.status < 300:
        raise failure(answer, _ADVICE, url)
    check_all_were_taken(answer)


def table_access(
    uri: str, table: str, environ: Mapping[str, str] = os.environ
) -> tuple[str, str | None]:
    """Return how far this process gets with a table, by a request without spans.

    Returns:
        The last step that was taken, ``"reach"``, ``"login"`` or ``"write"``, and what is wrong
        there; None where nothing is.
    """
    host = uri.removeprefix(_SCHEME)
    url = f"{host}{_PATH}"
    try:
        _log_in(host, environ)
    except StoreError as error:
        return "login", str(error)
    try:
        answer = _post(host, url, table, b"", environ)
    except StoreError as error:
        return "reach", str(error)
    if 200 <= answer.status < 300:
        return "write", None
    step = "login" if answer.status in (401, 403) else "write"
    return step, str(failure(answer, _ADVICE, url))


def _post(host: str, url: str, table: str, body: bytes, environ: Mapping[str, str]) -> Answer:
    headers = {"Content-Type": "application/x-protobuf", _TABLE_HEADER: table}

    def post() -> Answer:
        log_in = _log_in(host, environ)
        return exchange("POST", url, headers={**headers, **log_in}, body=body, seconds=_ANSWER_TIME)

    answer = post()
    # A token that has ended in the meantime: the function has another one.
    return post() if answer.status in (401, 403) and _tokens.forget() else answer


def _log_in(host: str, environ: Mapping[str, str]) -> dict[str, str]:
    token = _tokens.current() or environ.get(TOKEN_VARIABLE)
    if token:
        return {"Authorization": f"Bearer {token}"}
    return _log_in_by_sdk(host)


def _log_in_by_sdk(host: str) -> dict[str, str]:
    try:
        return dict(_sdk_config(host).authenticate())
    except ImportError:
        raise StoreError(f"this process has no log-in to {host}; {_ADVICE}") from None
    except Exception as error:
        # Whose text may quote what was tried.
        raise StoreError(
            f"databricks-sdk finds no log-in to {host} ({type(error).__name__}); {_ADVICE}"
        ) from None


@functools.lru_cache(maxsize=8)
def _sdk_config(host: str) -> Any:
    """Return databricks-sdk's own, which gets another token before one ends."""
    from databricks.sdk.core import Config

    return Config(host=host)


class _Tokens:
    """The tokens of the user's own function, which is called again when one is refused."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._source: Callable[[], str] | None = None
        self._token: str | None = None

    def set_source(self, source: Callable[[], str] | None) -> None:
        with self._lock:
            if source is not self._source:
                self._source, self._token = source, None

    def current(self) -> str | None:
        """Return a token; None where there is no function.

        Raises:
            StoreError: The function raises, or returns none.
        """
        with self._lock:
            if self._source is None or self._token is not None:
                return self._token
            try:
                token = self._source()
            except Exception as error:
                # Without its text, which may quote a secret.
                raise StoreError(f"databricks_token raised {type(error).__name__}") from None
            if not isinstance(token, str) or not token.strip():
                raise StoreError(f"databricks_token returned {type(token).__name__}, not a token")
            self._token = token.strip()
            return self._token

    def forget(self) -> bool:
        """Forget the token that was refused; return whether there may be another one."""
        with self._lock:
            self._token = None
            return self._source is not None


_tokens = _Tokens()
