"""Which texts of a finished span may leave this process: prompts, answers, what quotes them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.exceptions import warn_once
from mlflow_ctx_autolog.spans.record import SpanRecord

__all__ = ["ContentPolicy"]

_logger = logging.getLogger(__name__)

_WITHHELD = "[withheld]"

# Attributes that say what happened rather than what was said. All other texts are content, since
# a call's arguments and whatever the user records are attributes as well.
_FACTS = re.compile(
    r"mlflow\.(?!spanInputs|spanOutputs|spanDescription|chat\.(?!tokenUsage)|trace\.intermediate"
    r"|chunk).*"
    r"|(?:spark|spans|process|host|os|service|server|network|thread|code|error|telemetry)\..*"
    r"|mlflow_ctx_autolog\..*|annotation\..*|llm\.(?:calls|tokens|cost|request|silence|stream)\b.*"
    r"|gen_ai\.(?:request|response|usage|operation|provider|agent|conversation)\..*"
    r"|gen_ai\.(?:system|output\.type|tool\.name|tool\.type)"
    r"|exception\.(?:type|escaped)|http\.(?:request\.method|response\.status_code)"
    r"|model|session\.id|user\.id"
)
# Pieces of an answer, of which none shows what the whole says.
_CHUNK = "mlflow.chunk.value"

# Arguments of a call that carry log-ins: a request's own headers, and those of an MCP server.
_HOLDS_CREDENTIALS = re.compile(
    r'"(?:extra_headers|extra_query|headers|authorization|api[-_]key|x-api-key)" *:', re.IGNORECASE
)
_OF_CREDENTIALS = frozenset({"extra_headers", "extra_query", "headers"})
_CREDENTIALS = frozenset({"authorization", "api_key", "api-key", "x-api-key"})


class ContentPolicy:
    """Decides which content of spans may be sent; facts, as tokens, model and times, stay.

    Content is every text in a span's attributes and events that is not known to be a fact: inputs
    and outputs, the arguments of a call, tool definitions, pieces of a stream, messages and stack
    traces of exceptions, and the attributes that users set. Log-ins among the arguments of a call
    (``extra_headers``, for one) never are sent.

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
        if not self.changes_content and attributes == span.attributes and not span.events:
            return span
        return replace(
            span,
            attributes=attributes,
            events=tuple(
                replace(event, attributes=self.attributes(event.attributes))
                for event in span.events
            ),
            message=self.text(span.message),
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
        if _FACTS.fullmatch(name):
            return raw
        if not self.changes_content:
            if isinstance(raw, str) and _is_credential(name, raw):
                return _dumped(_without_credentials(json.loads(raw), name))
            return raw
        if name == _CHUNK:
            # A redaction that looks for a name does not find it in "Ali" and "ce".
            return None
        value, is_json = _loaded(raw)
        if value is None or isinstance(value, (bool, int, float)):
            return raw
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


def _is_credential(name: str, raw: str) -> bool:
    is_named = name.lower() in _OF_CREDENTIALS | _CREDENTIALS
    # Most spans have none, and need not be parsed.
    return (is_named or _HOLDS_CREDENTIALS.search(raw) is not None) and _loaded(raw)[1]


def _without_credentials(value: Any, name: str = "") -> Any:
    """Return a value without the log-ins of requests: the texts under names of such."""
    name = name.lower()
    if name in _CREDENTIALS and isinstance(value, str):
        return _WITHHELD
    if isinstance(value, dict):
        if name in _OF_CREDENTIALS:
            return dict.fromkeys(value, _WITHHELD)
        return {key: _without_credentials(each, key) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_credentials(each, name) for each in value]
    return value
