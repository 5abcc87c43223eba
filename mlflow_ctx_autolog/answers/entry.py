"""An answer as it lies on the disk: whole and its own, or not taken for one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Cipher", "DamagedEntryError", "Entry", "NewerEntryError", "cipher", "decode", "encode"]

_MAGIC, _VERSION = b"ctx-autolog-answer", 1
_DIGEST = 16


class DamagedEntryError(ValueError):
    """What was read is not what was written, or is another entry."""


class NewerEntryError(ValueError):
    """It was written by a release that writes otherwise."""


@dataclass(frozen=True)
class Entry:
    """An answer to an HTTP request, with status 200.

    Args:
        headers: Those that describe it.
        chunks: Its body as it came, still compressed where it was.
        paid_by: The call that it was given to: ``trace_id/span_id``.
    """

    headers: tuple[tuple[str, str], ...]
    chunks: tuple[bytes, ...]
    paid_by: str


@dataclass(frozen=True)
class Cipher:
    """Encrypts and decrypts, and tells what was changed.

    Args:
        encrypt: Takes and returns bytes.
        decrypt: The same; raises an exception of any kind for what it has not encrypted.
    """

    encrypt: Callable[[bytes], bytes]
    decrypt: Callable[[bytes], bytes]


def cipher(key: str) -> Cipher:
    """Return the cipher of a key.

    Raises:
        ImportError: The library for it is not installed.
    """
    try:
        from cryptography.fernet import Fernet
    except ImportError as error:
        raise ImportError(
            "answers_key is set, and cryptography is not installed, which encrypts the answers: "
            "pip install 'mlflow-ctx-autolog[answers]' on driver and workers"
        ) from error
    fernet = Fernet(key)
    return Cipher(fernet.encrypt, fernet.decrypt)


def encode(entry: Entry, name: str, encryption: Cipher | None = None) -> bytes:
    """Return an entry as it is written.

    Args:
        entry: The answer.
        name: What the file is called, so that one in another's place is found out.
        encryption: For its content.
    """
    head = {
        "name": name,
        "paid_by": entry.paid_by,
        "headers": entry.headers,
        "chunks": [len(chunk) for chunk in entry.chunks],
    }
    payload = b"\n".join([json.dumps(head, separators=(",", ":")).encode(), b"".join(entry.chunks)])
    if encryption is not None:
        payload = encryption.encrypt(payload)
    digest = hashlib.blake2b(payload, digest_size=_DIGEST).digest()
    return b"%s %d\n%s%s%s" % (_MAGIC, _VERSION, len(payload).to_bytes(8, "big"), digest, payload)


def decode(data: bytes, name: str, encryption: Cipher | None = None) -> Entry:
    """Return what :func:`encode` was given.

    Raises:
        DamagedEntryError: It is cut off or changed, or another one's.
        NewerEntryError: It has another version.
    """
    magic, _, rest = data.partition(b"\n")
    kind, _, version = magic.partition(b" ")
    if kind != _MAGIC or not version.isdigit():
        raise DamagedEntryError("it is no answer")
    if int(version) != _VERSION:
        raise NewerEntryError(f"it has version {int(version)}, and this release reads {_VERSION}")
    size, digest, payload = rest[:8], rest[8 : 8 + _DIGEST], rest[8 + _DIGEST :]
    if len(payload) != int.from_bytes(size, "big"):
        raise DamagedEntryError("it is cut off")
    if digest != hashlib.blake2b(payload, digest_size=_DIGEST).digest():
        raise DamagedEntryError("its content was changed")
    if encryption is not None:
        try:
            payload = encryption.decrypt(payload)
        except Exception as error:
            raise DamagedEntryError("it was encrypted with another key, or not at all") from error
    try:
        return _entry(payload, name)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedEntryError(f"its content cannot be read: {error!r}") from error


def _entry(payload: bytes, name: str) -> Entry:
    text, _, body = payload.partition(b"\n")
    head: dict[str, Any] = json.loads(text)
    if head["name"] != name:
        raise ValueError("it is another one's")
    chunks, start = [], 0
    for size in head["chunks"]:
        chunks.append(body[start : start + size])
        start += size
    if start != len(body):
        raise ValueError("its parts are not its whole")
    headers = tuple((str(key), str(value)) for key, value in head["headers"])
    return Entry(headers, tuple(chunks), str(head["paid_by"]))
