"""By what two requests are recognised as the same, without keeping what they say."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from typing import Any

__all__ = ["FINGERPRINT", "fingerprint", "new_key"]

# Attribute of a call's span.
FINGERPRINT = "llm.request.fingerprint"

# What says how a request is sent, rather than what is asked.
_NOT_ASKED = frozenset({"extra_headers", "timeout", "stream_options"})


def new_key() -> str:
    """Return a random key. Without it, no content can be guessed from a fingerprint."""
    return secrets.token_hex(16)


def fingerprint(key: str, interface: str, inputs: Mapping[str, Any]) -> str:
    """Return 32 hexadecimal digits that are the same for the same request under the same key.

    Args:
        key: What :func:`new_key` returned.
        interface: What was called, such as ``Completions``.
        inputs: The keyword arguments of the call: model, messages and parameters.
    """
    asked = {name: value for name, value in inputs.items() if name not in _NOT_ASKED}
    text = json.dumps([interface, asked], sort_keys=True, default=_plain, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), key=key.encode(), digest_size=16).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset, tuple)):
        return sorted(value, key=str)
    if isinstance(value, bytes):
        return value.hex()
    if not isinstance(value, type) and hasattr(value, "model_dump"):
        return value.model_dump()
    # Of classes, as for a response's format, and of openai's "not given", the name. Never the
    # text of an object, which may hold its address.
    named = value if isinstance(value, type) else type(value)
    return f"{named.__module__}.{named.__qualname__}"
