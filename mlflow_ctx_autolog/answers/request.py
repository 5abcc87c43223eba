"""What a request is: what goes over the wire, and whether its answer may be given again."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

__all__ = ["request_digest"]

_ENDPOINTS = ("/chat/completions", "/completions", "/responses", "/embeddings")

# Headers that say how or when something is sent, by whom it is watched or which attempt it is,
# rather than what is asked of whom. Each other one decides, known to us or not.
_NOT_ASKED = frozenset(
    {
        "accept-encoding",
        "b3",
        "baggage",
        "connection",
        "content-length",
        "cookie",
        "date",
        "host",
        "idempotency-key",
        "proxy-authorization",
        "request-id",
        "sentry-trace",
        "traceparent",
        "tracestate",
        "transfer-encoding",
        "uber-trace-id",
        "user-agent",
        "x-amz-date",
        "x-amz-security-token",
        "x-amzn-trace-id",
        "x-client-request-id",
        "x-cloud-trace-context",
        "x-correlation-id",
        "x-request-id",
    }
)
_NOT_ASKED_PREFIXES = ("x-b3-", "x-datadog-", "x-stainless-")

# Of a log-in by JSON web token: what is another for each token of the same user.
_OF_THE_TOKEN = frozenset(
    {"aio", "auth_time", "exp", "iat", "jti", "nbf", "nonce", "rh", "sid", "uti", "xms_ftd"}
)
_SIGNED = re.compile(r"AWS4-HMAC-SHA256 Credential=([^/,]+)/\d{8}/([^,]+)")

# What continues something at the server, or has it look elsewhere.
_AT_THE_SERVER = (
    "previous_response_id",
    "conversation",
    "background",
    "web_search_options",
    "data_sources",
    "dataSources",
    "plugins",
)
_TOOLS_OF_THE_CLIENT = ("function", "custom")
_REFERENCES = frozenset({"file_id", "file_ids", "vector_store_ids", "previous_response_id"})


def request_digest(
    method: str, url: str, headers: Iterable[tuple[str, str]], body: bytes, key: bytes
) -> str | None:
    """Return 32 hexadecimal digits that are the same for the same request under the same key.

    Args:
        method: Of HTTP.
        url: In full.
        headers: All that are sent, the log-in among them.
        body: As it is sent.
        key: At most 64 bytes. Without it, nothing can be guessed from the digest.

    Returns:
        None where the answer depends on more than the request, or leaves more than an answer: it
        continues a conversation that the server keeps, has the server use tools or look things up,
        or names files and URLs, whose content can change. So for what is no request of text, and
        for what cannot be read.
    """
    if method != "POST" or not urlsplit(url).path.endswith(_ENDPOINTS):
        return None
    try:
        asked = json.loads(body)
    except (RecursionError, ValueError):
        return None
    if not isinstance(asked, dict) or _is_of_the_moment(asked):
        return None
    digest = hashlib.blake2b(key=key, digest_size=16)
    decisive = sorted((name.lower(), value) for name, value in headers if _decides(name.lower()))
    parts = [method, url]
    for name, value in decisive:
        parts += [name, _who_asks(value) if name == "authorization" else value]
    for part in [*(text.encode() for text in parts), body]:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


def _decides(header: str) -> bool:
    return header not in _NOT_ASKED and not header.startswith(_NOT_ASKED_PREFIXES)


def _who_asks(authorization: str) -> str:
    """Return what is the same of a log-in when its token is renewed; itself where it is a key."""
    if (signed := _SIGNED.match(authorization)) is not None:
        return f"{signed[1]}/{signed[2]}"
    parts = authorization.rpartition(" ")[2].split(".")
    if len(parts) == 3:
        try:
            claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
        except (RecursionError, ValueError):
            return authorization
        if isinstance(claims, dict) and claims.keys() - _OF_THE_TOKEN:
            lasting = {name: claims[name] for name in claims if name not in _OF_THE_TOKEN}
            return json.dumps(lasting, sort_keys=True)
    return authorization


def _is_of_the_moment(asked: dict[str, Any]) -> bool:
    """Whether an answer depends on more than what is asked, or does more than answer."""
    if asked.get("store") is True or any(asked.get(name) for name in _AT_THE_SERVER):
        return True
    tools = asked.get("tools") or ()
    if not isinstance(tools, (list, tuple)) or any(
        not isinstance(tool, dict) or tool.get("type") not in _TOOLS_OF_THE_CLIENT for tool in tools
    ):
        return True
    # A prompt that is kept at the server has an id, and versions.
    if isinstance(asked.get("prompt"), dict):
        return True
    # These search the web unasked.
    model = str(asked.get("model"))
    if "-search-" in model or "deep-research" in model:
        return True
    return _refers([asked.get(name) for name in ("messages", "input", "prompt")])


def _refers(content: Any) -> bool:
    """Whether content names something that is elsewhere, rather than holding it."""
    found = [content]
    while found:
        each = found.pop()
        if isinstance(each, list):
            found.extend(item for item in each if isinstance(item, (dict, list)))
        elif isinstance(each, dict):
            if "id" in each and each.keys() <= {"id", "type"}:
                return True
            for name, value in each.items():
                if not value:
                    continue
                if name in _REFERENCES or value == "item_reference":
                    return True
                if isinstance(value, (dict, list)):
                    found.append(value)
                elif name.endswith("url") and not str(value).startswith("data:"):
                    return True
    return False
