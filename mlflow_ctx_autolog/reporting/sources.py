"""What a comparison is given, read: traces, runs, experiments with their times, or reports."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from mlflow_ctx_autolog.exceptions import shortened
from mlflow_ctx_autolog.reporting.call_report import CallReport
from mlflow_ctx_autolog.reporting.jobs import await_own_jobs, last_jobs
from mlflow_ctx_autolog.reporting.reading import Prices, report
from mlflow_ctx_autolog.stores import tracking_store as store
from mlflow_ctx_autolog.stores.job_search import experiment_id_of

__all__ = ["last_two_reports", "read_source"]

_RUN = re.compile("[0-9a-f]{32}")
_RANGE = re.compile("(?P<experiment>.+)@(?P<start>[^@]*?)[.][.](?P<end>[^@]*)")


def last_two_reports(uri: str | None, prices: Prices | None) -> tuple[CallReport, CallReport]:
    """Return reports on the last two jobs of the same name, the earlier first.

    Raises:
        StoreError: There are no two.
    """
    await_own_jobs()
    latest, earlier = last_jobs(uri or store.current_tracking_uri(), 2)
    return (
        report(earlier, tracking_uri=uri, prices=prices),
        report(latest, tracking_uri=uri, prices=prices),
    )


def read_source(source: Any, uri: str | None, prices: Prices | None) -> CallReport:
    """Return the report on what somebody has named, whatever kind of name it is.

    Args:
        source: A report; a mapping of keywords of :func:`~mlflow_ctx_autolog.report`; a trace, its
            id or a list of them; the id of a run; an experiment, by name or id, and its times, as
            ``NAME@2026-11-01..2026-11-08``, of which either may be left out.
        uri: Where the traces are kept; None for MLflow's configured store.
        prices: US dollars for a million input and output tokens, by model.

    Raises:
        ValueError: It is nothing of that.
        StoreError: The store does not answer, or has no such trace.
    """
    if isinstance(source, CallReport):
        return source
    if isinstance(source, Mapping):
        given = {"tracking_uri": uri, "prices": prices, **source}
        try:
            return report(**given)
        except TypeError as error:
            raise ValueError(
                f"{shortened(repr(source))} is not what report() takes: {error}"
            ) from None
    if isinstance(source, str):
        if _RUN.fullmatch(source):
            return report(run_id=source, tracking_uri=uri, prices=prices)
        if (found := _RANGE.fullmatch(source)) is not None:
            start, end = (_moment(source, found[name]) for name in ("start", "end"))
            experiment_id = experiment_id_of(
                uri or store.current_tracking_uri(), found["experiment"]
            )
            return report(
                experiment_id=experiment_id,
                tracking_uri=uri,
                start=start,
                end=end,
                prices=prices,
            )
        if not source.startswith(("tr-", "trace:")):
            raise ValueError(
                f"{shortened(repr(source))} is no trace (tr-...), no run (32 hexadecimal digits) "
                "and no experiment with times (NAME@2026-11-01..2026-11-08)"
            )
    return report(source, tracking_uri=uri, prices=prices)


def _moment(source: str, text: str) -> datetime | None:
    if not text:
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"{shortened(repr(source))} holds {text!r}, which is no time such as 2026-11-01 or "
            "2026-11-01T08:00"
        ) from None
