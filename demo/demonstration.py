"""The course of the demonstration: start the processes, run the variants, show the results."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
from pathlib import Path

import mlflow
import rules
import show
import signals
from cluster import Cluster
from documents import Collection
from results import Outcome
from rich.console import Console
from variants import Variants

from mlflow_ctx_autolog.testing import OpenAIEndpoint, TrackingServer

LATENCY_SECONDS = 0.15


def demonstrate(collection: Collection, folder: Path) -> None:
    """Run the job in each variant, keeping data and logs in ``folder``, and show the results."""
    console = show.make_console()
    documents = [(document.name, document.text) for document in collection.documents]
    left_out = f" ({collection.left_out} more left out)" if collection.left_out else ""
    console.print(f"Documents read: {len(documents)}{left_out}.")
    for line in collection.skipped:
        console.print(f"Skipped: {line}", markup=False)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        stack.callback(signals.handle)
        endpoint = choose_model(stack, console)
        server = stack.enter_context(TrackingServer(folder))
        # What MLflow still has to send must not wait for a server that is gone.
        stack.callback(mlflow.flush_trace_async_logging)
        cluster = Cluster(folder)
        stack.callback(cluster.close)
        # Whatever ends the demonstration, nothing interrupts the end of its processes.
        stack.callback(signals.ignore)
        mlflow.set_tracking_uri(server.uri)
        variants = Variants(documents, cluster, endpoint, console)
        outcomes: list[Outcome] = []
        if endpoint is not None:
            outcomes.append(variants.published("published pattern", server.uri, False))
        outcomes.append(variants.published("published pattern, synchronous", server.uri, True))
        outcomes.append(variants.one_line("ctx_autolog.enable()"))
        report(outcomes, server, folder, console)


def choose_model(stack: contextlib.ExitStack, console: Console) -> OpenAIEndpoint | None:
    """Set the environment of the workers for a real model, or start the local endpoint."""
    if os.environ.get("OPENAI_API_KEY"):
        os.environ.setdefault("OPENAI_MODEL", "gpt-4o-mini")
        address = os.environ.get("OPENAI_BASE_URL") or "the OpenAI API"
        console.print(f"Answers come from {os.environ['OPENAI_MODEL']} at {address}; each run is")
        console.print("paid for, so the published pattern runs only in its better form.")
        return None
    endpoint = stack.enter_context(
        OpenAIEndpoint(lambda request: rules.answer_prompt(request.prompt), LATENCY_SECONDS)
    )
    os.environ["OPENAI_BASE_URL"] = endpoint.base_url
    os.environ["OPENAI_API_KEY"] = "local"
    os.environ["OPENAI_MODEL"] = "rules"
    console.print(
        "Answers come from a local, rule-based reader behind a real OpenAI HTTP endpoint, "
        "not from a model;\nset OPENAI_API_KEY to use one. Tokens are words here."
    )
    return endpoint


def report(outcomes: list[Outcome], server: TrackingServer, folder: Path, console: Console) -> None:
    """Print the comparison, the trace of the last run, a sample, and how to open the trace."""
    last = outcomes[-1]
    console.print()
    console.print(show.comparison(outcomes))
    console.print()
    if last.trace is None:
        raise RuntimeError("the driver's trace is not on the tracking server")
    console.print(show.trace_tree(last.trace))
    console.print()
    console.print(show.sample(last.rows))
    mlflow_command = Path(sys.executable).with_name("mlflow")
    command = [
        *(_relative(mlflow_command), "server"),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
        *("--port", str(server.port)),
    ]
    address = (
        f"{server.uri}/#/experiments/{last.experiment_id}/traces"
        f"?selectedEvaluationId={last.trace.info.trace_id}"
    )
    console.print("\nTo open this trace in MLflow, run")
    console.print(f"  {shlex.join(command)}", soft_wrap=True, markup=False)
    console.print("and visit")
    console.print(f"  {address}", soft_wrap=True, markup=False)


def _relative(path: Path) -> str:
    folder = Path.cwd()
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
