"""What became of spans: of one task attempt's, and of a whole trace's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mlflow_ctx_autolog.spans.amounts import Amounts, parse_amounts

__all__ = ["Counts", "Receipt", "TaskReceipt"]

_MADE = "spans.made"
_SAMPLED_OUT = "spans.sampled_out"
_SILENCE = "llm.silence"
_CALLS = "llm.calls"
_TOKENS = "llm.tokens."
_COST = "llm.cost."


@dataclass
class Counts:
    """What became of the spans of one task attempt so far.

    Args:
        made: Those that have ended.
        delivered: Of these, stored.
        lost: Of these, dropped.
        set_aside: Of these, kept in a file since the store does not have them.
    """

    made: int = 0
    delivered: int = 0
    lost: int = 0
    set_aside: int = 0

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
        requests: Fingerprints of the calls, where the driver wants to know of repeats.
        silence: Why its model calls left no span, where that is known.
        sampled_out: Spans that ended in it besides, which sampling has left out.
        rows: Rows that its function has taken.
        sums: What else its calls come to, by ``CallSums.to_dict()``; empty where not known.
        set_aside: Of those that wait, kept in a file since the store does not have them.
        root: Where no span was active and the action is the trace: what the driver closes it with,
            ``name``, ``span_id``, ``began`` (nanoseconds since the epoch), ``metadata``, ``tags``.
        hides_properties: Whether the platform hides from it what the driver says of its action.
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
    silence: str | None = None
    sampled_out: int = 0
    rows: int = 0
    sums: Mapping[str, Any] = field(default_factory=dict)
    set_aside: int = 0
    root: Mapping[str, Any] | None = None
    hides_properties: bool = False

    def to_json(self) -> str:
        """Serialise to one JSON object."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> TaskReceipt:
        """Parse what :meth:`to_json` wrote.

        Raises:
            ValueError: It is not a receipt.
        """
        try:
            fields = json.loads(text)
            fields["usage"] = parse_amounts(fields.get("usage"))
            fields["cost"] = parse_amounts(fields.get("cost"))
            fields["requests"] = tuple(fields.get("requests", ()))
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
    ) -> dict[str, Any]:
        """Return the attributes by which a task's span is a receipt of its own."""
        return {
            _MADE: made,
            **({} if silence is None else {_SILENCE: silence}),
            **({_SAMPLED_OUT: sampled_out} if sampled_out else {}),
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

    @classmethod
    def of(
        cls,
        trace_id: str | None,
        tasks: Sequence[TaskReceipt],
        *,
        made: int,
        stored: int | None,
        waiting: int,
        lost: int,
        first_error: str | None,
        set_aside: int = 0,
    ) -> Receipt:
        """Return a receipt with what the receipts of its tasks say.

        Their first error goes before ``first_error``.
        """
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
            set_aside=set_aside + sum(task.set_aside for task in tasks),
        )

    @property
    def complete(self) -> bool:
        """Whether the store has all spans that are known to have been made."""
        return self.stored is not None and self.stored >= self.made and not self.lost

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
        if self.sampled_out:
            parts.append(f"{self.sampled_out:,} left out by sampling")
        return ", ".join(parts)
