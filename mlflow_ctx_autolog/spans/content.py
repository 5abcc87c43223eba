"""Which texts of a finished span may leave this process: prompts, answers, what quotes them."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.exceptions import warn_once
from mlflow_ctx_autolog.log_ins import safe_logger, without_log_ins
from mlflow_ctx_autolog.spans.attributes import EXCEPTION_EVENT
from mlflow_ctx_autolog.spans.record import SpanEvent, SpanRecord

__all__ = ["ContentPolicy"]

_logger = safe_logger(__name__)

_WITHHELD = "[withheld]"

# Attributes that say what happened rather than what was said, and whose values are no free texts:
# ids, names of models and libraries, numbers. All that is not among them is content.
_FACTS = re.compile(
    r"mlflow\.(?:spanType|spanLogLevel|spanFunctionName|spanStartTimeNs|traceRequestId|experimentId"
    r"|chat\.tokenUsage|llm\.cost|llm\.model|llm\.provider|message\.format"
    r"|gateway\.linkedTraceId)"
    r"|gen_ai\.request\.(?:model|max_tokens|temperature|top_p|top_k|seed|choice\.count|stream"
    r"|frequency_penalty|presence_penalty|encoding_formats)"
    r"|gen_ai\.response\.(?:id|model|finish_reasons|time_to_first_chunk)|gen_ai\.usage\.[\w.]+"
    r"|gen_ai\.(?:system|output\.type|operation\.name|provider\.name|conversation\.id|agent\.id)"
    r"|gen_ai\.(?:agent|tool)\.name|gen_ai\.tool\.(?:type|call\.id)"
    r"|error\.type|exception\.(?:type|escaped)"
    r"|http\.(?:request\.method|request\.resend_count|response\.status_code)"
    r"|(?:server|client|network\.peer)\.(?:address|port)|network\.[\w.]+|host\.(?:id|name|arch)"
    r"|os\.type|process\.(?:pid|parent_pid|runtime\.name|runtime\.version)"
    r"|service\.(?:name|version|namespace|instance\.id)|telemetry\.sdk\.\w+|thread\.(?:id|name)"
    r"|code\.(?:function|function\.name|namespace|filepath|file\.path|lineno|line\.number)"
    r"|session\.id|user\.id"
    # Parameters of a call that are recorded as attributes of their own.
    r"|model|temperature|top_p|top_k|max_tokens|max_completion_tokens|max_output_tokens|seed|n"
    r"|frequency_penalty|presence_penalty|logprobs|top_logprobs|stream|dimensions|encoding_format"
    r"|parallel_tool_calls|reasoning_effort|service_tier|size|quality|store|timeout|truncation"
)
# A value of theirs: what has a blank in it may be a text.
_FACT = re.compile(r"[\w.:/@+,#<>()\[\]{}\"'$%=-]{0,300}")
# What this library records, and what users want to see on the span.
_OURS = re.compile(
    r"annotation\..*|mlflow_ctx_autolog\.[\w.]+|linked\.(?:trace|span)\.id|spans\.[\w.]+"
    r"|spark\.(?:stage|partition|task|sql|application|handover|function|speculation|rows|job|connect"
    r"|streaming|executor)\b[\w.]*"
    r"|llm\.(?:calls|tokens|cost|request|silence|stream|answer|tool_calls|reused_from|usage)\b[\w.]*"
)
_INPUTS = "mlflow.spanInputs"
# Pieces of an answer, of which none shows what the whole says.
_CHUNK = "mlflow.chunk.value"

# Arguments of a call that carry log-ins: a request's own headers, and those of an MCP server. Of
# those, no value is sent; of what is sent along with a request, none whose name is a log-in's.
_OF_CREDENTIALS = frozenset({"extra_headers", "extra_query", "headers", "default_headers"})
_SENT_ALONG = frozenset({"extra_body"})
_CREDENTIALS = frozenset({"authorization", "api_key", "api-key", "x-api-key"})
_CREDENTIAL = re.compile(
    r"(?:.*[._-])?(?:token|secret|passw(?:or)?d|pwd|api[_-]?key|access[_-]?key|key[_-]?id|auth"
    r"|authorization|credentials?|cookie|signature)",
    re.IGNORECASE,
)
_HOLDS_CREDENTIALS = re.compile(
    r"[\"'](?:(?:extra|default)_headers|extra_query|extra_body|headers|authorization|api[-_]key"
    r"|x-api-key)[\"'] *:",
    re.IGNORECASE,
)


class ContentPolicy:
    """Decides which content of spans may be sent; facts, as tokens, model and times, stay.

    Content is whatever a span's attributes, events and links hold that is not known to be a fact:
    inputs and outputs, the arguments of a call, tool definitions, pieces of a stream, messages and
    stack traces of exceptions, and the attributes that users set, also where they look like
    numbers. Annotations are what users want to see, and stay. Log-ins among the arguments of a
    call (``extra_headers``, for one) never are sent.

    Args:
        config: ``capture_content``, ``max_content_chars`` and ``redact`` are used.
        redact: Takes the place of ``config.redact``.
        withholds: A reason to send no content at all, which is said in one warning.
    """

    def __init__(
        self,
        config: Config,
        redact: Callable[[Any], Any] | None = None,
        withholds: str | None = None,
    ) -> None:
        self._redact = redact or config.redact
        self._max_chars = config.max_content_chars
        self._sends_content = config.capture_content and withholds is None
        if withholds is not None and config.capture_content:
            warn_once(_logger, withholds, withholds)

    @property
    def changes_content(self) -> bool:
        """Whether content is sent otherwise than as it is."""
        return not self._sends_content or self._redact is not None or self._max_chars is not None

    def attributes(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the attributes to send, of a span or an event.

        Args:
            attributes: Values as OpenTelemetry has them; texts may be JSON, as MLflow's are.
        """
        found = {name: self._attribute_or_none(name, value) for name, value in attributes.items()}
        return {name: value for name, value in found.items() if value is not None}

    def record(self, span: SpanRecord) -> SpanRecord:
        """Return a span with the content that may be sent."""
        attributes = self.attributes(span.attributes)
        is_same = attributes == span.attributes and not span.events and not span.message
        if is_same and not self.changes_content:
            return span
        return replace(
            span,
            attributes=attributes,
            events=tuple(
                replace(event, attributes=self.attributes(_shown(event))) for event in span.events
            ),
            message=self.text(span.message and without_log_ins(span.message)),
        )

    def text(self, text: str | None) -> str | None:
        """Return what to send of a text that may quote content, such as a status' description."""
        if not text or not self.changes_content:
            return text
        found = self._content(text)
        return found if found is None or isinstance(found, str) else json.dumps(found, default=str)

    def _attribute_or_none(self, name: str, raw: Any) -> Any:
        try:
            return self._attribute(name, raw)
        except Exception as error:
            # Nested too deeply, for one. Neither may the user's call fail, nor the text leave.
            warn_once(
                _logger,
                "attribute",
                f"Attributes of spans that cannot be looked through are withheld, {name} for one: "
                f"{type(error).__name__}.",
            )
            return None

    def _attribute(self, name: str, raw: Any) -> Any:
        is_ours, is_of_facts = _kind(name)
        if is_ours or (is_of_facts and _is_fact(raw)):
            return raw
        if not self.changes_content:
            return _without_log_ins(name, raw)
        if not self._sends_content or name == _CHUNK:
            # A redaction that looks for a name does not find it in "Ali" and "ce".
            return None
        value, is_json = _loaded(raw)
        if isinstance(raw, str) and not isinstance(value, (str, dict, list)):
            # Digits, such as a card's number, which a redaction finds in a text.
            value, is_json = raw, False
        elif value is None or isinstance(value, (bool, int, float)):
            return raw
        if isinstance(value, str):
            value = value if _without_log_ins(name, raw) == raw else _WITHHELD
        found = self._content(_without_credentials(value, name))
        if found is None or (isinstance(found, str) and not is_json):
            return found
        return _dumped(found)

    def _content(self, value: Any) -> Any:
        if not self._sends_content:
            return None
        if self._redact is not None:
            try:
                value = self._redact(value)
            except Exception as error:
                # Its message may quote what was to be redacted.
                warn_once(
                    _logger,
                    "redact",
                    f"The redact function raised {type(error).__name__}, so content of spans is "
                    "withheld. It is called with dictionaries, lists and texts.",
                )
                return None
        return value if self._max_chars is None else _cut(value, self._max_chars)


# The names of most attributes are the same few in all spans.
@functools.lru_cache(maxsize=1024)
def _kind(name: str) -> tuple[bool, bool]:
    """Return whether an attribute is one of this library's, and whether it says what happened."""
    return _OURS.fullmatch(name) is not None, _FACTS.fullmatch(name) is not None


def _shown(event: SpanEvent) -> Mapping[str, Any]:
    """Return what an event says; of an exception, whose texts quote anything, no log-ins."""
    if event.name != EXCEPTION_EVENT:
        return event.attributes
    return {
        name: without_log_ins(value) if isinstance(value, str) else value
        for name, value in event.attributes.items()
    }


def _loaded(raw: Any) -> tuple[Any, bool]:
    """Return the value of an attribute, and whether it was JSON."""
    if isinstance(raw, str):
        try:
            return json.loads(raw), True
        except (RecursionError, ValueError):
            return raw, False
    return (list(raw) if isinstance(raw, tuple) else raw), False


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _cut(value: Any, limit: int) -> Any:
    """Return a value whose texts have ``limit`` characters at most, and a note of the rest."""
    if isinstance(value, str):
        rest = len(value) - limit
        return value if rest <= 0 else f"{value[:limit]}... [{rest} more characters]"
    if isinstance(value, Mapping):
        return {name: _cut(each, limit) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cut(each, limit) for each in value]
    return value


def _is_fact(raw: Any) -> bool:
    if isinstance(raw, str):
        return _FACT.fullmatch(raw) is not None or isinstance(_loaded(raw)[0], (dict, list))
    return not isinstance(raw, (list, tuple)) or all(map(_is_fact, raw))


def _without_log_ins(name: str, raw: Any) -> Any:
    """Return an attribute as it is, but for log-ins of requests in it."""
    # Most spans have none, and need not be parsed.
    is_named = name.lower() in _OF_CREDENTIALS | _SENT_ALONG | _CREDENTIALS
    if not isinstance(raw, str) or not (is_named or _HOLDS_CREDENTIALS.search(raw)):
        return raw
    value, is_json = _loaded(raw)
    if isinstance(value, str) and not is_named:
        # Arguments that MLflow could not write as JSON: how Python shows them cannot be parsed.
        is_shown = value.startswith("{") and (name == _INPUTS or not is_json)
        return _WITHHELD if is_shown else raw
    found = _without_credentials(value, name)
    if found == value:
        return raw
    return _dumped(found) if is_json else found


def _without_credentials(value: Any, name: str = "", *, is_sent_along: bool = False) -> Any:
    """Return a value without the log-ins of requests: what stands under names of such."""
    name = name.lower()
    if name in _OF_CREDENTIALS and not (name == "headers" and isinstance(value, list)):
        # Of another mapping than a dictionary, only a text is left, with all its values in it.
        return dict.fromkeys(value, _WITHHELD) if isinstance(value, dict) else _WITHHELD
    is_sent_along = is_sent_along or name in _SENT_ALONG
    if isinstance(value, dict):
        return {
            key: _without_credentials(each, str(key), is_sent_along=is_sent_along)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [_without_credentials(each, name, is_sent_along=is_sent_along) for each in value]
    if value is None:
        return None
    if name in _CREDENTIALS or (is_sent_along and _CREDENTIAL.fullmatch(name)):
        return _WITHHELD
    # Else it is how Python shows a mapping, with whatever is in it.
    return _WITHHELD if name in _SENT_ALONG and isinstance(value, str) else value
