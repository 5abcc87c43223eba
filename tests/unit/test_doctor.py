"""What ``doctor()`` and ``enable()`` find on a driver, each cause provoked for real."""

from __future__ import annotations

import contextlib
import html
import importlib
import importlib.util
import json
import socket
import sqlite3
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import openai
import openai.resources.chat.completions
import pytest
from mlflow.entities.trace_location import MlflowExperimentLocation
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from mlflow.tracing.client import TracingClient

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog import cli
from mlflow_ctx_autolog.delivery.spool import Destination
from mlflow_ctx_autolog.diagnosis.check import Finding, Level
from mlflow_ctx_autolog.driver import spark
from mlflow_ctx_autolog.recorder.layers import _CALLS
from mlflow_ctx_autolog.stores.tracking_store import PROBE_TAG
from mlflow_ctx_autolog.testing import Status, UnreliableProxy

Completions = openai.resources.chat.completions.Completions


def causes(diagnosis: ctx_autolog.Diagnosis) -> dict[str, str]:
    """Return what does not pass, by check; each is on the driver here."""
    complaints = [*diagnosis.failures, *diagnosis.warnings]
    assert {finding.where for finding in complaints} <= {"driver", "job"}
    return {finding.check: finding.level for finding in complaints}


@pytest.fixture
def store(database: Destination) -> Iterator[Destination]:
    """A store in which nothing of the doctor's remains."""
    yield database
    with sqlite3.connect(str(database.tracking_uri).removeprefix("sqlite:///")) as connection:
        query = "SELECT count(*) FROM spans WHERE name LIKE '%doctor%'"
        assert connection.execute(query).fetchone() == (0,)


@pytest.fixture
def tracing_is_restored() -> Iterator[None]:
    yield
    mlflow.tracing.enable()


def test_a_driver_on_which_all_is_well(store: Destination) -> None:
    """Nothing is found; without a Spark session, what needs one is said not to be known."""
    diagnosis = ctx_autolog.doctor()

    assert causes(diagnosis) == {}
    by_check = {finding.check: finding for finding in diagnosis.findings}
    assert by_check["experiment_is_writable"].found == "a span was stored"
    assert by_check["workers_answer"].level == "unknown"
    assert "there is no Spark session" in by_check["round_trip"].found


def test_a_store_where_nobody_listens(store: Destination) -> None:
    """A wrong tracking URI is found in a moment, and nothing else is put down to it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
    mlflow.set_tracking_uri(uri)
    diagnosis = ctx_autolog.doctor()

    assert causes(diagnosis) == {"store_is_reachable": "fail"}
    (failure,) = diagnosis.failures
    assert uri in failure.found
    assert "mlflow.set_tracking_uri" in failure.advice


def test_the_command_tells_by_its_status(
    store: Destination, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """2 for what cannot work, in so many words."""
    monkeypatch.setattr(
        spark, "started_session", lambda master, remote: contextlib.nullcontext((None, None))
    )
    assert cli.main(["doctor"]) == 0
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    assert cli.main(["doctor"]) == 2
    assert "http://127.0.0.1:9" in capsys.readouterr().out


def test_a_probe_that_cannot_be_deleted_is_tagged(
    database: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a log-in may write, but not delete, the trace says what it was."""

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise MlflowException("not for you", error_code=PERMISSION_DENIED)

    monkeypatch.setattr(TracingClient, "delete_traces", forbidden)
    diagnosis = ctx_autolog.doctor()

    assert causes(diagnosis) == {}
    (trace,) = mlflow.search_traces(
        locations=["0"], filter_string=f"tag.`{PROBE_TAG}` = 'true'", return_type="list"
    )
    assert [span.name for span in trace.data.spans] == ["mlflow-ctx-autolog doctor"]


@pytest.mark.parametrize(
    ("status", "cause"), [(401, "log_in_is_accepted"), (503, "store_is_reachable")]
)
def test_a_store_that_does_not_let_in(store: Destination, status: int, cause: str) -> None:
    """A log-in that is refused is told from a server that does not work."""
    with UnreliableProxy("http://127.0.0.1:9") as proxy:
        proxy.mode = Status(status)
        mlflow.set_tracking_uri(proxy.uri)
        diagnosis = ctx_autolog.doctor()

    assert causes(diagnosis) == {cause: "fail"}
    assert str(status) in diagnosis.failures[0].found


def test_an_experiment_whose_name_is_unknown(
    store: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An experiment that the environment names and the store does not have is found."""
    mlflow.tracing.reset()
    monkeypatch.setattr("mlflow.tracking.fluent._active_experiment_id", None)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "4711")
    diagnosis = ctx_autolog.doctor()

    assert causes(diagnosis) == {"experiment_exists": "fail"}
    assert "4711" in diagnosis.failures[0].found


@pytest.mark.parametrize("what", ["deleted", "missing"])
def test_an_experiment_that_is_gone(store: Destination, what: str) -> None:
    """An experiment that was deleted after this process had chosen it is found."""
    experiment = mlflow.set_experiment("gone")
    number = experiment.experiment_id
    if what == "deleted":
        mlflow.delete_experiment(number)
    else:
        number = "4711"
        mlflow.tracing.set_destination(MlflowExperimentLocation(number))
    try:
        diagnosis = ctx_autolog.doctor()
    finally:
        mlflow.tracing.reset()

    assert causes(diagnosis) == {"experiment_exists": "fail"}
    assert f"the experiment {number}" in diagnosis.failures[0].found


def test_an_experiment_that_takes_nothing(store: Destination) -> None:
    """That reading is allowed and writing is not is found by writing."""
    with sqlite3.connect(str(store.tracking_uri).removeprefix("sqlite:///")) as connection:
        connection.execute(
            "CREATE TRIGGER refuse BEFORE INSERT ON spans "
            "BEGIN SELECT RAISE(ABORT, 'you may not write'); END"
        )
    diagnosis = ctx_autolog.doctor()

    assert causes(diagnosis) == {"experiment_is_writable": "fail"}
    assert "you may not write" in diagnosis.failures[0].found


def test_a_file_store(store: Destination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of files takes no spans of workers: a warning that says how they travel."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "files").as_uri())
    diagnosis = ctx_autolog.doctor()

    assert causes(diagnosis) == {"spans_can_travel": "warn"}
    assert "file store" in diagnosis.warnings[0].found


def test_a_transport_that_cannot_be_had(
    store: Destination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What enable() would raise is one failure."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_CTX_AUTOLOG_TRANSPORT", "direct")
    mlflow.set_tracking_uri((tmp_path / "files").as_uri())

    assert causes(ctx_autolog.doctor()) == {"spans_can_travel": "fail"}


def test_a_collector_instead_of_a_store(
    store: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where spans go to a collector, nothing is asked of it that only a tracking store knows."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    diagnosis = ctx_autolog.doctor()

    assert causes(diagnosis) == {}
    by_check = {finding.check: finding for finding in diagnosis.findings}
    assert "OTLP endpoint" in by_check["spans_can_travel"].found
    assert by_check["store_is_reachable"].level == "unknown"


def test_buffers_that_are_set_low(store: Destination, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings by which MLflow drops spans are named with their values."""
    monkeypatch.setenv("MLFLOW_ASYNC_TRACE_LOGGING_MAX_QUEUE_SIZE", "10")
    monkeypatch.setenv("MLFLOW_TRACE_BUFFER_TTL_SECONDS", "7200")
    diagnosis = ctx_autolog.doctor()

    assert causes(diagnosis) == {"nothing_is_forgotten": "warn"}
    assert "MLFLOW_ASYNC_TRACE_LOGGING_MAX_QUEUE_SIZE=10" in diagnosis.warnings[0].found
    assert "TTL" not in diagnosis.warnings[0].found


def switch_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow.tracing.disable()


def disable_opentelemetry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")


def sample_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", "0")


def put_a_file_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFLOW_CTX_AUTOLOG_SPOOL_DIRECTORY", str(tmp_path / "file" / "spools"))


def wrap_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In the shape in which Langfuse and others do it: a wrapt proxy around the method.
    wrapt = pytest.importorskip("wrapt")

    def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return wrapped(*args, **kwargs)

    wrapper.__module__ = "langfuse.openai"
    monkeypatch.setattr(Completions, "create", wrapt.FunctionWrapper(Completions.create, wrapper))


FAULTS = [
    (switch_off, "tracing_is_on", "fail"),
    (disable_opentelemetry, "tracing_is_on", "fail"),
    (sample_nothing, "all_is_sampled", "fail"),
    (put_a_file_in_the_way, "spool_is_writable", "fail"),
    (wrap_calls, "nobody_else_traces", "warn"),
]


@pytest.mark.usefixtures("tracing_is_restored")
@pytest.mark.parametrize(("provoke", "check", "level"), FAULTS)
def test_what_enable_finds_too(
    store: Destination,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    provoke: Callable[[Path, pytest.MonkeyPatch], None],
    check: str,
    level: str,
) -> None:
    """The doctor names the cause and no other; enable() warns once of it, or raises if strict."""
    provoke(tmp_path, monkeypatch)
    diagnosis = ctx_autolog.doctor()
    assert causes(diagnosis) == {check: level}
    (found,) = [each for each in diagnosis.findings if each.check == check]

    with pytest.warns(ctx_autolog.CtxAutologWarning) as warned:
        ctx_autolog.enable()
    assert len(warned) == 1
    assert str(found) in str(warned[0].message)
    assert warned[0].filename == __file__
    ctx_autolog.disable()

    with pytest.raises(ctx_autolog.DiagnosisError) as caught:
        ctx_autolog.enable(strict=True)
    assert caught.value.findings == (found,)
    assert found.advice in str(caught.value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ctx_autolog.disable()


def test_a_share_that_the_user_has_chosen(
    store: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling a share is a warning of the doctor's, and for enable() nothing to speak of."""
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", "0.5")

    assert causes(ctx_autolog.doctor()) == {"all_is_sampled": "warn"}
    with ctx_autolog.enable(strict=True):
        pass


def instrument_by_openinference() -> None:
    module = pytest.importorskip("openinference.instrumentation.openai")
    module.OpenAIInstrumentor().instrument()


def instrument_by_openllmetry() -> None:
    module = pytest.importorskip("opentelemetry.instrumentation.openai")
    module.OpenAIInstrumentor().instrument()


def instrument_by_langfuse() -> None:
    # Which wraps the client as it is imported.
    pytest.importorskip("langfuse.openai")


def instrument_by_ddtrace() -> None:
    pytest.importorskip("ddtrace").patch(openai=True)


@pytest.mark.parametrize(
    ("instrument", "name"),
    [
        (instrument_by_openinference, "OpenInference"),
        (instrument_by_openllmetry, "OpenLLMetry"),
        (instrument_by_langfuse, "Langfuse"),
        (instrument_by_ddtrace, "ddtrace"),
    ],
)
def test_a_real_instrumentation(
    store: Destination,
    monkeypatch: pytest.MonkeyPatch,
    instrument: Callable[[], None],
    name: str,
) -> None:
    """A library that instruments the client is found by what it leaves on the client."""
    for where, path in _CALLS:
        # To have back what it does not clean up.
        owner, _, method = path.partition(".")
        holder = getattr(importlib.import_module(where), owner)
        if method in vars(holder):
            monkeypatch.setattr(holder, method, vars(holder)[method])
    mlflow.openai.autolog()
    instrument()
    diagnosis = ctx_autolog.doctor()

    assert causes(diagnosis) == {"nobody_else_traces": "warn"}
    assert name in diagnosis.warnings[0].found


SECRETS = {
    "MLFLOW_TRACKING_TOKEN": "token-that-is-secret",
    "OPENAI_API_KEY": "sk-that-is-secret",
    "DATABRICKS_TOKEN": "dapi-that-is-secret",
    "COMPANY_PASSWORD": "word-that-is-secret",
}


def test_no_secret_is_shown(store: Destination, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what secret variables hold nor what a URI does is in any form of the diagnosis."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HTTPS_PROXY", "http://user:proxy-that-is-secret@127.0.0.1:9")
    with UnreliableProxy("http://127.0.0.1:9") as proxy:
        proxy.mode = Status(401)
        host = proxy.uri.removeprefix("http://")
        mlflow.set_tracking_uri(
            f"http://name-that-is-secret:uri-that-is-secret@{host}/?key=query-that-is-secret"
        )
        diagnosis = ctx_autolog.doctor()

    assert causes(diagnosis)["log_in_is_accepted"] == "fail"
    shown = f"{diagnosis} {diagnosis._repr_html_()} {json.dumps(diagnosis.to_dict())} {diagnosis!r}"
    assert "MLFLOW_TRACKING_TOKEN" in shown
    assert "that-is-secret" not in shown


def test_the_diagnosis_says_first_what_counts(store: Destination) -> None:
    """Then what is not right, and the rest in a line; in a notebook it escapes what it shows."""
    advice = "do <b>this</b>"
    diagnosis = ctx_autolog.Diagnosis(
        (
            Finding("well", "All is well", "driver", "pass", "it is", ""),
            Finding("odd", "C", "workers", "warn", "odd", "look"),
            Finding("name", "A & B", "driver", "fail", "<script>", advice),
            Finding("other", "D", "job", "unknown", "could not be found out", ""),
        ),
        1.44,
    )

    assert str(diagnosis).splitlines() == [
        "Traces will be missing: 1 thing is wrong.",
        "FAIL  driver   A & B: <script>",
        f"{' ' * 15}-> {advice}",
        "WARN  workers  C: odd",
        f"{' ' * 15}-> look",
        "1 check passed, 1 could not be made (D), in 1.4 s.",
    ]
    assert "\x1b" not in repr(diagnosis)
    assert diagnosis.to_text(colour=True).startswith("\x1b[31mTraces will be missing")
    page = diagnosis._repr_html_()
    assert html.escape(advice) in page
    assert "<script>" not in page
    told = json.loads(json.dumps(diagnosis.to_dict()))
    assert told["findings"][2]["level"] == "fail"
    assert told["verdict"] == "Traces will be missing: 1 thing is wrong."


@pytest.mark.parametrize(
    ("round_trip", "odd", "verdict"),
    [
        ("pass", 0, "A call made in a Spark task arrived under the driver's trace."),
        (
            "pass",
            2,
            "A call made in a Spark task arrived under the driver's trace; 2 things are to be "
            "looked at.",
        ),
        (
            "unknown",
            0,
            "Nothing is known to be wrong, and whether a call arrives was not tried, since X.",
        ),
    ],
)
def test_the_verdict_claims_no_more_than_was_seen(
    round_trip: Level, odd: int, verdict: str
) -> None:
    """Only where a call has arrived does it say so."""
    found = "not tried, since X" if round_trip == "unknown" else "read back"
    findings = [Finding("round_trip", "it arrives", "job", round_trip, found, "")]
    findings += [Finding("odd", "C", "workers", "warn", "odd", "look")] * odd

    assert ctx_autolog.Diagnosis(tuple(findings), 1.0).verdict() == verdict


def test_no_store_at_all_is_found_first(
    store: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where MLflow lacks what its default store takes, doctor() and enable() say it, and how."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "sqlalchemy" else find_spec(name, *more),
    )
    diagnosis = ctx_autolog.doctor()
    first = diagnosis.failures[0]

    assert causes(diagnosis) == {"there_is_a_store": "fail"}
    assert (
        "MLflow has a tracking store: no tracking store: the tracking URI is sqlite:"
        in (str(diagnosis).splitlines()[1])
    )
    assert "pip install mlflow" in first.advice
    with pytest.warns(ctx_autolog.CtxAutologWarning, match=r"no tracking store: .* no store of"):
        ctx_autolog.enable()
