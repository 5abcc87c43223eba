"""What is recorded of calls that are given an answer again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
from recording import Keeper
from reuse import new_store

from mlflow_ctx_autolog.answers.task_answers import Place, TaskAnswers
from mlflow_ctx_autolog.answers_settings import Answers
from mlflow_ctx_autolog.exceptions import BudgetExceeded
from mlflow_ctx_autolog.testing import EndpointError, OpenAIEndpoint, Request

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Which clause?"}]}


@pytest.fixture
def client(endpoint: OpenAIEndpoint) -> openai.OpenAI:
    return openai.OpenAI(base_url=endpoint.base_url, api_key="not-a-key", max_retries=2)


class Attempts:
    def __init__(self, folder: Path, keeper: Keeper) -> None:
        self._store = new_store(folder)
        self._keeper = keeper

    def begin(self) -> None:
        """Let the calls from here on be those of a new attempt."""
        self._store.flush(10)
        place = Place("job", "function", "0", "")
        self._keeper.answers = TaskAnswers(self._store, place, Answers(), b"key")


@pytest.fixture
def attempts(tmp_path: Path, keeper: Keeper) -> Attempts:
    return Attempts(tmp_path / "answers", keeper)


@pytest.mark.parametrize("stream", [False, True])
def test_a_reused_call_says_whose_answer_it_has(
    attempts: Attempts,
    keeper: Keeper,
    client: openai.OpenAI,
    endpoint: OpenAIEndpoint,
    stream: bool,
) -> None:
    """It names and links the call that paid, and has its text, but neither tokens nor a cost."""
    for _ in range(2):
        attempts.begin()
        options = {"stream_options": {"include_usage": True}} if stream else {}
        reply = client.chat.completions.create(**CHAT, stream=stream, **options)
        if stream:
            list(reply)
    paid, reused = keeper.spans

    assert len(endpoint.requests) == len(keeper.sent) == 1
    assert keeper.reuses == [False]
    assert reused.get("llm.reused_from") == f"{paid.mlflow_trace_id}/{paid.span_id}"
    assert [(link.trace_id, link.span_id) for link in reused.links] == [
        (paid.trace_id, paid.span_id)
    ]
    usage = paid.get("mlflow.chat.tokenUsage")
    assert usage["total_tokens"] == endpoint.total_tokens
    assert reused.get("llm.reused.usage") == usage
    for name in ("mlflow.chat.tokenUsage", "mlflow.llm.cost", "llm.usage.unknown"):
        assert reused.get(name) is None
    for name in ("mlflow.spanOutputs", "mlflow.spanInputs", "llm.answer.chars"):
        assert reused.get(name) == paid.get(name) is not None
    assert paid.get("llm.reused_from") is None


def test_a_call_that_is_not_admitted_is_not_sent(
    attempts: Attempts, keeper: Keeper, client: openai.OpenAI, endpoint: OpenAIEndpoint
) -> None:
    """Nothing left to spend: known answers are given, and the next call raises the user's error."""
    attempts.begin()
    client.chat.completions.create(**CHAT)
    attempts.begin()
    keeper.refusal = BudgetExceeded("nothing left")
    client.chat.completions.create(**CHAT)
    with pytest.raises(BudgetExceeded) as raised:
        client.chat.completions.create(**CHAT)
    assert raised.value is keeper.refusal
    assert len(endpoint.requests) == 1
    assert keeper.spans[-1].get("llm.request.not_sent") is True
    assert keeper.spans[-1].has_failed


def test_each_attempt_of_the_client_is_admitted(
    attempts: Attempts, keeper: Keeper, client: openai.OpenAI, endpoint: OpenAIEndpoint
) -> None:
    """What the client sends again is admitted again, as without answers that are kept."""
    answers = iter([EndpointError(503, "not now", {"Retry-After-Ms": "1"}), "yes"])

    def answer(request: Request) -> str:
        found = next(answers)
        if isinstance(found, Exception):
            raise found
        return found

    endpoint.answer = answer
    attempts.begin()
    client.chat.completions.create(**CHAT)
    assert [is_first for _, _, is_first in keeper.sent] == [True, False]
    assert keeper.spans[0].get("http.request.resend_count") == 1
