"""What one model call was, and the task attempt that made it, read from what spans carry."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from mlflow_ctx_autolog.prices import is_unknown, least_total
from mlflow_ctx_autolog.spans.amounts import Amounts, parse_amounts
from mlflow_ctx_autolog.spans.attributes import (
    ANNOTATION,
    FINGERPRINT,
    FINISH_REASONS,
    FUNCTION,
    NOT_SENT,
    OUTCOME,
    RUNNING,
)
from mlflow_ctx_autolog.spans.quality import (
    ANSWER_CHARS,
    ANSWER_HASH,
    FLAGS,
    REQUEST_SHAPE,
    answer_attributes,
    answer_text,
    request_shape,
    signals_of,
)
from mlflow_ctx_autolog.stores.stored_trace import (
    LINKED_SPAN,
    SPARK_FACTS,
    StoredSpan,
    StoredTrace,
    joined_metadata,
)

__all__ = [
    "CONTENT",
    "Attempt",
    "Call",
    "SparkFacts",
    "is_wanted",
    "read_calls",
]

_CALLS = frozenset({"CHAT_MODEL", "LLM", "EMBEDDING"})
# MLflow records these as tools.
_IMAGES = frozenset({"Images", "AsyncImages"})

_USAGE, _COST = "mlflow.chat.tokenUsage", "mlflow.llm.cost"
_MODELS = ("mlflow.llm.model", "model", "gen_ai.request.model")
_RESENDS = "http.request.resend_count"
_FIRST_TOKEN = ("gen_ai.response.time_to_first_chunk", "gen_ai.server.time_to_first_token")
# Attributes that hold what was asked, and what was answered.
CONTENT = _INPUTS, _OUTPUTS = "mlflow.spanInputs", "mlflow.spanOutputs"
# Whether a call was answered and its usage is not known; and the call that has paid for an answer
# that was used again, as "trace_id/span_id".
_USAGE_UNKNOWN, _REUSED_FROM = "llm.usage.unknown", "llm.reused_from"
_QUALITY = frozenset({FINISH_REASONS, ANSWER_CHARS, ANSWER_HASH, REQUEST_SHAPE, *FLAGS})
_WANTED = frozenset(
    {_USAGE, _COST, *_MODELS, _RESENDS, *_FIRST_TOKEN, _INPUTS, _OUTPUTS, FINGERPRINT, NOT_SENT}
    | {_USAGE_UNKNOWN, _REUSED_FROM}
    | _QUALITY
)
_OF_TASKS = ("spark.", "host.", "process.", "llm.", "linked.", "spans.")

# Characters of a prompt and an answer that are kept to recognise them by.
_EXCERPT = 160
# For hashes of answers that were recorded without: they are compared within one report alone.
_KEY = secrets.token_hex(16)


def is_wanted(attribute: str) -> bool:
    """Whether an attribute of a span says something about a call or its task."""
    return attribute in _WANTED or attribute.startswith((ANNOTATION, *_OF_TASKS))


@dataclass(slots=True)
class SparkFacts:
    """What only the driver can learn from Spark, for one trace.

    Args:
        plans: For each SQL execution, or operation of Spark Connect, how many nodes of its final
            plan run a function of that name, or any, and how many read a cached table
            (``InMemoryTableScan``).
        speculative: Ids of the task attempts that were speculative copies; None where not asked.
        jobs: The job of each stage.
    """

    plans: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    speculative: frozenset[int] | None = None
    jobs: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: str | None) -> SparkFacts:
        """Parse the driver's JSON, an object of these fields; no facts where it is none."""
        try:
            document = json.loads(text or "{}")
            speculative = document.get("speculative")
            return cls(
                {str(key): dict(nodes) for key, nodes in document.get("plans", {}).items()},
                None if speculative is None else frozenset(map(int, speculative)),
                {int(stage): int(job) for stage, job in document.get("jobs", {}).items()},
            )
        except (AttributeError, TypeError, ValueError):
            return cls()


@dataclass(slots=True, eq=False)
class Attempt:
    """One attempt of a Spark task, as its span tells of it.

    Args:
        span_id: Of its span.
        trace_id: Of the trace that the span is in.
        function: The name of the function handed to Spark.
        facts: What the driver has learnt of its trace.
        application: Spark's application id.
        action: The SQL execution that it was part of, or the one that has started that; None
            for RDDs.
        execution: The SQL execution itself.
        operation: The operation of Spark Connect that it was part of.
        stage: Spark's stage id.
        partition: Spark's partition id.
        number: 0 for the first attempt of the partition in this attempt of the stage.
        attempt_id: Unique in the application, and larger for later ones.
        handover: Names the function, the same for each of its uses.
        call_site: The line on the driver that ran the action, where Spark says so.
        speculation: Whether ``spark.speculation`` was on, if known.
        host: Where it ran.
        process: The worker's process id.
        outcome: ``completed``, ``failed``, ``closed early``, or ``running`` for one that was
            killed, or runs still.
        started: Nanoseconds since the epoch, on the worker's clock.
        ended: The same; None for one that has not ended.
        last_seen: When it, or a call in it, last began or ended.
        rows: Rows that the function has taken.
        calls: Calls that it has made by its own count; None where it has not ended.
        tokens: Of these, by its own count.
        cost: US dollars of these, by its own count.
        sampled_out: Spans of it that sampling has left out.
    """

    span_id: str
    trace_id: str
    function: str
    facts: SparkFacts
    application: str | None
    action: str | None
    execution: str | None
    operation: str | None
    stage: int | None
    partition: int | None
    number: int | None
    attempt_id: int | None
    handover: str | None
    call_site: str | None
    speculation: bool | None
    host: str | None
    process: int | None
    outcome: str
    started: int
    ended: int | None
    last_seen: int
    rows: int | None = None
    calls: int | None = None
    tokens: int = 0
    cost: float = 0.0
    sampled_out: int = 0

    def overlaps(self, other: Attempt) -> bool:
        """Whether both are known to have run at the same time."""
        return self.started < other.last_seen and other.started < self.last_seen

    def ended_before(self, other: Attempt) -> bool:
        """Whether this one is known to have ended before the other began."""
        return self.ended is not None and self.ended <= other.started


@dataclass(slots=True, eq=False)
class Call:
    """One model call.

    Args:
        trace_id: Of the trace that it is in.
        experiment_id: Of that trace.
        span_id: Of its span.
        interface: What was called, such as ``Completions``.
        model: The model asked for.
        attempt: The task attempt that made it; None for calls of the driver.
        started: Nanoseconds since the epoch.
        ended: The same; None where it has not ended.
        failed: Whether it has ended in an error.
        error: Type and message of that.
        request: By what the same request is recognised; None where nothing says so.
        annotations: The user's own keys.
        resends: How many times the client itself sent it again.
        usage: Tokens, by MLflow's names.
        cost: In US dollars; None where neither MLflow nor a price table says so.
        first_token: Seconds to the first piece of a stream; None for others.
        prompt: The beginning of the last message, "" where content is not kept.
        answer: The beginning of the answer; the same.
        signals: What its answer shows without a judge; :func:`signals_of` names them, and
            ``canned`` and ``odd_length`` are those that only all calls together show.
        finish_reasons: Why the endpoint has ended the answer, one for each choice.
        chars: Characters of the answer; None where it was no text, or none came.
        answer_hash: The same for the same answer within one job.
        shape: What the request looks like, whatever it says; None where not known.
        usage_unknown: Whether it was answered, or may have been, and nobody knows all its tokens.
        reused_from: The call whose answer was used again, so that nothing was sent.
        is_orphan: Whether the store lacks a span above it, so that its task is not known.
    """

    trace_id: str
    experiment_id: str
    span_id: str
    interface: str
    model: str | None
    attempt: Attempt | None
    started: int
    ended: int | None
    failed: bool
    error: str | None
    request: str | None
    annotations: Mapping[str, Any]
    resends: int
    usage: Amounts
    cost: float | None
    first_token: float | None
    prompt: str
    answer: str = ""
    signals: frozenset[str] = frozenset()
    finish_reasons: Sequence[str] = ()
    chars: int | None = None
    answer_hash: str | None = None
    shape: str | None = None
    usage_unknown: bool = False
    reused_from: str | None = None
    is_orphan: bool = False

    @property
    def cost_is_known(self) -> bool:
        """Whether its cost is all that it cost, rather than the least that it may have cost."""
        return self.cost is not None and not self.usage_unknown

    @property
    def was_answered(self) -> bool:
        """Whether there is an answer that can be good or bad."""
        return self.chars is not None or bool(self.signals)

    @property
    def seconds(self) -> float | None:
        """How long it took."""
        return None if self.ended is None else (self.ended - self.started) / 1e9

    @property
    def tokens(self) -> float:
        """Input and output together; at least so many, where not all are known."""
        return least_total(self.usage)

    @property
    def function(self) -> str:
        """The name of the function handed to Spark that made it."""
        if self.attempt is not None:
            return self.attempt.function
        return "(not known)" if self.is_orphan else "(driver)"


def read_calls(trace: StoredTrace) -> tuple[list[Call], list[Attempt]]:
    """Return the calls of a trace, by their time, and its task attempts."""
    facts = SparkFacts.from_json(joined_metadata(trace.metadata, SPARK_FACTS))
    parents: dict[str, str | None] = {}
    attempts: dict[str, Attempt] = {}
    calls: list[Call] = []
    for span in trace.spans:
        # The root of a linked trace stands for the span of its task.
        parents[span.span_id] = span.parent_id or span.text(LINKED_SPAN)
        if span.kind == "TASK" and OUTCOME in span.attributes:
            attempts[span.span_id] = _attempt(span, facts)
        elif NOT_SENT not in span.attributes and (
            span.kind in _CALLS or _interface(span) in _IMAGES
        ):
            calls.append(_call(trace, span))
    # A library's span around a call of the client is the same call.
    above: set[str] = set()
    for call in calls:
        parent = parents[call.span_id]
        while parent is not None and parent not in above:
            above.add(parent)
            parent = parents.get(parent)
    found = [call for call in calls if call.span_id not in above]
    for call in found:
        parent = parents[call.span_id]
        while parent is not None and parent not in attempts:
            call.is_orphan = parent not in parents
            parent = parents.get(parent)
        if parent is not None:
            call.is_orphan = False
            call.attempt = attempts[parent]
            call.attempt.last_seen = max(call.attempt.last_seen, call.ended or call.started)
    return sorted(found, key=lambda call: call.started), list(attempts.values())


def _interface(span: StoredSpan) -> str:
    """Return what was called, without the annotation that may stand behind it in the name."""
    is_ours = FINGERPRINT in span.attributes
    return span.name.partition(" (")[0] if is_ours else span.name


def _attempt(span: StoredSpan, facts: SparkFacts) -> Attempt:
    outcome = span.text(OUTCOME) or RUNNING
    execution = span.text("spark.sql.execution.id")
    speculation = span.text("spark.speculation")
    # A task's span is stored when it begins, as if it had ended then.
    ended = None if outcome == RUNNING else span.ended
    return Attempt(
        span.span_id,
        span.trace_id,
        # Releases before this one named the span alone.
        span.text(FUNCTION) or span.name,
        facts,
        application=span.text("spark.application.id"),
        action=span.text("spark.sql.execution.root_id") or execution,
        execution=execution,
        operation=span.text("spark.connect.operation.id"),
        stage=span.number("spark.stage.id"),
        partition=span.number("spark.partition.id"),
        number=span.number("spark.task.attempt_number"),
        attempt_id=span.number("spark.task.attempt_id"),
        handover=span.text("spark.function.id"),
        call_site=span.text("spark.call_site"),
        speculation=None if speculation is None else speculation.lower() == "true",
        host=span.text("host.name"),
        process=span.number("process.pid"),
        outcome=outcome,
        started=span.started,
        ended=ended,
        last_seen=ended or span.started,
        rows=span.number("spark.rows.in"),
        calls=None if ended is None else span.number("llm.calls"),
        tokens=span.number("llm.tokens.total") or 0,
        cost=parse_amounts({"total_cost": span.get("llm.cost.total")}).get("total_cost", 0.0),
        sampled_out=span.number("spans.sampled_out") or 0,
    )


def _call(trace: StoredTrace, span: StoredSpan) -> Call:
    inputs = span.attributes.get(_INPUTS)
    request = span.text(FINGERPRINT)
    if request is None and inputs is not None:
        # Recorded without this library: what was asked is all that can be compared.
        text = f"{span.name} {inputs}"
        request = "content:" + hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    cost = parse_amounts(span.get(_COST)).get("total_cost")
    asked = _loaded(inputs)
    # Not the vectors of an embedding.
    answer = None if span.kind == "EMBEDDING" else _loaded(span.attributes.get(_OUTPUTS))
    quality = _quality(span, asked, answer)
    reasons, chars = quality.get(FINISH_REASONS), quality.get(ANSWER_CHARS)
    usage, failed = parse_amounts(span.get(_USAGE)), span.status == "ERROR"
    unknown = span.get(_USAGE_UNKNOWN)
    reused_from = span.text(_REUSED_FROM)
    if reused_from is not None:
        # Nothing was sent, whatever its answer had cost once.
        usage, cost, unknown = {}, 0.0, False
    return Call(
        span.trace_id,
        trace.experiment_id,
        span.span_id,
        _interface(span),
        next((model for name in _MODELS if (model := span.text(name)) is not None), None),
        None,
        span.started,
        span.ended,
        failed,
        span.error,
        request,
        {
            name.removeprefix(ANNOTATION): span.get(name)
            for name in span.attributes
            if name.startswith(ANNOTATION)
        },
        max(0, span.number(_RESENDS) or 0),
        usage,
        cost,
        _first_token(span),
        _prompt(asked),
        answer_text(answer)[:_EXCERPT],
        signals_of(quality),
        tuple(map(str, reasons)) if isinstance(reasons, list) else (),
        chars if isinstance(chars, int) else None,
        quality.get(ANSWER_HASH),
        quality.get(REQUEST_SHAPE),
        is_unknown(unknown, usage, failed=failed),
        reused_from,
    )


def _quality(span: StoredSpan, asked: Any, answer: Any) -> dict[str, Any]:
    """Return what the span says of the answer, and what it does not say, from the answer."""
    said = {name: span.get(name) for name in _QUALITY if name in span.attributes}
    request = asked if isinstance(asked, dict) else {}
    if ANSWER_CHARS not in said:
        said = {**answer_attributes(request, answer, key=_KEY), **said}
    if REQUEST_SHAPE not in said and request:
        with suppress(Exception):
            said[REQUEST_SHAPE] = request_shape(request)
    return said


def _loaded(text: str | None) -> Any:
    if not text:
        return None
    try:
        return json.loads(text)
    except ValueError:
        # As where it was cut.
        return text


def _first_token(span: StoredSpan) -> float | None:
    for name in _FIRST_TOKEN:
        seconds = span.get(name)
        if isinstance(seconds, (int, float)):
            return float(seconds)
    return None if span.first_chunk is None else (span.first_chunk - span.started) / 1e9


def _prompt(asked: Any) -> str:
    if not isinstance(asked, dict):
        return "" if asked is None else str(asked)[:_EXCERPT]
    content = asked.get("messages") or asked.get("input") or asked.get("prompt") or ""
    if isinstance(content, list) and content:
        content = content[-1]
    if isinstance(content, dict):
        content = content.get("content") or ""
    if isinstance(content, list):
        texts = (part.get("text") for part in content if isinstance(part, dict))
        content = " ".join(text for text in texts if isinstance(text, str))
    return str(content)[:_EXCERPT]
