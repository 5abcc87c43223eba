"""Log-ins, which stay out of every text that is logged, raised, shown or stored."""

from __future__ import annotations

import base64
import logging
import os
import re
from collections.abc import Iterable
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlencode, urlsplit, urlunsplit

__all__ = ["has_log_in", "remember", "safe_logger", "without_credentials", "without_log_ins"]

_HIDDEN = "***"
# Variables that hold a log-in, by their names; not PWD, where a shell keeps its directory.
_SECRET_NAME = re.compile(
    r"TOKEN|PASSW|PASSPHRASE|SECRET|CREDENTIAL|_PWD|(?:^|_)AUTH|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY"
    r"|_KEY$|_HEADERS$",
    re.IGNORECASE,
)
# Shorter ones would take pieces out of ordinary words.
_SHORTEST = 4
# Parts of a query that say how to connect, and not as whom. All others may be log-ins.
_HARMLESS = frozenset(
    (
        *("application_name", "charset", "client_encoding", "connect_timeout", "driver"),
        *("connection_timeout", "encoding", "encrypt", "gssencmode", "keepalives", "mode"),
        *("read_timeout", "ssl", "ssl_mode", "sslmode", "target_session_attrs", "timeout"),
        *("trustservercertificate", "use_unicode", "write_timeout"),
    )
)
_URI = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>`]+")
_SCHEME = re.compile(r"\b(Bearer|Basic|Digest|Token|ApiKey)\s+(?!\*)[^\s\"',;]{4,}", re.IGNORECASE)
_NAMED = re.compile(
    r"((?:password|passwd|passphrase|pwd|token|secret|api[-_]?key|authorization|credential)s?"
    r"[\"']?\s*[=:]\s*)(?!\*|Bearer|Basic|Digest)([\"']?)[^\s\"',;&}]{3,}\2",
    re.IGNORECASE,
)

# What this process was told, other than by its environment.
_remembered: set[str] = set()


def remember(*secrets: str | None) -> None:
    """Keep values out of texts that are no variables of this process, such as a URI's password."""
    for secret in secrets:
        if secret is not None and len(secret.strip()) >= _SHORTEST:
            _remembered.add(secret.strip())


def without_log_ins(text: str) -> str:
    """Return a text without log-ins: those that this process knows, and what looks like one.

    Of URIs, it leaves what :func:`without_credentials` does.
    """
    for secret in sorted(_known(), key=len, reverse=True):
        if secret in text:
            text = text.replace(secret, _HIDDEN)
    text = _URI.sub(lambda found: _shown_uri(found.group()), text)
    text = _SCHEME.sub(rf"\1 {_HIDDEN}", text)
    return _NAMED.sub(rf"\1{_HIDDEN}", text)


def _known() -> Iterable[str]:
    found = set(_remembered)
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value.strip()) >= _SHORTEST:
            found.add(value.strip())
            if name.upper().endswith("_HEADERS"):
                values = (pair.partition("=")[2].strip() for pair in value.split(","))
                found |= {each for each in values if len(each) >= _SHORTEST}
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{n}") for n in ("USERNAME", "PASSWORD"))
    if user and password:
        found.add(base64.b64encode(f"{user}:{password}".encode()).decode())
    for secret in list(found):
        found |= {quote(secret, safe=""), quote_plus(secret), unquote(secret), repr(secret)[1:-1]}
    return {secret for secret in found if len(secret) >= _SHORTEST}


def _shown_uri(uri: str) -> str:
    try:
        return without_credentials(uri) or uri
    except ValueError:
        return _HIDDEN


def without_credentials(uri: str | None) -> str | None:
    """Return a URI without user and password, and without whatever in its query may be one."""
    if uri is None:
        return None
    try:
        parts = urlsplit(uri)
    except ValueError:
        # No address that anybody could use.
        return _HIDDEN
    if "@" in parts.netloc:
        parts = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    if parts.query:
        given = parse_qsl(parts.query, keep_blank_values=True)
        kept = [(name, value) for name, value in given if _is_harmless(name)]
        if len(kept) != len(given) or not given:
            parts = parts._replace(query=urlencode(kept))
    return uri if parts == urlsplit(uri) else urlunsplit(parts)


def has_log_in(uri: str) -> bool:
    """Whether a URI holds a user, a password, or in its query what may be one."""
    return without_credentials(uri) != uri


def _is_harmless(name: str) -> bool:
    return name.lower() in _HARMLESS


class _WithoutLogIns(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = without_log_ins(record.getMessage()), None
        return True


def safe_logger(name: str) -> logging.Logger:
    """Return the logger of a module, which writes no log-in. Tracebacks are not looked through."""
    logger = logging.getLogger(name)
    if not any(isinstance(each, _WithoutLogIns) for each in logger.filters):
        logger.addFilter(_WithoutLogIns())
    return logger
