"""Has the roles of docstrings (``:func:`~module.name```) shown as code in the API reference."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(\w+):`~?(?:[\w.]*\.)?(\w+)`")


def _as_code(found: re.Match[str]) -> str:
    role, name = found.groups()
    return f"`{name}()`" if role in ("func", "meth") else f"`{name}`"


class Roles(griffe.Extension):
    """Changes docstrings as they are loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change one."""
        if obj.docstring is not None:
            text = _ROLE.sub(_as_code, obj.docstring.value)
            obj.docstring.value = text.replace("``", "`")
