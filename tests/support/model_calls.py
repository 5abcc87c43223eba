"""What child processes of a worker import, shipped to it as a user's module would be."""

from __future__ import annotations

from typing import Any

_clients: dict[str, Any] = {}


def ask_model(url: str, number: int) -> str:
    """Make one model call about a document."""
    from openai import OpenAI

    if url not in _clients:
        _clients[url] = OpenAI(base_url=url, api_key="not-a-key", max_retries=0)
    reply = _clients[url].chat.completions.create(
        model="gpt-test", messages=[{"role": "user", "content": f"What of document {number}?"}]
    )
    return str(reply.choices[0].message.content)


def ask_into(results: Any, url: str, number: int) -> None:
    """Make one model call and put the answer into a queue."""
    results.put(ask_model(url, number))


def ask_under_a_span(url: str, number: int) -> str:
    """Make one model call under a span that the child process opens itself."""
    import mlflow

    with mlflow.start_span("child"):
        return ask_model(url, number)
