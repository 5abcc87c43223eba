"""Spark does the same with the library and without it: programs run twice, and compared.

Each run is a process of its own with one Spark session for all its programs: one plain, one with
``enable()`` and spans of the driver's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyspark
import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from job import CLASSIC, CONNECT, PROGRAMS  # noqa: E402
from programs import callables, driver, errors, libraries, plans, streams, ways  # noqa: E402, F401

# Each test waits until its program has run.
pytestmark = pytest.mark.timeout(580)

ENGINES = (CLASSIC, CONNECT)
# Spark 3.5 fetches its Connect server from the network.
HAS_CONNECT = pyspark.__version__ >= "4"


class Run:
    """A process that runs programs, and what it has found so far.

    Args:
        process: The process.
        output: The file that it adds what it finds to: lines of JSON, each a name and a value.
        log: What it prints.
    """

    def __init__(self, process: subprocess.Popen[bytes], output: Path, log: Path) -> None:
        self.process = process
        self._output = output
        self._log = log

    def __getitem__(self, name: str) -> Any:
        """Return what was found by that name, once it has been."""
        while True:
            has_ended = self.process.poll() is not None
            text = self._output.read_text() if self._output.exists() else ""
            found = dict(map(json.loads, text.rpartition("\n")[0].splitlines()))
            if name in found:
                return found[name]
            assert not has_ended, self._log.read_text()[-5000:]
            time.sleep(0.2)


@dataclass
class Twice:
    """What is found in two runs of some programs."""

    plain: Run
    traced: Run


@pytest.fixture(scope="session")
def runs(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    ctx_autolog_empty_database: Path,
) -> Iterator[Callable[[str], Twice]]:
    """Return the two runs of an engine, of the programs that were chosen on the command line."""
    chosen: dict[str, list[str]] = {engine: [] for engine in ENGINES}
    for item in request.session.items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if item.path == Path(__file__) and "program" in parameters:
            names = chosen[parameters["engine"]]
            if parameters["program"] not in names:
                names.append(parameters["program"])
    begun: dict[str, Twice] = {}

    def of(engine: str) -> Twice:
        if engine not in begun:
            folder = tmp_path_factory.mktemp(engine)
            begun[engine] = _begin(engine, chosen[engine], folder, ctx_autolog_empty_database)
        return begun[engine]

    yield of
    for twice in begun.values():
        for run in (twice.plain, twice.traced):
            run.process.terminate()
            run.process.wait(60)


def _begin(engine: str, names: list[str], folder: Path, empty_database: Path) -> Twice:
    database = folder / "mlflow.db"
    database.write_bytes(empty_database.read_bytes())
    begun = {}
    for run, options in (("plain", []), ("traced", ["--database", str(database)])):
        output, log = folder / f"{run}.jsonl", folder / f"{run}.txt"
        command = [
            sys.executable, str(HERE / "run_programs.py"), "--engine", engine,
            "--output", str(output), *options, "--", *names,
        ]  # fmt: skip
        environment = {**os.environ, "MLFLOW_CTX_AUTOLOG_SPOOL_DIRECTORY": str(folder / run)}
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=folder
            )
        begun[run] = Run(process, output, log)
    return Twice(**begun)


CASES = [
    pytest.param(
        engine,
        name,
        marks=[] if program.fast else [pytest.mark.slow],
        id=f"{engine}-{name.replace('`', '')}",
    )
    for engine in ENGINES
    if engine == CLASSIC or HAS_CONNECT
    for name, program in PROGRAMS.items()
    if engine in program.engines
]


@pytest.mark.parametrize(("engine", "program"), CASES)
def test_all_facts_are_the_same(runs: Callable[[str], Twice], engine: str, program: str) -> None:
    found = runs(engine)
    plain, traced = found.plain[f"program {program}"], found.traced[f"program {program}"]
    assert "failed" not in plain, plain["failed"]
    assert "failed" not in traced, traced["failed"]
    differing = {
        name: (plain.get(name), traced.get(name))
        for name in sorted({*plain, *traced})
        if plain.get(name) != traced.get(name)
    }
    assert not differing, "\n".join(
        f"{name}:\n  without: {without!r}\n  with:    {with_!r}"
        for name, (without, with_) in differing.items()
    )


@pytest.mark.parametrize(("engine", "program"), CASES)
def test_the_calls_are_in_the_traces(
    runs: Callable[[str], Twice], engine: str, program: str
) -> None:
    """Else two runs without tracing would have been compared."""
    if not PROGRAMS[program].is_traced:
        pytest.skip("not all of its calls are below its spans")
    made, found = runs(engine).traced["traced"][program]
    assert found == made


@pytest.mark.parametrize("engine", [CLASSIC])
def test_what_stays_until_the_end_is_a_fixed_few(runs: Callable[[str], Twice], engine: str) -> None:
    """However many functions, plans and jobs there were: one broadcast, and one accumulator."""
    found = runs(engine)
    plain, traced = found.plain["session"], found.traced["session"]
    assert plain, "nothing was counted"
    for kind in plain:
        assert plain[kind] <= traced[kind] <= plain[kind] + 2, kind


def test_there_are_enough_programs() -> None:
    assert len(PROGRAMS) >= 60
