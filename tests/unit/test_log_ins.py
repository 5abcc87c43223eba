"""No log-in in any text, by what this process knows as well as by form."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import mlflow_ctx_autolog
from mlflow_ctx_autolog import log_ins
from mlflow_ctx_autolog.exceptions import StoreError
from mlflow_ctx_autolog.log_ins import (
    has_log_in,
    remember,
    safe_logger,
    without_credentials,
    without_log_ins,
)

SECRET = "planted-secret"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://bob:planted-secret@host:5000/a?b", "https://host:5000/a"),
        ("https://planted-secret@host/", "https://host/"),
        ("postgresql://db/mlflow?user=bob&password=planted-secret", "postgresql://db/mlflow"),
        ("mysql+pymysql://db/mlflow?passwd=planted-secret", "mysql+pymysql://db/mlflow"),
        ("https://mlflow.example/?token=planted-secret", "https://mlflow.example/"),
        ("postgresql://db/m?sslmode=require&passfile=/x", "postgresql://db/m?sslmode=require"),
        ("mssql+pyodbc:///?odbc_connect=UID%3Dsa%3BPWD%3Dplanted-secret", "mssql+pyodbc:///"),
        ("sqlite:////tmp/a.db?key=planted-secret&mode=ro", "sqlite:////tmp/a.db?mode=ro"),
        ("http://host?planted-secret", "http://host"),
    ],
)
def test_of_an_address_only_what_is_harmless_is_shown(uri: str, shown: str) -> None:
    assert without_credentials(uri) == shown
    assert has_log_in(uri)
    assert SECRET not in without_log_ins(f"cannot reach {uri}, says it")


@pytest.mark.parametrize(
    "uri",
    [
        *("http://host:5000", "https://host/path", "sqlite:////tmp/a@b.db", "databricks://profile"),
        *("postgresql://host/db?sslmode=require", "otlp+http://host:4318/v1/traces", "/a/folder"),
    ],
)
def test_an_address_without_a_log_in_is_shown_as_it_is(uri: str) -> None:
    assert without_credentials(uri) == uri
    assert not has_log_in(uri)
    assert without_log_ins(f"sent to {uri}.") == f"sent to {uri}."


@pytest.mark.parametrize(
    "text",
    [
        "Invalid header value: 'Bearer planted-secret\\n'",
        "Authorization: Basic planted-secret==",
        "{'api_key': 'planted-secret', 'x': 1}",
        '{"password": "planted-secret"}',
        "PWD=planted-secret;UID=sa",
        "https://x/?access_token=planted-secret failed",
    ],
)
def test_what_looks_like_a_log_in_is_taken_out(text: str) -> None:
    assert SECRET not in without_log_ins(text)
    assert SECRET not in str(StoreError(text))


@pytest.mark.parametrize(
    "name",
    [
        *("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "OPENAI_API_KEY", "DB_PWD"),
        *("AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "SOME_CREDENTIALS", "PROXY_AUTH"),
    ],
)
def test_what_this_process_has_as_a_secret_is_known_by_its_value(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also where a line break, quotes or an address have changed it."""
    monkeypatch.setenv(name, "pl@nted s3cret\n")
    for text in ("pl@nted s3cret", "pl%40nted%20s3cret", "pl%40nted+s3cret", "'pl@nted s3cret\\n'"):
        assert "s3cret" not in without_log_ins(f"it said {text} and no more")


def test_headers_in_a_variable_are_known_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=first%20one,y=second-one")
    text = without_log_ins("said first one, first%20one, second-one")
    assert "one" not in text


def test_a_directory_is_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """PWD is where a shell is."""
    monkeypatch.setenv("PWD", "/some/where")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    monkeypatch.setenv("SOME_AUTH", "true")
    monkeypatch.setenv("SOME_CREDENTIALS", __file__)
    text = f"no such file: /some/where/abc, is it true? not {__file__}"
    assert without_log_ins(text) == text


def test_what_was_told_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_ins, "_remembered", set())
    remember("hunter2-and-more", None, "x")
    assert without_log_ins("it is hunter2-and-more") == "it is ***"


def test_a_logger_writes_none(caplog: pytest.LogCaptureFixture) -> None:
    logger = safe_logger("mlflow_ctx_autolog.of_a_test")
    assert safe_logger("mlflow_ctx_autolog.of_a_test") is logger
    assert len(logger.filters) == 1
    with caplog.at_level(logging.INFO):
        logger.warning(
            "sent to %s by %r", "http://bob:planted-secret@host", "Bearer planted-secret"
        )
    (record,) = caplog.records
    assert record.getMessage() == "sent to http://host by 'Bearer ***'"


def test_ordinary_texts_stay_as_they_are() -> None:
    for text in (
        "it answered 500 Internal Server Error: max_tokens: 100 is too many",
        "3 spans made, 2 stored: total_tokens=12",
        "the token limit is 4096",
    ):
        assert without_log_ins(text) == text


def test_no_module_has_a_logger_that_writes_log_ins() -> None:
    """Each takes its logger from here."""
    package = Path(mlflow_ctx_autolog.__file__).parent
    plain = [
        str(path.relative_to(package))
        for path in sorted(package.rglob("*.py"))
        if "logging.getLogger(__name__)" in path.read_text(encoding="utf-8")
    ]
    assert plain == []
