"""The commands ``compare`` and ``history``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

__all__ = ["compare", "history", "read_prices"]

_tracking_uri = click.option(
    "--tracking-uri", help="Where the traces are kept; by default MLflow's configured store."
)
_html = click.option(
    "--html", type=click.Path(path_type=Path), help="Write it to this file, too, to look at."
)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


@click.command()
@click.argument("before", required=False)
@click.argument("after", required=False)
@click.option(
    "--fail-if",
    "conditions",
    multiple=True,
    metavar="CONDITION",
    help="Exit with 1 if so, such as cost>10%, p95>50% (growth) or invalid_json>1%, errors>2% "
    "(shares of the calls after); METRIC@FUNCTION>NUMBER% for one function or model.",
)
@click.option("--strict", is_flag=True, help="Fail also where chance may explain it.")
@click.option(
    "--prices", metavar="JSON", help="US dollars for a million input and output tokens, by model."
)
@_tracking_uri
@_html
@_as_json
def compare(
    before: str | None,
    after: str | None,
    conditions: tuple[str, ...],
    strict: bool,
    prices: str | None,
    tracking_uri: str | None,
    html: Path | None,
    as_json: bool,
) -> int:
    r"""Show what changed from one job to another, by more than chance.

    BEFORE and AFTER are ids of traces or runs, or an experiment and its times; without them, the
    last two jobs of the same name in the current experiment are compared.

    \b
    Examples:
      mlflow-ctx-autolog compare
      mlflow-ctx-autolog compare tr-0a1b... tr-2c3d... --html changes.html
      mlflow-ctx-autolog compare nightly@2026-11-01..2026-11-08 nightly@2026-11-08..
      mlflow-ctx-autolog compare --fail-if 'cost>10%' --fail-if 'invalid_json>1%'

    Exit status: 2 where something cannot be read or judged; 1 where a condition is met.
    """
    return _attempt(
        lambda: _compare(
            before, after, conditions, strict, read_prices(prices), tracking_uri, html, as_json
        )
    )


def _compare(
    before: str | None,
    after: str | None,
    conditions: tuple[str, ...],
    strict: bool,
    prices: Any,
    tracking_uri: str | None,
    html: Path | None,
    as_json: bool,
) -> int:
    from mlflow_ctx_autolog.reporting.comparison import compare as make_comparison
    from mlflow_ctx_autolog.reporting.gate import failures, parse_condition

    # Before anything is read, which may take a minute.
    asked = [parse_condition(each) for each in conditions]
    found = make_comparison(before, after, tracking_uri=tracking_uri, prices=prices)
    if html is not None:
        found.to_html(html)
    reasons = failures(found, asked, strict=strict)
    if as_json:
        click.echo(json.dumps({**found.to_dict(), "failures": reasons}, indent=2, default=str))
    else:
        click.echo(str(found))
    for reason in reasons:
        click.echo(click.style(f"FAILED {reason}", fg="red"), err=True)
    return 1 if reasons else 0


@click.command()
@click.argument("experiment", required=False)
@click.option("--days", type=float, default=30.0, show_default=True, help="How far back to look.")
@click.option("--name", help="Only jobs of this name.")
@_tracking_uri
@_html
@_as_json
def history(
    experiment: str | None,
    days: float,
    name: str | None,
    tracking_uri: str | None,
    html: Path | None,
    as_json: bool,
) -> int:
    r"""Show what the jobs of an experiment came to over time, one line each.

    EXPERIMENT is its name or id; by default MLflow's current one. It reads what drivers have
    written with their traces, and no spans.

    \b
    Examples:
      mlflow-ctx-autolog history nightly --days 7
      mlflow-ctx-autolog history --json

    Exit status: 2 where the store does not answer, or has no such experiment.
    """

    def show() -> int:
        from mlflow_ctx_autolog.reporting.history import history as make_history

        found = make_history(experiment, days=days, name=name, tracking_uri=tracking_uri)
        if html is not None:
            found.to_html(html)
        click.echo(found.to_json() if as_json else str(found))
        return 0

    return _attempt(show)


def _attempt(show: Callable[[], int]) -> int:
    from mlflow_ctx_autolog.exceptions import StoreError

    try:
        return show()
    except (ImportError, OSError, StoreError, ValueError) as error:
        click.echo(click.style(str(error), fg="red"), err=True)
        return 2


def read_prices(text: str | None) -> Any:
    """Return what ``--prices`` says: JSON, or what is in a file of it."""
    if text is None:
        return None
    try:
        content = text if text.lstrip().startswith("{") else Path(text).read_text("utf-8")
        return json.loads(content)
    except (OSError, ValueError) as error:
        raise click.BadParameter(
            f'it is neither JSON, as {{"gpt-x": [2.5, 10]}}, nor a file of it: {error}',
            param_hint="--prices",
        ) from error
