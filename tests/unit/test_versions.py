"""Supported versions, and the command that shows them."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

from mlflow_ctx_autolog import UnsupportedVersionError
from mlflow_ctx_autolog.cli import main
from mlflow_ctx_autolog.versions import SUPPORTED, Supported, check, installed_version

PYSPARK_LIKE = Supported("pyspark", "3.5", "5")
# Each package's own distribution that says which version of it is installed.
DISTRIBUTIONS = {"mlflow": "mlflow-skinny", "openai": "openai", "pyspark": "pyspark"}


def supported(package: str) -> Supported:
    return next(entry for entry in SUPPORTED if entry.package == package)


@pytest.mark.parametrize(
    "version",
    [
        "3.5",
        "3.5.0",
        "3.5.0rc1",
        "3.5.0.dev0",
        "3.8.9",
        "4.0.0.dev1+databricks",
        "4.1.2+local.build",
        "4.99.99",
        "4.0.0.post1",
    ],
)
def test_version_in_range_is_supported(version: str) -> None:
    """Releases in the range are supported, and so are builds named after one of them."""
    assert version in PYSPARK_LIKE


@pytest.mark.parametrize(
    "version",
    [
        "3.4.9",
        "2.0",
        "0",
        "5",
        "5.0.0",
        "5.0.0.dev0",
        "5.0.0rc1+vendor",
        "10.1",
        "1!4.0",
        "",
        "unknown",
        "four",
        "3.x",
    ],
)
def test_version_out_of_range_is_not_supported(version: str) -> None:
    """Older and newer releases, pre-releases of newer ones and garbage are not supported."""
    assert version not in PYSPARK_LIKE


def test_installed_versions_are_supported() -> None:
    """The versions that these tests run with are supported."""
    check()

    assert [installed_version(package) for package in DISTRIBUTIONS] == [
        importlib.metadata.version(distribution) for distribution in DISTRIBUTIONS.values()
    ]


@pytest.mark.parametrize("version", ["0.1", "99.0.dev1+vendor", "unknown"])
@pytest.mark.parametrize("package", DISTRIBUTIONS)
def test_unsupported_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, package: str, version: str
) -> None:
    """A package too old or too new is refused with its version and those supported."""
    monkeypatch.setattr(f"{package}.__version__", version)

    with pytest.raises(UnsupportedVersionError) as caught:
        check()

    message = str(caught.value)
    assert f"{package} {version} is installed" in message
    assert f"from {supported(package).oldest} up to" in message
    assert f"not including, {supported(package).below}" in message


@pytest.mark.parametrize("package", ["mlflow", "openai"])
def test_missing_package_is_refused(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """A package that is needed and missing is refused with the versions supported."""
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(UnsupportedVersionError, match=f"{package} is not installed") as caught:
        check()

    assert f"from {supported(package).oldest} up to" in str(caught.value)


def test_missing_pyspark_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library works on a driver without PySpark."""
    monkeypatch.setitem(sys.modules, "pyspark", None)
    assert installed_version("pyspark") is None

    check()


def test_broken_package_is_not_taken_for_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A package that lacks one of its own requirements is reported as it is, not as missing."""
    (tmp_path / "broken_ctx_package.py").write_text("import absent_ctx_requirement\n")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(ModuleNotFoundError, match="absent_ctx_requirement"):
        installed_version("broken_ctx_package")


def test_command_shows_each_package(capsys: pytest.CaptureFixture[str]) -> None:
    """The command shows each package's version and that it is supported, and returns 0."""
    assert main(["versions"]) == 0

    shown = capsys.readouterr().out
    for package, distribution in DISTRIBUTIONS.items():
        version = re.escape(importlib.metadata.version(distribution))
        entry = supported(package)
        assert re.search(
            rf"^{package}\s+{version}\s+supported; .* {entry.oldest} .* {entry.below}$", shown, re.M
        )
    assert re.search(r"^python\s+3\.\d+", shown, re.M)


@pytest.mark.parametrize("package", DISTRIBUTIONS)
def test_command_fails_on_an_unsupported_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    """The command marks an unsupported version, shows the other packages too, and returns 2."""
    monkeypatch.setattr(f"{package}.__version__", "99.9")

    assert main(["versions"]) == 2

    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "99.9" in lines[package]
    assert {name for name, line in lines.items() if "NOT SUPPORTED" in line} == {package}
    assert set(DISTRIBUTIONS) <= set(lines)


@pytest.mark.parametrize(
    ("package", "verdict", "status"),
    [("mlflow", "missing", 2), ("openai", "missing", 2), ("pyspark", "not installed", 0)],
)
def test_command_shows_what_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    package: str,
    verdict: str,
    status: int,
) -> None:
    """The command fails where a package is missing that is needed, and only there."""
    monkeypatch.setitem(sys.modules, package, None)

    assert main(["versions"]) == status

    assert re.search(rf"^{package}\s+-\s+{verdict};", capsys.readouterr().out, re.M)


def test_command_shows_the_librarys_own_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version prints the version of the installed distribution."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == importlib.metadata.version("mlflow-ctx-autolog")


def test_command_explains_its_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a command, its help is shown."""
    main([])

    shown = capsys.readouterr()
    assert "versions" in shown.out + shown.err
