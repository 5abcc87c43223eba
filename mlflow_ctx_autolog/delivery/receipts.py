"""What became of spans: of one task attempt's, and of a whole trace's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from mlflow_ctx_autolog.spans.amounts import Amounts, parse_amounts
from mlflow_ctx_autolog.spans.attributes import FUNCTION, TRACE_UPDATE
from mlflow_ctx_autolog.spans.trace_update import parse_update

__all__ = [
    "ATTEMPT",
    "NUMBER",
    "STAGE",
    "Counts",
    "Loss",
    "Receipt",
    "TaskReceipt",
]

_MADE = "spans.made"
_SAMPLED_OUT = "spans.sampled_out"
_SILENCE = "llm.silence"
_CALLS = "llm.calls"
_ROWS = "spark.rows.in"
_TOKENS = "llm.tokens."
_COST = "llm.cost."
# Attributes by which Spark is known to have begun a task's span.
ATTEMPT, STAGE = "spark.task.attempt_id", "spark.stage.id"
NUMBER = "spark.task.attempt_number"


class Loss(str, Enum):
    """Every way in which a finished span is dropped: none without one of these."""

    NO_ROOM = "no room for them on the disk or in memory"
    REFUSED = "refused by the store, with no file to keep them in"
    REFUSED_UNNAMED = "refused by a collector that does not say which"
    TOO_LATE = "come home after a store for whole traces had the trace"


@dataclass
class Counts:
    """What became of the spans of one task attempt, or of one trace on the driver, so far.

    Args:
        made: Those that have ended.
        delivered: Of these, stored.
        losses: Of these, dropped, by the way in which they were.
        set_aside: Of these, kept in a file since the store does not have them.
    """

    made: int = 0
    delivered: int = 0
    losses: Counter[Loss] = field(default_factory=Counter)
    set_aside: int = 0

    @property
    def lost(self) -> int:
        """Spans that were dropped, in whatever way."""
        return sum(self.losses.values())

    @property
    def waiting(self) -> int:
        """Spans that are neither stored nor lost, those that were set aside among them."""
        return self.made - self.delivered - self.lost


@dataclass(frozen=True)
class TaskReceipt:
    """What one task attempt hands back at its end.

    Args:
        trace_id: The MLflow trace that its spans belong to.
        task_span_id: The span of the attempt, by which it is counted once.
        made: Spans that ended in the attempt, its own among them.
        delivered: Of these, stored by the worker.
        waiting: Of these, not stored yet: they come home with the receipt, or stay in the spool.
        lost: Of these, dropped since neither memory nor spool had room.
        first_error: Why the store did not take spans; None where it did.
        seconds_waiting: How long the end of the task waited for its spans to be stored.
        usage: Tokens of its model calls, by MLflow's names.
        cost: Cost of its model calls in US dollars, where their spans say so.
        calls: Model calls that it has made.
        errors: Of these, those that have failed.
        spent: US dollars that they have cost, where there is a budget.
        requests: Fingerprints of its requests, each once, where the driver wants to know of
            repeats; of the first thousand that differ.
        repeats: Requests that were made before in the attempt.
        requests_untold: Requests beyond those, of which it is not known whether they are repeats.
        silence: Why its model calls left no span, where that is known.
        sampled_out: Spans that ended in it besides, which sampling has left out.
        rows: Rows that its function has taken.
        sums: What else its calls come to, by ``CallSums.to_dict()``; empty where not known.
        set_aside: Of those that wait, kept in a file since the store does not have them.
        root: Where no span was active and the action is the trace: what the driver closes it with,
            ``name``, ``span_id``, ``began`` (nanoseconds since the epoch), ``metadata``, ``tags``.
        hides_properties: Whether the platform hides from it what the driver says of its action.
        losses: Of those lost, how many in which way, by the values of :class:`Loss`.
        attempt: Spark's id of the attempt; None outside Spark.
        stage: The number of the stage that it is of; None where it is not told.
        models: Of its calls whose cost is not told, input and output tokens, and of how many calls
            these are known, by the model that was asked.
        function: The name of its function; "" where it is not told.
        trace_update: What it has said of the trace besides spans, see
            :mod:`~mlflow_ctx_autolog.spans.trace_update`.
        swept: Whether, in the attempt, all that processes which are gone had left on its host was
            found and delivered.
    """

    trace_id: str
    task_span_id: str
    made: int
    delivered: int = 0
    waiting: int = 0
    lost: int = 0
    first_error: str | None = None
    seconds_waiting: float = 0.0
    usage: Amounts = field(default_factory=dict)
    cost: Amounts = field(default_factory=dict)
    calls: int = 0
    errors: int = 0
    spent: float = 0.0
    requests: Sequence[str] = ()
    repeats: int = 0
    requests_untold: int = 0
    silence: str | None = None
    sampled_out: int = 0
    rows: int = 0
    sums: Mapping[str, Any] = field(default_factory=dict)
    set_aside: int = 0
    root: Mapping[str, Any] | None = None
    hides_properties: bool = False
    losses: Mapping[str, int] = field(default_factory=dict)
    attempt: int | None = None
    stage: int | None = None
    swept: bool = False
    models: Mapping[str, Sequence[int]] = field(default_factory=dict)
    function: str = ""
    trace_update: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Serialise to one JSON object."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> TaskReceipt:
        """Parse what :meth:`to_json` wrote; what a later release may have added is ignored.

        Raises:
            ValueError: It is not a receipt.
        """
        try:
            known = cls.__dataclass_fields__
            fields = {name: each for name, each in json.loads(text).items() if name in known}
            fields["usage"] = parse_amounts(fields.get("usage"))
            fields["cost"] = parse_amounts(fields.get("cost"))
            fields["requests"] = tuple(fields.get("requests", ()))
            fields["trace_update"] = parse_update(fields.get("trace_update"))
            return cls(**fields)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"not the receipt of a task: {text[:200]!r}") from error

    @staticmethod
    def attributes(
        made: int,
        usage: Amounts,
        cost: Amounts,
        silence: str | None = None,
        sampled_out: int = 0,
        trace_update: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Return the attributes by which a task's span is a receipt of its own."""
        return {
            _MADE: made,
            **({} if silence is None else {_SILENCE: silence}),
            **({_SAMPLED_OUT: sampled_out} if sampled_out else {}),
            **({TRACE_UPDATE: dict(trace_update)} if trace_update else {}),
            **{_TOKENS + name.removesuffix("_tokens"): n for name, n in usage.items()},
            **{_COST + name.removesuffix("_cost"): amount for name, amount in cost.items()},
        }

    @classmethod
    def from_attributes(
        cls, trace_id: str, span_id: str, attributes: Mapping[str, Any]
    ) -> TaskReceipt | None:
        """Return the receipt that a stored task's span is; None for one that had not ended."""
        made = attributes.get(_MADE)
        if not isinstance(made, int):
            return None
        usage = _amounts(attributes, _TOKENS, "_tokens")
        cost = _amounts(attributes, _COST, "_cost")
        silence = attributes.get(_SILENCE)
        calls = attributes.get(_CALLS, 0)
        return cls(
            trace_id,
            span_id,
            made,
            delivered=made,
            usage=usage,
            cost=cost,
            calls=calls,
            silence=silence,
            sampled_out=attributes.get(_SAMPLED_OUT, 0),
            rows=attributes.get(_ROWS, 0),
            function=attributes.get(FUNCTION, ""),
            attempt=attributes.get(ATTEMPT),
            stage=attributes.get(STAGE),
            trace_update=parse_update(attributes.get(TRACE_UPDATE)),
        )


def _amounts(attributes: Mapping[str, Any], prefix: str, suffix: str) -> Amounts:
    named = {
        name.removeprefix(prefix) + suffix: amount
        for name, amount in attributes.items()
        if name.startswith(prefix)
    }
    return parse_amounts(named)


@dataclass(frozen=True)
class Receipt:
    """What became of the spans of a trace, having asked the store.

    Args:
        trace_id: The MLflow trace; None where each task is a trace of its own.
        tasks: Task attempts known to have ended.
        made: Spans made, on the driver and by these attempts, counted by span id.
        stored: Spans that the store has of the trace; None where it did not answer.
        waiting: Spans known to be kept somewhere until the store takes them.
        lost: Spans known to be dropped.
        first_error: The first reason why a store did not take spans, if there was one.
        seconds_waiting: How long the ends of tasks waited for their spans, in all.
        sampled_out: Spans that ended besides, which sampling has left out.
        set_aside: Spans, or what is known of the trace, that the store does not have, and that are
            kept in a file for ``recover``.
        losses: Of those lost, how many in which way, by the values of :class:`Loss`.
        unknown: Task attempts that Spark has begun and of which it is not known what they have
            made: by the host that they ran on, empty where Spark does not say which.
        is_unread: Whether what tasks have made can be read from the store alone, and was not in
            time.
    """

    trace_id: str | None
    tasks: int = 0
    made: int = 0
    stored: int | None = None
    waiting: int = 0
    lost: int = 0
    first_error: str | None = None
    seconds_waiting: float = 0.0
    sampled_out: int = 0
    set_aside: int = 0
    losses: Mapping[str, int] = field(default_factory=dict)
    unknown: Mapping[str, int] = field(default_factory=dict)
    is_unread: bool = False

    @classmethod
    def of(
        cls,
        trace_id: str | None,
        tasks: Sequence[TaskReceipt],
        *,
        made: int,
        stored: int | None,
        here: Counts,
        first_error: str | None,
        unknown: Mapping[str, int] | None = None,
        is_unread: bool = False,
        at_most_waiting: int | None = None,
    ) -> Receipt:
        """Return a receipt with what its tasks have told, and what became of spans on the driver.

        Args:
            trace_id: The trace.
            tasks: What its task attempts have told.
            made: Spans known to have been made; the store cannot have more.
            stored: Spans that the store has; None where it did not answer.
            here: What became on the driver of its own spans, and of those that came home.
            first_error: Why a store did not take spans from the driver; that of a task goes before.
            unknown: See :class:`Receipt`.
            is_unread: See :class:`Receipt`.
            at_most_waiting: Spans that wait at most, where the store did not answer.
        """
        losses: Counter[str] = Counter({loss.value: n for loss, n in here.losses.items()})
        for task in tasks:
            told = dict(task.losses)
            losses.update(told)
            if (unnamed := task.lost - sum(told.values())) > 0:
                losses[Loss.NO_ROOM.value] += unnamed
        lost = sum(losses.values())
        made = max(made, stored or 0)
        waiting = max(0, made - (stored or 0) - lost)
        if stored is None and at_most_waiting is not None:
            waiting = min(waiting, at_most_waiting)
        return cls(
            trace_id,
            len(tasks),
            made,
            stored,
            waiting,
            lost,
            first_error=next((task.first_error for task in tasks if task.first_error), first_error),
            seconds_waiting=sum(task.seconds_waiting for task in tasks),
            sampled_out=sum(task.sampled_out for task in tasks),
            set_aside=here.set_aside + sum(task.set_aside for task in tasks),
            losses=dict(losses),
            unknown=dict(unknown or {}),
            is_unread=is_unread,
        )

    @property
    def complete(self) -> bool:
        """Whether the store has all spans that were made, and it is known how many these are."""
        return (
            self.stored is not None
            and self.stored >= self.made
            and not self.lost
            and not self.unknown
            and not self.is_unread
        )

    @property
    def attempts_unknown(self) -> str:
        """Of how many task attempts it is not known what they have made, and where they ran."""
        hosts = [f"{count:,} on {host}" for host, count in self.unknown.items() if host]
        count = sum(self.unknown.values())
        where = f" ({', '.join(hosts)})" if hosts else ""
        return f"{count:,} task attempt{'s' * (count != 1)}{where}"

    def summary(self) -> dict[str, Any]:
        """Return the numbers by which :meth:`__str__` says it, but for those that are nothing."""
        names = ("made", "stored", "waiting", "lost", "set_aside", "sampled_out", "unknown")
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value or name in names[:2]}

    @classmethod
    def from_summary(cls, trace_id: str, text: str | None) -> Receipt | None:
        """Return what :meth:`summary` has told, from its JSON; None where there is none."""
        with suppress(TypeError, ValueError, AttributeError):
            fields = json.loads(text or "")
            unknown = {str(host): int(count) for host, count in fields.pop("unknown", {}).items()}
            numbers: dict[str, Any] = {
                str(name): int(n) for name, n in fields.items() if n is not None
            }
            return cls(str(trace_id), unknown=unknown, **numbers)
        return None

    def __str__(self) -> str:
        stored = "the store did not say how many it has"
        if self.stored is not None:
            stored = f"{self.stored:,} stored"
        parts = [f"{self.made:,} spans made", stored]
        if self.waiting:
            parts.append(f"{self.waiting:,} waiting")
        if self.set_aside:
            parts.append(f"{self.set_aside:,} set aside")
        if self.lost:
            parts.append(f"{self.lost:,} lost")
        if self.unknown:
            parts.append(f"unknown what {self.attempts_unknown} made")
        if self.is_unread:
            parts.append("what its tasks say could not be read in time")
        if self.sampled_out:
            parts.append(f"{self.sampled_out:,} left out by sampling")
        return ", ".join(parts)
