"""The Spark side of the demonstration: these functions run in the worker processes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd

SCHEMA = "name string, who string, may string, terms string"
COLUMNS = ["name", "who", "may", "terms"]
MAX_CHARACTERS = 20_000
PROMPT = """\
Who may do what under which terms? Answer as one JSON object with the keys "document", "parties",
"entitlements" (a list of objects with "who", "may" and "terms") and "obligations".

Document: {name}
{text}
"""

Batches = Iterator[pd.DataFrame]


def extract(batches: Batches) -> Batches:
    """Ask for the entitlements of each document (columns name, text), one call per document."""
    from openai import OpenAI

    client = OpenAI(max_retries=0)
    for batch in batches:
        rows: list[list[str]] = []
        for name, text in zip(batch["name"], batch["text"], strict=True):
            prompt = PROMPT.format(name=name, text=text[:MAX_CHARACTERS])
            reply = client.chat.completions.create(
                model=os.environ["OPENAI_MODEL"],
                messages=[{"role": "user", "content": prompt}],
                response_format={"type": "json_object"},
            )
            rows += _rows(name, reply.choices[0].message.content or "")
        yield pd.DataFrame(rows, columns=COLUMNS, dtype="object")


_configured = False


def published_pattern(
    tracking_uri: str, experiment: str, synchronous: bool
) -> Callable[[Batches], Batches]:
    """Return `extract` with MLflow set up inside it, once per worker process.

    This is the pattern found in published articles; ``synchronous`` adds their advice to turn
    off asynchronous export.
    """

    def extract_with_setup(batches: Batches) -> Batches:
        global _configured
        if not _configured:
            if synchronous:
                os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "false"
            import mlflow

            mlflow.set_tracking_uri(tracking_uri)
            mlflow.set_experiment(experiment)
            mlflow.openai.autolog()
            _configured = True
        yield from extract(batches)

    return extract_with_setup


def warm_up(batches: Batches) -> Batches:
    """Do nothing, so that starting the worker processes is not timed."""
    for batch in batches:
        yield pd.DataFrame([], columns=COLUMNS, dtype="object")
        del batch


def _rows(name: str, answer: str) -> list[list[str]]:
    """Turn an answer into rows of name, who, may, terms; other answers give no rows."""
    try:
        found: Any = json.loads(answer)["entitlements"]
    except (ValueError, KeyError, TypeError):
        return []
    if not isinstance(found, list):
        return []
    entries = [entry for entry in found if isinstance(entry, dict)]
    return [[name, *(str(entry.get(key, "")) for key in COLUMNS[1:])] for entry in entries]
