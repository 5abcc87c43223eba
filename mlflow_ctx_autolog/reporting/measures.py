"""What is measured of a job, or of a part of it, to be compared with another."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mlflow_ctx_autolog.reporting.calls import Attempt
from mlflow_ctx_autolog.reporting.causes import CLIENT_RETRY, Judged

__all__ = ["Measures", "measures_by_part"]

# The part that is all of the job.
ALL = ""


@dataclass
class _Piece:
    """One partition of one use of a function, whatever number of attempts was made at it."""

    rows: int | None = None
    calls: int = 0
    requests: int = 0
    repeats: Counter[str] = field(default_factory=Counter)


@dataclass
class Measures:
    """What was measured of some calls.

    Args:
        calls: How many.
        requests: What was sent to the endpoint for them.
        unknown: Calls whose cost is not known.
        answered: Calls whose answer says something about its quality.
        odd: Of these, with one signal at least.
        input_tokens: Of each call with usage.
        output_tokens: The same.
        costs: US dollars, of each call that cost something.
        seconds: Of each call that was sent and has ended.
        first_tokens: Seconds to the first piece, of each stream.
        signals: How many answers have each signal.
        errors: How many calls ended in an error of each kind.
        repeats: How many requests were repeats, by the key of the cause.
        shapes: How many requests looked like what.
        pieces: By use of a function and partition.
    """

    calls: int = 0
    requests: int = 0
    unknown: int = 0
    answered: int = 0
    odd: int = 0
    input_tokens: list[float] = field(default_factory=list)
    output_tokens: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    signals: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    repeats: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    pieces: dict[Hashable, _Piece] = field(default_factory=dict)

    @property
    def rows(self) -> int | None:
        """Rows that functions have taken, those evaluated again counted once; None if not known."""
        known = [piece.rows for piece in self.pieces.values() if piece.rows is not None]
        return sum(known) if known else None

    @property
    def cost(self) -> float | None:
        """US dollars in all; None where that of some calls is not known."""
        return None if self.unknown else sum(self.costs)

    def add_attempt(self, attempt: Attempt) -> None:
        """Add a task attempt of a function whose calls are among these."""
        piece = self.pieces.setdefault(_piece(attempt), _Piece())
        if attempt.rows is not None:
            # What is evaluated again takes the same rows again.
            piece.rows = max(piece.rows or 0, attempt.rows)

    def add(self, each: Judged) -> None:
        """Add a call."""
        call = each.call
        requests = call.resends + (call.reused_from is None)
        self.calls += 1
        self.requests += requests
        self.unknown += not call.cost_is_known
        if call.cost:
            self.costs.append(call.cost)
        for amounts, name in (
            (self.input_tokens, "input_tokens"),
            (self.output_tokens, "output_tokens"),
        ):
            if name in call.usage:
                amounts.append(call.usage[name])
        if call.seconds is not None and call.reused_from is None:
            self.seconds.append(call.seconds)
        if call.first_token is not None:
            self.first_tokens.append(call.first_token)
        self.answered += call.was_answered
        self.odd += bool(call.signals)
        for signal in call.signals:
            self.signals[signal] += 1
        if call.failed:
            self.errors[(call.error or "error").partition(":")[0]] += 1
        if call.shape:
            self.shapes[call.shape] += 1
        repeats = {CLIENT_RETRY.key: call.resends} if call.resends else {}
        if each.cause is not None:
            repeats[each.cause.key] = repeats.get(each.cause.key, 0) + 1
        piece = None
        if call.attempt is not None:
            piece = self.pieces.setdefault(_piece(call.attempt), _Piece())
            piece.calls += 1
            piece.requests += requests
        for cause, number in repeats.items():
            self.repeats[cause] += number
            if piece is not None:
                piece.repeats[cause] += number


def _piece(attempt: Attempt) -> Hashable:
    return attempt.trace_id, attempt.function, attempt.handover, attempt.partition


def measures_by_part(
    calls: Iterable[Judged], attempts: Sequence[Attempt]
) -> Mapping[tuple[str, str], Measures]:
    """Return what was measured of a job, by function and model; of all of it by ``("", "")``."""
    found: defaultdict[tuple[str, str], Measures] = defaultdict(Measures)
    whole = found[ALL, ALL]
    for each in calls:
        whole.add(each)
        found[each.call.function, each.call.model or "(no model)"].add(each)
    for attempt in attempts:
        whole.add_attempt(attempt)
        for (function, _), part in found.items():
            if function == attempt.function:
                part.add_attempt(attempt)
    return dict(found)
