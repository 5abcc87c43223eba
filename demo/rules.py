"""A rule-based reader of licences and contracts: who may do what under which terms.

It stands in for a language model, so that the demonstration needs neither a network nor a key.
Sentences are found first; each is then matched against the phrasings in which English legal
texts grant, demand and disclaim. The result is a rough reading, not legal advice.
"""

from __future__ import annotations

import json
import re
from typing import Any, TypedDict

from phrases import (
    ABBREVIATION,
    COPYRIGHT,
    DEFINED,
    DISCLAIMERS,
    DUTIES,
    GRANTS,
    ITEM,
    NEGATED,
    NO_DUTY,
    NO_HOLDER,
    NO_SUBJECT,
    SENTENCE_END,
    TERMS,
    THINGS,
)

MARKER = "Document: "
"""Starts the prompt line that names the document; its text follows."""


class Entitlement(TypedDict):
    """One permission found in a document."""

    who: str
    may: str
    terms: str


def answer_prompt(prompt: str) -> str:
    """Read the document in a prompt made by the demonstration and answer as JSON text."""
    head, _, rest = prompt.partition(MARKER)
    name, _, text = rest.partition("\n") if rest else ("", "", head)
    return json.dumps(read(name.strip(), text), ensure_ascii=False)


def read(name: str, text: str) -> dict[str, Any]:
    """Return the parties, entitlements, obligations and disclaimers stated in ``text``."""
    entitlements: list[Entitlement] = []
    obligations: list[str] = []
    disclaimers: list[str] = []
    found = sentences(text)
    for position, sentence in enumerate(found):
        if DISCLAIMERS.search(sentence):
            disclaimers.append(_clip(sentence))
            continue
        grant = _grant(sentence, found[position + 1 : position + 3])
        if grant and grant not in entitlements:
            entitlements.append(grant)
        elif not grant and DUTIES.search(sentence) and not NO_DUTY.search(sentence):
            obligations.append(_clip(sentence))
    return {
        "document": name,
        "parties": _parties(text, found),
        "entitlements": entitlements,
        "obligations": _unique(obligations),
        "disclaimers": _unique(disclaimers),
    }


def sentences(text: str) -> list[str]:
    """Split a text with wrapped lines, lists and comment marks into sentences."""
    blocks: list[list[str]] = [[]]
    for raw in text.splitlines():
        line = re.sub(r"^\s*(?:#+|//+|>)\s*", "", raw).strip()
        if not line or ITEM.match(line) or COPYRIGHT.match(line):
            blocks.append([])
        blocks[-1].append(ITEM.sub("", line))
        if COPYRIGHT.match(line):
            blocks.append([])
    return [sentence for block in blocks for sentence in _split(" ".join(block).strip())]


def _split(block: str) -> list[str]:
    parts: list[str] = []
    for piece in SENTENCE_END.split(re.sub(r"\s+", " ", block)):
        if parts and ABBREVIATION.search(parts[-1]):
            parts[-1] += " " + piece
        else:
            parts.append(piece)
    return [part for part in parts if len(part.split()) > 2]


def _grant(sentence: str, following: list[str]) -> Entitlement | None:
    if NEGATED.search(sentence):
        return None
    for pattern in GRANTS:
        match = pattern.search(sentence)
        if match:
            groups = match.groupdict()
            action, terms = groups["may"], groups.get("terms") or ""
            before = sentence[: match.start()]
            marker = TERMS.search(action)
            if marker and marker.start() > 3:
                action, terms = action[: marker.start()], action[marker.start() :] + terms
            said = [before if TERMS.search(before) else "", groups.get("lead") or "", terms]
            if sentence.endswith(":"):
                said += following
            who = _who(groups.get("who") or "")
            if len(action.split()) == 0 or not who:
                return None
            return {
                "who": who,
                "may": _clip(action),
                "terms": _clip("; ".join(filter(None, map(_trim, said))), 240) or "none stated",
            }
    return None


def _who(subject: str) -> str:
    """Name the grantee; permissions without a subject are granted to everybody."""
    subject = re.split(r"[,;:]\s*|\b(?:that|which|and that|if|where|when|but)\s", subject)[-1]
    subject = _trim(subject)
    if (subject and not re.search(r"[A-Za-z]{2}", subject)) or subject.lower() in NO_SUBJECT:
        return ""
    return _clip(subject or "anyone", 90)


def _parties(text: str, found: list[str]) -> list[str]:
    holders = [match["party"] for line in text.splitlines() if (match := COPYRIGHT.match(line))]
    holders = [name for name in holders if not NO_HOLDER.match(name)]
    defined = [
        match["party"] or match["term"] for item in found for match in DEFINED.finditer(item)
    ]
    defined = [name for name in defined if not THINGS.search(name)]
    return _unique([_trim(name) for name in holders + defined])


def _trim(text: str) -> str:
    return re.sub(r"^(?:and|or)\s+|\s+(?:and|or)$", "", text.strip(" \t,;:.*-")).strip(" ,;:")


def _clip(text: str, length: int = 200) -> str:
    text = _trim(text)
    return text if len(text) <= length else text[:length].rsplit(" ", 1)[0] + " ..."


def _unique(items: list[str]) -> list[str]:
    return list(dict.fromkeys(item for item in items if item))
