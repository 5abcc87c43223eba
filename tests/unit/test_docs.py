"""The documentation: its site is built without a complaint, and has every page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as make docs builds it: whatever is amiss, such as a link to nowhere, fails."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_has_its_place() -> None:
    """Each page of docs is in the navigation, once."""
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = re.findall(r": ([\w/-]+\.md)$", navigation, re.MULTILINE)
    pages = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]

    assert sorted(named) == sorted(pages)


def test_the_reference_comes_from_the_docstrings(site: Path) -> None:
    """Every public name is in it, and none of the marks of docstrings is left."""
    import mlflow_ctx_autolog as ctx_autolog

    page = (site / "api.html").read_text(encoding="utf-8")
    for name in ctx_autolog.__all__:
        assert f'id="mlflow_ctx_autolog.{name}"' in page, name
    assert ":class:" not in page
    assert ":func:" not in page


def test_assistants_find_the_pages(site: Path) -> None:
    """llms.txt names each page that is there, with what it begins with."""
    text = (site / "llms.txt").read_text(encoding="utf-8")
    pages = re.findall(r"^- \[[^\]]+\]\(([^)]+)\): (.+)$", text, re.MULTILINE)

    assert len(pages) == len(list(DOCS.rglob("*.md"))) - 1  # The home page.
    for address, beginning in pages:
        assert (site / address).exists()
        assert re.match(r"[\w`]", beginning)


def test_the_public_workflow_has_every_row_of_the_matrix() -> None:
    """A combination that is supported is one that is tested."""
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    rows = re.findall(r"^          - ([\w.-]+)$", workflow, re.MULTILINE)
    nox = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    declared = re.findall(r'^    "([\w.-]+)": Row\(', nox, re.MULTILINE)

    assert sorted(rows) == sorted(declared)
