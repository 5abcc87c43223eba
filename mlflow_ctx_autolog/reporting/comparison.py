"""What changed from one job to another, and whether that is more than chance."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from mlflow_ctx_autolog.reporting import chance
from mlflow_ctx_autolog.reporting.call_report import CallReport
from mlflow_ctx_autolog.reporting.causes import CAUSES
from mlflow_ctx_autolog.reporting.comparison_text import comparison_lines, comparison_tables
from mlflow_ctx_autolog.reporting.files import write_private
from mlflow_ctx_autolog.reporting.measures import Measures, measures_by_part
from mlflow_ctx_autolog.reporting.signals import SIGNALS
from mlflow_ctx_autolog.reporting.sources import last_two_reports, read_source
from mlflow_ctx_autolog.reporting.sums import at_least, percentiles

__all__ = ["LEAST", "Comparison", "Difference", "compare"]

# What counts at least: growth of amounts, growth of times, and points of a share.
LEAST = {"change": 0.05, "seconds": 0.2, "share": 0.005}
# A difference is called more than chance if its chance, taken together with all others, is no more.
ALPHA = 0.05

_PERCENTS = (50, 95, 99)

# Of before and after.
_Numbers = tuple[float | None, float | None]
_Both = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Difference:
    """One number before and after.

    Args:
        function: Of which function; "" for all of the job.
        model: Of which model; "" for all.
        metric: Its name, by which a condition names it.
        label: What people call it.
        kind: ``"change"`` of an amount, ``"seconds"``, ``"share"``; or ``"fact"``, which is not
            tested.
        unit: ``"$"``, ``"s"``, ``"tokens"``, ``"%"`` or "".
        before: The number; None where it is not known.
        after: The same.
        change: Growth (0.3 is 30 % more), infinite from 0; of a share, the difference in points
            (0.02 is two of a hundred). None where it is not known.
        chance: How often chance alone makes such a difference somewhere in a comparison like this
            one; None where it was not tested, for too few calls.
        verdict: ``"changed"``, ``"small"`` (less than counts), ``"chance"``, ``"too few"`` or
            ``"not known"``; "" for a fact.
        counts: Of a share after, how many of how many.
    """

    function: str
    model: str
    metric: str
    label: str
    kind: str
    unit: str
    before: float | None
    after: float | None
    change: float | None = None
    chance: float | None = None
    verdict: str = ""
    counts: tuple[int, int] | None = None

    @property
    def part(self) -> str:
        """What it is a number of: "all", or function and model."""
        return f"{self.function}, {self.model}" if self.function or self.model else "all"


@dataclass(frozen=True, repr=False)
class Comparison:
    """What :func:`compare` returns.

    Args:
        before: What was compared: its traces, jobs, calls, requests, rows, cost, functions, models.
        after: The same of the later one.
        differences: All that were looked at: those of the whole job, then by function and model.
        news: What is only in one of them: ``functions``, ``models`` and ``prompts`` (the shapes of
            requests), each with ``new`` and ``vanished``, and how many calls each has.
        least: From which size on a difference counts.
        notes: What limits what can be said, one sentence each.
    """

    before: Mapping[str, Any]
    after: Mapping[str, Any]
    differences: Sequence[Difference]
    news: Mapping[str, Mapping[str, Mapping[str, int]]]
    least: Mapping[str, float] = field(default_factory=lambda: dict(LEAST))
    notes: Sequence[str] = ()

    @property
    def changed(self) -> list[Difference]:
        """What changed by more than chance and by enough to count, the largest first."""
        found = [each for each in self.differences if each.verdict == "changed"]
        return sorted(found, key=lambda each: (bool(each.function), -_weight(each, self.least)))

    @property
    def is_single(self) -> bool:
        """Whether all of both jobs is of one function and model, which are not listed again."""
        return not any(each.function for each in self.differences)

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "before": dict(self.before),
            "after": dict(self.after),
            "changed": [_finite(asdict(each)) for each in self.changed],
            "differences": [_finite(asdict(each)) for each in self.differences],
            "news": {name: dict(each) for name, each in self.news.items()},
            "least": dict(self.least),
            "alpha": ALPHA,
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """Return :meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, default=str)

    def to_pandas(self) -> Any:
        """Return a DataFrame with a row for each difference."""
        import pandas

        return pandas.DataFrame([asdict(each) for each in self.differences])

    def to_html(self, path: str | Path) -> Path:
        """Write it as one HTML file that works offline, with mode 0600; return its path."""
        from mlflow_ctx_autolog.reporting.comparison_page import comparison_page

        return write_private(path, comparison_page(self.to_dict()))

    def _repr_html_(self) -> str:
        return comparison_tables(self.to_dict())

    def __str__(self) -> str:
        return "\n".join(comparison_lines(self.to_dict()))

    def __repr__(self) -> str:
        return (
            f"<Comparison: {len(self.changed)} of {len(self.differences)} numbers changed by more "
            "than chance>"
        )


def compare(
    before: Any = None,
    after: Any = None,
    *,
    tracking_uri: str | None = None,
    prices: Mapping[str, tuple[float, float]] | None = None,
    least: Mapping[str, float] | None = None,
) -> Comparison:
    """Return what changed from one job to another, by function and model.

    Args:
        before: A trace, its id or a list of them; the id of a run; an experiment and its times as
            ``"NAME@2026-11-01..2026-11-08"``; keywords of :func:`~mlflow_ctx_autolog.report` as a
            mapping; or a report. By default the last two jobs of the same name in MLflow's current
            experiment are compared.
        after: The same, of the later one.
        tracking_uri: Where the traces are kept; by default MLflow's configured store.
        prices: As for :func:`~mlflow_ctx_autolog.report`.
        least: From which size on a difference counts, in place of :data:`LEAST`: ``change`` of
            amounts (0.05 is 5 %), ``seconds`` for growth of times, ``share`` in points (0.005).

    Raises:
        ValueError: One of them is nothing that can be read, or only one is given.
        StoreError: The store does not answer, or has no such trace.
        ImportError: scipy is missing; the message says how to install it.
    """
    chance.require_scipy()
    if (before is None) != (after is None):
        raise ValueError("name both jobs, before and after, or neither for the last two")
    counts = _checked_least(least or {})
    if before is None:
        first, second = last_two_reports(tracking_uri, prices)
    else:
        first, second = (read_source(each, tracking_uri, prices) for each in (before, after))
    return compared(first, second, counts)


def compared(before: CallReport, after: CallReport, least: Mapping[str, float]) -> Comparison:
    """Return what changed from one report to another."""
    one = measures_by_part(before.calls, before.attempts)
    two = measures_by_part(after.calls, after.attempts)
    parts = [part for part in one if part in two]
    if len(one) == len(two) == 2 and len(parts) == 2:
        # All of the job is of one function and model.
        parts = parts[:1]
    found = [
        replace(each, function=function, model=model)
        for function, model in parts
        for each in _differences(one[function, model], two[function, model])
    ]
    chances = chance.holm(each.chance for each in found)
    judged = [
        replace(each, chance=together, verdict=_verdict(each, together, least))
        for each, together in zip(found, chances, strict=True)
    ]
    notes = [
        f"{name}: {note}"
        for name, report in (("before", before), ("after", after))
        for note in report.notes
    ]
    return Comparison(
        _side(before, one), _side(after, two), judged, _news(one, two), dict(least), notes
    )


def _side(report: CallReport, parts: Mapping[tuple[str, str], Measures]) -> dict[str, Any]:
    whole = parts["", ""]
    return {
        "trace_ids": report.trace_ids,
        "jobs": [{**vars(job), "seconds": job.seconds} for job in report.jobs],
        "calls": whole.calls,
        "requests": whole.requests,
        "rows": whole.rows,
        "cost": whole.cost,
        "money": at_least(sum(whole.costs), whole.unknown),
        "functions": sorted({function for function, _ in parts if function}),
        "models": sorted({model for _, model in parts if model}),
    }


def _checked_least(least: Mapping[str, float]) -> dict[str, float]:
    for name, size in least.items():
        if name not in LEAST:
            raise ValueError(f"least has {name!r}, which is none of {', '.join(LEAST)}")
        if isinstance(size, bool) or not isinstance(size, (int, float)) or not 0 <= size < math.inf:
            raise ValueError(f"least[{name!r}] is {size!r}; it must be a number, at least 0")
    return {**LEAST, **least}


def _verdict(each: Difference, together: float | None, least: Mapping[str, float]) -> str:
    if each.kind == "fact":
        return ""
    if each.change is None:
        return "not known"
    if together is None:
        return "too few"
    if together > ALPHA:
        return "chance"
    return "changed" if abs(each.change) >= least[each.kind] else "small"


def _weight(each: Difference, least: Mapping[str, float]) -> float:
    return abs(each.change or 0.0) / (least.get(each.kind) or 1e-9)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    # JSON has no infinity.
    return {name: None if value == math.inf else value for name, value in row.items()}


def _news(
    one: Mapping[tuple[str, str], Measures], two: Mapping[tuple[str, str], Measures]
) -> dict[str, dict[str, dict[str, int]]]:
    def calls(parts: Mapping[tuple[str, str], Measures], place: int) -> Counter[str]:
        found: Counter[str] = Counter()
        for part, measures in parts.items():
            if any(part):
                found[part[place]] += measures.calls
        return found

    shapes = (one["", ""].shapes, two["", ""].shapes)
    named = {
        "functions": (calls(one, 0), calls(two, 0)),
        "models": (calls(one, 1), calls(two, 1)),
        # Of a job whose requests nobody has looked at, nothing is new or gone.
        "prompts": shapes if all(shapes) else (Counter(), Counter()),
    }
    return {
        name: {
            "new": {each: number for each, number in after.items() if each not in before},
            "vanished": {each: number for each, number in before.items() if each not in after},
        }
        for name, (before, after) in named.items()
    }


def _differences(one: Measures, two: Measures) -> Iterator[Difference]:
    yield from _amounts(one, two)
    yield from _times(one, two)
    for share in _shares(one, two):
        # What neither has is no difference to look for.
        if share.before or share.after:
            yield share


def _amounts(one: Measures, two: Measures) -> Iterator[Difference]:
    spread = _spread(one, two)
    yield _difference("rows", "rows", "fact", "", (one.rows, two.rows), None)
    ones = [1.0] * one.calls, [1.0] * two.calls
    found = (one.calls, two.calls)
    yield _amount("calls", "calls", "", found, chance.rates(*ones, (1, 1), spread))
    tokens = {
        "input_tokens": ("tokens in", (one.input_tokens, two.input_tokens)),
        "output_tokens": ("tokens out", (one.output_tokens, two.output_tokens)),
    }
    known = one.cost is not None and two.cost is not None
    # Where nothing cost anything, there is nothing to tell.
    has_cost = not known or bool(one.cost or two.cost)
    costs = one.costs, two.costs
    if has_cost:
        p = chance.rates(*costs, (1, 1), spread) if known else None
        yield _amount("cost", "cost", "$", (one.cost, two.cost), p)
        p = chance.means(*costs) if known else None
        means = (_mean(one.costs), _mean(two.costs)) if known else (None, None)
        yield _amount("cost_per_call", "cost per call", "$", means, p)
    for name, (label, values) in tokens.items():
        means = _mean(values[0]), _mean(values[1])
        yield _amount(name, f"{label} per call", "tokens", means, chance.means(*values))
    if not one.rows or not two.rows:
        return
    rows = float(one.rows), float(two.rows)
    p = chance.rates(*ones, rows, spread)
    per_row = one.calls / rows[0], two.calls / rows[1]
    yield _amount("calls_per_row", "calls per row", "", per_row, p)
    for name, (label, values) in tokens.items():
        p = chance.rates(*values, rows, spread)
        name, label = f"{name}_per_1000_rows", f"{label} per 1,000 rows"
        yield _amount(name, label, "tokens", _per_1000(values, rows), p)
    if has_cost:
        p = chance.rates(*costs, rows, spread) if known else None
        paid = _per_1000(costs, rows) if known else (None, None)
        yield _amount("cost_per_1000_rows", "cost per 1,000 rows", "$", paid, p)


def _per_1000(values: _Both, rows: tuple[float, float]) -> tuple[float, float]:
    return 1000 * sum(values[0]) / rows[0], 1000 * sum(values[1]) / rows[1]


def _times(one: Measures, two: Measures) -> Iterator[Difference]:
    for values, prefix, label in (
        ((one.seconds, two.seconds), "", "latency"),
        ((one.first_tokens, two.first_tokens), "first_token_", "time to first token"),
    ):
        if not any(values):
            continue
        first, second = (percentiles(each, _PERCENTS) for each in values)
        for percent in _PERCENTS:
            name = f"p{percent}"
            yield _difference(
                f"{prefix}{name}",
                f"{label} {name}",
                "seconds",
                "s",
                (first.get(name), second.get(name)),
                chance.quantiles(*values, percent),
            )


def _shares(one: Measures, two: Measures) -> Iterator[Difference]:
    calls, answered = (one.calls, two.calls), (one.answered, two.answered)
    requests = one.requests, two.requests
    yield _share("odd", "answers with a signal", (one.odd, two.odd), answered)
    for signal in SIGNALS:
        counts = one.signals[signal], two.signals[signal]
        yield _share(signal, f"answers: {SIGNALS[signal]}", counts, answered)
    yield _share("errors", "errors", (one.errors.total(), two.errors.total()), calls)
    for kind in sorted({*one.errors, *two.errors}):
        counts = one.errors[kind], two.errors[kind]
        yield _share(f"errors:{kind}", f"errors: {kind}", counts, calls)
    causes = {cause.key: cause.name for cause in CAUSES}
    spread = _spread_of_repeats(one, two, Counter.total)
    counts = one.repeats.total(), two.repeats.total()
    yield _share("repeats", "repeats", counts, requests, spread)
    for cause, name in causes.items():
        spread = _spread_of_repeats(one, two, itemgetter(cause))
        counts = one.repeats[cause], two.repeats[cause]
        yield _share(f"repeats:{cause}", f"repeats: {name}", counts, requests, spread)


def _spread(one: Measures, two: Measures) -> chance.Spread:
    spread = chance.Spread()
    for measures in (one, two):
        pieces = [piece for piece in measures.pieces.values() if piece.rows]
        calls = [float(piece.calls) for piece in pieces]
        spread.add(calls, [float(piece.rows or 0) for piece in pieces], sum(calls))
    return spread


def _spread_of_repeats(
    one: Measures, two: Measures, number: Callable[[Counter[str]], int]
) -> chance.Spread:
    spread = chance.Spread()
    for measures in (one, two):
        pieces = [piece for piece in measures.pieces.values() if piece.requests]
        repeats = [float(number(piece.repeats)) for piece in pieces]
        requests = [float(piece.requests) for piece in pieces]
        share = sum(repeats) / sum(requests) if pieces else 0.0
        spread.add(repeats, requests, share * (1 - share) * sum(requests))
    return spread


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _growth(before: float | None, after: float | None) -> float | None:
    if before is None or after is None:
        return None
    if not before:
        return math.inf if after else 0.0
    return after / before - 1


def _amount(metric: str, label: str, unit: str, numbers: _Numbers, p: float | None) -> Difference:
    return _difference(metric, label, "change", unit, numbers, p)


def _share(
    metric: str,
    label: str,
    counts: tuple[int, int],
    of: tuple[int, int],
    spread: chance.Spread | None = None,
) -> Difference:
    before, after = (some / all_ if all_ else None for some, all_ in zip(counts, of, strict=True))
    p = chance.shares((counts[0], of[0]), (counts[1], of[1]), spread)
    found = _difference(metric, label, "share", "%", (before, after), p)
    return replace(found, counts=(counts[1], of[1]))


def _difference(
    metric: str, label: str, kind: str, unit: str, numbers: _Numbers, p: float | None
) -> Difference:
    before, after = numbers
    change = _growth(before, after)
    if kind == "share" and before is not None and after is not None:
        change = after - before
    return Difference("", "", metric, label, kind, unit, before, after, change, p)
