"""What the server has answered, as attributes of the call's span."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlflow_ctx_autolog.prices import in_and_out
from mlflow_ctx_autolog.spans.attributes import MODEL, REUSED_USAGE, USAGE, USAGE_UNKNOWN
from mlflow_ctx_autolog.spans.usage import usage_of_answer
from mlflow_ctx_autolog.spans.values import dump

__all__ = ["answer_attributes", "as_reused", "document_of", "error_in", "outputs_of"]


def document_of(result: Any) -> Any:
    """Return what the client has made of an answer as a document, as the server might have sent."""
    if isinstance(result, Mapping):
        return result
    try:
        return result.model_dump(warnings=False)
    except Exception:
        return None


def outputs_of(result: Any) -> str:
    """Return what the client has made of an answer as JSON; never raises."""
    try:
        return str(result.model_dump_json(warnings=False))
    except Exception:
        return dump(result)


def answer_attributes(arguments: Mapping[str, Any], document: Any) -> dict[str, Any]:
    """Return what a server's answer says of model and tokens.

    Args:
        arguments: Those of the call.
        document: The answer, as the server has sent it or as its pieces come to; None where there
            is none.
    """
    answer = document if isinstance(document, Mapping) else {}
    model = answer.get("model") or arguments.get("model")
    attributes: dict[str, Any] = {}
    if isinstance(model, str):
        attributes[MODEL] = model
    # A list is one of embeddings.
    usage = usage_of_answer(answer.get("usage"), has_output=answer.get("object") != "list")
    if usage:
        attributes[USAGE] = usage
    if in_and_out(usage) is None and (usage or error_in(document) is None):
        attributes[USAGE_UNKNOWN] = True
    return attributes


def as_reused(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an answer says where it was given again: tokens are told, but not used."""
    found = {name: value for name, value in attributes.items() if name != USAGE_UNKNOWN}
    if (usage := found.pop(USAGE, None)) is not None:
        found[REUSED_USAGE] = usage
    return found


def error_in(document: Any) -> tuple[str, str] | None:
    """Return the kind and the message of an error that a server has sent as an answer."""
    if not isinstance(document, Mapping):
        return None
    error = document.get("error")
    if document.get("type") == "error" and not error:
        # An event of a stream of the Responses API.
        error = document
    if not error:
        return None if document.get("status") != "failed" else ("failed", "the answer has failed")
    if not isinstance(error, Mapping):
        return "error", str(error)
    kind = error.get("code") or error.get("type") or "error"
    return str(kind), str(error.get("message") or error)
