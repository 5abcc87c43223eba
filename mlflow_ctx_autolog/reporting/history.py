"""The jobs of an experiment over time, from the sums that drivers have written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from mlflow_ctx_autolog.reporting.files import write_private
from mlflow_ctx_autolog.reporting.history_text import history_lines, history_table
from mlflow_ctx_autolog.spans.amounts import parse_amounts
from mlflow_ctx_autolog.spans.call_sums import CALL_SUMS, CallSums
from mlflow_ctx_autolog.stores import tracking_store as store
from mlflow_ctx_autolog.stores.job_search import (
    FoundJob,
    current_experiment_id,
    experiment_id_of,
    find_jobs,
    log_metrics,
)
from mlflow_ctx_autolog.stores.stored_trace import joined_metadata

__all__ = ["History", "JobSums", "history"]

_USAGE, _COST = "mlflow.trace.tokenUsage", "mlflow.trace.cost"
_METRICS = "ctx_autolog."


@dataclass(frozen=True)
class JobSums:
    """What one job came to, as its driver has written it.

    Args:
        trace_id: Of its trace.
        name: Of its trace.
        state: ``OK``, ``ERROR`` or ``IN_PROGRESS``.
        started: When it began, in UTC.
        seconds: How long it took; None while it runs.
        calls: Model calls, as its tasks have counted them.
        errors: Of these, ended in an error; None where not known.
        rows: Rows that its functions have taken, those evaluated again included; None where not
            known.
        input_tokens: As the endpoint counted them.
        output_tokens: The same.
        cost: US dollars; None where no price is known.
        unknown: Calls that were answered, and whose tokens are not all known.
        p50: Seconds that half of the calls did not exceed, to 2.2 %; None where not known.
        p95: The same for 95 of 100.
        p99: The same for 99 of 100.
        first_token_p50: The same for the first piece of streams.
        answered: Calls whose answer says something about its quality.
        odd: Of these, with one signal at least.
        signals: How many answers have each signal.
    """

    trace_id: str
    name: str
    state: str
    started: datetime
    seconds: float | None
    calls: int
    errors: int | None
    rows: int | None
    input_tokens: int
    output_tokens: int
    cost: float | None
    unknown: int
    p50: float | None
    p95: float | None
    p99: float | None
    first_token_p50: float | None
    answered: int
    odd: int
    signals: Mapping[str, int] = field(default_factory=dict)

    @property
    def tokens_per_row(self) -> float | None:
        """Tokens in and out for each row; None where rows are not known."""
        return (self.input_tokens + self.output_tokens) / self.rows if self.rows else None

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        found = {**asdict(self), "started": self.started.isoformat()}
        return {**found, "tokens_per_row": self.tokens_per_row}

    def metrics(self) -> dict[str, float]:
        """Return its numbers by the names that they have as metrics of a run."""
        numbers = {
            **{name: value for name, value in self.to_dict().items() if name not in _NO_METRICS},
            **{
                f"signals.{signal}": number / self.answered
                for signal, number in self.signals.items()
                if self.answered
            },
        }
        return {
            _METRICS + name: float(value) for name, value in numbers.items() if value is not None
        }


_NO_METRICS = ("trace_id", "name", "state", "started", "signals")


@dataclass(frozen=True, repr=False)
class History:
    """What :func:`history` returns: jobs, the earliest first.

    Args:
        experiment_id: The experiment that was looked into.
        jobs: Its jobs.
        notes: What limits what can be said, one sentence each.
    """

    experiment_id: str
    jobs: Sequence[JobSums]
    notes: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "experiment_id": self.experiment_id,
            "jobs": [job.to_dict() for job in self.jobs],
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """Return :meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_pandas(self) -> Any:
        """Return a DataFrame with a row for each job."""
        import pandas

        return pandas.DataFrame([job.to_dict() for job in self.jobs])

    def to_html(self, path: str | Path) -> Path:
        """Write a page with the charts and the table that works offline; return its path.

        Raises:
            ImportError: plotly is missing; the message says how to install it.
        """
        from mlflow_ctx_autolog.reporting.history_page import history_page

        return write_private(path, history_page(self.to_dict()))

    def _repr_html_(self) -> str:
        return history_table(self.to_dict())

    def __str__(self) -> str:
        return "\n".join(history_lines(self.to_dict()))

    def __repr__(self) -> str:
        return f"<History of experiment {self.experiment_id}: {len(self.jobs):,} jobs>"


def history(
    experiment: str | None = None,
    *,
    days: float = 30,
    name: str | None = None,
    tracking_uri: str | None = None,
    log_metrics: bool = False,
) -> History:
    """Return what the jobs of an experiment came to over time. Reads no spans.

    Args:
        experiment: Its name or id; by default MLflow's current experiment.
        days: How far back to look. More than 0.
        name: Only jobs of this name, which is that of their root span.
        tracking_uri: Where the traces are kept; by default MLflow's configured store.
        log_metrics: Log the numbers of the latest job as metrics of the active run, as
            ``ctx_autolog.cost``, so that MLflow's comparison of runs shows them.

    Raises:
        ValueError: ``days`` is not more than 0.
        StoreError: The store does not answer, or has no such experiment.
        RuntimeError: Metrics are to be logged, and no run is active, or there is no job.
    """
    if isinstance(days, bool) or not isinstance(days, (int, float)) or not 0 < days <= 36_500:
        raise ValueError(f"days={days!r} is out of range; it must be more than 0, at most 36500")
    uri = tracking_uri or store.current_tracking_uri()
    experiment_id = (
        current_experiment_id() if experiment is None else experiment_id_of(uri, experiment)
    )
    since = datetime.now(timezone.utc) - timedelta(days=days)
    found = list(find_jobs(uri, experiment_id, int(since.timestamp() * 1000)))
    jobs = [_job(each) for each in reversed(found) if name in (None, each.name)]
    result = History(experiment_id, jobs, list(_notes(found, jobs, days)))
    if log_metrics:
        _log(jobs)
    return result


def _log(jobs: Sequence[JobSums]) -> None:
    if not jobs:
        raise RuntimeError("There is no job whose numbers could be logged.")
    log_metrics(jobs[-1].metrics())


def _job(found: FoundJob) -> JobSums:
    written = _written(found)
    sums = CallSums.from_dict(written)
    rows = written.get("rows")
    usage = parse_amounts(found.metadata.get(_USAGE))
    cost = parse_amounts(found.metadata.get(_COST)).get("total_cost")
    is_known = sums.latency.count > 0 or not sums.calls
    return JobSums(
        found.trace_id,
        found.name,
        found.state,
        datetime.fromtimestamp(found.started / 1000, tz=timezone.utc),
        None if found.milliseconds is None else found.milliseconds / 1000,
        sums.calls,
        sums.errors if is_known else None,
        rows if isinstance(rows, int) and rows > 0 else None,
        int(usage.get("input_tokens", 0)),
        int(usage.get("output_tokens", 0)),
        cost,
        sums.unknown,
        sums.latency.percentile(50),
        sums.latency.percentile(95),
        sums.latency.percentile(99),
        sums.first_token.percentile(50),
        sums.answered,
        sums.odd,
        dict(sums.signals.most_common()),
    )


def _written(found: FoundJob) -> dict[str, Any]:
    try:
        written = json.loads(joined_metadata(found.metadata, CALL_SUMS) or "{}")
    except ValueError:
        return {}
    return written if isinstance(written, dict) else {}


def _notes(found: Sequence[FoundJob], jobs: Sequence[JobSums], days: float) -> Iterator[str]:
    if not jobs:
        yield f"There are no jobs in the last {days:g} days."
    older = sum(CALL_SUMS not in each.metadata for each in found)
    if older:
        yield (
            f"{older:,} jobs have no sums: they run still, were stored by an earlier release, or "
            "their driver was gone before their end."
        )
    partly = sum("tasks_without_sums" in _written(each) for each in found)
    if partly:
        yield (
            f"Of {partly:,} jobs, not all calls of tasks that brought no receipt home are in the "
            "trace: times, errors and signals are those of the others, or left out."
        )
    if unknown := sum(job.unknown for job in jobs):
        yield (
            f"{unknown:,} calls were answered without usage, or with a part of it: tokens and "
            "cost are at least."
        )
