"""Who else has put themselves between a user and the OpenAI client."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

__all__ = ["layers_on_calls"]

# Where other libraries are known to put themselves between a user and the model.
_CALLS = (
    ("openai", "OpenAI.request"),
    ("openai", "AsyncOpenAI.request"),
    ("openai.resources.chat.completions", "Completions.create"),
    ("openai.resources.chat.completions", "AsyncCompletions.create"),
    ("openai.resources.responses", "Responses.create"),
    ("openai.resources.embeddings", "Embeddings.create"),
)
_EXPECTED_LAYERS = {"openai", "mlflow", "mlflow_ctx_autolog"}


def layers_on_calls() -> list[str]:
    """Return the modules of others that have wrapped the OpenAI client's calls, sorted."""
    found: set[str] = set()
    for module, path in _CALLS:
        owner, _, name = path.partition(".")
        try:
            function = getattr(getattr(importlib.import_module(module), owner), name)
        except (ImportError, AttributeError):
            continue
        found.update(_layers(function))
    return sorted(each for each in found if each.partition(".")[0] not in _EXPECTED_LAYERS)


def _layers(function: Any) -> Iterator[str]:
    """Yield the module of each layer of a function, from the outside to the inside."""
    while function is not None:
        if hasattr(function, "__dd_wrapped__"):
            # Whose wrapper is in the bytecode of the function itself.
            yield "ddtrace"
        # Of a proxy by wrapt, what it calls; of a function, where it was written, since wrappers
        # take on the __module__ of what they wrap.
        wrapper = getattr(function, "_self_wrapper", None)
        if wrapper is None:
            yield str(getattr(function, "__globals__", {}).get("__name__", "openai"))
        else:
            yield str(getattr(wrapper, "__module__", None) or type(wrapper).__module__)
        function = getattr(function, "__wrapped__", None)
