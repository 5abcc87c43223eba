"""The command ``mlflow-ctx-autolog``.

A new command is one function below :func:`commands`, which returns its exit status. What imports
MLflow is imported in it: nobody who wants to know versions, or completes a word, waits for that.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from mlflow_ctx_autolog.reporting.commands import compare, history, read_prices
from mlflow_ctx_autolog.versions import SUPPORTED, installed_version

__all__ = ["commands", "main"]

_NAME = "mlflow-ctx-autolog"
_EPILOG = """\b
Exit status: 0 where all is well, 2 where something is wrong or cannot be done,
1 for warnings of doctor --strict.

\b
Completion, for bash (also zsh, fish):
  eval "$(_MLFLOW_CTX_AUTOLOG_COMPLETE=bash_source mlflow-ctx-autolog)"
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    0, or 2 where something cannot work; 1 for warnings of ``doctor --strict``, and for
    conditions of ``compare``.
    """
    given = None if arguments is None else list(arguments)
    try:
        status: int = commands.main(given, prog_name=_NAME, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return 130
    return status


def _fail(problem: object) -> int:
    click.echo(click.style(str(problem), fg="red"), err=True)
    return 2


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=str))


_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_EPILOG,
)
@click.version_option(version(_NAME), message="%(version)s")
def commands() -> None:
    """Trace the OpenAI calls of Spark workers under the driver's MLflow trace.

    \b
    Examples:
      mlflow-ctx-autolog doctor --master 'local[2]'
      mlflow-ctx-autolog report last
      mlflow-ctx-autolog recover
    """


commands.add_command(compare)
commands.add_command(history)


@commands.command()
@_as_json
def versions(as_json: bool) -> int:
    """Show the installed versions and those supported.

    Exit status: 2 where one is missing or not supported.
    """
    rows = [("python", platform.python_version(), "supported", "3.10", "3.14")]
    for supported in SUPPORTED:
        found = installed_version(supported.package)
        if found is None:
            verdict = "missing" if supported.required else "not installed"
        else:
            verdict = "supported" if found in supported else "NOT SUPPORTED"
        rows.append((supported.package, found or "-", verdict, supported.oldest, supported.below))
    if as_json:
        names = ("package", "version", "verdict", "oldest", "below")
        _print_json([dict(zip(names, row, strict=True)) for row in rows])
    else:
        for package, found, verdict, oldest, below in rows:
            click.echo(
                f"{package:<9} {found:<12} {verdict}; supported are {oldest} up to, but not "
                f"including, {below}"
            )
    return 2 if any(row[2] in ("missing", "NOT SUPPORTED") for row in rows) else 0


@commands.command()
@click.option("--master", help="Spark's master; by default what Spark is configured for.")
@click.option("--remote", help="A Spark Connect server instead, such as sc://host:15002.")
@click.option("--model-url", help="The model endpoint that workers have to reach.")
@click.option("--strict", is_flag=True, help="Exit with 1 for warnings.")
@_as_json
def doctor(
    master: str | None, remote: str | None, model_url: str | None, strict: bool, as_json: bool
) -> int:
    """Find out what makes traces go missing.

    On this host, on the workers and in the store. Run it where the driver would run. It takes less
    than a minute and spends no token.

    \b
    Examples:
      mlflow-ctx-autolog doctor --master spark://host:7077
      mlflow-ctx-autolog doctor --remote sc://host:15002 --json

    Exit status: 2 where something is wrong; 1 for warnings, with --strict.
    """
    if master is not None and remote is not None:
        raise click.UsageError("--master and --remote cannot be given together.")
    # Imports MLflow and starts Spark.
    from mlflow_ctx_autolog.diagnosis.doctor import diagnose
    from mlflow_ctx_autolog.driver.spark import started_session

    with started_session(master, remote) as (session, problem):
        diagnosis = diagnose(session, model_url=model_url, session_error=problem)
    if as_json:
        _print_json(diagnosis.to_dict())
    else:
        # Which takes colours away where nobody sees them.
        click.echo(diagnosis.to_text(colour=True))
    if diagnosis.failures:
        return 2
    return 1 if strict and diagnosis.warnings else 0


@commands.command()
@click.argument("traces", nargs=-1, metavar="[TRACE_ID...|last]")
@click.option("--run-id", help="All traces of this run instead.")
@click.option(
    "--experiment-id", help="Where to look for the last; by default MLflow's current experiment."
)
@click.option("--tracking-uri", help="Where they are kept; by default MLflow's configured store.")
@click.option(
    "--prices",
    metavar="JSON",
    help="US dollars for a million input and output tokens by model, where MLflow knows no cost: "
    "JSON, or a file of it.",
)
@click.option(
    "--html", type=click.Path(path_type=Path), help="Write it to this file, too, to look at."
)
@_as_json
def report(
    traces: tuple[str, ...],
    run_id: str | None,
    experiment_id: str | None,
    tracking_uri: str | None,
    prices: str | None,
    html: Path | None,
    as_json: bool,
) -> int:
    """Show what calls came to, and why some were made again.

    Name traces by their ids, or "last" for the latest of the experiment.

    \b
    Examples:
      mlflow-ctx-autolog report last
      mlflow-ctx-autolog report tr-0a1b2c... --html report.html
      mlflow-ctx-autolog report --run-id 4f3e... --prices '{"gpt-x": [2.5, 10]}'

    Exit status: 2 where the store does not answer or has no such trace.
    """
    if bool(traces) == (run_id is not None):
        raise click.UsageError("Name traces, or last, or --run-id.")
    known_prices = read_prices(prices)
    # Imports MLflow.
    from mlflow_ctx_autolog import report as make_report
    from mlflow_ctx_autolog.exceptions import StoreError

    try:
        asked: dict[str, Any] = {"run_id": run_id} if run_id is not None else {}
        if traces:
            asked["traces"] = [
                _last_trace(tracking_uri, experiment_id) if each == "last" else each
                for each in traces
            ]
        found = make_report(tracking_uri=tracking_uri, prices=known_prices, **asked)
        click.echo(found.to_json() if as_json else str(found))
        if html is not None:
            found.to_html(html)
    except (ImportError, OSError, StoreError, ValueError) as error:
        return _fail(error)
    return 0


def _last_trace(tracking_uri: str | None, experiment_id: str | None) -> str:
    from mlflow_ctx_autolog.log_ins import without_credentials
    from mlflow_ctx_autolog.stores.reading import find_traces
    from mlflow_ctx_autolog.stores.tracking_store import current_tracking_uri
    from mlflow_ctx_autolog.tracing import current_experiment_id

    experiment_id = experiment_id or current_experiment_id()
    uri = tracking_uri or current_tracking_uri()
    found = find_traces(uri, None, experiment_id, None, None, jobs=1)
    if not found:
        raise ValueError(
            f"The experiment {experiment_id} in {without_credentials(uri)} has no trace of a Spark "
            "job; name another by --experiment-id or --tracking-uri"
        )
    return found[0]


@commands.command()
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option(
    "--tracking-uri",
    help="Where to store them; by default where they were to go, and for spans that only the "
    "driver could store, MLflow's configured tracking URI.",
)
@_as_json
def recover(path: Path | None, tracking_uri: str | None, as_json: bool) -> int:
    """Store the spans that killed processes have left on this host.

    PATH is a spool file, or a directory of them or of folders with them; by default the spools of
    this user on this host: those of MLFLOW_CTX_AUTOLOG_SPOOL_DIRECTORY, and of the temporary files.
    Run it as the user of the workers. Answers kept beside them whose time is over are removed.

    \b
    Examples:
      mlflow-ctx-autolog recover
      mlflow-ctx-autolog recover /var/spool/spans --tracking-uri http://host:5000

    Exit status: 2 where something could not be read or stored; what is left stays where it is.
    """
    if path is not None and not path.exists():
        return _fail(f"{path} does not exist")
    # Imports MLflow.
    from mlflow_ctx_autolog.answers.directory import default_root, sweep
    from mlflow_ctx_autolog.delivery.recovery import recover as recover_spool
    from mlflow_ctx_autolog.delivery.spool import Destination, Record
    from mlflow_ctx_autolog.driver.totals import write_stored_totals
    from mlflow_ctx_autolog.exceptions import StoreError
    from mlflow_ctx_autolog.stores.otlp import is_collector
    from mlflow_ctx_autolog.stores.sending import send_to
    from mlflow_ctx_autolog.stores.tracking_store import spans_of

    status = 0
    told: list[dict[str, Any]] = []
    traces: set[tuple[Destination, str]] = set()

    def tell(line: str, **fields: Any) -> None:
        told.append(fields)
        if not as_json:
            click.echo(line)

    def send(destination: Destination, records: Sequence[Record]) -> None:
        used = send_to(tracking_uri, destination, records)
        if is_collector(used.tracking_uri):
            return
        traces.update((used, span.trace_id) for span in spans_of(records))

    places = _spool_directories() if path is None else [path]
    paths = [file for place in places for file in _spools_below(place)]
    if not paths and not as_json:
        names = " and ".join(str(place) for place in places)
        click.echo(f"There are no spools in {names}: nothing is left to recover.")
    for each in paths:
        try:
            found = recover_spool(each, send)
        except BlockingIOError:
            line = f"{each}: left alone, since the process that writes it is alive"
            tell(line, file=str(each), is_in_use=True)
            continue
        except OSError as error:
            tell(f"{each}: cannot be read: {error}", file=str(each), problem=str(error))
            status = 2
            continue
        line = f"{each}: {found.stored} stored, {found.left} left"
        if found.problem is not None:
            line += f"\n  {found.problem}"
            status = 2
        counts = {"stored": found.stored, "left": found.left}
        tell(line, file=str(each), problem=found.problem, **counts)
    for place in places:
        # Answers whose time is over, and which no task has come by to remove.
        sweep(default_root(place), None)
    for used, trace_id in sorted(traces, key=str):
        try:
            write_stored_totals(used, trace_id)
        except StoreError as error:
            line = f"{trace_id}: its tokens and cost could not be added up: {error}"
            tell(line, trace_id=trace_id, problem=str(error))
            status = 2
    if as_json:
        _print_json(told)
    return status


def _spool_directories() -> list[Path]:
    """Return where processes of this user keep their spools on this host."""
    from mlflow_ctx_autolog.config import Config
    from mlflow_ctx_autolog.delivery.directory import default_directory

    named = Config.from_env().spool_directory
    return [*([] if named is None else [Path(named)]), default_directory()]


def _spools_below(path: Path) -> list[Path]:
    """Return the spools of a directory, and of the folders in it; or the one that it is."""
    from mlflow_ctx_autolog.delivery.directory import default_directory
    from mlflow_ctx_autolog.delivery.segments import spool_files

    if path == default_directory():
        # Among files of everybody, and looked at more closely.
        return spool_files(refused=True)
    if not path.is_dir():
        return [path] if path.exists() else []
    folders = sorted(each for each in path.iterdir() if each.is_dir() and not each.is_symlink())
    return [file for folder in (path, *folders) for file in spool_files(folder, refused=True)]
