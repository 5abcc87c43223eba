"""What the calls of traces came to, which of them were repeats, how good they were, and why."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlflow_ctx_autolog.reporting.calls import Attempt, Call
from mlflow_ctx_autolog.reporting.causes import CAUSES, CLIENT_RETRY, Cause, Judged
from mlflow_ctx_autolog.reporting.contents import read_contents
from mlflow_ctx_autolog.reporting.files import write_private
from mlflow_ctx_autolog.reporting.jobs import Job
from mlflow_ctx_autolog.reporting.rows import call_row, for_evaluation, task_row
from mlflow_ctx_autolog.reporting.signals import Quality
from mlflow_ctx_autolog.reporting.sums import Sums, percentiles
from mlflow_ctx_autolog.reporting.text import lines, tables
from mlflow_ctx_autolog.stores import tracking_store as store

__all__ = ["CallReport"]

_LISTED = 10
_MOMENTS = 200
_ROWS = 10_000


@dataclass(repr=False)
class CallReport:
    """What :func:`~mlflow_ctx_autolog.report` returns.

    Three words for three numbers: *calls* are what functions have made, *requests* what was sent to
    the endpoint for them, by the client's own retries as well, and *repeats* those requests that
    were made before.

    Args:
        calls: The calls with the cause of each repetition, by their time.
        attempts: The task attempts.
        trace_ids: The traces that were read.
        notes: What limits what can be said, one sentence each.
        tracking_uri: Where the traces are kept, if that is an address of MLflow's UI.
        jobs: What is known of the traces themselves.
        source: Where the traces are kept, whatever that is, to read content from; None where
            it cannot be read.
    """

    calls: list[Judged]
    attempts: list[Attempt]
    trace_ids: list[str]
    notes: list[str] = field(default_factory=list)
    tracking_uri: str | None = None
    jobs: list[Job] = field(default_factory=list)
    source: str | None = None

    # What it comes to.

    @property
    def made(self) -> Sums:
        """All calls."""
        return Sums.of(each.call for each in self.calls)

    @property
    def useful(self) -> Sums:
        """The first call of each request that succeeded, or the first if none did.

        Each as one request: what the client has sent again by itself is among :attr:`repeated`.
        """
        calls = [each.call for each in self.calls if each.kept]
        sums = Sums.of(call for call in calls if call.reused_from is None)
        sums.resends = 0
        return sums

    @property
    def repeated(self) -> Sums:
        """What was paid for again: the other calls, and all that the client has sent again."""
        sums = Sums.of(each.call for each in self.calls if not each.kept)
        sums.resends = sum(each.call.resends for each in self.calls)
        return sums

    @property
    def distinct(self) -> int:
        """How many different requests were made."""
        return sum(each.cause is None and each.call.reused_from is None for each in self.calls)

    @property
    def requests(self) -> int:
        """How many requests were sent to the endpoint."""
        return self.made.requests

    @property
    def repeats(self) -> int:
        """How many of these were made before, by a function or by the client itself."""
        return self.repeated.requests

    @property
    def multiplier(self) -> float:
        """Requests sent for each distinct one; 1 where nothing was repeated."""
        return self.requests / self.distinct if self.distinct else 1.0

    @property
    def quality(self) -> Quality:
        """What the answers show, without a judge."""
        return Quality.of(each.call for each in self.calls)

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
        if resends := sum(each.call.resends for each in self.calls):
            sums.setdefault(CLIENT_RETRY, Sums()).resends = resends
        return dict(sorted(sums.items(), key=lambda item: -item[1].requests))

    def by_function(self) -> dict[str, Sums]:
        """Return sums for each function handed to Spark."""
        return self._grouped(lambda call: call.function)

    def by_model(self) -> dict[str, Sums]:
        """Return sums for each model asked for."""
        return self._grouped(lambda call: call.model or "(no model)")

    def quality_by(self, part: str) -> dict[str, Quality]:
        """Return what the answers show for each ``"function"`` or ``"model"``."""
        if part not in ("function", "model"):
            raise ValueError(f"part={part!r} is neither 'function' nor 'model'")
        found: defaultdict[str, list[Call]] = defaultdict(list)
        for each in self.calls:
            call = each.call
            found[call.function if part == "function" else call.model or "(no model)"].append(call)
        return {name: Quality.of(calls) for name, calls in found.items()}

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
        """Return p50, p95 and p99 of the seconds that requests took; empty if none has ended."""
        return percentiles(
            each.call.seconds for each in self.calls if each.call.reused_from is None
        )

    def time_to_first_token(self) -> dict[str, float]:
        """Return the same for the first piece of streams; empty where there are none."""
        return percentiles([each.call.first_token for each in self.calls])

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
        # Each goes through all calls.
        made, repeated, distinct = self.made, self.repeated, self.distinct
        return {
            "trace_ids": self.trace_ids,
            "jobs": [{**vars(job), "seconds": job.seconds} for job in self.jobs],
            "calls": made.calls,
            "requests": made.requests,
            "repeats": repeated.requests,
            "distinct": distinct,
            "multiplier": round(made.requests / distinct if distinct else 1.0, 6),
            "made": made.to_dict(),
            "useful": self.useful.to_dict(),
            "repeated": repeated.to_dict(),
            "causes": {
                cause.key: {"name": cause.name, "fix": cause.fix, **sums.to_dict()}
                for cause, sums in self.by_cause().items()
            },
            "quality": self.quality.to_dict(),
            "latency": self.latency(),
            "time_to_first_token": self.time_to_first_token(),
            "errors": self.errors(),
            "concurrency": self.concurrency(),
            "functions": self._parts(self.by_function(), "function"),
            "models": self._parts(self.by_model(), "model"),
            "stages": {name: sums.to_dict() for name, sums in self.by_stage().items()},
            "partitions": {
                name: sums.to_dict() for name, sums in list(self.by_partition().items())[:_LISTED]
            },
            "slowest": [call_row(each) for each in self.slowest()],
            "dearest": [call_row(each) for each in self.dearest()],
            "notes": self.notes,
        }

    def _parts(self, sums: dict[str, Sums], part: str) -> dict[str, Any]:
        quality = self.quality_by(part)
        repeats: Counter[str] = Counter()
        for each in self.calls:
            call = each.call
            name = call.function if part == "function" else call.model or "(no model)"
            repeats[name] += call.resends + (each.cause is not None)
        return {
            name: {
                **of_part.to_dict(),
                "repeats": repeats[name],
                "quality": quality[name].to_dict(),
            }
            for name, of_part in sums.items()
        }

    def to_json(self) -> str:
        """Return :meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, default=str)

    def to_pandas(self, *, content: bool = False) -> Any:
        """Return a DataFrame with a row for each call.

        Args:
            content: With what was asked and answered, read anew from the store, in the columns that
                :func:`mlflow.genai.evaluate` takes: ``inputs``, ``outputs``, ``tags``. All is in
                memory at once; :meth:`frames` yields it in pieces.

        Raises:
            StoreError: The store does not answer.
        """
        import pandas

        if not content:
            return pandas.DataFrame([call_row(each) for each in self.calls])
        frames = list(self.frames(rows=max(1, len(self.calls))))
        return frames[0] if frames else pandas.DataFrame()

    def frames(self, *, rows: int = _ROWS) -> Iterator[Any]:
        """Yield DataFrames of ``rows`` calls at most, with what was asked and answered.

        As :meth:`to_pandas` with ``content``, in the order in which the store has the calls; one
        trace of the store and one frame at a time are in memory. Calls whose content was not kept
        are left out.

        Raises:
            ValueError: ``rows`` is less than 1, or the report was not read from a store.
            StoreError: The store does not answer.
        """
        import pandas

        if rows < 1:
            raise ValueError(f"rows={rows!r} is out of range; it must be at least 1")
        if self.source is None:
            raise ValueError("this report was not read from a store, so that it has no content")
        by_id = {(each.call.trace_id, each.call.span_id): each for each in self.calls}
        kept: list[dict[str, Any]] = []
        for trace_id, span_id, request, answer in read_contents(self.source, self.trace_ids):
            each = by_id.get((trace_id, span_id))
            if each is None:
                continue
            kept.append(for_evaluation(each, request, answer))
            if len(kept) == rows:
                yield pandas.DataFrame(kept)
                kept = []
        if kept:
            yield pandas.DataFrame(kept)

    def to_html(self, path: str | Path, *, comparison: Any = None) -> Path:
        """Write the report as one HTML file that works offline, with mode 0600; return its path.

        Args:
            path: Where to.
            comparison: With a job before, as :func:`~mlflow_ctx_autolog.compare` returned it, to
                say on the page what changed.

        Raises:
            ImportError: plotly is missing; the message says how to install it.
        """
        return write_private(path, self._page(comparison))

    def _page(self, comparison: Any = None) -> str:
        from mlflow_ctx_autolog.reporting.html_page import page

        rows = [call_row(each) for each in self.calls]
        tasks = [task_row(attempt) for attempt in self.attempts]
        changes = None if comparison is None else comparison.to_dict()
        return page(self.to_dict(), rows, tasks, self.tracking_uri, changes)

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

    def __repr__(self) -> str:
        traces = ", ".join(self.trace_ids[:2]) + (", ..." if len(self.trace_ids) > 2 else "")
        made = self.made
        return (
            f"<CallReport of {traces or 'no trace'}: {made.calls:,} calls, {made.requests:,} "
            f"requests, {self.repeats:,} repeats, {made.money}>"
        )
