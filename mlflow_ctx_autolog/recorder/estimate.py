"""About how many tokens a call has used, where its server tells nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from mlflow_ctx_autolog.spans.amounts import Amounts
from mlflow_ctx_autolog.spans.attributes import INPUTS, OUTPUTS
from mlflow_ctx_autolog.spans.quality import ANSWER_CHARS
from mlflow_ctx_autolog.spans.record import SpanRecord

__all__ = ["estimated_usage"]

_BYTES_OF_TOKEN = 4
_TOKENS_OF_MEDIUM = 1000
_ASKED = ("messages", "input", "prompt", "instructions", "tools", "functions")
_MEDIA = ("image", "audio", "file", "video")


def estimated_usage(span: SpanRecord) -> Amounts:
    """Return about how many tokens a call has used, of which the server told nothing.

    One for each four bytes of the texts of request and answer in UTF-8, and 1,000 for each image,
    sound or file of the request.

    Args:
        span: Of the call, with its content.
    """
    asked = span.get(INPUTS)
    if isinstance(asked, Mapping):
        asked = [asked.get(name) for name in _ASKED]
    answered = span.get(ANSWER_CHARS)
    if not isinstance(answered, int):
        answered = len(str(span.get(OUTPUTS) or ""))
    used = sum(_tokens(asked)), math.ceil(answered / _BYTES_OF_TOKEN)
    return {"input_tokens": used[0], "output_tokens": used[1], "total_tokens": sum(used)}


def _tokens(content: Any) -> Iterator[int]:
    if isinstance(content, str):
        yield math.ceil(len(content.encode(errors="replace")) / _BYTES_OF_TOKEN)
    elif isinstance(content, Mapping):
        if any(medium in str(content.get("type")) for medium in _MEDIA):
            yield _TOKENS_OF_MEDIUM
        else:
            for each in content.values():
                yield from _tokens(each)
    elif isinstance(content, (list, tuple)):
        for each in content:
            yield from _tokens(each)
