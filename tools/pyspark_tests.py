"""Runs PySpark's own tests of functions with ``enable()`` on and without, and says what differs.

They are in Spark's repository, not in what is installed: check it out at the release that is
installed, or near it, and name the folder. A test that fails in both runs is no concern of ours.

    python tools/pyspark_tests.py ../spark [pyspark.sql.tests.test_udf ...]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODULES = (
    "pyspark.sql.tests.test_udf",
    "pyspark.sql.tests.test_udtf",
    "pyspark.sql.tests.test_udf_profiler",
    "pyspark.sql.tests.pandas.test_pandas_cogrouped_map",
    "pyspark.sql.tests.pandas.test_pandas_grouped_map",
    "pyspark.sql.tests.pandas.test_pandas_map",
    "pyspark.sql.tests.pandas.test_pandas_udf",
    "pyspark.sql.tests.pandas.test_pandas_udf_grouped_agg",
    "pyspark.sql.tests.pandas.test_pandas_udf_scalar",
    "pyspark.sql.tests.pandas.test_pandas_udf_typehints",
    "pyspark.sql.tests.pandas.test_pandas_udf_window",
    "pyspark.sql.tests.arrow.test_arrow_cogrouped_map",
    "pyspark.sql.tests.arrow.test_arrow_grouped_map",
    "pyspark.sql.tests.arrow.test_arrow_map",
    "pyspark.sql.tests.arrow.test_arrow_python_udf",
    "pyspark.sql.tests.arrow.test_arrow_udf_scalar",
    "pyspark.sql.tests.streaming.test_streaming_foreach",
    "pyspark.sql.tests.streaming.test_streaming_foreach_batch",
    "pyspark.tests.test_rdd",
    "pyspark.tests.test_rddbarrier",
)


def overlay(source: Path, folder: Path) -> Path:
    """Return a folder with the installed PySpark, and with tests and helpers of another one."""
    found = importlib.util.find_spec("pyspark")
    assert found is not None
    assert found.origin is not None
    installed = Path(found.origin).parent
    tests = [path for path in (source / "python" / "pyspark").rglob("tests") if path.is_dir()]
    helpers = Path("pyspark", "testing")
    with_tests = {path.parent.relative_to(source / "python") for path in tests} - {helpers}
    inner = {parent for path in with_tests for parent in (path, *path.parents)} - {Path()}
    for path in sorted(inner):
        (folder / path).mkdir()
        here = installed.parent / path
        for entry in here.iterdir() if here.is_dir() else ():
            if path / entry.name not in {*inner, helpers, path / "tests", path / "__pycache__"}:
                (folder / path / entry.name).symlink_to(entry)
        if path in with_tests:
            (folder / path / "tests").symlink_to(source.resolve() / "python" / path / "tests")
    (folder / helpers).symlink_to(source.resolve() / "python" / helpers)
    return folder


class Outcomes(unittest.TextTestResult):
    """Notes what became of each test."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.passed: list[str] = []

    def addSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802
        """See :class:`unittest.TestResult`."""
        super().addSuccess(test)
        self.passed.append(test.id())


@contextlib.contextmanager
def tracing(folder: Path) -> Iterator[None]:
    """Have the library on in a block, and a span of the driver's active."""
    import mlflow

    import mlflow_ctx_autolog as ctx_autolog

    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.set_experiment(experiment_id="0")
    with ctx_autolog.enable(spool_directory=str(folder)), mlflow.start_span("tests"):
        yield


def run(module: str, output: Path, *, is_traced: bool) -> None:
    """Run the tests of a module in this process, and write down which have passed."""
    with tracing(output.parent) if is_traced else contextlib.nullcontext():
        tests = unittest.defaultTestLoader.loadTestsFromName(module)
        found = unittest.TextTestRunner(resultclass=Outcomes, verbosity=1).run(tests)
        assert isinstance(found, Outcomes)
        told = {
            test.id(): text for test, text in (*found.failures, *found.errors) if test is not None
        }
    output.write_text(json.dumps({"passed": found.passed, "failed": told}))


def outcomes(module: str, packages: Path, *, is_traced: bool) -> dict[str, Any]:
    """Run the tests of a module in a process of its own."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        output = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--output", str(output), module]
        paths = os.pathsep.join(filter(None, (str(packages), os.environ.get("PYTHONPATH"))))
        with (Path(folder) / "log.txt").open("w+") as log:
            subprocess.run(
                [*command, "--traced"] if is_traced else command,
                env={**os.environ, "PYTHONPATH": paths, "PYSPARK_PYTHON": sys.executable},
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
            if not output.exists():
                log.seek(0)
                return {"passed": [], "failed": {module: log.read()[-3000:]}}
        found: dict[str, Any] = json.loads(output.read_text())
        return found


def main() -> None:
    """See the module; its status is 1 where a test fails only with the library."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", nargs="?", type=Path, help="where Spark's repository is")
    parser.add_argument("modules", nargs="*")
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--traced", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.output is not None:
        run(str(given.source), given.output, is_traced=given.traced)
        return
    if given.source is None:
        parser.error("name the folder that Spark's repository is in")
    differs = False
    with tempfile.TemporaryDirectory() as folder:
        packages = overlay(given.source, Path(folder))
        for module in given.modules or MODULES:
            plain, traced = (outcomes(module, packages, is_traced=on) for on in (False, True))
            fails = sorted(set(plain["passed"]) - set(traced["passed"]))
            passed = len(plain["passed"])
            print(f"{module}: {passed} passed without, {len(fails)} of them fail with")
            for test in fails:
                differs = True
                print(f"\n{test}\n{traced['failed'].get(test, traced['failed'].get(module, ''))}")
            if not plain["passed"]:
                print("".join(plain["failed"].values())[-1500:])
            sys.stdout.flush()
    sys.exit(differs)


if __name__ == "__main__":
    main()
