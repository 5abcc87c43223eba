"""Which texts of a span may leave the process."""

from __future__ import annotations

import collections
import importlib
import json
import logging
import re
import types
import uuid
from collections.abc import Iterator
from typing import Any

import mlflow
import pytest
from mlflow.entities import LiveSpan, Span
from openai import APIStatusError, OpenAI
from opentelemetry.trace import Link

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog import exceptions
from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.delivery.spool import Destination
from mlflow_ctx_autolog.driver.exports import filtered, snapshot
from mlflow_ctx_autolog.spans.content import ContentPolicy
from mlflow_ctx_autolog.spans.record import SpanEvent, SpanRecord
from mlflow_ctx_autolog.stores.tracking_store import read_trace, span_record
from mlflow_ctx_autolog.testing import EndpointError, OpenAIEndpoint, Request

SECRET = "Alice lives in Turku"


@pytest.fixture(autouse=True)
def _warns_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exceptions, "_warned", set())


@pytest.fixture
def span(database: Destination) -> Iterator[LiveSpan]:
    """An open span that holds a secret wherever a span can hold a text."""
    with mlflow.start_span("call", span_type="CHAT_MODEL") as span:
        span.set_inputs({"messages": [{"role": "user", "content": SECRET}], "seed": 7})
        span.set_outputs({"choices": [{"message": {"content": f"Yes, {SECRET}."}}]})
        span.set_attribute("mlflow.chat.tools", [{"function": {"description": SECRET}}])
        span.set_attribute("mlflow.chat.tokenUsage", {"input_tokens": 3, "total_tokens": 3})
        span.set_attribute("mlflow.llm.model", "gpt-test")
        span.set_attribute("model", "gpt-test")
        span.set_attribute("llm.request.fingerprint", "0f0f")
        span.set_attribute("llm.stream.outcome", "closed early")
        span.set_attribute("annotation.doc_id", "contract-7")
        span.set_attribute("spark.stage.id", 3)
        span.set_attribute("temperature", 0.5)
        span.set_attribute("note", SECRET)
        span._span.set_attribute("gen_ai.input.messages", f"[not JSON: {SECRET}")
        span._span.set_attribute("gen_ai.request.model", "gpt-test")
        span._span.set_attribute("of.another.library", (SECRET, "b"))
        span.add_event(
            mlflow.entities.SpanEvent(
                "mlflow.chunk.item.0",
                attributes={"mlflow.chunk.value": json.dumps({"delta": SECRET})},
            )
        )
        span.record_exception(ValueError(SECRET))
        yield span


def _is_mlflows(name: str) -> bool:
    return name in ("mlflow.traceRequestId", "mlflow.spanLogLevel")


def _sent(span: LiveSpan, policy: ContentPolicy) -> tuple[Span, str]:
    """Return a span as it is sent, and all that is sent of it as one text."""
    finished = snapshot(span)
    assert finished is not None
    sent = filtered(finished, policy)
    return sent, span_record(sent).payload.decode(errors="replace")


def test_by_default_a_span_is_as_it_is(span: LiveSpan) -> None:
    """Content is what tracing is for."""
    sent, _ = _sent(span, ContentPolicy(Config()))

    assert sent.to_dict() == snapshot(span).to_dict() | {"end_time_unix_nano": sent.end_time_ns}


def test_without_content_facts_remain(span: LiveSpan) -> None:
    """Tokens, model, numbers and other facts stay; of texts there is nothing, wherever it was."""
    sent, text = _sent(span, ContentPolicy(Config(capture_content=False)))

    assert "Alice" not in text
    assert "Turku" not in text
    assert sent.inputs is None
    assert sent.outputs is None
    kept = {name: value for name, value in sent.attributes.items() if not _is_mlflows(name)}
    assert kept == {
        "mlflow.spanType": "CHAT_MODEL",
        "mlflow.chat.tokenUsage": {"input_tokens": 3, "total_tokens": 3},
        "mlflow.llm.model": "gpt-test",
        "model": "gpt-test",
        "llm.request.fingerprint": "0f0f",
        "llm.stream.outcome": "closed early",
        "annotation.doc_id": "contract-7",
        "spark.stage.id": 3,
        "temperature": 0.5,
        "gen_ai.request.model": "gpt-test",
    }
    assert [event.name for event in sent.events] == ["mlflow.chunk.item.0", "exception"]
    assert dict(sent.events[1].attributes) == {"exception.type": "ValueError"}
    assert sent.status.status_code == "ERROR"
    # The span itself is as it was, for whoever else looks at it.
    assert span.inputs["seed"] == 7


def test_redacted_is_whatever_holds_content(span: LiveSpan) -> None:
    """The user's function sees dictionaries, lists and texts, and what it returns is sent."""

    def redact(value: Any) -> Any:
        return json.loads(re.sub("Alice|Turku", "***", json.dumps(value)))

    sent, text = _sent(span, ContentPolicy(Config(redact=redact)))

    assert "Alice" not in text
    assert "Turku" not in text
    assert sent.inputs == {"messages": [{"role": "user", "content": "*** lives in ***"}], "seed": 7}
    assert sent.attributes["note"] == "*** lives in ***"
    assert sent.attributes["of.another.library"] == ["*** lives in ***", "b"]
    assert sent.events[1].attributes["exception.message"] == "*** lives in ***"
    assert sent.status.description == "ValueError: *** lives in ***"
    # A name could be spread over several pieces.
    assert not sent.events[0].attributes


def test_where_redaction_fails_nothing_is_sent(
    span: LiveSpan, caplog: pytest.LogCaptureFixture
) -> None:
    """Content is withheld, with one warning that does not quote it."""

    def redact(value: Any) -> Any:
        raise RuntimeError(f"cannot redact {value}")

    policy = ContentPolicy(Config(redact=redact))
    sent, text = _sent(span, policy)
    _sent(span, policy)

    assert "Alice" not in text
    assert sent.attributes["mlflow.llm.model"] == "gpt-test"
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "RuntimeError" in warning.getMessage()
    assert "Alice" not in warning.getMessage()


def test_long_texts_are_cut(span: LiveSpan) -> None:
    """Each text is cut, wherever it is, and says how much is missing; the structure remains."""
    sent, _ = _sent(span, ContentPolicy(Config(max_content_chars=5)))

    assert sent.inputs["messages"][0]["content"] == "Alice... [15 more characters]"
    assert sent.attributes["note"] == "Alice... [15 more characters]"
    assert sent.attributes["spark.stage.id"] == 3


def test_what_cannot_be_looked_through_is_withheld(span: LiveSpan) -> None:
    """A value nested too deeply does not leave, and fails nobody's call."""
    depth = 50_000
    span._span.set_attribute("deep", f"{'[' * depth}1{']' * depth}")
    span._span.set_attribute("less.deep", f"{'[' * 900}1{']' * 900}")
    sent, _ = _sent(span, ContentPolicy(Config(redact=lambda value: value)))

    assert sent.attributes["note"] == SECRET
    assert "less.deep" not in sent.attributes or sent.attributes["less.deep"]


@pytest.mark.parametrize("settings", [{}, {"max_content_chars": 1000}])
def test_log_ins_among_arguments_are_never_sent(
    database: Destination, settings: dict[str, Any]
) -> None:
    """Headers of a request, and of a tool's server, are recorded by name only."""
    arguments = {
        "extra_headers": {"X-Team-Key": "s3cret"},
        "tools": [
            {"type": "mcp", "headers": {"Authorization": "s3cret"}, "authorization": "s3cret"}
        ],
        "input": 'of "headers": and {"authorization": "said aloud"}',
    }
    with mlflow.start_span("call", attributes=arguments) as span:
        span.set_inputs(arguments)
        sent, text = _sent(span, ContentPolicy(Config(**settings)))

    assert "s3cret" not in text
    assert sent.inputs["extra_headers"] == {"X-Team-Key": "[withheld]"}
    assert sent.inputs["tools"][0]["authorization"] == "[withheld]"
    assert sent.inputs["input"] == arguments["input"]
    assert sent.attributes["extra_headers"] == {"X-Team-Key": "[withheld]"}


@pytest.mark.parametrize("ending", ["answer", "stream", "error"])
def test_calls_of_the_driver_itself_are_treated_alike(database: Destination, ending: str) -> None:
    """Whether the trace is handed to Spark or not, and whatever becomes of the call."""

    def answer(request: Request) -> str:
        if ending == "error":
            raise EndpointError(400, f"What should '{request.prompt}' mean?")
        return request.prompt

    ctx_autolog.enable(capture_content=False)
    question: Any = {"model": "gpt-test", "messages": [{"role": "user", "content": SECRET}]}
    with OpenAIEndpoint(answer) as endpoint, mlflow.start_span("job") as span:
        client = OpenAI(base_url=endpoint.base_url, api_key="not-a-key", max_retries=0)
        span.set_inputs({"who": SECRET})
        if ending == "error":
            with pytest.raises(APIStatusError):
                client.chat.completions.create(**question)
        elif ending == "stream":
            assert list(client.chat.completions.create(**question, stream=True))
        else:
            assert client.chat.completions.create(**question)
    mlflow.flush_trace_async_logging()

    info, spans = read_trace(database, span.trace_id)
    text = json.dumps([info.to_dict(), *(span.to_dict() for span in spans)])
    assert len(spans) == 2
    assert "Turku" not in text
    assert "gpt-test" in text


@pytest.mark.parametrize("propagates", [True, False])
def test_trace_headers_are_sent_as_wished(
    database: Destination, endpoint: OpenAIEndpoint, propagates: bool
) -> None:
    """MLflow sends a traceparent to the model's endpoint, unless that is switched off."""
    ctx_autolog.enable(propagate_headers=propagates)
    client = OpenAI(base_url=endpoint.base_url, api_key="not-a-key", max_retries=0)
    client.chat.completions.create(model="m", messages=[{"role": "user", "content": "?"}])

    (request,) = endpoint.requests
    assert ("traceparent" in {name.lower() for name in request.headers}) is propagates


@pytest.mark.parametrize("with_processor", [True, False])
@pytest.mark.parametrize("with_redact", [True, False])
def test_attach_withholds_without_the_functions_of_the_driver(
    database: Destination, with_processor: bool, with_redact: bool
) -> None:
    """A carrier holds no functions; ``redact`` can be given to attach(), processors cannot."""

    def redact(value: Any) -> Any:
        return value

    processors = [lambda span: None] if with_processor else []
    with (
        mlflow.tracing.configure(span_processors=processors),
        ctx_autolog.enable(redact=redact),
        mlflow.start_span("driver") as span,
    ):
        document = json.loads(ctx_autolog.capture().to_json())
    mlflow.tracing.configure(span_processors=[])
    carrier = json.dumps({**document, "process_id": "another"})
    with (
        ctx_autolog.attach(carrier, redact=redact if with_redact else None),
        mlflow.start_span("own") as own,
    ):
        own.set_inputs({"who": SECRET})

    _, spans = read_trace(database, span.trace_id)
    (sent,) = [each for each in spans if each.name == "own"]
    assert (sent.inputs is not None) is (with_redact and not with_processor)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("error.message", SECRET), ("code.stacktrace", f"prompt={SECRET!r}")),
        *(("gen_ai.request.messages", SECRET), ("gen_ai.response.text", SECRET)),
        *(("gen_ai.agent.description", SECRET), ("process.command_line", "--password hunter2")),
        *(("process.command_args", ("job.py", "hunter2")), ("url.full", "https://x/?q=Alice")),
        *(("model", SECRET), ("mlflow.linkedPrompts", SECRET), ("db.statement", SECRET)),
        *(("exception.message", "4111111111111111"), ("user_text", "4111111111111111")),
        *(("patient", 4711), ("of.another.library", (SECRET,)), ("flag", True)),
        *(("spark.note", SECRET), ("llm.note", SECRET), ("session.id", SECRET)),
    ],
)
def test_what_is_not_known_as_a_fact_is_content(name: str, value: Any) -> None:
    """By what may pass, not by what may not: a name that nobody has thought of does not."""
    assert ContentPolicy(Config(capture_content=False)).attributes({name: value}) == {}
    redacted = ContentPolicy(Config(), redact=lambda _: "[redacted]").attributes({name: value})
    if not isinstance(value, (int, bool)):
        assert redacted[name] == "[redacted]"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("mlflow.llm.model", '"gpt-4o"'), ("mlflow.chat.tokenUsage", '{"input_tokens": 3}')),
        *(("gen_ai.usage.input_tokens", 7), ("gen_ai.response.finish_reasons", '["stop"]')),
        *(("gen_ai.response.finish_reasons", ("stop",)), ("temperature", "0.5"), ("seed", 7)),
        *(("server.address", "api.example.com"), ("http.response.status_code", 200)),
        *(("llm.answer.chars", "120"), ("llm.reused_from", '"tr-1/ab"'), ("spark.rows.in", 3)),
        *(("spark.task.outcome", "closed early"), ("annotation.note", SECRET)),
        *(("exception.type", "openai.RateLimitError"), ("http.request.resend_count", "2")),
        *(("spans.made", 3), ("linked.trace.id", "tr-1"), ("llm.cost.total", 0.5)),
    ],
)
def test_facts_pass_and_annotations(name: str, value: Any) -> None:
    for policy in (
        ContentPolicy(Config(capture_content=False)),
        ContentPolicy(Config(), redact=lambda _: "[redacted]"),
    ):
        assert policy.attributes({name: value}) == {name: value}


def _mappings() -> dict[str, Any]:
    from requests.structures import CaseInsensitiveDict

    try:
        httpx = importlib.import_module("httpx2")
    except ImportError:
        httpx = importlib.import_module("httpx")
    headers = {"X-Tenant-Token": "planted-secret", "Authorization": "Bearer planted-secret"}
    return {
        "dict": headers,
        "httpx.Headers": httpx.Headers(headers),
        "CaseInsensitiveDict": CaseInsensitiveDict(headers),
        "MappingProxyType": types.MappingProxyType(headers),
        "UserDict": collections.UserDict(headers),
    }


@pytest.mark.parametrize("kind", list(_mappings()))
@pytest.mark.parametrize("argument", ["extra_headers", "extra_query", "extra_body", "headers"])
def test_log_ins_of_requests_are_not_sent_in_whatever_mapping(kind: str, argument: str) -> None:
    """In the inputs and as an attribute of their own, as MLflow writes them."""
    given = _mappings()[kind]
    inputs = {"model": "m", "messages": [{"role": "user", "content": "hi"}], argument: given}
    written = {"mlflow.spanInputs": _written(inputs), argument: _written(given)}
    for policy in (ContentPolicy(Config()), ContentPolicy(Config(), redact=lambda value: value)):
        sent = policy.attributes(written)
        assert "planted-secret" not in json.dumps(sent)
        assert "hi" in sent["mlflow.spanInputs"]


def test_arguments_that_are_no_json_are_withheld_with_their_log_ins() -> None:
    """MLflow writes them as Python shows them, which nobody can take apart safely."""
    inputs = {"extra_body": {uuid.uuid4(): 1}, "extra_headers": {"Authorization": "planted-secret"}}
    sent = ContentPolicy(Config()).attributes({"mlflow.spanInputs": _written(inputs)})
    assert sent == {"mlflow.spanInputs": "[withheld]"}


def test_what_is_sent_along_loses_only_its_log_ins() -> None:
    body = {"api_key": "planted-secret", "auth": {"x-token": "planted-secret"}, "top_k": 3}
    sent = ContentPolicy(Config()).attributes({"extra_body": json.dumps(body)})
    expected = {"api_key": "[withheld]", "auth": {"x-token": "[withheld]"}, "top_k": 3}
    assert json.loads(sent["extra_body"]) == expected


@pytest.mark.parametrize(
    "content",
    [
        '{"headers": {"Accept": "text/html"}}',
        "{'authorization': 'see chapter 3'}",
        "Which headers: does extra_headers= take?",
    ],
)
def test_prompts_about_log_ins_are_prompts(content: str) -> None:
    written = {"mlflow.spanInputs": _written({"messages": [{"content": content}]})}
    assert ContentPolicy(Config()).attributes(written) == written


def _written(value: Any) -> str:
    from mlflow.tracing.utils import dump_span_attribute_value

    return str(dump_span_attribute_value(value))


def test_attributes_of_links_are_content(span: LiveSpan) -> None:
    finished = snapshot(span)
    assert finished is not None
    context = finished._span.context
    finished._span._links = (Link(context, {"note": SECRET, "gen_ai.request.model": "m"}),)
    (link,) = filtered(finished, ContentPolicy(Config(capture_content=False)))._span.links
    assert dict(link.attributes) == {"gen_ai.request.model": "m"}


def test_texts_of_exceptions_are_without_log_ins() -> None:
    """Servers quote the key that they refuse, and clients the header that they cannot send."""
    text = "Incorrect key: token=s3cret-of-mine, at http://me:s3cret-of-mine@host/v1"
    said = {"exception.type": "E", "exception.message": text, "exception.stacktrace": text}
    span = SpanRecord(
        "1" * 32,
        "2" * 16,
        None,
        "call",
        0,
        1,
        {},
        events=(SpanEvent("exception", 0, said), SpanEvent("note", 0, {"text": text})),
        status="ERROR",
        message=text,
    )
    found = ContentPolicy(Config()).record(span)
    assert "s3cret" not in f"{found.message}{found.events[0]}"
    assert "Incorrect key" in str(found.message)
    # What users write themselves is theirs.
    assert found.events[1].attributes == {"text": text}
