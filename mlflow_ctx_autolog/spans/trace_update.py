"""What tasks say of the trace that they belong to, besides spans, and which word of several holds.

An update is a mapping of texts. Its names are those of MLflow's ``TraceInfo``:
``client_request_id``, ``request_preview``, ``response_preview``, ``state``; and ``tags.`` and
``trace_metadata.``, each with the name of one behind the dot.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = [
    "CONTENT",
    "LINKED_PROMPTS",
    "ROOM",
    "bounded",
    "differing",
    "fields_of",
    "joined_prompts",
    "latest",
    "parse_update",
    "prompts_of",
    "trace_update",
]

TraceUpdate = Mapping[str, str]

_FIELDS = ("client_request_id", "request_preview", "response_preview", "state")
# Those that quote what was asked and answered.
CONTENT = ("request_preview", "response_preview")
LINKED_PROMPTS = "tags.mlflow.linkedPrompts"
# Names that are MLflow's, or ours: most are for whoever stores the trace, such as those of its
# name, its inputs and its totals; some are for users as well.
_RESERVED = re.compile(r"(?:tags|trace_metadata)\.(?:mlflow|mlflow_ctx_autolog)\.")
_TO_BE_SAID = re.compile(
    r"(?:tags|trace_metadata)\.mlflow\."
    r"(?:trace\.(?:session|user)|sourceRun|modelId|linkedPrompts|source\..+)"
)
# Characters of an update, so that receipts stay small.
ROOM = 8000


def trace_update(
    tags: Mapping[str, Any], metadata: Mapping[str, Any], **fields: Any
) -> dict[str, str]:
    """Return the update that says this; of fields, those that are not None."""
    said = {f"tags.{name}": value for name, value in tags.items()}
    said |= {f"trace_metadata.{name}": value for name, value in metadata.items()}
    said |= {name: value for name, value in fields.items() if value is not None}
    return {name: str(value) for name, value in said.items() if _is_to_be_said(name)}


def _is_to_be_said(name: str) -> bool:
    return _RESERVED.match(name) is None or _TO_BE_SAID.fullmatch(name) is not None


def parse_update(document: Any) -> dict[str, str]:
    """Return the update that a JSON object is, without what is none."""
    if not isinstance(document, dict):
        return {}
    return {
        name: value
        for name, value in document.items()
        if isinstance(value, str)
        and (name in _FIELDS or name.startswith(("tags.", "trace_metadata.")))
        and (name != "state" or value in ("OK", "ERROR"))
        and _is_to_be_said(name)
    }


def bounded(update: TraceUpdate) -> tuple[dict[str, str], list[str]]:
    """Return what there is room for, and the names of the rest."""
    room = ROOM
    kept, rest = {}, []
    for name, value in update.items():
        if len(name) + len(value) <= room:
            room -= len(name) + len(value)
            kept[name] = value
        else:
            rest.append(name)
    return kept, rest


def latest(updates: Iterable[TraceUpdate]) -> dict[str, str]:
    """Return what holds of several: the last word, each prompt, and a state of ``ERROR``."""
    found: dict[str, str] = {}
    for update in updates:
        held = dict(found)
        found.update(update)
        if LINKED_PROMPTS in held and LINKED_PROMPTS in update:
            found[LINKED_PROMPTS] = joined_prompts(held[LINKED_PROMPTS], update[LINKED_PROMPTS])
        if held.get("state") == "ERROR":
            found["state"] = "ERROR"
    return found


def joined_prompts(one: str | None, other: str) -> str:
    """Return the prompts of both, as MLflow writes those that a trace was made with."""
    prompts = prompts_of(one)
    return json.dumps([*prompts, *(each for each in prompts_of(other) if each not in prompts)])


def prompts_of(text: str | None) -> list[Any]:
    """Return the ``name`` and ``version`` of each prompt in such a text; none of what is none."""
    try:
        found = json.loads(text or "[]")
    except ValueError:
        return []
    return found if isinstance(found, list) else []


def differing(updates: Iterable[TraceUpdate]) -> dict[str, tuple[str, str]]:
    """Return of what is said in more than one way the last two: the one before, and the one."""
    found: dict[str, tuple[str, str]] = {}
    said: dict[str, str] = {}
    for update in updates:
        for name, value in update.items():
            # These can all be true.
            if said.get(name, value) != value and name not in (LINKED_PROMPTS, "state"):
                found[name] = said[name], value
            said[name] = value
    return found


def fields_of(update: TraceUpdate) -> dict[str, Any]:
    """Return the same as MLflow's JSON of a trace has it."""
    document: dict[str, Any] = {"tags": {}, "trace_metadata": {}}
    for name, value in update.items():
        kind, _, key = name.partition(".")
        if key:
            document[kind][key] = value
        else:
            document[kind] = value
    return document
