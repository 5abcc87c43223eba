"""Which module may import which, and which foreign library each may touch."""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlflow_ctx_autolog

NAME = "mlflow_ctx_autolog"
PACKAGE = Path(mlflow_ctx_autolog.__file__).parent

ROOT = Path(__file__).parents[2]


def documented() -> dict[str, tuple[set[str], set[str]]]:
    """Read the table of modules: name to foreign libraries and imports."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \|[^|]*\|([^|]*)\|([^|]*)\|$", text, re.MULTILINE)
    return {
        name: (set(re.findall(r"`(\w+)`", foreign)), set(re.findall(r"`([\w.]+)`", ours)))
        for name, foreign, ours in rows
    }


MAY_IMPORT = {name: ours for name, (_, ours) in documented().items()}
FOREIGN = {name: foreign for name, (foreign, _) in documented().items() if foreign}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
OURS = [
    name for name in MODULES if not name.endswith("__init__") and not name.startswith("testing.")
]
FOR_PYTEST = {
    "testing.traces": ({"mlflow"}, {"__init__"}),
    "testing.plugin": ({"mlflow", "pytest"}, {"__init__", "testing"}),
}
# Where users come in: they introduce the rooms to one another.
ENTRANCES = {"autolog", "cli"}
# Modules that import others in functions, when MLflow is wanted, and what that may be.
DOORS = {"worker.mlflow_loading", "worker.runner", "stores.sending"}
BEHIND = {"tracing"}
TESTING = [name for name in MODULES if name.startswith("testing.")]


def imported(module: str) -> Iterator[str]:
    """Yield the full names that a module imports, anywhere in it."""
    package = [NAME, *module.split(".")[:-1]]
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=origin, names=names, level=level):
                above = package[: len(package) - level + 1] if level else []
                prefix = ".".join([*above, *([origin] if origin else [])])
                yield from (f"{prefix}.{alias.name}" for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module")
                | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def ours_imported(module: str) -> set[str]:
    """Return the modules of this library that a module imports; `__init__` for the facade."""
    found = set()
    for name in imported(module):
        if name.partition(".")[0] == NAME:
            inner = name.split(".")[1:]
            while inner and ".".join(inner) not in MODULES:
                inner.pop()
            found.add(".".join(inner) or "__init__")
    return found


def foreign_imported(module: str) -> set[str]:
    """Return the libraries, other than Python's own, that a module imports."""
    libraries = {name.partition(".")[0] for name in imported(module)}
    return libraries - {NAME} - sys.stdlib_module_names


def test_every_module_is_in_the_table() -> None:
    """Each module has its place in the architecture, and the table names no others."""
    assert set(OURS) == set(MAY_IMPORT)


@pytest.mark.parametrize("module", OURS)
def test_module_imports_what_the_table_says(module: str) -> None:
    """Each module imports those modules of this library that the table gives it, and no others."""
    assert ours_imported(module) == MAY_IMPORT[module]


def test_imports_have_no_cycle() -> None:
    """The modules can be put in an order in which each imports earlier ones only."""
    graph = {module: ours_imported(module) for module in OURS}
    order = list(graphlib.TopologicalSorter(graph).static_order())

    for module, needed in graph.items():
        assert all(order.index(name) < order.index(module) for name in needed)


def room(module: str) -> str:
    """Return the room that a module is in; one at the top is a room of its own."""
    return module.partition(".")[0]


def test_rooms_have_no_cycle() -> None:
    """Nor do rooms need one another: what one needs of another does not need it in turn."""
    graph: dict[str, set[str]] = {}
    for module in OURS:
        if room(module) not in ENTRANCES:
            needed = {room(name) for name in ours_imported(module)} - {"__init__", "testing"}
            graph.setdefault(room(module), set()).update(needed - {room(module)} - ENTRANCES)

    # Raises where there is none.
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert {"spans", "recorder", "worker", "driver"} <= set(order)


def test_the_bridge_alone_knows_mlflow_in_a_worker() -> None:
    """What every worker imports leads to MLflow by a door that opens only when it is wanted."""
    reached, next_ones = set(), {"worker.runner"}
    while next_ones:
        module = next_ones.pop()
        reached.add(module)
        if module not in DOORS:
            next_ones |= ours_imported(module) - reached - {"__init__"}
    assert {module for module in reached if "mlflow" in FOREIGN.get(module, set())} <= BEHIND


@pytest.mark.parametrize("module", OURS)
def test_foreign_library_is_touched_in_its_module_only(module: str) -> None:
    """Each foreign library has its own module, so that a change of it is met in one place."""
    assert foreign_imported(module) == FOREIGN.get(module, set())


@pytest.mark.parametrize("module", TESTING)
def test_testing_needs_the_standard_library_only(module: str) -> None:
    """The servers for tests can be used without any other package, and without the library."""
    foreign, ours = FOR_PYTEST.get(module, (set(), {"testing"}))
    assert foreign_imported(module) == foreign
    assert {name.partition(".")[0] for name in ours_imported(module)} <= ours
