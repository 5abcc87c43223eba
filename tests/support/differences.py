"""How the recorder's spans differ from MLflow's of the same calls, and why; a page of the docs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "differences.md"

# What an ended span has that says what the answer was.
_OF_ANSWER = frozenset(
    {
        "mlflow.chat.tokenUsage",
        "mlflow.chat.tools",
        "mlflow.llm.model",
        "mlflow.spanLogLevel",
        "mlflow.spanOutputs",
        "status",
    }
)
_ADDED = (
    "annotation.",
    "gen_ai.response.",
    "http.request.resend_count",
    "llm.answer.",
    "llm.request.",
    "llm.stream.outcome",
    "llm.tool_calls.",
    "llm.usage.unknown",
)


@dataclass(frozen=True)
class Compared:
    """One thing that two spans of the same call say, and do not say alike.

    Args:
        name: An attribute, or ``inputs`` and the like.
        ours: What the recorder's says; None where it does not.
        theirs: What MLflow's says.
        status: That of MLflow's span: ``UNSET`` where it never ended.
    """

    name: str
    ours: Any
    theirs: Any
    status: str


@dataclass(frozen=True)
class Difference:
    """One way in which they differ.

    Args:
        what: What differs.
        why: Why it does.
        covers: Whether something differs in this way.
    """

    what: str
    why: str
    covers: Callable[[Compared], bool]


def _is_not_given(value: Any) -> bool:
    return isinstance(value, str) and (value.endswith(".Omit object>") or value == "NOT_GIVEN")


def _given(inputs: Any) -> Any:
    return {name: value for name, value in (inputs or {}).items() if not _is_not_given(value)}


DIFFERENCES = [
    Difference(
        "More attributes: `http.request.resend_count`, `gen_ai.response.*`, `llm.*` and "
        "`annotation.*`",
        "How often the client sent the request, when a stream's first piece came, how it was "
        "read, by what the request is recognised, and what can be told of the answer: MLflow "
        "does not record it.",
        lambda compared: compared.theirs is None and compared.name.startswith(_ADDED),
    ),
    Difference(
        "Arguments that were not given",
        "The client's `stream()` hands its own marks for them on to `create()`. MLflow records "
        "each as an argument, with the address of an object for its value.",
        lambda compared: (
            (compared.ours is None and _is_not_given(compared.theirs))
            or (compared.name == "mlflow.spanInputs" and compared.ours == _given(compared.theirs))
        ),
    ),
    Difference(
        "All that is known of the answer, where MLflow's span never ends",
        "MLflow ends the span of a stream at its last piece only, and of a call with tools that "
        "its own type does not fit, such as one without parameters, not at all.",
        lambda compared: compared.status == "UNSET" and compared.name in (*_OF_ANSWER, "events"),
    ),
    Difference(
        "Text, model and tools of a stream that broke",
        "What had come was paid for. MLflow records the error only.",
        lambda compared: (
            compared.status == "ERROR" and compared.theirs is None and compared.name in _OF_ANSWER
        ),
    ),
    Difference(
        "`mlflow.chat.tokenUsage` of embeddings, images and completions of a text",
        "They cost what they cost. MLflow records it of chat and responses.",
        lambda compared: compared.name == "mlflow.chat.tokenUsage" and compared.theirs is None,
    ),
    Difference(
        "The answer, where it is read through `with_streaming_response`",
        "MLflow records the text of the response object, before anything has been read.",
        lambda compared: (
            compared.name == "mlflow.spanOutputs" and "APIResponse [200 OK]" in str(compared.theirs)
        ),
    ),
    Difference(
        "All choices of a stream, their tool calls, refusals and finish reasons; "
        "its usage, whichever piece has it",
        "MLflow joins the texts of all first choices of the pieces to one, and takes `stop` for "
        "the reason unless the last piece has another.",
        lambda compared: (
            compared.name == "mlflow.spanOutputs"
            and isinstance(compared.theirs, dict)
            and compared.theirs.get("object") == "chat.completion"
        ),
    ),
    Difference(
        "Streams of completions of a text: the whole completion, with its usage and model",
        "MLflow records the text of the first choice.",
        lambda compared: compared.name == "mlflow.spanOutputs" and isinstance(compared.theirs, str),
    ),
    Difference(
        "Model, log level and cached tokens with older releases of MLflow, too",
        "The recorder does not depend on the release of MLflow.",
        lambda compared: (
            compared.theirs is None and compared.name in ("mlflow.llm.model", "mlflow.spanLogLevel")
        ),
    ),
]


def page() -> str:
    """Return the page for users."""
    lines = [
        "# Where a worker's spans differ from MLflow's own",
        "",
        "In workers this library records the calls of the OpenAI client itself; on the driver "
        "MLflow's autolog does. A test makes each call of the [coverage table](coverage.md) "
        "with both and compares all that the spans say. They are the same but for this:",
        "",
        *(f"- **{each.what}.** {each.why}" for each in DIFFERENCES),
        "",
        "Images and audio stay in the messages in workers, where MLflow would take them out and "
        "upload them with the trace's root, which is in another process.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
