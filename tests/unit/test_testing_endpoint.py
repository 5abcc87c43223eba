"""The local OpenAI endpoint."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from typing import Any

import openai
import pytest
from openai import AzureOpenAI, OpenAI

from mlflow_ctx_autolog.testing import (
    Answer,
    EndpointError,
    OpenAIEndpoint,
    Request,
    ToolCall,
    script,
)

needs_responses = pytest.mark.skipif(
    find_spec("openai.resources.responses") is None, reason="this openai has no responses API"
)


def ask(endpoint: OpenAIEndpoint, prompt: str = "How many words?", **options: Any) -> Any:
    client = OpenAI(base_url=endpoint.base_url, api_key="key", max_retries=0)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]
    return client.chat.completions.create(model="m", messages=messages, **options)


def post(endpoint: OpenAIEndpoint, body: bytes, path: str = "/v1/chat/completions") -> Any:
    """Return status and parsed body of a plain POST."""
    connection = http.client.HTTPConnection("127.0.0.1", endpoint.port, timeout=5)
    connection.request("POST", path, body)
    reply = connection.getresponse()
    content = json.loads(reply.read())
    connection.close()
    return reply.status, content


def test_import_is_light() -> None:
    """Importing the package loads neither mlflow, nor openai, nor pyspark."""
    code = (
        "import sys, types, importlib.util\n"
        "spec = importlib.util.find_spec('mlflow_ctx_autolog')\n"
        "parent = types.ModuleType('mlflow_ctx_autolog')\n"
        "parent.__path__ = spec.submodule_search_locations\n"
        "sys.modules['mlflow_ctx_autolog'] = parent\n"
        "before = set(sys.modules)\n"
        "import mlflow_ctx_autolog.testing\n"
        "print({'mlflow', 'openai', 'pyspark'} & (set(sys.modules) - before))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_completion() -> None:
    """A reply carries the function's answer, and usage of one token per word."""
    with OpenAIEndpoint(lambda request: f"You said {request.prompt}") as endpoint:
        reply = ask(endpoint, "two words")
    assert reply.id.startswith("chatcmpl-")
    assert reply.object == "chat.completion"
    assert reply.model == "m"
    assert reply.choices[0].message.content == "You said two words"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.prompt_tokens == 4
    assert reply.usage.completion_tokens == 4
    assert reply.usage.total_tokens == 8
    assert endpoint.total_tokens == 8


def test_default_answer_echoes() -> None:
    """Without an answer function, the reply echoes the first 40 characters of the prompt."""
    with OpenAIEndpoint() as endpoint:
        reply = ask(endpoint, "x" * 50)
    assert reply.choices[0].message.content == 'You asked: "' + "x" * 40 + '".'


def test_ids_are_unique() -> None:
    """Each completion has an id of its own."""
    with OpenAIEndpoint() as endpoint:
        assert ask(endpoint).id != ask(endpoint).id


def test_requests_are_recorded() -> None:
    """The requests property gives headers, body and prompt of what was received, as a copy."""
    with OpenAIEndpoint() as endpoint:
        ask(endpoint, "first", extra_headers={"X-Trace": "abc"})
        ask(endpoint, "second")
        received = endpoint.requests
        received.clear()
        assert [request.prompt for request in endpoint.requests] == ["first", "second"]
        first = endpoint.requests[0]
    assert first.headers["x-trace"] == "abc"
    assert first.path == "/v1/chat/completions"
    assert first.model == "m"
    assert first.messages[0]["role"] == "system"


def test_prompt_of_parts() -> None:
    """The prompt is the text of the last user message, also when it is a list of parts."""
    parts = [{"type": "text", "text": "a b"}, {"type": "image_url"}, {"type": "text", "text": "c"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "no"}]
    assert Request("/", {}, {"messages": messages}).prompt == "a b\nc"
    assert Request("/", {}, {"messages": []}).prompt == ""


@pytest.mark.parametrize("include_usage", [True, False])
def test_streaming(include_usage: bool) -> None:
    """A streamed answer arrives in pieces, followed by the usage only if asked for."""
    options: dict[str, Any] = {"stream": True}
    if include_usage:
        options["stream_options"] = {"include_usage": True}
    with OpenAIEndpoint(lambda request: "one two  three") as endpoint:
        chunks = list(ask(endpoint, "a b c", **options))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == "one two  three"
    assert len([piece for piece in pieces if piece]) == 3
    assert len({chunk.id for chunk in chunks}) == 1
    usages = [chunk.usage for chunk in chunks if chunk.usage]
    assert [usage.total_tokens for usage in usages] == ([8] if include_usage else [])


def test_models() -> None:
    """The list of models can be read."""
    with OpenAIEndpoint() as endpoint:
        client = OpenAI(base_url=endpoint.base_url, api_key="key")
        assert [model.object for model in client.models.list()] == ["model"]


def test_chosen_error() -> None:
    """An EndpointError from the answer function sets status, message and headers."""

    def refuse(request: Request) -> str:
        raise EndpointError(429, "Slow down.", {"Retry-After": "7"})

    with OpenAIEndpoint(refuse) as endpoint, pytest.raises(openai.RateLimitError) as caught:
        ask(endpoint)
    assert "Slow down." in str(caught.value)
    assert caught.value.response.headers["retry-after"] == "7"


def test_unexpected_error() -> None:
    """Any other exception becomes a 500 with the exception's type name."""

    def fail(request: Request) -> str:
        raise ZeroDivisionError("secret")

    with OpenAIEndpoint(fail) as endpoint:
        with pytest.raises(openai.InternalServerError, match="ZeroDivisionError") as caught:
            ask(endpoint)
        assert len(endpoint.requests) == 1
    assert "secret" not in str(caught.value)


TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
LOOK_UP = Answer(tool_calls=[ToolCall("look_up", {"clause": 7}), ToolCall("stop")])


def test_tool_calls() -> None:
    """An answer can ask for tools, whole or in the pieces of a stream."""
    with OpenAIEndpoint(lambda request: LOOK_UP) as endpoint:
        (choice,) = ask(endpoint, tools=TOOLS).choices
        chunks = list(ask(endpoint, tools=TOOLS, stream=True))
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
    assert calls == [("look_up", '{"clause": 7}'), ("stop", "{}")]
    streamed: dict[int, list[str]] = {}
    for chunk in chunks:
        for call in chunk.choices[0].delta.tool_calls or []:
            parts = streamed.setdefault(call.index, ["", ""])
            parts[0] += call.function.name or ""
            parts[1] += call.function.arguments
    assert [tuple(parts) for parts in streamed.values()] == calls
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_structured_output() -> None:
    """An answer that is a dict arrives as JSON, and the function sees the schema."""
    schema = {"type": "object", "properties": {"clause": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with OpenAIEndpoint(lambda request: {"seen": request.schema}) as endpoint:
        reply = ask(endpoint, response_format=wanted)
    assert json.loads(reply.choices[0].message.content) == {"seen": schema}


def test_structured_output_needs_an_answer() -> None:
    """The default answer says that it cannot follow a schema."""
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
    with OpenAIEndpoint() as endpoint, pytest.raises(openai.BadRequestError, match="a dict"):
        ask(endpoint, response_format=wanted)


def test_a_stream_that_breaks() -> None:
    """A stream ends after the pieces that the answer says, in silence or with an error."""
    silent = Answer("one two three", breaks_after=2)
    loud = Answer("one two three", breaks_after=1, break_with=EndpointError(500, "Too hot."))
    with OpenAIEndpoint(script(silent, loud, "whole again")) as endpoint:
        pieces: list[str] = []
        stream = ask(endpoint, stream=True)
        # Which is an exception of the HTTP library in older releases.
        with pytest.raises(Exception, match="onnection"):
            pieces.extend(chunk.choices[0].delta.content for chunk in stream)
        with pytest.raises(openai.APIError, match="Too hot"):
            pieces.extend(chunk.choices[0].delta.content for chunk in ask(endpoint, stream=True))
        assert ask(endpoint).choices[0].message.content == "whole again"
    assert pieces == ["", "one ", "two ", "", "one "]


def test_a_script_is_followed_step_by_step() -> None:
    """Answers and errors come in turn, and the last one ever after."""
    steps = EndpointError(429, "Slow down.", {"Retry-After": "0"}), "yes", "no"
    with OpenAIEndpoint(script(*steps)) as endpoint:
        with pytest.raises(openai.RateLimitError):
            ask(endpoint)
        answers = [ask(endpoint).choices[0].message.content for _ in range(3)]
    assert answers == ["yes", "no", "no"]
    with pytest.raises(ValueError, match="at least one step"):
        script()


@needs_responses
def test_responses() -> None:
    """A response has the answer, usage, and the tools that are asked for; items are messages."""
    with OpenAIEndpoint(script("a b c", LOOK_UP)) as endpoint:
        client = OpenAI(base_url=endpoint.base_url, api_key="key", max_retries=0)
        text = [{"role": "user", "content": [{"type": "input_text", "text": "one two"}]}]
        reply = client.responses.create(model="m", input=text, instructions="Be brief.")  # type: ignore[arg-type]
        tools = client.responses.create(model="m", input="go")
        request = endpoint.requests[0]
    assert (reply.output_text, reply.status) == ("a b c", "completed")
    assert reply.usage is not None
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (4, 3)
    calls = [(item.name, item.arguments) for item in tools.output]  # type: ignore[union-attr]
    assert calls == [("look_up", '{"clause": 7}'), ("stop", "{}")]
    assert (request.api, request.prompt) == ("responses", "one two")


@needs_responses
def test_streamed_responses() -> None:
    """The events of a streamed response come in OpenAI's order, and add up to the response."""
    answer = Answer("one two", tool_calls=LOOK_UP.tool_calls)
    failing = Answer("one two", breaks_after=1, break_with=EndpointError(500, "Too hot."))
    with OpenAIEndpoint(script(answer, failing)) as endpoint:
        client = OpenAI(base_url=endpoint.base_url, api_key="key", max_retries=0)
        with client.responses.stream(model="m", input="go") as stream:
            events = [event.type for event in stream]
            final = stream.get_final_response()
        with pytest.raises(openai.APIError, match="Too hot"):
            list(client.responses.create(model="m", input="go", stream=True))
    assert events[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert events[-1] == "response.completed"
    assert final.output_text == "one two"
    assert len(final.output) == 3
    assert final.usage is not None


def test_embeddings() -> None:
    """An embedding depends on the text alone, and has length 1 and the dimensions asked for."""
    with OpenAIEndpoint() as endpoint:
        client = OpenAI(base_url=endpoint.base_url, api_key="key", max_retries=0)
        reply = client.embeddings.create(model="m", input=["a b", "c", "a b"], dimensions=5)
        plain = client.embeddings.create(
            model="m", input="a b", dimensions=5, encoding_format="float"
        )
    first, second, third = (item.embedding for item in reply.data)
    assert first == third != second
    assert len(first) == 5
    assert sum(value * value for value in first) == pytest.approx(1)
    assert plain.data[0].embedding == pytest.approx(first)
    assert reply.usage.total_tokens == 5


def test_images_and_completions() -> None:
    """Images are PNGs of one pixel; the old completions API answers a prompt, streamed or not."""
    with OpenAIEndpoint(lambda request: f"{request.prompt} there") as endpoint:
        client = OpenAI(base_url=endpoint.base_url, api_key="key", max_retries=0)
        images = client.images.generate(model="m", prompt="a cat", n=2).data or []
        reply = client.completions.create(model="m", prompt="hello")
        chunks = client.completions.create(model="m", prompt="hello", stream=True)
        pieces = [chunk.choices[0].text for chunk in chunks]
        assert [request.api for request in endpoint.requests] == [
            "images",
            "completions",
            "completions",
        ]
    assert len(images) == 2
    assert base64.b64decode(images[0].b64_json or "").startswith(b"\x89PNG")
    assert (reply.choices[0].text, "".join(pieces)) == ("hello there", "hello there")
    assert reply.usage is not None
    assert reply.usage.total_tokens == 3


def test_azure() -> None:
    """Azure's addresses name the deployment, and need the version of the API."""
    with OpenAIEndpoint() as endpoint:
        azure = AzureOpenAI(azure_endpoint=endpoint.url, api_version="2024-10-21", api_key="key")
        messages: Any = [{"role": "user", "content": "hello"}]
        azure.chat.completions.create(model="my-gpt", messages=messages)
        azure.embeddings.create(model="my-embedding", input="a")
        path = "/openai/deployments/my%20gpt/chat/completions"
        body = json.dumps({"messages": messages}).encode()
        assert post(endpoint, body, path)[0] == 404
        assert post(endpoint, body, f"{path}?api-version=1")[0] == 200
        deployments = [request.deployment for request in endpoint.requests]
        assert endpoint.requests[-1].model == "my gpt"
    assert deployments == ["my-gpt", "my-embedding", "my gpt"]


@pytest.mark.parametrize("prefix", ["/serving-endpoints", "/ai-gateway/mlflow/v1", "/openai/v1"])
def test_other_addresses(prefix: str) -> None:
    """A Databricks workspace's addresses, and Azure's newer one, are those of the same APIs."""
    with OpenAIEndpoint() as endpoint:
        client = OpenAI(base_url=endpoint.url + prefix, api_key="key", max_retries=0)
        client.embeddings.create(model="m", input="a")
        assert endpoint.requests[0].path == f"{prefix}/embeddings"


def test_an_answer_that_is_none() -> None:
    """An answer function that returns something else is told so, by way of the client."""
    with (
        OpenAIEndpoint(lambda request: None) as endpoint,  # type: ignore[arg-type, return-value]
        pytest.raises(openai.InternalServerError, match="returned 'NoneType'"),
    ):
        ask(endpoint)


@pytest.mark.parametrize(
    "body", [b"{", b"\xff", b"[]", b"{}", b'{"model": "m"}', b'{"model": "m", "messages": [1]}']
)
def test_malformed_body(body: bytes) -> None:
    """A body that is not a completion request is refused with an OpenAI-shaped error."""
    with OpenAIEndpoint() as endpoint:
        status, content = post(endpoint, body)
        assert endpoint.requests == []
    assert status == 400
    assert content["error"]["type"] == "invalid_request_error"
    assert content["error"]["message"]


def test_unknown_paths() -> None:
    """Unknown addresses and methods get OpenAI-shaped errors, too."""
    with OpenAIEndpoint() as endpoint:
        status, content = post(endpoint, b"{}", "/v1/other")
        assert (status, "error" in content) == (404, True)
        request = urllib.request.Request(f"{endpoint.base_url}/models", method="DELETE")
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=5)
        assert "error" in json.loads(caught.value.read())
        caught.value.close()


def test_reply_is_one_packet() -> None:
    """Requests over a kept connection are answered without the delay of a second packet."""
    with OpenAIEndpoint() as endpoint:
        connection = http.client.HTTPConnection("127.0.0.1", endpoint.port, timeout=5)
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 20_000}]})
        start = time.perf_counter()
        for _ in range(20):
            connection.request("POST", "/v1/chat/completions", body)
            assert connection.getresponse().read()
        seconds = time.perf_counter() - start
        connection.close()
    assert seconds < 20 * 0.04


def test_latency_is_per_request_and_parallel() -> None:
    """Each completion waits for the latency, all of them at the same time."""
    with OpenAIEndpoint(latency=0.3) as endpoint:
        threads = [threading.Thread(target=ask, args=(endpoint,)) for _ in range(8)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - start
        assert len(endpoint.requests) == 8
    assert 0.3 <= seconds < 8 * 0.3


def test_close_is_idempotent_quick_and_final(capfd: pytest.CaptureFixture[str]) -> None:
    """Closing twice is fine, drops kept connections, frees the port and prints nothing."""
    endpoint = OpenAIEndpoint()
    kept = socket.create_connection(("127.0.0.1", endpoint.port), timeout=5)
    kept.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
    assert kept.recv(10_000).startswith(b"HTTP/1.1 200 OK\r\n")
    start = time.perf_counter()
    endpoint.close()
    endpoint.close()
    assert time.perf_counter() - start < 1
    assert kept.recv(10) == b""
    kept.close()
    with OpenAIEndpoint(port=endpoint.port) as again:
        assert ask(again).id
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
