"""One HTTP exchange with a store: within a deadline, never redirected, and nobody's span.

By Python's own client, since of the libraries that would do, none has a deadline for a whole
exchange, all have instrumentations that would make spans of it, and each costs a worker memory.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import io
import netrc
import os
import queue
import socket
import ssl
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from mlflow_ctx_autolog.exceptions import StoreError
from mlflow_ctx_autolog.stores.answers import Answer, root_cause

__all__ = ["TLS", "basic_log_in", "exchange", "speaks_to_proxy", "untraced"]

# Bytes of an answer that are read at most: what is sent to a store is answered with a few.
_LONGEST_ANSWER = 1_000_000
# Seconds to wait for each address that a host's name stands for.
_CONNECT_TIME = 10.0


@dataclass(frozen=True)
class TLS:
    """How a server's certificate is checked, and what this process shows of its own.

    Args:
        verify: True for well-known authorities, a file or directory of others, False for none.
        certificate: A PEM file to show, with the key in it unless ``key`` names another.
        key: That file.
    """

    verify: bool | str = True
    certificate: str | None = None
    key: str | None = None


def exchange(
    method: str,
    url: str,
    *,
    headers: Mapping[str, str],
    body: bytes,
    seconds: float,
    tls: TLS | None = None,
) -> Answer:
    """Make one request and return whatever the server answers.

    Proxies and ``.netrc`` are heeded, and ``REQUESTS_CA_BUNDLE``, as the ``requests`` library does.

    Args:
        method: Such as ``POST``.
        url: With user and password, these are the log-in.
        headers: What else to say.
        body: What to send.
        seconds: For the whole exchange, but for looking up the host's name.
        tls: For ``https``.

    Raises:
        StoreError: There is no answer, or none in time.
    """
    deadline = time.monotonic() + seconds
    parts = urlsplit(url)
    try:
        with untraced(), contextlib.closing(_connection(parts, deadline, tls or TLS())) as opened:
            connection, target, for_proxy = opened.connection, opened.target, opened.headers
            log_in = _log_in_of(parts)
            connection.request(method, target, body, {**headers, **log_in, **for_proxy})
            response = connection.getresponse()
            content = response.read(_LONGEST_ANSWER)
            return Answer(response.status, response.reason, response.headers, content)
    except TimeoutError:
        raise StoreError(f"it did not answer within {seconds:g} seconds") from None
    except (OSError, http.client.HTTPException) as error:
        raise StoreError(f"it cannot be reached: {root_cause(error)}") from error
    except ValueError:
        # Whose text may quote a log-in.
        raise StoreError(
            "the request cannot be made: a header or the address holds what HTTP cannot carry; "
            "look for a line break at the end of a token or password"
        ) from None


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Have no instrumentation of OpenTelemetry's make a span of what happens here."""
    api: Any = sys.modules.get("opentelemetry.context")
    if api is None:
        # Then there is none.
        yield
        return
    context = api.get_current()
    for key in ("suppress_instrumentation", "suppress_http_instrumentation"):
        context = api.set_value(key, True, context)
    token = api.attach(context)
    try:
        yield
    finally:
        api.detach(token)


def basic_log_in(user: str, password: str) -> dict[str, str]:
    """Return the header of a log-in by name and password."""
    text = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Authorization": f"Basic {text}"}


def speaks_to_proxy(url: str) -> bool:
    """Whether the proxy on the way to a URL is of a kind that is spoken to, or there is none."""
    proxy = _proxy_for(urlsplit(url))
    return proxy is None or proxy.scheme == "http"


@dataclass(frozen=True)
class _Opened:
    connection: http.client.HTTPConnection
    target: str
    headers: Mapping[str, str]

    def close(self) -> None:
        self.connection.close()


def _connection(parts: SplitResult, deadline: float, tls: TLS) -> _Opened:
    host, is_secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if is_secure else 80)
    target = str(urlunsplit(("", "", parts.path or "/", parts.query, "")))
    proxy = _proxy_for(parts)
    for_proxy: dict[str, str] = {}
    if proxy is not None:
        if proxy.scheme != "http":
            raise StoreError(
                f"the proxy on the way is of the kind {proxy.scheme}, which is not spoken to; set "
                "an http one, or NO_PROXY for this host"
            )
        if proxy.username is not None:
            log_in = basic_log_in(unquote(proxy.username), unquote(proxy.password or ""))
            for_proxy = {"Proxy-Authorization": log_in["Authorization"]}
    near = (host, port) if proxy is None else (proxy.hostname or "", proxy.port or 80)
    connection: http.client.HTTPConnection
    if is_secure:
        connection = http.client.HTTPSConnection(
            *near, context=_tls_context(tls, os.environ.get("REQUESTS_CA_BUNDLE"))
        )
    else:
        connection = http.client.HTTPConnection(*near)
    connection._create_connection = functools.partial(  # type: ignore[attr-defined]
        _connected, deadline
    )
    connection.response_class = functools.partial(  # type: ignore[assignment]
        _Response, deadline=deadline
    )
    if proxy is not None and is_secure:
        connection.set_tunnel(host, port, for_proxy)
        for_proxy = {}
    elif proxy is not None:
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2])
        target = bare._replace(path=parts.path or "/", fragment="").geturl()
    return _Opened(connection, target, for_proxy)


def _connected(deadline: float, address: tuple[str, int], *_others: Any) -> socket.socket:
    problem: OSError = OSError(f"{address[0]} has no address")
    for family, kind, protocol, _name, where in _addresses(deadline, address):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(min(_CONNECT_TIME, _remaining(deadline)))
            connection.connect(where)
        except OSError as error:
            connection.close()
            problem = error
        else:
            # For each single step from here on; the reading of the answer is bounded as a whole.
            connection.settimeout(_remaining(deadline))
            return connection
    raise problem


def _addresses(deadline: float, address: tuple[str, int]) -> Sequence[Any]:
    """Return what a host's name stands for; the system's own look-up has no deadline."""
    look_up = functools.partial(socket.getaddrinfo, *address, type=socket.SOCK_STREAM)
    with contextlib.suppress(socket.gaierror):
        # Of a number there is nothing to look up.
        return look_up(flags=socket.AI_NUMERICHOST)
    answers: queue.SimpleQueue[Sequence[Any] | Exception] = queue.SimpleQueue()

    def answer() -> None:
        try:
            answers.put(look_up())
        except Exception as error:
            answers.put(error)

    try:
        name = "mlflow-ctx-autolog-look-up"
        threading.Thread(target=answer, name=name, daemon=True).start()
    except RuntimeError:
        # At the exit of the process, there are no more threads.
        return look_up()
    try:
        found = answers.get(timeout=_remaining(deadline))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(found, Exception):
        raise found
    return found


def _remaining(deadline: float) -> float:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    return remaining


class _Response(http.client.HTTPResponse):
    """A response that is read until the deadline, however slowly its bytes come."""

    def __init__(self, sock: socket.socket, *args: Any, deadline: float, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self.fp = io.BufferedReader(_Reader(sock, deadline))


class _Reader(io.RawIOBase):
    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._socket = sock
        self._deadline = deadline
        # Which the socket's own close waits for.
        self._raw: Any = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Any:
        self._socket.settimeout(_remaining(self._deadline))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _proxy_for(parts: SplitResult) -> SplitResult | None:
    host = parts.hostname or ""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(host):
        return None
    return urlsplit(proxy if "//" in proxy else f"http://{proxy}")


def _log_in_of(parts: SplitResult) -> dict[str, str]:
    """Return the log-in that the address or the user's ``.netrc`` has for a host."""
    found = _netrc_of(parts.hostname or "")
    if found is not None:
        return basic_log_in(*found)
    if parts.username is None:
        return {}
    return basic_log_in(unquote(parts.username), unquote(parts.password or ""))


def _netrc_of(host: str) -> tuple[str, str] | None:
    named = os.environ.get("NETRC")
    for path in [named] if named else ["~/.netrc", "~/_netrc"]:
        full = os.path.expanduser(path)
        if not os.path.exists(full):
            continue
        try:
            found = netrc.netrc(full).authenticators(host)
        except (OSError, netrc.NetrcParseError):
            return None
        return None if found is None else (found[0] or found[1] or "", found[2] or "")
    return None


@functools.lru_cache(maxsize=8)
def _tls_context(tls: TLS, bundle: str | None) -> ssl.SSLContext:
    # To read the authorities takes longer than all else.
    verify = (
        (bundle or os.environ.get("CURL_CA_BUNDLE") or True) if tls.verify is True else (tls.verify)
    )
    if isinstance(verify, str) and os.path.isdir(verify):
        context = ssl.create_default_context(capath=verify)
    else:
        context = ssl.create_default_context(
            cafile=verify if isinstance(verify, str) else _well_known()
        )
    if verify is False:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.key)
    return context


def _well_known() -> str | None:
    """Return the file of authorities that ``requests`` trusts, if it is there."""
    try:
        import certifi
    except ImportError:
        return None
    return str(certifi.where())
