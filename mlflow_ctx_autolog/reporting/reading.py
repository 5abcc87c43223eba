"""Reading the calls of traces, and what limits what can be said of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from mlflow_ctx_autolog.config import checked_prices
from mlflow_ctx_autolog.delivery.receipts import Receipt
from mlflow_ctx_autolog.driver.totals import correct_totals
from mlflow_ctx_autolog.exceptions import shortened
from mlflow_ctx_autolog.log_ins import without_credentials
from mlflow_ctx_autolog.prices import cost_of
from mlflow_ctx_autolog.reporting.call_report import CallReport
from mlflow_ctx_autolog.reporting.calls import Attempt, Call, is_wanted, read_calls
from mlflow_ctx_autolog.reporting.causes import judge, skewed_hosts
from mlflow_ctx_autolog.reporting.jobs import Job, await_own_jobs, last_jobs, read_job
from mlflow_ctx_autolog.reporting.signals import add_signals_of_all
from mlflow_ctx_autolog.reporting.sums import dollars
from mlflow_ctx_autolog.stores import tracking_store as store
from mlflow_ctx_autolog.stores.reading import find_traces
from mlflow_ctx_autolog.stores.stored_trace import LINKED_SPAN, RECEIPT, StoredSpan, StoredTrace

__all__ = ["Prices", "RequestKey", "milliseconds", "report"]

# US dollars for a million tokens: input, output.
Prices = Mapping[str, tuple[float, float]]
RequestKey = str | Sequence[str] | Callable[[Call], Hashable]


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
    """Return what the calls of traces came to, how good they were, which were repeats, and why.

    Name one of ``traces``, ``run_id`` and ``experiment_id``; without any, it is the last job of
    MLflow's current experiment. The traces are read from MLflow's tracking store; those of an
    experiment, or a run, at most 1000, the latest.

    Args:
        traces: A trace of MLflow, its id, or a list of them.
        run_id: A run, for all traces that were made under it.
        experiment_id: An experiment, for all its traces from ``start`` to ``end``.
        tracking_uri: Where the traces are kept; by default MLflow's configured store.
        start: The first moment; without a time zone, local time.
        end: The last moment.
        prices: US dollars for a million input and output tokens, by model; they go before what
            MLflow has recorded.
        request_key: By which calls are the same request, instead of function, model, messages and
            parameters: the name of an annotation, several, or a function of a :class:`Call` that
            returns None for a call that is like no other.

    Raises:
        ValueError: More than one source is named, or a price or time is no such.
        StoreError: The store does not answer, or has no such trace.
    """
    sources = {"traces": traces, "run_id": run_id, "experiment_id": experiment_id}
    named = [name for name, source in sources.items() if source is not None]
    if len(named) > 1:
        raise ValueError(
            f"{' and '.join(named)} are named: take one of traces, run_id and experiment_id, or "
            "none for the last job"
        )
    if experiment_id is None and (start is not None or end is not None):
        raise ValueError("start and end go with experiment_id, which is not named")
    priced = checked_prices(prices or {})
    uri = tracking_uri or store.current_tracking_uri()
    await_own_jobs()
    if not named:
        ids = last_jobs(uri, 1)
    elif traces is None:
        ids = find_traces(uri, run_id, experiment_id, milliseconds(start), milliseconds(end))
    else:
        several = isinstance(traces, Iterable) and not isinstance(traces, str)
        ids = [_trace_id(trace) for trace in (traces if several else [traces])]
    reader = _Reader(priced)
    read: list[str] = []
    for trace_id in ids:
        trace = read_job(uri, trace_id, is_wanted, reader.note)
        if trace.trace_id not in read:
            correct_totals(uri, trace, reader.read(trace))
            read.append(trace.trace_id)
    return reader.finish(_key(request_key), read, uri)


class _Reader:
    """Gathers the calls of traces, and what limits what can be said of them."""

    def __init__(self, prices: Prices) -> None:
        self._prices = prices
        self._calls: list[Call] = []
        self._attempts: list[Attempt] = []
        self._jobs: list[Job] = []
        self._skewed: dict[str, float] = {}
        self._notes: list[str] = []

    def note(self, limit: str) -> None:
        """Keep a sentence on what limits what can be said."""
        self._notes.append(limit)

    def read(self, trace: StoredTrace) -> float:
        """Take a trace; return how many tokens its calls have used, as far as is known."""
        roots: list[StoredSpan] = []
        calls, attempts = read_calls(replace(trace, spans=_watched(trace.spans, roots)))
        for call in calls:
            call.cost = self._cost(call)
        self._calls += calls
        self._attempts += attempts
        root = min(roots, key=lambda span: span.started, default=None)
        self._jobs.append(_job(trace, root))
        self._note_on_trace(trace, calls, attempts)
        opened = None if root is None else root.started
        for host, seconds in skewed_hosts(attempts, opened).items():
            self._skewed[host] = max(seconds, self._skewed.get(host, 0.0))
        return sum(call.usage.get("total_tokens", 0) for call in calls)

    def _cost(self, call: Call) -> float | None:
        """Return what a call has cost; None where nobody knows."""
        if call.reused_from is not None:
            return 0.0
        price = self._prices.get(call.model or "")
        if price is not None and (costs := cost_of(price, call.usage)):
            # The user knows better: of an alias behind a gateway, or a price of his own.
            return costs["total_cost"]
        if call.cost is None and not call.usage and call.failed and not call.usage_unknown:
            return 0.0
        return call.cost

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
        receipt = Receipt.from_summary(name, trace.metadata.get(RECEIPT))
        if receipt is not None and not receipt.complete:
            self._notes.append(f"When its driver last asked the store, trace {name} had {receipt}.")
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
            priced = f", {dollars(money)}" if money else ""
            self._notes.append(
                f"Sampling has left {spans:,} spans of trace {trace.trace_id} out of the store, so "
                f"that repeats of their calls are not seen. In all, its tasks have counted "
                f"{calls:,} calls, {sum(each.tokens for each in attempts):,} tokens{priced}."
            )

    def finish(
        self, key: Callable[[Call], Hashable] | None, ids: Sequence[str], uri: str
    ) -> CallReport:
        """Return the report on all traces taken."""
        self._calls.sort(key=lambda call: call.started)
        add_signals_of_all(self._calls)
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
        self._note_on_costs()
        if not ids:
            self._notes.append("There are no traces in this run, or experiment and time.")
        # Of a page that is sent around.
        shown = without_credentials(uri) or ""
        address = shown if shown.startswith(("http://", "https://")) else None
        return CallReport(
            judged, self._attempts, list(ids), self._notes, address, self._jobs, source=uri
        )

    def _note_on_costs(self) -> None:
        unmetered = Counter(
            call.model or "(no model)" for call in self._calls if call.usage_unknown
        )
        if unmetered:
            models = ", ".join(sorted(unmetered))
            self._notes.append(
                f"{sum(unmetered.values())} calls to {models} were answered without usage, or with "
                'a part of it, so that tokens and cost are "at least": of streams, ask for it with '
                'stream_options={"include_usage": True}.'
            )
        unpriced = Counter(
            call.model or "(no model)"
            for call in self._calls
            if call.cost is None and not call.usage_unknown
        )
        if unpriced:
            models = ", ".join(sorted(unpriced))
            self._notes.append(
                f"No price is known of {sum(unpriced.values())} calls to {models}; "
                "prices={model: (input, output)} gives them, in US dollars for a million tokens."
            )


def _watched(spans: Iterable[StoredSpan], roots: list[StoredSpan]) -> Iterable[StoredSpan]:
    for span in spans:
        if span.parent_id is None and LINKED_SPAN not in span.attributes:
            roots.append(span)
        yield span


def _job(trace: StoredTrace, root: StoredSpan | None) -> Job:
    if root is None:
        return Job(trace.trace_id, trace.experiment_id, trace.trace_id)
    ended = None if trace.state == "IN_PROGRESS" else root.ended
    return Job(trace.trace_id, trace.experiment_id, root.name, root.started, ended)


def _trace_id(trace: Any) -> str:
    if isinstance(trace, str):
        return trace
    info = getattr(trace, "info", trace)
    found = getattr(info, "trace_id", None)
    if not isinstance(found, str):
        raise ValueError(f"{_shown(trace)} is neither a trace nor the id of one")
    return found


def _shown(value: object) -> str:
    return f"{shortened(repr(value))} ({type(value).__name__})"


def milliseconds(moment: datetime | None) -> int | None:
    """Return a moment in milliseconds since the epoch.

    Raises:
        ValueError: It is no datetime.
    """
    if moment is None:
        return None
    if not isinstance(moment, datetime):
        raise ValueError(f"{_shown(moment)} is not a datetime")
    return int(moment.timestamp() * 1000)


def _key(request_key: RequestKey | None) -> Callable[[Call], Hashable] | None:
    if request_key is None or callable(request_key):
        return request_key
    names = [request_key] if isinstance(request_key, str) else list(request_key)

    def key(call: Call) -> Hashable:
        values = tuple(call.annotations.get(name) for name in names)
        return None if None in values else (call.function, *values)

    return key
