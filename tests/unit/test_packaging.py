"""What is installed: the wheel, its typing marker, its requirements and its public names."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mlflow_ctx_autolog

ROOT = Path(__file__).parents[2]
PACKAGE = Path(mlflow_ctx_autolog.__file__).parent


def requirements() -> list[Requirement]:
    return [Requirement(text) for text in importlib.metadata.requires("mlflow-ctx-autolog") or []]


def names_for(extra: str) -> set[str]:
    return {
        requirement.name
        for requirement in requirements()
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra})
    }


def test_installed_wheel_is_under_test() -> None:
    """These tests test what users install, not the checkout."""
    assert not PACKAGE.resolve().is_relative_to(ROOT / "mlflow_ctx_autolog")
    distribution = importlib.metadata.distribution("mlflow-ctx-autolog")
    installed = distribution.locate_file("mlflow_ctx_autolog/__init__.py")

    assert Path(str(installed)).samefile(mlflow_ctx_autolog.__file__)


def test_every_module_of_the_checkout_is_installed() -> None:
    """No module is forgotten in the wheel."""
    source = ROOT / "mlflow_ctx_autolog"
    expected = {path.relative_to(source) for path in source.rglob("*.py")}

    assert {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")} == expected


def test_type_hints_are_shipped() -> None:
    """Type checkers find the marker that says that the library is typed."""
    files = importlib.metadata.files("mlflow-ctx-autolog") or []

    assert "mlflow_ctx_autolog/py.typed" in {file.as_posix() for file in files}
    assert (PACKAGE / "py.typed").is_file()


def test_runtime_requirements_are_few() -> None:
    """Installing the library brings along these packages and no others, PySpark least of all."""
    assert names_for(extra="") == {
        # Which mlflow-skinny brings, too.
        "click",
        "mlflow-skinny",
        "openai",
        "opentelemetry-api",
        "opentelemetry-sdk",
        "packaging",
        "pandas",
    }


def test_pyspark_comes_with_the_extra() -> None:
    """The extra `spark` brings PySpark and what its pandas functions need."""
    assert names_for(extra="spark") - names_for(extra="") == {"pyspark", "pyarrow"}


def test_all_that_a_machine_of_ones_own_takes_comes_with_the_extra() -> None:
    """The extra `local` brings Spark and the whole of MLflow, whose default store is a file."""
    added = names_for(extra="local") - names_for(extra="")
    assert added == {"mlflow", "pyspark", "pyarrow"}


def test_an_exporter_comes_with_the_extra() -> None:
    """The extra `otlp` brings what encodes spans for a collector, and MLflow's way there."""
    added = names_for(extra="otlp") - names_for(extra="")
    assert added == {"opentelemetry-exporter-otlp-proto-http"}


@pytest.mark.parametrize("name", mlflow_ctx_autolog.__all__)
def test_public_name_resolves(name: str) -> None:
    """Every name that the library announces exists, is documented, and is listed by dir()."""
    assert getattr(mlflow_ctx_autolog, name).__doc__
    assert name in dir(mlflow_ctx_autolog)


def test_completion_shows_public_names_only() -> None:
    """Not the modules, of which there are many, and none of which is meant for users."""
    assert dir(mlflow_ctx_autolog) == sorted(mlflow_ctx_autolog.__all__)


def test_public_names_are_sorted_and_unique() -> None:
    """The public names are in order, and each is there once."""
    assert mlflow_ctx_autolog.__all__ == sorted(set(mlflow_ctx_autolog.__all__))


def test_unknown_name_is_an_attribute_error() -> None:
    """A name that the library does not have is refused as in any module."""
    with pytest.raises(AttributeError, match="'mlflow_ctx_autolog' has no attribute 'enabel'"):
        mlflow_ctx_autolog.enabel  # noqa: B018
    assert not hasattr(mlflow_ctx_autolog, "enabel")


def test_no_public_name_is_that_of_a_module() -> None:
    """Importing a module puts it into the package, where it would hide a function of its name."""
    modules = {path.stem for path in Path(mlflow_ctx_autolog.__file__).parent.iterdir()}
    assert not modules & set(mlflow_ctx_autolog.__all__)
