"""Two nights of one job: what changed, over time, and evaluated as the docs do it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from pyspark import cloudpickle
from pyspark.sql import SparkSession
from workload import SCHEMA

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.cli import main
from mlflow_ctx_autolog.testing import OpenAIEndpoint

cloudpickle.register_pickle_by_value(sys.modules[__name__])

IS_PRELOADED = True
ROWS = 60
PRICES = {"gpt-test": (2.0, 10.0)}
EVALUATION = Path(__file__).parents[2] / "docs" / "evaluate.md"


def extractor(url: str, more: str) -> Callable[[Iterable[pd.DataFrame]], Any]:
    def extract(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        from openai import OpenAI

        client = OpenAI(base_url=url, api_key="not-a-key", max_retries=0)
        for batch in batches:
            answers = []
            for number in batch["id"]:
                with ctx_autolog.annotate(doc_id=int(number)):
                    reply = client.chat.completions.create(
                        model="gpt-test",
                        messages=[{"role": "user", "content": f"Document {number}? {more}"}],
                        response_format={"type": "json_object"},
                    )
                answers.append(reply.choices[0].message.content)
            yield batch.assign(answer=answers)

    return extract


def night(spark: SparkSession, more: str, answer: Callable[[int], str]) -> str:
    """Run the job once, with an endpoint that answers so; return its trace."""

    def reply(request: Any) -> str:
        return answer(int(re.search(r"Document (\d+)", request.prompt)[1]))

    with OpenAIEndpoint(reply) as endpoint, mlflow.start_span("nightly") as span:
        spark.range(0, ROWS, 1, 4).mapInPandas(extractor(endpoint.base_url, more), SCHEMA).collect()
    assert ctx_autolog.receipt(timeout=30).complete
    return str(span.trace_id)


def as_json(number: int) -> str:
    return json.dumps({"id": number})


def half_as_prose(number: int) -> str:
    return as_json(number) if number % 2 else f"It is document {number}."


def test_two_nights(
    spark: SparkSession,
    experiment_id: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The second night's prompts are longer, and half of its answers are no JSON."""
    ctx_autolog.enable()
    monday = night(spark, "", as_json)
    tuesday = night(spark, "Take your time. " * 20, half_as_prose)

    report = ctx_autolog.report(prices=PRICES)
    assert report.trace_ids == [tuesday]
    assert report.quality.signals == {"invalid_json": ROWS // 2}
    assert (report.requests, report.repeats) == (ROWS, 0)

    changes = ctx_autolog.compare(prices=PRICES)
    assert (changes.before["trace_ids"], changes.after["trace_ids"]) == ([monday], [tuesday])
    changed = {each.metric for each in changes.changed}
    assert {"input_tokens", "cost_per_call", "invalid_json"} <= changed
    assert "calls_per_row" not in changed
    page = report.to_html(tmp_path / "report.html", comparison=changes)
    assert "What changed" in page.read_text(encoding="utf-8")

    asked = ["compare", monday, tuesday, "--prices", json.dumps({"gpt-test": [2, 10]})]
    assert main([*asked, "--fail-if", "invalid_json>60%"]) == 0
    assert main([*asked, "--fail-if", "cost>10%", "--fail-if", "invalid_json@extract>1%"]) == 1
    failed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("FAILED")]
    assert [line.split(":")[0] for line in failed] == [
        "FAILED cost>10%",
        "FAILED invalid_json@extract>1%",
    ]

    jobs = ctx_autolog.history().jobs
    assert [job.trace_id for job in jobs] == [monday, tuesday]
    assert [(job.calls, job.errors, job.rows) for job in jobs] == [(ROWS, 0, ROWS)] * 2
    assert [job.signals for job in jobs] == [{}, {"invalid_json": ROWS // 2}]
    latency = report.latency()
    assert jobs[1].p50 == pytest.approx(latency["p50"], rel=0.05)
    assert jobs[1].input_tokens == report.made.input_tokens

    evaluate_as_documented()
    trace = mlflow.get_trace(tuesday)
    feedback = {each.span_id: each.feedback.value for each in trace.info.assessments}
    spans = [each.call.span_id for each in report.calls if "invalid_json" in each.call.signals]
    assert len(feedback) == ROWS
    assert sorted(spans) == sorted(span for span, good in feedback.items() if not good)


def evaluate_as_documented() -> None:
    """Run the first block of the page, as it stands there."""
    code = re.search(r"```python\n(.*?)```", EVALUATION.read_text(encoding="utf-8"), re.DOTALL)[1]
    exec(compile(code, str(EVALUATION), "exec"), {"__name__": "evaluation"})
