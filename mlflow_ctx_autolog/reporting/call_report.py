"""What the calls of traces came to, which of them were repeats, and why."""

from __future__ import annotations

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from mlflow_ctx_autolog.config import checked_prices
from mlflow_ctx_autolog.exceptions import StoreError
from mlflow_ctx_autolog.reporting.calls import Attempt, Call, is_wanted, read_calls
from mlflow_ctx_autolog.reporting.causes import (
    CAUSES,
    CLIENT_RETRY,
    Cause,
    Judged,
    judge,
    skewed_hosts,
)
from mlflow_ctx_autolog.reporting.text import lines, tables
from mlflow_ctx_autolog.stores import reading
from mlflow_ctx_autolog.stores import tracking_store as store
from mlflow_ctx_autolog.stores.stored_trace import (
    LINKED_TRACE,
    TRACE_KEY,
    StoredSpan,
    StoredTrace,
)

__all__ = ["CallReport", "Sums", "report"]

# US dollars for a million tokens: input, output.
Prices = Mapping[str, tuple[float, float]]
RequestKey = str | Sequence[str] | Callable[[Call], Hashable]

_LISTED = 10
_MOMENTS = 200


@dataclass
class Sums:
    """What some calls come to.

    Args:
        calls: How many.
        errors: Of these, ended in an error.
        input_tokens: As the endpoint counted them.
        output_tokens: The same.
        tokens: Both together.
        cost: US dollars, over the calls whose price is known.
        unpriced: Calls that used tokens, and whose price is not known.
        resends: How many times the client sent one of them again.
    """

    calls: int = 0
    errors: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    tokens: int = 0
    cost: float = 0.0
    unpriced: int = 0
    resends: int = 0

    @classmethod
    def of(cls, calls: Iterable[Call]) -> Sums:
        """Add up calls."""
        sums = cls()
        for call in calls:
            sums.calls += 1
            sums.errors += call.failed
            sums.input_tokens += int(call.usage.get("input_tokens", 0))
            sums.output_tokens += int(call.usage.get("output_tokens", 0))
            sums.tokens += int(call.tokens)
            sums.cost += call.cost or 0.0
            sums.unpriced += call.cost is None and call.tokens > 0
            sums.resends += call.resends
        return sums

    @property
    def requests(self) -> int:
        """Calls, and those that the client sent again by itself."""
        return self.calls + self.resends

    @property
    def money(self) -> str:
        """The cost as a text: "-" where no price is known, "at least" where some are not."""
        priced = f"${self.cost:,.4f}" if self.cost < 100 else f"${self.cost:,.2f}"
        if not self.unpriced:
            return priced if self.cost or not self.tokens else "-"
        return f"at least {priced}" if self.cost else "-"

    def to_dict(self) -> dict[str, Any]:
        """Return the sums; the cost is None where no price is known."""
        cost = None if self.unpriced and not self.cost else round(self.cost, 9)
        return {**vars(self), "cost": cost, "money": self.money, "requests": self.requests}


@dataclass
class CallReport:
    """What :func:`report` returns.

    Args:
        calls: The calls with the cause of each repetition, by their time.
        attempts: The task attempts.
        trace_ids: The traces that were read.
        notes: What limits what can be said, one sentence each.
        tracking_uri: Where the traces are kept, if that is an address of MLflow's UI.
    """

    calls: list[Judged]
    attempts: list[Attempt]
    trace_ids: list[str]
    notes: list[str] = field(default_factory=list)
    tracking_uri: str | None = None

    # What it comes to.

    @property
    def made(self) -> Sums:
        """All calls."""
        return Sums.of(each.call for each in self.calls)

    @property
    def useful(self) -> Sums:
        """The first call of each request that succeeded, or the first if none did."""
        return Sums.of(each.call for each in self.calls if each.kept)

    @property
    def repeated(self) -> Sums:
        """The others: what was paid for again."""
        return Sums.of(each.call for each in self.calls if not each.kept)

    @property
    def distinct(self) -> int:
        """How many different requests were made."""
        return sum(each.cause is None for each in self.calls)

    @property
    def multiplier(self) -> float:
        """Calls made for each distinct request; 1 where nothing was repeated."""
        return len(self.calls) / self.distinct if self.calls else 1.0

    def by_cause(self) -> dict[Cause, Sums]:
        """Return what was repeated for each cause, the one with most requests first."""
        found: defaultdict[str, list[Call]] = defaultdict(list)
        for each in self.calls:
            if each.cause is not None:
                # Of a request that failed first, it is the failed call that was for nothing.
                wasted = each.repeats if each.kept and each.repeats is not None else each.call
                found[each.cause.key].append(wasted)
        sums = {cause: Sums.of(found[cause.key]) for cause in CAUSES if cause.key in found}
        for of_cause in sums.values():
            of_cause.resends = 0
        if resends := self.made.resends:
            sums.setdefault(CLIENT_RETRY, Sums()).resends = resends
        return dict(sorted(sums.items(), key=lambda item: -item[1].requests))

    def by_function(self) -> dict[str, Sums]:
        """Return sums for each function handed to Spark."""
        return self._grouped(lambda call: call.function)

    def by_stage(self) -> dict[str, Sums]:
        """Return sums for each stage, by function, application and stage id."""
        return self._grouped(
            lambda call: (
                "(none)"
                if call.attempt is None
                else f"{call.attempt.application or '-'} stage {call.attempt.stage}"
            )
        )

    def by_partition(self) -> dict[str, Sums]:
        """Return sums for each stage and partition, the heaviest first."""
        found = self._grouped(
            lambda call: (
                "(none)"
                if call.attempt is None
                else f"stage {call.attempt.stage} partition {call.attempt.partition}"
            )
        )
        return dict(sorted(found.items(), key=lambda item: (-item[1].tokens, -item[1].calls)))

    def _grouped(self, name: Callable[[Call], str]) -> dict[str, Sums]:
        found: defaultdict[str, list[Call]] = defaultdict(list)
        for each in self.calls:
            found[name(each.call)].append(each.call)
        return {key: Sums.of(calls) for key, calls in found.items()}

    def latency(self) -> dict[str, float]:
        """Return p50, p95 and p99 of the seconds that calls took; empty if none has ended."""
        return _percentiles([each.call.seconds for each in self.calls])

    def time_to_first_token(self) -> dict[str, float]:
        """Return the same for the first piece of streams; empty where there are none."""
        return _percentiles([each.call.first_token for each in self.calls])

    def errors(self) -> dict[str, int]:
        """Return how many calls ended in an error of each type, the most frequent first."""
        counted = Counter(
            (each.call.error or "error").partition(":")[0]
            for each in self.calls
            if each.call.failed
        )
        return dict(counted.most_common())

    def concurrency(self) -> list[tuple[float, float]]:
        """Return how many calls were under way over time.

        Returns:
            At most 200 pairs: seconds since the first call, and the mean number from there on.
        """
        spans = [
            (each.call.started, each.call.ended)
            for each in self.calls
            if each.call.ended is not None
        ]
        if not spans:
            return []
        start, end = min(a for a, _ in spans), max(b for _, b in spans)
        width = max(1, -(-(end - start) // _MOMENTS))
        # Nanoseconds of calls in each moment: those of the first and the last by themselves, and
        # of those between by a difference, so that a long call costs no more than a short one.
        filled = [0] * (_MOMENTS + 2)
        steps = [0] * (_MOMENTS + 2)
        for began, over in spans:
            first, last = (began - start) // width, (over - start) // width
            if first == last:
                filled[first] += over - began
            else:
                filled[first] += (first + 1) * width - (began - start)
                filled[last] += (over - start) - last * width
                steps[first + 1] += width
                steps[last] -= width
        whole, found = 0, []
        for moment in range((end - start) // width + 1):
            whole += steps[moment]
            found.append((moment * width / 1e9, (filled[moment] + whole) / width))
        return found

    def slowest(self, count: int = _LISTED) -> list[Judged]:
        """Return the calls that took longest."""
        return sorted(self.calls, key=lambda each: -(each.call.seconds or 0.0))[:count]

    def dearest(self, count: int = _LISTED) -> list[Judged]:
        """Return the calls that cost most, by tokens where no price is known."""
        return sorted(self.calls, key=lambda each: (-(each.call.cost or 0), -each.call.tokens))[
            :count
        ]

    # What can be done with it.

    def filter(self, **annotations: Any) -> CallReport:
        """Return a report on the calls with these annotations; causes stay as they are.

        Args:
            **annotations: Keys and values as given to :func:`~mlflow_ctx_autolog.annotate`.
        """
        kept = [
            each
            for each in self.calls
            if all(each.call.annotations.get(key) == value for key, value in annotations.items())
        ]
        return replace(self, calls=kept)

    def to_dict(self) -> dict[str, Any]:
        """Return what the report says, without single calls other than the heaviest, for JSON."""
        return {
            "trace_ids": self.trace_ids,
            "calls": len(self.calls),
            "distinct": self.distinct,
            "multiplier": round(self.multiplier, 6),
            "made": self.made.to_dict(),
            "useful": self.useful.to_dict(),
            "repeated": self.repeated.to_dict(),
            "causes": {
                cause.key: {"name": cause.name, "fix": cause.fix, **sums.to_dict()}
                for cause, sums in self.by_cause().items()
            },
            "latency": self.latency(),
            "time_to_first_token": self.time_to_first_token(),
            "errors": self.errors(),
            "concurrency": self.concurrency(),
            "functions": {name: sums.to_dict() for name, sums in self.by_function().items()},
            "stages": {name: sums.to_dict() for name, sums in self.by_stage().items()},
            "partitions": {
                name: sums.to_dict() for name, sums in list(self.by_partition().items())[:_LISTED]
            },
            "slowest": [_row(each) for each in self.slowest()],
            "dearest": [_row(each) for each in self.dearest()],
            "notes": self.notes,
        }

    def to_json(self) -> str:
        """Return :meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, default=str)

    def to_pandas(self) -> Any:
        """Return a DataFrame with a row for each call."""
        import pandas

        return pandas.DataFrame([_row(each) for each in self.calls])

    def to_html(self, path: str | Path) -> Path:
        """Write the report as one HTML file that works offline, with mode 0600; return its path.

        Raises:
            ImportError: plotly is missing; the message says how to install it.
        """
        target = Path(path)
        text = self._page()
        with open(target, "w", encoding="utf-8", opener=_private) as file:
            file.write(text)
        return target

    def _page(self) -> str:
        from mlflow_ctx_autolog.reporting.html_page import page

        rows = [_row(each) for each in self.calls]
        tasks = [_task_row(attempt) for attempt in self.attempts]
        return page(self.to_dict(), rows, tasks, self.tracking_uri)

    def log(self, name: str = "call-report.html") -> None:
        """Log the report to the active MLflow run as an artifact: HTML, or JSON by its name.

        Raises:
            RuntimeError: No run is active.
        """
        store.log_text(self._page() if name.endswith(".html") else self.to_json(), name)

    def _repr_html_(self) -> str:
        return tables(self.to_dict())

    def __str__(self) -> str:
        return "\n".join(lines(self.to_dict()))


def report(
    traces: Any = None,
    *,
    run_id: str | None = None,
    experiment_id: str | None = None,
    tracking_uri: str | None = None,
    start: datetime | None = None,
    end: datetime | None = None,
    prices: Prices | None = None,
    request_key: RequestKey | None = None,
) -> CallReport:
    """Return what the calls of traces came to, which were repeats, and why.

    Name exactly one of ``traces``, ``run_id`` and ``experiment_id``. The traces are read from
    MLflow's tracking store; those of an experiment, or a run, at most 1000, the latest.

    Args:
        traces: A trace of MLflow, its id, or a list of them.
        run_id: A run, for all traces that were made under it.
        experiment_id: An experiment, for all its traces from ``start`` to ``end``.
        tracking_uri: Where the traces are kept; by default MLflow's configured store.
        start: The first moment; without a time zone, local time.
        end: The last moment.
        prices: US dollars for a million input and output tokens, by model; used where MLflow has
            recorded no cost.
        request_key: By which calls are the same request, instead of function, model, messages and
            parameters: the name of an annotation, several, or a function of a :class:`Call` that
            returns None for a call that is like no other.

    Raises:
        ValueError: Not one source is named, or a price or time is no such.
        StoreError: The store does not answer, or has no such trace.
    """
    if sum(source is not None for source in (traces, run_id, experiment_id)) != 1:
        raise ValueError("name exactly one of: traces, run_id, experiment_id")
    priced = checked_prices(prices or {})
    uri = tracking_uri or store.current_tracking_uri()
    if traces is None:
        ids = reading.find_traces(
            uri, run_id, experiment_id, _milliseconds(start), _milliseconds(end)
        )
    else:
        several = isinstance(traces, Iterable) and not isinstance(traces, str)
        ids = [_trace_id(trace) for trace in (traces if several else [traces])]
    reader = _Reader(priced)
    read: list[str] = []
    for trace_id in ids:
        trace = _read_job(uri, trace_id, reader.note)
        if trace.trace_id not in read:
            reader.read(trace)
            read.append(trace.trace_id)
    found = reader.finish(_key(request_key), read)
    found.tracking_uri = uri if uri.startswith(("http://", "https://")) else None
    return found


def _read_job(uri: str, trace_id: str, note: Callable[[str], None]) -> StoredTrace:
    """Return a trace, or that of its job, with the spans of the traces linked to its tasks."""
    trace = reading.read_stored_trace(uri, trace_id, is_wanted)
    job_trace_id = trace.metadata.get(TRACE_KEY, trace_id)
    if job_trace_id != trace.trace_id:
        trace = reading.read_stored_trace(uri, job_trace_id, is_wanted)

    def spans() -> Iterator[StoredSpan]:
        linked: list[str] = []
        for span in trace.spans:
            if (linked_id := span.text(LINKED_TRACE)) is not None:
                linked.append(linked_id)
            yield span
        for linked_id in linked:
            try:
                yield from reading.read_stored_trace(uri, linked_id, is_wanted).spans
            except StoreError as error:
                note(f"The linked trace {linked_id} of {trace.trace_id} cannot be read: {error}")

    return replace(trace, spans=spans())


class _Reader:
    """Gathers the calls of traces, and what limits what can be said of them."""

    def __init__(self, prices: Prices) -> None:
        self._prices = prices
        self._calls: list[Call] = []
        self._attempts: list[Attempt] = []
        self._skewed: dict[str, float] = {}
        self._notes: list[str] = []

    def note(self, limit: str) -> None:
        """Keep a sentence on what limits what can be said."""
        self._notes.append(limit)

    def read(self, trace: StoredTrace) -> None:
        """Take a trace."""
        root_started: list[int] = []
        spans = _watched(trace.spans, root_started)
        calls, attempts = read_calls(replace(trace, spans=spans))
        for call in calls:
            if call.cost is None:
                call.cost = self._price(call)
        self._calls += calls
        self._attempts += attempts
        self._note_on_trace(trace, calls, attempts)
        opened = min(root_started, default=None)
        for host, seconds in skewed_hosts(attempts, opened).items():
            self._skewed[host] = max(seconds, self._skewed.get(host, 0.0))

    def _price(self, call: Call) -> float | None:
        if not call.tokens:
            return 0.0 if call.failed else None
        price = self._prices.get(call.model or "")
        if price is None or not {"input_tokens", "output_tokens"} <= call.usage.keys():
            return None
        input_price, output_price = price
        used = call.usage["input_tokens"] * input_price + call.usage["output_tokens"] * output_price
        return used / 1e6

    def _note_on_trace(
        self, trace: StoredTrace, calls: Sequence[Call], attempts: Sequence[Attempt]
    ) -> None:
        name = trace.trace_id
        if trace.state == "IN_PROGRESS":
            self._notes.append(f"Trace {name} is still running: this is what it has stored so far.")
        if not calls:
            self._notes.append(
                f"Trace {name} has no model calls. Calls of workers are traced from "
                "mlflow_ctx_autolog.enable() on."
            )
        unfinished = [attempt for attempt in attempts if attempt.ended is None]
        if unfinished and trace.state != "IN_PROGRESS":
            self._notes.append(
                f"{len(unfinished)} task attempts of trace {name} were killed, or run still: "
                "calls that had not returned in them are not recorded."
            )
        counted = Counter(call.attempt.span_id for call in calls if call.attempt is not None)
        self._note_on_sampling(trace, attempts)
        missing = sum(
            max(0, (each.calls or 0) - counted[each.span_id])
            for each in attempts
            if not each.sampled_out
        )
        if missing:
            self._notes.append(
                f"The store lacks {missing} calls that tasks of trace {name} have counted."
            )
        orphans = sum(call.is_orphan for call in calls)
        if orphans:
            self._notes.append(
                f"{orphans} calls of trace {name} are below spans that the store does not have: "
                "their tasks are not known."
            )

    def _note_on_sampling(self, trace: StoredTrace, attempts: Sequence[Attempt]) -> None:
        sampled = [each for each in attempts if each.sampled_out]
        if sampled:
            spans = sum(each.sampled_out for each in sampled)
            calls = sum(each.calls or 0 for each in attempts)
            money = sum(each.cost for each in attempts)
            priced = f", ${money:,.4f}" if money else ""
            self._notes.append(
                f"Sampling has left {spans:,} spans of trace {trace.trace_id} out of the store, so "
                f"that repeats of their calls are not seen. In all, its tasks have counted "
                f"{calls:,} calls, {sum(each.tokens for each in attempts):,} tokens{priced}."
            )

    def finish(self, key: Callable[[Call], Hashable] | None, ids: Sequence[str]) -> CallReport:
        """Return the report on all traces taken."""
        self._calls.sort(key=lambda call: call.started)
        judged = judge(self._calls, attempts=self._attempts, key=key, skewed=self._skewed)
        for host, seconds in self._skewed.items():
            self._notes.append(
                f"The clock of {host} is at least {seconds:.3f} s behind the driver's: times of "
                "different hosts are not compared."
            )
        if key is None and (nameless := sum(call.request is None for call in self._calls)):
            self._notes.append(
                f"{nameless} calls say nothing to recognise their requests by, and count as "
                "distinct."
            )
        unpriced = Counter(
            call.model or "(no model)"
            for call in self._calls
            if call.cost is None and call.tokens > 0
        )
        if unpriced:
            models = ", ".join(sorted(unpriced))
            self._notes.append(
                f"No price is known of {sum(unpriced.values())} calls to {models}; "
                "prices={model: (input, output)} gives them, in US dollars for a million tokens."
            )
        if not ids:
            self._notes.append("There are no traces in this run, or experiment and time.")
        return CallReport(judged, self._attempts, list(ids), self._notes)


def _watched(spans: Iterable[Any], root_started: list[int]) -> Iterable[Any]:
    for span in spans:
        if span.parent_id is None:
            root_started.append(span.started)
        yield span


def _trace_id(trace: Any) -> str:
    if isinstance(trace, str):
        return trace
    info = getattr(trace, "info", trace)
    found = getattr(info, "trace_id", None)
    if not isinstance(found, str):
        raise ValueError(f"{shown(trace)} is neither a trace nor the id of one")
    return found


def shown(value: object) -> str:
    """Return how a value is named in a message."""
    return f"{repr(value)[:100]} ({type(value).__name__})"


def _milliseconds(moment: datetime | None) -> int | None:
    if moment is None:
        return None
    if not isinstance(moment, datetime):
        raise ValueError(f"{shown(moment)} is not a datetime")
    return int(moment.timestamp() * 1000)


def _key(request_key: RequestKey | None) -> Callable[[Call], Hashable] | None:
    if request_key is None or callable(request_key):
        return request_key
    names = [request_key] if isinstance(request_key, str) else list(request_key)

    def key(call: Call) -> Hashable:
        values = tuple(call.annotations.get(name) for name in names)
        return None if None in values else (call.function, *values)

    return key


def _percentiles(values: Iterable[float | None]) -> dict[str, float]:
    known = sorted(value for value in values if value is not None)
    if not known:
        return {}
    # The smallest value that so many percent of all do not exceed.
    return {
        f"p{percent}": known[max(0, math.ceil(len(known) * percent / 100) - 1)]
        for percent in (50, 95, 99)
    }


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)


def _task_row(attempt: Attempt) -> dict[str, Any]:
    return {
        "trace_id": attempt.trace_id,
        "span_id": attempt.span_id,
        "function": attempt.function,
        "stage": attempt.stage,
        "partition": attempt.partition,
        "attempt": attempt.number,
        "host": attempt.host,
        "process": attempt.process,
        "outcome": attempt.outcome,
        "started": attempt.started,
        "ended": attempt.last_seen,
    }


def _row(each: Judged) -> dict[str, Any]:
    call, attempt = each.call, each.call.attempt
    return {
        "trace_id": call.trace_id,
        "span_id": call.span_id,
        "function": call.function,
        "interface": call.interface,
        "model": call.model,
        "stage": None if attempt is None else attempt.stage,
        "partition": None if attempt is None else attempt.partition,
        "attempt": None if attempt is None else attempt.number,
        "task": None if attempt is None else attempt.span_id,
        "experiment_id": call.experiment_id,
        "started": call.started,
        "seconds": call.seconds,
        "first_token": call.first_token,
        "input_tokens": call.usage.get("input_tokens"),
        "output_tokens": call.usage.get("output_tokens"),
        "cost": call.cost,
        "resends": call.resends,
        "error": call.error if call.failed else None,
        "cause": None if each.cause is None else each.cause.key,
        "repeats": None if each.repeats is None else each.repeats.span_id,
        "prompt": call.prompt,
        **{f"annotation.{key}": value for key, value in call.annotations.items()},
    }
