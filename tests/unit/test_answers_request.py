"""What makes a request the same, and which answers may not be given again."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from mlflow_ctx_autolog.answers.request import request_digest

URL = "https://api.openai.com/v1/chat/completions"
HEADERS = {"Authorization": "Bearer key", "Content-Type": "application/json"}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "What?"}]}


def digest(
    body: Any = CHAT, url: str = URL, method: str = "POST", key: bytes = b"key", **headers: str
) -> str | None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return request_digest(method, url, {**HEADERS, **named}.items(), content, key)


def token(**claims: Any) -> str:
    parts = [json.dumps({"alg": "RS256"}), json.dumps(claims), f"signature {claims}"]
    return ".".join(base64.urlsafe_b64encode(part.encode()).decode().strip("=") for part in parts)


def test_it_is_the_same_for_the_same() -> None:
    assert digest() == digest()
    assert len(str(digest())) == 32


@pytest.mark.parametrize(
    "other",
    [
        {"url": "https://other.openai.com/v1/chat/completions"},
        {"url": f"{URL}?api-version=2"},
        {"key": b"another"},
        {"body": {**CHAT, "model": "n"}},
        {"Authorization": "Bearer another"},
        {"api_key": "another"},
        {"OpenAI_Organization": "another"},
        {"X_My_Tenant": "another"},
        {"OpenAI_Beta": "another"},
    ],
)
def test_whatever_decides_makes_another(other: dict[str, Any]) -> None:
    assert digest(**other) is not None
    assert digest(**other) != digest()


@pytest.mark.parametrize(
    "header",
    [
        "User-Agent",
        "traceparent",
        "X-Stainless-Retry-Count",
        "x-stainless-raw-response",
        "Idempotency-Key",
        "X-Request-Id",
        "Cookie",
        "x-datadog-trace-id",
        "Accept-Encoding",
    ],
)
def test_how_it_is_sent_does_not(header: str) -> None:
    assert digest(**{header: "another"}) == digest()


def test_parts_do_not_run_into_one_another() -> None:
    assert digest(a="bc") != digest(ab="c")


def test_a_token_that_is_renewed_is_the_same_login() -> None:
    """Of JSON web tokens, and of signatures that change with each second, who it is decides."""

    def bearer(**claims: Any) -> str | None:
        return digest(Authorization=f"Bearer {token(**claims)}")

    first = bearer(sub="job", tid="tenant", exp=1, iat=0, jti="a")
    assert first == bearer(sub="job", tid="tenant", exp=2, iat=1, jti="b")
    assert first != bearer(sub="job", tid="another", exp=1)
    assert bearer(exp=1) != bearer(exp=2)
    signed = "AWS4-HMAC-SHA256 Credential=AKID/{}/us-east-1/bedrock/aws4_request, Signature={}"
    one = digest(Authorization=signed.format("20260101", "a"), x_amz_date="1")
    assert one == digest(Authorization=signed.format("20260102", "b"), x_amz_date="2")
    assert one != digest(Authorization=signed.replace("AKID", "B").format("20260101", "a"))


PART = "https://host/picture.png"


@pytest.mark.parametrize(
    "body",
    [
        {**CHAT, "store": True},
        {**CHAT, "web_search_options": {"search_context_size": "low"}},
        {**CHAT, "data_sources": [{"type": "search"}]},
        {**CHAT, "model": "gpt-4o-search-preview"},
        {**CHAT, "tools": [{"type": "web_search"}]},
        {**CHAT, "tools": [{"name": "no type"}]},
        {**CHAT, "tools": {"type": "function"}},
        {"model": "m", "input": "a", "previous_response_id": "r"},
        {"model": "m", "input": "a", "conversation": {"id": "c"}},
        {"model": "m", "input": "a", "background": True},
        {"model": "m", "prompt": {"id": "p"}},
        {"model": "m", "input": [{"type": "item_reference", "id": "i"}]},
        {"model": "m", "input": [{"id": "i"}]},
        {"model": "m", "input": [{"role": "user", "content": [{"file_id": "f"}]}]},
        {"model": "m", "input": [{"role": "user", "content": [{"file_url": PART}]}]},
        {"model": "m", "input": [{"role": "user", "content": [{"image_url": PART}]}]},
        {"model": "m", "messages": [{"content": [{"image_url": {"url": PART}}]}]},
        {"model": "m", "messages": [{"role": "assistant", "audio": {"id": "a"}}]},
        b"not JSON",
        b"[]",
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_what_depends_on_more_has_none(body: Any) -> None:
    assert digest(body) is None


@pytest.mark.parametrize(
    "body",
    [
        {**CHAT, "store": False, "tools": [{"type": "function", "function": {"name": "f"}}]},
        {**CHAT, "web_search_options": None, "previous_response_id": None},
        {"model": "m", "messages": [{"content": f"Read {PART} and file_id 7."}]},
        {"model": "m", "messages": [{"content": [{"image_url": {"url": "data:image/png,x"}}]}]},
        {"model": "m", "input": [[1, 2, 3], [4]]},
        {"model": "m", "prompt": ["one", "two"]},
        {"model": "m", "input": [{"type": "message", "id": "i", "content": "by value"}]},
        {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"url": PART}}},
    ],
)
def test_what_says_all_has_one(body: Any) -> None:
    assert digest(body) is not None


@pytest.mark.parametrize(
    ("method", "path", "has_one"),
    [
        ("POST", "/v1/responses", True),
        ("POST", "/v1/embeddings", True),
        ("POST", "/v1/completions", True),
        ("POST", "/openai/deployments/d/chat/completions?api-version=1", True),
        ("POST", "/serving-endpoints/chat/completions", True),
        ("GET", "/v1/responses", False),
        ("POST", "/v1/responses/r/cancel", False),
        ("POST", "/v1/images/generations", False),
        ("POST", "/oauth/token", False),
        ("POST", "/v1/batches", False),
    ],
)
def test_where_it_goes(method: str, path: str, has_one: bool) -> None:
    assert (digest(url=f"https://host{path}", method=method) is not None) == has_one
