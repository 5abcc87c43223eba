"""The command ``mlflow-ctx-autolog``."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from importlib.metadata import version

from mlflow_ctx_autolog.versions import SUPPORTED, installed_version

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 where something cannot work."""
    parser = argparse.ArgumentParser(
        prog="mlflow-ctx-autolog",
        description="Trace the OpenAI calls of Spark workers under the driver's MLflow trace.",
    )
    parser.add_argument("--version", action="version", version=version("mlflow-ctx-autolog"))
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("versions", help="show the installed versions and those supported")
    parser.parse_args(arguments)
    return _show_versions()


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
