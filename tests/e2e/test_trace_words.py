"""What a task says to MLflow of its trace, apart from spans, is known of the trace."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from pyspark import cloudpickle
from pyspark.sql import SparkSession
from workload import SCHEMA, StoredTrace, ask, stored_trace, stored_traces

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.driver.handover import driver
from mlflow_ctx_autolog.testing import OpenAIEndpoint, TrackingServer

IS_PRELOADED = True
cloudpickle.register_pickle_by_value(sys.modules[__name__])

PROMPT = "question-of-a-document"


def speaker(url: str, say: Callable[[int], Any]) -> Callable[[Iterator[pd.DataFrame]], Any]:
    """Return a function that says something, and makes one call, for each row."""

    def speak(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        from openai import OpenAI

        client = OpenAI(base_url=url, api_key="not-a-key", max_retries=0)
        for batch in batches:
            answers = []
            for number in batch["id"]:
                with say(int(number)):
                    answers.append(ask(client, number))
            yield batch.assign(answer=answers)

    return speak


def outright(number: int) -> Any:
    """Say all that can be said of the current trace."""
    import contextlib

    import mlflow

    mlflow.update_current_trace(
        tags={"fruit": "apple", "who": f"row {number}"},
        metadata={"commit": "abc", "mlflow.trace.tokenUsage": "not for users"},
        client_request_id="req-1",
        request_preview="What was asked",
        response_preview="What was answered",
        state="ERROR",
        session_id="session-of-a-task",
    )
    return contextlib.nullcontext()


def forking(url: str) -> Callable[[Iterator[pd.DataFrame]], Any]:
    """Return a function whose calls are made, and whose words are said, in child processes."""

    def in_child(number: int) -> None:
        from openai import OpenAI

        client = OpenAI(base_url=url, api_key="not-a-key", max_retries=0)
        with mlflow.start_span("in child"), outright(number):
            ask(client, number)

    def speak(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        import multiprocessing

        for batch in batches:
            for number in batch["id"]:
                child = multiprocessing.get_context("fork").Process(
                    target=in_child, args=[int(number)]
                )
                child.start()
                child.join()
                assert child.exitcode == 0
            yield batch.assign(answer="")

    return speak


@pytest.fixture
def spoken(
    spark: SparkSession,
    endpoint: OpenAIEndpoint,
    experiment_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., None]:
    """Runs a job of two rows in one partition, whose function says something for each."""
    # Of earlier tests.
    monkeypatch.setattr(driver.ledger, "_warned", set())

    def spoken(say: Callable[[int], Any], rows: int = 2, partitions: int = 1) -> None:
        function = speaker(endpoint.base_url, say)
        spark.range(0, rows, 1, partitions).mapInPandas(function, SCHEMA).collect()

    return spoken


def info_of_job(experiment_id: str, span: Any = None) -> StoredTrace:
    """Return the trace of a span, or the only one of the experiment."""
    assert ctx_autolog.flush(60)
    if span is not None:
        return stored_trace(span.trace_id)
    (trace,) = stored_traces(experiment_id)
    return trace


def assert_said_outright(spoken: Callable[..., None], experiment_id: str, has_span: bool) -> None:
    """Run a job whose tasks say it, and find it in the job's trace."""
    with ctx_autolog.enable():
        if has_span:
            with mlflow.start_span("job") as span:
                spoken(outright)
        else:
            span = None
            spoken(outright)
        info = info_of_job(experiment_id, span).trace.info
    assert_said(info)


@pytest.mark.parametrize("has_span", [True, False])
def test_what_is_said_outright(
    spoken: Callable[..., None], experiment_id: str, has_span: bool
) -> None:
    """In the driver's trace where a span was active there, else in that of the action."""
    assert_said_outright(spoken, experiment_id, has_span)


@pytest.mark.parametrize("has_span", [True, False])
@pytest.mark.parametrize("kind", ["database", "files"])
def test_where_the_driver_stores_what_workers_have_made(
    spoken: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    has_span: bool,
) -> None:
    """As on a laptop."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    where = f"sqlite:///{tmp_path}/mlflow.db" if kind == "database" else tmp_path.as_uri()
    mlflow.set_tracking_uri(where)
    experiment_id = mlflow.set_experiment("words").experiment_id
    assert_said_outright(spoken, experiment_id, has_span)


def test_what_is_said_in_a_child_process(
    spark: SparkSession, endpoint: OpenAIEndpoint, experiment_id: str
) -> None:
    """It is handed to the task with the child's spans."""
    function = forking(endpoint.base_url)
    with ctx_autolog.enable():
        with mlflow.start_span("job") as span:
            spark.range(0, 2, 1, 1).mapInPandas(function, SCHEMA).collect()
        info = info_of_job(experiment_id, span).trace.info
    assert_said(info)


def assert_said(info: Any) -> None:
    """Assert that what :func:`outright` says is known of a trace, and nothing more."""
    assert info.tags["fruit"] == "apple"
    assert info.tags["who"] == "row 1"
    assert info.trace_metadata["commit"] == "abc"
    assert info.trace_metadata["mlflow.trace.session"] == "session-of-a-task"
    assert info.client_request_id == "req-1"
    assert (info.request_preview, info.response_preview) == ("What was asked", "What was answered")
    assert info.state == "ERROR"
    assert info.token_usage["total_tokens"] > 0


def test_the_drivers_word_holds(
    spoken: Callable[..., None], experiment_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether it was said before the action or after it; and that it differs is said once."""
    with ctx_autolog.enable():
        with mlflow.start_span("job") as span:
            mlflow.update_current_trace(tags={"fruit": "pear"}, session_id="the driver's")
            spoken(outright)
            mlflow.update_current_trace(
                metadata={"commit": "def"}, request_preview="Of the driver", state="OK"
            )
        info = info_of_job(experiment_id, span).trace.info
    assert info.tags["fruit"] == "pear"
    assert info.trace_metadata["commit"] == "def"
    assert info.trace_metadata["mlflow.trace.session"] == "the driver's"
    assert info.state == "OK"
    assert (info.request_preview, info.response_preview) == ("Of the driver", "What was answered")
    assert info.tags["who"] == "row 1"
    (warning,) = [each for each in caplog.messages if "What is said of trace" in each]
    assert "'pear' on the driver, 'apple' for a task" in warning
    assert "What was asked" not in warning


def test_of_tasks_that_differ_the_latest_holds(
    spoken: Callable[..., None], experiment_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By the attempt, not by when it has ended; and that they differ is said once."""
    with ctx_autolog.enable():
        for _ in range(2):
            with mlflow.start_span("job") as span:
                spoken(outright, rows=2, partitions=2)
        trace = info_of_job(experiment_id, span)
    last = max(trace.tasks, key=lambda task: task.attributes["spark.task.attempt_id"])
    said = json.loads(json.dumps(last.attributes["mlflow_ctx_autolog.trace_update"]))
    assert trace.trace.info.tags["who"] == said["tags.who"] == "row 1"
    assert len([each for each in caplog.messages if "What is said of trace" in each]) == 1


def test_what_holds_around_a_call(
    spoken: Callable[..., None], experiment_id: str, server: TrackingServer
) -> None:
    """Declared for traces, an active run, an active model: said by the calls made in it."""
    uri = server.uri

    def declaring(number: int) -> Any:
        import contextlib

        import mlflow

        stack = contextlib.ExitStack()
        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment(experiment_id=experiment_id)
        if number == 0:
            run = stack.enter_context(mlflow.start_run())
            mlflow.set_tag("run of", run.info.run_id)
            mlflow.set_active_model(name="model-of-a-task")
        stack.enter_context(
            mlflow.tracing.context(tags={"fruit": "apple"}, session_id="s-1", user="u-1")
        )
        return stack

    with ctx_autolog.enable():
        with mlflow.start_span("job") as span:
            spoken(declaring)
        info = info_of_job(experiment_id, span).trace.info
    (run,) = mlflow.search_runs([experiment_id], output_format="list")
    (model,) = mlflow.search_logged_models([experiment_id], output_format="list")
    assert info.tags["fruit"] == "apple"
    assert info.trace_metadata["mlflow.trace.session"] == "s-1"
    assert info.trace_metadata["mlflow.trace.user"] == "u-1"
    assert info.trace_metadata["mlflow.sourceRun"] == run.info.run_id
    assert info.trace_metadata["mlflow.modelId"] == model.model_id


def test_prompts_are_linked(
    spoken: Callable[..., None], experiment_id: str, server: TrackingServer
) -> None:
    """Those of tasks beside those of the driver."""
    uri = server.uri
    for version in ("one", "two"):
        mlflow.genai.register_prompt(PROMPT, f"{version}: {{{{document}}}}")

    def loading(_: int) -> Any:
        import mlflow

        mlflow.set_tracking_uri(uri)
        mlflow.genai.load_prompt(f"prompts:/{PROMPT}/2")
        return mlflow.start_span("with prompt")

    with ctx_autolog.enable():
        with mlflow.start_span("job") as span:
            mlflow.genai.load_prompt(f"prompts:/{PROMPT}/1")
            spoken(loading)
        info = info_of_job(experiment_id, span).trace.info
    prompts = json.loads(info.tags["mlflow.linkedPrompts"])
    assert [each["version"] for each in prompts] == ["1", "2"]
    found = mlflow.search_traces(
        [experiment_id], filter_string=f"prompt = '{PROMPT}/2'", return_type="list"
    )
    assert [trace.info.trace_id for trace in found] == [span.trace_id]


def test_previews_are_content(spoken: Callable[..., None], experiment_id: str) -> None:
    """Without content they stay home, and all else that users want to see arrives."""
    with ctx_autolog.enable(capture_content=False):
        with mlflow.start_span("job") as span:
            spoken(outright)
        trace = info_of_job(experiment_id, span)
    info = trace.trace.info
    # What MLflow's list shows of the job instead is names and numbers.
    assert str(info.request_preview).startswith("speak on ")
    assert "call" in str(info.response_preview)
    assert "What was asked" not in trace.trace.to_json()
    assert (info.tags["fruit"], info.client_request_id) == ("apple", "req-1")


def test_of_a_task_that_fails(spoken: Callable[..., None], experiment_id: str) -> None:
    """No receipt comes home; its span says it."""

    def failing(number: int) -> Any:
        if number == 1:
            raise ValueError("of the user's")
        return outright(number)

    with ctx_autolog.enable():
        with mlflow.start_span("job") as span, pytest.raises(Exception, match="of the user's"):
            spoken(failing)
        info = info_of_job(experiment_id, span).trace.info
    assert info.tags["who"] == "row 0"
    assert info.client_request_id == "req-1"
