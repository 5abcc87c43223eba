"""The versions of other packages that this library knows how to work with."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass

from packaging.version import InvalidVersion, Version

from mlflow_ctx_autolog.exceptions import UnsupportedVersionError

__all__ = ["SUPPORTED", "Supported", "check", "installed_version", "is_older"]


@dataclass(frozen=True)
class Supported:
    """A package and the versions of it that can be patched safely.

    Args:
        package: Its import name.
        oldest: The first supported version.
        below: The first version that is too new to be known.
        required: Whether the library works without it.
    """

    package: str
    oldest: str
    below: str
    required: bool = True

    def __contains__(self, version: str) -> bool:
        # Builds such as 4.0.0.dev1+databricks count as the release they are named after.
        try:
            release = Version(Version(version).base_version)
        except InvalidVersion:
            return False
        return Version(self.oldest) <= release < Version(self.below)


SUPPORTED = (
    Supported("mlflow", "3.9", "4"),
    Supported("openai", "1.40", "4"),
    Supported("pyspark", "3.5", "5", required=False),
)


def is_older(version: str, *, than: str) -> bool:
    """Whether one version comes before another."""
    return Version(version) < Version(than)


def installed_version(package: str) -> str | None:
    """Return the version of an importable package, None where it is not installed."""
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == package:
            return None
        raise
    # Asked of the package itself: three distributions ship the package mlflow, and clusters ship
    # a pyspark that no distribution owns. A mere folder of that name has no version.
    version = getattr(module, "__version__", None)
    return None if version is None else str(version)


def check(*, needs_spark: bool = False) -> None:
    """Check the installed packages.

    Args:
        needs_spark: Whether pyspark has to be there.

    Raises:
        UnsupportedVersionError: One is missing, too old, or too new.
    """
    for supported in SUPPORTED:
        version = installed_version(supported.package)
        if version is None and not supported.required:
            if not needs_spark:
                continue
            raise UnsupportedVersionError(
                f"{supported.package} is not installed for {sys.executable}, and enable() is for "
                "the driver of a Spark job. On a cluster, run it with the Python that Spark's "
                "driver runs with; on a machine of your own, "
                "pip install 'mlflow-ctx-autolog[local]'."
            )
        if version is None or version not in supported:
            found = "is not installed" if version is None else f"{version} is installed"
            raise UnsupportedVersionError(
                f"{supported.package} {found}; mlflow-ctx-autolog supports {supported.package} "
                f"from {supported.oldest} up to, but not including, {supported.below}."
            )
