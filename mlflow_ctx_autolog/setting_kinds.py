"""What a setting takes: how it is checked, read from a variable, and described."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["AbsolutePath", "Choice", "Flag", "Function", "Kind", "Name", "Names", "Number"]

_VARIABLE = re.compile("[A-Za-z_][A-Za-z0-9_]*")
# RFC 9110, section 5.6.2.
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


class Kind(Protocol):
    """A kind of setting. Its ``str()`` says in a few words what it takes."""

    @property
    def in_variable(self) -> str:
        """What an environment variable has to hold, as in "it is not ..."."""

    def check(self, name: str, value: Any) -> Any:
        """Return the value as it is kept.

        Raises:
            TypeError: It is of the wrong type; the message names setting and value.
            ValueError: It is out of range; the message names the range, too.
        """

    def read(self, text: str) -> Any:
        """Return the value that a variable's text stands for.

        Raises:
            ValueError: It stands for none.
        """


@dataclass(frozen=True)
class Number:
    """A number in a range, whole or not; None as well where there may be no limit."""

    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    whole: bool = False
    optional: bool = False

    @property
    def in_variable(self) -> str:
        return "a number, or none" if self.optional else "a number"

    def check(self, name: str, value: Any) -> Any:
        if value is None and self.optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            raise TypeError(f"{name}={value!r} is not {self._kind}")
        # Comparisons with nan are false, so nan is outside every range; inf is outside those with
        # an upper limit, and no setting of floats lacks one.
        inside = (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
        )
        if not inside:
            raise ValueError(f"{name}={value!r} is out of range; it must be {self._range}")
        return value

    def read(self, text: str) -> Any:
        if self.optional and text.lower() == "none":
            return None
        return int(text) if self.whole else float(text)

    def __str__(self) -> str:
        return f"{self._kind}, {self._range}{', or None' if self.optional else ''}"

    @property
    def _kind(self) -> str:
        return "a whole number" if self.whole else "a number"

    @property
    def _range(self) -> str:
        limits = (
            ("more than", self.above),
            ("at least", self.at_least),
            ("at most", self.at_most),
        )
        return " and ".join(f"{words} {limit:,}" for words, limit in limits if limit is not None)


@dataclass(frozen=True)
class Flag:
    """True or false."""

    in_variable = "true or false"

    def check(self, name: str, value: Any) -> Any:
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r} is not True or False")
        return value

    def read(self, text: str) -> Any:
        flags = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in flags:
            raise ValueError(text)
        return flags[text.lower()]

    def __str__(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class Choice:
    """One of some words."""

    words: Sequence[str]
    in_variable = "one of them"

    def check(self, name: str, value: Any) -> Any:
        if value not in self.words:
            known = ", ".join(self.words)
            raise ValueError(f"{name}={value!r} is unknown; it must be one of {known}")
        return value

    def read(self, text: str) -> Any:
        return text

    def __str__(self) -> str:
        return ", ".join(f"`{word}`" for word in self.words)


@dataclass(frozen=True)
class AbsolutePath:
    """The full path of a directory; None for the default one."""

    in_variable = "a path"

    def check(self, name: str, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, str):
            raise TypeError(f"{name}={value!r} is not a text")
        if not os.path.isabs(value):
            raise ValueError(
                f"{name}={value!r} is not an absolute path, and a worker has another working "
                "directory"
            )
        return value

    def read(self, text: str) -> Any:
        return text

    def __str__(self) -> str:
        return "an absolute path"


@dataclass(frozen=True)
class Function:
    """A function, or None."""

    in_variable = "a function: give it to enable()"

    def check(self, name: str, value: Any) -> Any:
        if value is not None and not callable(value):
            raise TypeError(f"{name}={value!r} is not a function")
        return value

    def read(self, text: str) -> Any:
        raise ValueError(text)

    def __str__(self) -> str:
        return "a function; not by variable"


@dataclass(frozen=True)
class Name:
    """One name, as HTTP headers have them; None for none.

    Args:
        shown: What it is the name of.
    """

    shown: str
    in_variable = "a name"

    def check(self, name: str, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, str):
            raise TypeError(f"{name}={value!r} is not a text")
        if not _TOKEN.fullmatch(value):
            raise ValueError(f"{name}={value!r} is not {self.shown}")
        return value

    def read(self, text: str) -> Any:
        return text

    def __str__(self) -> str:
        return f"{self.shown}, or None"


@dataclass(frozen=True)
class Names:
    """Names of environment variables."""

    in_variable = "a list"

    def check(self, name: str, value: Any) -> Any:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError(f"{name}={value!r} is not a list of names")
        for each in value:
            if not isinstance(each, str) or not _VARIABLE.fullmatch(each):
                raise ValueError(
                    f"{name} holds {each!r}, which is not an environment variable's name"
                )
        # So that two settings objects with the same names are equal, whatever held them.
        return tuple(value)

    def read(self, text: str) -> Any:
        return tuple(name.strip() for name in text.split(",") if name.strip())

    def __str__(self) -> str:
        return "names of variables; in a variable, separated by commas"
