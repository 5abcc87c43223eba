"""When Spark is told which span is active."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from mlflow_ctx_autolog.context import BY_BROADCAST, BY_PROPERTY, DriverContext
from mlflow_ctx_autolog.driver import propagation
from mlflow_ctx_autolog.driver.propagation import ActionPropagator
from mlflow_ctx_autolog.worker import submission
from mlflow_ctx_autolog.worker.spark_task import ACTION_PROPERTY


class Context:
    """A SparkContext, as far as it is told something: for each thread."""

    def __init__(self) -> None:
        self.told: list[tuple[int, str, str | None]] = []
        self.heard: str | None = None
        self._jsc = SimpleNamespace(
            setLocalProperty=self._set, getLocalProperty=lambda name: self.heard
        )

    def _set(self, name: str, value: str | None) -> None:
        self.told.append((threading.get_ident(), name, value))

    @property
    def texts(self) -> list[str | None]:
        assert {name for _, name, _ in self.told} <= {ACTION_PROPERTY}
        return [value for _, _, value in self.told]


class Driver:
    """Has a context, and says which span is active."""

    def __init__(self) -> None:
        self.context: Any = Context()
        self.span: str | None = None
        self.propagator = ActionPropagator(
            lambda: self.span, lambda: f"text of {self.span}", lambda request: None
        )

    def act(self, span: str | None) -> None:
        """Send a command to the JVM while a span is active."""
        self.span = span
        self.propagator._tell_jvm(None)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    driver = Driver()
    monkeypatch.setattr(propagation, "_active_spark_context", lambda: driver.context)
    monkeypatch.setattr(driver.propagator, "_is_on", True)
    return driver


def test_spark_is_told_where_the_span_is_another(driver: Driver) -> None:
    for span in ("one", "one", "other", None, None):
        driver.act(span)
    assert driver.context.texts == ["text of one", "text of other", "text of None"]


def test_a_context_that_is_new_is_told_what_the_old_one_knew(driver: Driver) -> None:
    driver.act("one")
    driver.context = Context()
    driver.act("one")
    driver.act("one")
    assert driver.context.texts == ["text of one"]


def test_a_context_that_has_stopped_is_told_nothing(driver: Driver) -> None:
    driver.context._jsc = None
    driver.act("one")
    driver.context = None
    driver.act("one")


def test_each_thread_says_its_own(driver: Driver) -> None:
    driver.act("one")
    other = threading.Thread(target=driver.act, args=("one",))
    other.start()
    other.join()
    driver.act("one")
    assert driver.context.texts == ["text of one"] * 2
    assert len({thread for thread, _, _ in driver.context.told}) == 2


def test_what_was_said_is_taken_back(driver: Driver) -> None:
    driver.act("one")
    driver.propagator.uninstall()
    driver.act("one")
    assert driver.context.texts == ["text of one", None]


def test_threads_that_spark_cannot_tell_apart_are_warned_of_once(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PYSPARK_PIN_THREAD", "false")
    monkeypatch.setattr("mlflow_ctx_autolog.exceptions._warned", set(), raising=False)
    driver.act("one")
    assert not caplog.messages
    for span in ("other", "third"):
        thread = threading.Thread(target=driver.act, args=(span,))
        thread.start()
        thread.join()
    assert len([each for each in caplog.messages if "PYSPARK_PIN_THREAD" in each]) == 1


def test_a_failure_to_tell_is_warned_of_and_passes(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str, value: str | None) -> None:
        raise ConnectionError("the JVM is gone")

    driver.context._jsc.setLocalProperty = fail
    driver.act("one")
    assert "the JVM is gone" in caplog.text


@pytest.mark.parametrize("heard", ["of the stream", None])
def test_a_thread_that_the_jvm_calls_on_keeps_what_it_has(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, heard: str | None
) -> None:
    """Unless a span is opened there, as long as it is active: the stream's calls are not theirs."""
    driver.context.heard = heard
    texts = {None: "none", "one": PARENT}
    monkeypatch.setattr(driver.propagator, "_text", lambda: texts[driver.span])

    def call() -> None:
        for span in (None, "one", None):
            driver.act(span)

    monkeypatch.setattr(propagation, "_is_of_jvm", lambda thread: True)
    call()
    assert driver.context.texts == [PARENT, heard]


PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
OTHER = "00-1af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        (None, "the driver did not say which span its action is of"),
        ("", "what the driver said of the action is damaged: ''"),
        (OTHER[:-1], "what the driver said of the action is damaged"),
        ("none;calls=many", "what the driver said of the action is damaged"),
    ],
)
def test_what_a_task_is_not_told_means_no_other_span(
    text: str | None,
    warning: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not that in which the carrier was made, but a trace of its own; and one warning says so."""
    monkeypatch.setattr(submission, "action_text", lambda: text)
    monkeypatch.setattr("mlflow_ctx_autolog.exceptions._warned", set())
    carrier = DriverContext("0", traceparent=PARENT, propagation=BY_PROPERTY)
    for _ in range(2):
        parent = submission.Submission("extract", carrier).context().traceparent
        assert parent is not None
        assert parent[:35] not in (PARENT[:35], OTHER[:35])
    (said,) = caplog.messages
    assert warning in said


def test_a_task_is_told_its_span(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the property, where the carrier asks for it; else the carrier names it."""
    monkeypatch.setattr(submission, "action_text", lambda: f"{OTHER};session=s;calls=3")
    carrier = DriverContext("0", traceparent=PARENT, propagation=BY_PROPERTY)
    context = submission.Submission("extract", carrier).context()
    assert (context.traceparent, context.session_id) == (OTHER, "s")
    assert context.spent == {"calls": 3.0}
    alone = DriverContext("0", traceparent=PARENT, propagation=BY_BROADCAST)
    assert submission.Submission("extract", alone).context().traceparent == PARENT
