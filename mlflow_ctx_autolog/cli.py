"""The command ``mlflow-ctx-autolog``."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from mlflow_ctx_autolog.versions import SUPPORTED, installed_version

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    0, or 2 where something cannot work; 1 for warnings of ``doctor --strict``.
    """
    parser = argparse.ArgumentParser(
        prog="mlflow-ctx-autolog",
        description="Trace the OpenAI calls of Spark workers under the driver's MLflow trace.",
    )
    parser.add_argument("--version", action="version", version=version("mlflow-ctx-autolog"))
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("versions", help="show the installed versions and those supported")
    recover = commands.add_parser(
        "recover", help="store the spans that killed processes have left on this host"
    )
    recover.add_argument("path", type=Path, help="a spool file, or a directory of them")
    recover.add_argument(
        "--tracking-uri",
        help="where to store them; by default where they were to go, and for spans that only the "
        "driver could store, MLflow's configured tracking URI",
    )
    doctor = commands.add_parser(
        "doctor", help="find out what makes traces go missing, on this host and on the workers"
    )
    session = doctor.add_mutually_exclusive_group()
    session.add_argument("--master", help="Spark's master; by default what Spark is configured for")
    session.add_argument("--remote", help="a Spark Connect server, such as sc://host:15002")
    doctor.add_argument("--model-url", help="the model endpoint that workers have to reach")
    doctor.add_argument("--strict", action="store_true", help="exit with 1 for warnings")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")
    report = commands.add_parser(
        "report", help="show what the calls of traces came to, and why some were made again"
    )
    report.add_argument("trace_id", nargs="+", help="a trace's id, such as tr-0a1b...")
    report.add_argument("--tracking-uri", help="where it is kept, if not in MLflow's store")
    report.add_argument("--html", type=Path, help="write it to this file, too, to look at")
    report.add_argument("--json", action="store_true", help="print it as JSON")
    given = parser.parse_args(arguments)
    if given.command == "doctor":
        return _doctor(given)
    if given.command == "report":
        return _report(given.trace_id, given.tracking_uri, given.html, given.json)
    if given.command == "recover":
        return _recover(given.path, given.tracking_uri)
    return _show_versions()


def _report(
    trace_ids: list[str], tracking_uri: str | None, html: Path | None, as_json: bool
) -> int:
    from mlflow_ctx_autolog.exceptions import StoreError
    from mlflow_ctx_autolog.reporting.call_report import report

    try:
        found = report(trace_ids, tracking_uri=tracking_uri)
        print(found.to_json() if as_json else found)
        if html is not None:
            found.to_html(html)
    except (ImportError, OSError, StoreError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _recover(path: Path, tracking_uri: str | None) -> int:
    # Imports MLflow, for which nobody should wait who wants to know versions.
    from mlflow_ctx_autolog.delivery.recovery import recover
    from mlflow_ctx_autolog.delivery.spool import Destination, Record, spool_files
    from mlflow_ctx_autolog.driver.ledger import write_stored_totals
    from mlflow_ctx_autolog.exceptions import StoreError
    from mlflow_ctx_autolog.stores.otlp import is_collector
    from mlflow_ctx_autolog.stores.sending import send_to
    from mlflow_ctx_autolog.stores.tracking_store import spans_of

    if not path.exists():
        print(f"{path} does not exist")
        return 2
    paths = spool_files(path, refused=True) if path.is_dir() else [path]
    if not paths:
        print(f"There are no spools in {path}: nothing is left to recover.")
    status = 0
    traces: set[tuple[Destination, str]] = set()

    def send(destination: Destination, records: Sequence[Record]) -> None:
        used = send_to(tracking_uri, destination, records)
        if is_collector(used.tracking_uri):
            return
        traces.update((used, span.trace_id) for span in spans_of(records))

    for each in paths:
        try:
            found = recover(each, send)
        except BlockingIOError:
            print(f"{each}: left alone, since the process that writes it is alive")
            continue
        except OSError as error:
            print(f"{each}: cannot be read: {error}")
            status = 2
            continue
        print(f"{each}: {found.stored} stored, {found.left} left")
        if found.problem is not None:
            print(f"  {found.problem}")
            status = 2
    for used, trace_id in sorted(traces, key=str):
        try:
            write_stored_totals(used, trace_id)
        except StoreError as error:
            print(f"{trace_id}: its tokens and cost could not be added up: {error}")
            status = 2
    return status


def _doctor(given: argparse.Namespace) -> int:
    # Imports MLflow and starts Spark.
    from mlflow_ctx_autolog.diagnosis.doctor import diagnose
    from mlflow_ctx_autolog.driver.spark import started_session

    with started_session(given.master, given.remote) as (session, problem):
        diagnosis = diagnose(session, model_url=given.model_url, session_error=problem)
    print(json.dumps(diagnosis.to_dict(), indent=2) if given.json else diagnosis)
    if diagnosis.failures:
        return 2
    return 1 if given.strict and diagnosis.warnings else 0


def _show_versions() -> int:
    status = 0
    print(f"python    {platform.python_version()}")
    for supported in SUPPORTED:
        found = installed_version(supported.package)
        if found is None:
            verdict = "missing" if supported.required else "not installed"
        else:
            verdict = "supported" if found in supported else "NOT SUPPORTED"
        if verdict in ("missing", "NOT SUPPORTED"):
            status = 2
        shown = found or "-"
        print(
            f"{supported.package:<9} {shown:<12} {verdict}; supported are "
            f"{supported.oldest} up to, but not including, {supported.below}"
        )
    return status
