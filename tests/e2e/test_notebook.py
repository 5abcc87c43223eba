"""A notebook: run from top to bottom, and kept as it was shown."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

pytestmark = [pytest.mark.sqlite, pytest.mark.timeout(600)]

CELLS = {
    "set up": """
        import mlflow
        from pyspark.sql import SparkSession

        import mlflow_ctx_autolog as ctx_autolog
        from mlflow_ctx_autolog.testing import OpenAIEndpoint

        url = OpenAIEndpoint().base_url
        spark = (
            SparkSession.builder.master("local[2]")
            .config("spark.ui.enabled", "false")
            .config("spark.ui.showConsoleProgress", "false")
            .getOrCreate()
        )
        spark.sparkContext.setLogLevel("OFF")

        def extract(batches):
            from openai import OpenAI

            client = OpenAI(base_url=url, api_key="unused", max_retries=0)
            for batch in batches:
                for number in batch["id"]:
                    messages = [{"role": "user", "content": str(number)}]
                    client.chat.completions.create(model="gpt-x", messages=messages)
                yield batch
        """,
    "enable": "ctx_autolog.enable(progress=True)",
    "run": """
        with mlflow.start_span("job"):
            spark.range(0, 20, 1, 4).mapInPandas(extract, "id long").collect()
        """,
    "later": "ctx_autolog.receipt().complete",
    "run again": """
        with mlflow.start_span("again"):
            spark.range(0, 4, 1, 2).mapInPandas(extract, "id long").collect()
        """,
    "budget": """
        with ctx_autolog.enable(max_calls=3), mlflow.start_span("budget"):
            spark.range(0, 20, 1, 1).mapInPandas(extract, "id long").collect()
        """,
    "doctor": "ctx_autolog.doctor(spark)",
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What is below each cell of the notebook as it is saved, having been run."""
    folder = tmp_path_factory.mktemp("notebook")
    cells = [nbformat.v4.new_code_cell(textwrap.dedent(text)) for text in CELLS.values()]
    notebook = nbformat.v4.new_notebook(cells=cells)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYSPARK_PYTHON", sys.executable)
        for name in os.environ:
            if name.startswith(("MLFLOW_", "OPENAI_")):
                environment.delenv(name)
        client = nbclient.NotebookClient(
            notebook,
            timeout=300,
            kernel_name="python3",
            allow_errors=True,
            resources={"metadata": {"path": str(folder)}},
        )
        client.execute()
    path = folder / "saved.ipynb"
    nbformat.write(notebook, path)
    saved = json.loads(path.read_text(encoding="utf-8"))
    return {name: cell["outputs"] for name, cell in zip(CELLS, saved["cells"], strict=True)}


def shown(outputs: list[dict[str, Any]]) -> str:
    """Return all text below a cell, but what other libraries log."""
    texts = []
    for each in outputs:
        texts += ["".join(text) for text in each.get("data", {}).values()]
        texts += [each.get("text", ""), *each.get("traceback", [])]
    return "\n".join("".join(text) for text in texts)


def test_progress_stands_below_the_cell_that_runs_the_action(
    outputs: dict[str, list[dict[str, Any]]],
) -> None:
    """With that job's numbers, as they were in the end; nothing of it below another."""
    assert "model calls: 20 calls" in shown(outputs["run"])
    assert "model calls: 4 calls" in shown(outputs["run again"])
    assert shown(outputs["run"]).count("model calls") == 1
    for name in ("enable", "later"):
        assert "model calls" not in shown(outputs[name]), name
    # Nor of its own call. That a job has failed is known a moment after its cell has ended.
    assert "model calls: 1 calls" not in shown(outputs["doctor"])


def test_what_is_on_is_a_line(outputs: dict[str, list[dict[str, Any]]]) -> None:
    """Below the cell that turns it on."""
    line = shown(outputs["enable"])
    assert line.strip().startswith(
        "<mlflow-ctx-autolog: on. Spans travel with the task to the driver, which stores"
    )
    assert len(line.strip().splitlines()) == 1


def test_a_spent_budget_says_so_in_the_end(outputs: dict[str, list[dict[str, Any]]]) -> None:
    """In one line, the last of the error's."""
    if sys.version_info < (3, 11):
        pytest.skip("Exceptions have no notes there")
    (error,) = [each for each in outputs["budget"] if each["output_type"] == "error"]
    last = "".join(error["traceback"]).strip().splitlines()[-1]
    assert "BudgetExceeded: A call of 'gpt-x' was not made: max_calls=3 is reached" in last


def test_the_diagnosis_is_a_table(outputs: dict[str, list[dict[str, Any]]]) -> None:
    """With the sentence that counts first, and without MLflow's box for the deleted trace."""
    page = shown(outputs["doctor"])
    assert "arrived under the driver" in page
    assert "<table>" in page
    assert "not found" not in page
