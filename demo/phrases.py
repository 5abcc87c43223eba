"""The phrasings of English licences and contracts that `rules` looks for."""

from __future__ import annotations

import re

TERMS = re.compile(
    r"\b(?:provided(?:,? however,?)? that|provided (?=the following)|subject to|on (?:the )?"
    r"condition that|(?:as|so) long as|only if|if and only if|under the (?:terms|conditions)|"
    r"in accordance with|unless|except (?:as|that|for|where|in|with)|"
    r"for (?:any|the sole) purposes?|"
    r"with or without fee|free of charge|without (?:charge|fee))\b",
    re.IGNORECASE,
)
_USES = (
    r"use|copi|copy|modif|distribut|redistribut|reproduc|publish|sublicens|sell|sold|assign|"
    r"transfer|terminat|disclos|includ|incorporat|combin|link|convey|propagat"
)
_SUBJECT = r"(?P<who>(?:[\w'\u2019\"\u201c\u201d/()-]+ ){0,9}?[\w'\u2019\"\u201c\u201d/()-]+)"
GRANTS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"permission is (?:hereby )?granted,?(?P<lead>.*?),? to (?P<who>(?:any|every|each|all|the"
        r"|you|licensee)\b.*?),? to (?P<may>[a-z].*)",
        r"permission (?:is (?:hereby )?granted )?to (?P<may>.*?)(?: is (?:hereby )?granted\b"
        r"(?P<terms>.*)|$)",
        r"(?:hereby )?grants? (?:to )?(?P<who>[\w \"'\u201c\u201d()-]{2,60}?),? (?:an?|the) "
        r"(?P<lead>[^.]*?(?:licen[cs]e|right|permission)s?\b.*?) to (?P<may>[a-z].*)",
        r"(?P<may>.+?) (?:is|are) (?:hereby )?(?:permitted|allowed)\b(?! to\b)(?P<terms>.*)",
        _SUBJECT + r" (?:is|are) (?:hereby )?(?:permitted|allowed|entitled|authori[sz]ed|licensed"
        r"|free) to (?P<may>.*)",
        _SUBJECT + r" (?:has|have|shall have) the (?:\w+ )?right to (?P<may>.*)",
        rf"(?:^|[,;:] )(?P<may>[^,;:]*?\bmay be (?:{_USES})\w*\b.*)",
        _SUBJECT + r" may,? (?!not\b|be\b|have\b|result\b|contain\b|cause\b|apply\b|arise\b|vary\b"
        r"|exist\b|appear\b|only be\b|or may\b|also be\b|obtain a copy of the licen[cs]e)"
        r"(?P<may>[a-z].*)",
    )
]
DUTIES = re.compile(
    r"\b(?:must|shall|may not|agrees? (?:not )?to|(?:is|are) (?:required|obliged|obligated) to|"
    r"(?:is|are) responsible for|neither .* may)\b",
    re.IGNORECASE,
)
NO_DUTY = re.compile(r"\bshall (?:mean|include|be deemed|have the)\b|\bfor the purposes of\b", re.I)
DISCLAIMERS = re.compile(
    r"\bas[- ]is\b|\bwithout (?:any )?warrant|\bdisclaim|\bin no event\b|\bno (?:liability|"
    r"warrant)|\bnot be liable\b",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"(?<=[.;!?])[\"\u201d)]*\s+(?=[\"\u201c(]?[A-Z0-9])")
ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|inc|ltd|co|corp|no|art|sec|vs?|[A-Z]))\.$", re.I)
ITEM = re.compile(r"^\s*(?:\(?(?:[0-9]{1,2}|[a-z]|[ivx]{1,4})[.)]|[0-9]+(?:\.[0-9]+)+\.?|[*•-])\s+")
COPYRIGHT = re.compile(
    r"^\W*copyright\s*(?:\(c\)|©)?\s*(?:[\d,\s\u2013-]|present)*(?:by )?\s*"
    r"(?P<party>[^\d\W].{1,70}?)(?:[,.]? all rights reserved.*|<.*|\s*[,.;])?$",
    re.IGNORECASE,
)
DEFINED = re.compile(
    r"[\"\u201c](?P<party>[A-Z][\w -]{1,30})[\"\u201d]\s*\)"
    r"|^[\"\u201c](?P<term>[A-Z][\w -]{1,30})[\"\u201d]"
    r"(?: \(or \S+\))? (?:shall )?means? (?:the|an?|any) (?:\w+ )*?"
    r"(?:individual|person|owner|entity|party|company|customer)\b"
)
THINGS = re.compile(
    r"\b(?:software|licen[cs]e|work|program|agreement|product|library|font|code|"
    r"python|materials?|services?|data|effective date|fees?|notices?)s?$",
    re.I,
)
NO_SUBJECT = {"it", "this", "there", "they", "or", "and", "which", "but", "that", "nor", "you may"}
NEGATED = re.compile(
    r"\bmay not\b|\b(?:not|neither|nor|nothing|no) (?:\S+ ){0,25}?(?:may|permitted|allowed|"
    r"entitled|grant(?:s|ed)?)\b",
    re.IGNORECASE,
)
NO_HOLDER = re.compile(
    r"(?:notice|holder|owner|law|statement|licen[cs]e|and|or|the above|interest)", re.IGNORECASE
)
