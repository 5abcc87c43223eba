"""Whether and where answers are kept to be given again, and with what they are encrypted."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mlflow_ctx_autolog.exceptions import shortened

__all__ = ["Answers", "AnswersKey", "AnswersKeySetting", "AnswersSetting"]

_HOUR, _WEEK = 3600.0, 7 * 24 * 3600.0
_SAME_REQUEST = "same request"
_SCOPES, _MATCHES = ("job", "always"), ("partition", "request")
_TAKES = (
    f'it must be True, False, an absolute path, "{_SAME_REQUEST}", or '
    'Answers(path, scope="job" or "always", match="partition" or "request", ttl=seconds)'
)
# Where workers find a key that does not travel.
_VARIABLE = "$MLFLOW_CTX_AUTOLOG_ANSWERS_KEY"


@dataclass(frozen=True)
class Answers:
    """Which answers are kept, where, for how long, and who gets them again.

    Args:
        path: An absolute path of a directory, which all workers see if answers are to survive the
            loss of a host; None for files of each host.
        scope: ``"job"``: they are given again within one job, which is a trace of the driver, or a
            Spark application where no span was active, or one micro-batch of a stream.
            ``"always"``: to any job that uses the same ``path``.
        match: ``"partition"``: the k-th time that the same partition of the same function asks a
            request, it gets the answer that it was given the k-th time before. ``"request"``:
            whoever asks the same request gets the same answer, also for another row.
        ttl: Seconds that an answer is kept: from when its job was last at work; with
            ``scope="always"``, from when it was given. By default an hour; a week with
            ``scope="always"``. More than 0.

    Raises:
        ValueError: A value is out of range; the message names it and the range.
        TypeError: A value is of the wrong type.
    """

    path: str | None = None
    scope: str = "job"
    match: str = "partition"
    ttl: float | None = None

    def __post_init__(self) -> None:
        if self.path is not None:
            _set(self, "path", _absolute(self.path))
        for name, known in (("scope", _SCOPES), ("match", _MATCHES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"Answers({name}={getattr(self, name)!r}) is unknown; it must be one of "
                    f"{', '.join(known)}"
                )
        if self.scope == "always" and self.path is None:
            raise ValueError(
                'Answers(scope="always") needs a path: what outlives a job is kept where you say'
            )
        if self.ttl is None:
            _set(self, "ttl", _WEEK if self.scope == "always" else _HOUR)
        elif isinstance(self.ttl, bool) or not isinstance(self.ttl, (int, float)):
            raise TypeError(f"Answers(ttl={self.ttl!r}) is not a number of seconds")
        elif not 0 < self.ttl < 1e9:
            raise ValueError(f"Answers(ttl={self.ttl!r}) is out of range; it must be more than 0")

    @property
    def seconds_kept(self) -> float:
        """How many seconds an answer is kept."""
        return _HOUR if self.ttl is None else self.ttl

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        return asdict(self)


def _set(answers: Answers, name: str, value: Any) -> None:
    object.__setattr__(answers, name, value)


def _absolute(path: object) -> str:
    try:
        text = os.fspath(path)  # type: ignore[call-overload]
    except TypeError:
        raise TypeError(f"reuse_answers={path!r} is of the wrong type; {_TAKES}") from None
    if not isinstance(text, str) or not os.path.isabs(text):
        raise ValueError(
            f"reuse_answers={text!r} is not an absolute path, and a worker has another working "
            f"directory; {_TAKES}"
        )
    return os.path.normpath(text)


class AnswersKey(str):
    """A key, or where workers find it, which no log shows."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"'{self}'" if self.startswith("$") else "'...'"

    def secret(self, environ: Mapping[str, str] = os.environ) -> str:
        """Return the key itself.

        Raises:
            ValueError: There is none where it is to be found, or it is none.
        """
        if not self.startswith("$"):
            return str(self)
        found = environ.get(self[1:])
        if found is None:
            raise ValueError(
                f"the environment variable {self[1:]} is to hold the key of answers_key and is not "
                "set; set it on all nodes, or name it in forward_env"
            )
        _check_key(f"the environment variable {self[1:]}", found)
        return found


def _check_key(name: str, text: str) -> None:
    try:
        is_key = len(base64.b64decode(text, altchars=b"-_", validate=True)) == 32
    except (binascii.Error, ValueError):
        is_key = False
    if not is_key:
        # Without the value, which is nearly one.
        raise ValueError(
            f"{name} is no key, a text of {len(text)} characters; it must be 32 bytes in URL-safe "
            "base64, as cryptography.fernet.Fernet.generate_key() returns"
        )


@dataclass(frozen=True)
class AnswersSetting:
    """Whether and where answers are kept."""

    in_variable = f'true, false, an absolute path or "{_SAME_REQUEST}"'

    def check(self, name: str, value: Any) -> Any:
        """Return an :class:`Answers`; None where none are kept."""
        if value is None or isinstance(value, Answers):
            return value
        if isinstance(value, bool):
            return Answers() if value else None
        if value == _SAME_REQUEST:
            return Answers(match="request")
        if isinstance(value, (str, os.PathLike)):
            return Answers(_absolute(value))
        if isinstance(value, dict):
            # As it has travelled.
            return Answers(**value)
        raise TypeError(f"{name}={shortened(repr(value))} is of the wrong type; {_TAKES}")

    def read(self, text: str) -> Any:
        flags = {"true": True, "1": True, "false": False, "0": False}
        return flags.get(text.lower(), text)

    def __str__(self) -> str:
        return f'true or false, an absolute path, "{_SAME_REQUEST}", or `Answers(...)`'


@dataclass(frozen=True)
class AnswersKeySetting:
    """With what answers are encrypted."""

    in_variable = "a key"

    def check(self, name: str, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, bytes):
            value = value.decode("ascii", "replace")
        if not isinstance(value, str):
            raise TypeError(f"{name} is of type {type(value).__name__}, not a text")
        if not value.startswith("$"):
            _check_key(name, value)
        elif not re.fullmatch(r"\$[A-Za-z_][A-Za-z0-9_]*", value):
            raise ValueError(f"{name}={value!r} is not $ and an environment variable's name")
        return AnswersKey(value)

    def read(self, text: str) -> Any:  # noqa: ARG002 - it stays where it is
        return _VARIABLE

    def __str__(self) -> str:
        return "a key, or `$` and the name of a variable of the workers"
