"""What is captured for a function is that of the moment, also where the last one is used again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.context import BY_PROPERTY, DriverContext
from mlflow_ctx_autolog.driver.handover import _shared

FLAG = "MLFLOW_TRACE_SAMPLING_RATIO"


@pytest.fixture
def enabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_experiment(experiment_id="0")
    with ctx_autolog.enable(spool_directory=str(tmp_path)):
        yield
    mlflow.flush_trace_async_logging(terminate=True)
    mlflow.set_tracking_uri(before)
    mlflow.tracing.reset()


def captured() -> DriverContext:
    return _shared(None, BY_PROPERTY)


def test_under_a_span_it_is_found_out_once(enabled: None) -> None:
    """Under another one it is found out again; without any, each time."""
    with mlflow.start_span("first"):
        first = captured()
        assert captured() is first
        with mlflow.start_span("below"):
            assert captured() is not first
            assert captured() == first
    other = captured()
    assert captured() is not other


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (lambda: ctx_autolog.enable(batch_size=7), lambda found: found.config.batch_size == 7),
        (
            lambda: mlflow.set_tracking_uri("http://127.0.0.1:9"),
            lambda found: found.tracking_uri == "http://127.0.0.1:9",
        ),
        (
            lambda: mlflow.openai.autolog(disable=True),
            lambda found: found.records_no_calls,
        ),
    ],
    ids=["settings", "store", "autolog"],
)
def test_what_the_user_changes_under_a_span_is_taken(
    enabled: None, change: Callable[[], object], changed: Callable[[DriverContext], bool]
) -> None:
    with mlflow.start_span("job"):
        assert not changed(captured())
        try:
            change()
            assert changed(captured())
        finally:
            mlflow.openai.autolog(disable=False)


def test_what_the_environment_says_under_a_span_is_taken(
    enabled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mlflow.start_span("job"):
        assert FLAG not in captured().environment
        monkeypatch.setenv(FLAG, "0.5")
        assert captured().environment[FLAG] == "0.5"
