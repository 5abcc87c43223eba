"""Spans for a Unity Catalog table: sent as a workspace takes them, with a log-in that is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mlflow_ctx_autolog.delivery.records import Destination, Record
from mlflow_ctx_autolog.exceptions import StoreError, UnsupportedStoreError
from mlflow_ctx_autolog.stores import databricks
from mlflow_ctx_autolog.stores.access import access
from mlflow_ctx_autolog.stores.sending import appends, needs_mlflow, send
from mlflow_ctx_autolog.testing import DatabricksWorkspace

SPAN = Record("span", "a", b"\x0a\x00")
INFO = Record("trace", "tr-1", b"{}")
TABLE = "main.traces.legal_otel_spans"


@pytest.fixture
def workspace() -> Iterator[DatabricksWorkspace]:
    with DatabricksWorkspace("main.traces.legal") as found:
        yield found


@pytest.fixture(autouse=True)
def provide(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    for name in ("DATABRICKS_TOKEN", "DATABRICKS_HOST"):
        monkeypatch.delenv(name, raising=False)
    yield databricks.provide_token
    databricks.provide_token(None)


def place(workspace: DatabricksWorkspace, table: str = TABLE) -> Destination:
    return Destination(databricks.table_uri(workspace.uri), table)


def test_it_is_appended_to_without_mlflow(workspace: DatabricksWorkspace) -> None:
    uri = place(workspace).tracking_uri
    assert appends(uri)
    assert not needs_mlflow(uri)
    assert not appends("databricks")
    assert needs_mlflow("databricks")


def test_spans_go_to_the_table_in_one_request(workspace: DatabricksWorkspace) -> None:
    """With what the service asks for; what is known of a trace stays."""
    environ = {"DATABRICKS_TOKEN": workspace.token}
    send(place(workspace), [SPAN, INFO, SPAN], environ)
    assert workspace.spans == [(TABLE, SPAN.payload * 2)]
    send(place(workspace), [INFO], environ)
    assert len(workspace.received) == 1


def test_function_is_asked_again_when_its_token_has_ended(
    workspace: DatabricksWorkspace, provide: Callable[..., None]
) -> None:
    """Once for as long as one lasts, in place of a variable."""
    asked: list[str] = []

    def token() -> str:
        asked.append(workspace.token)
        return f"{workspace.token}\n"

    provide(token)
    for _ in range(3):
        send(place(workspace), [SPAN], {"DATABRICKS_TOKEN": "another"})
    workspace.renew_token()
    send(place(workspace), [SPAN], {})
    assert asked == ["not-a-token", "not-a-token-renewed"]
    assert len(workspace.spans) == 4


@pytest.mark.parametrize(
    ("token", "said"),
    [
        pytest.param(lambda: 1 / 0, "databricks_token raised ZeroDivisionError", id="raises"),
        pytest.param(lambda: None, "databricks_token returned NoneType", id="returns none"),
        pytest.param(lambda: "wrong", "answered 401", id="returns a wrong one"),
    ],
)
def test_function_that_is_of_no_use_is_said(
    workspace: DatabricksWorkspace, provide: Callable[..., None], token: Any, said: str
) -> None:
    """And the spans wait."""
    provide(token)
    with pytest.raises(StoreError, match=said) as caught:
        send(place(workspace), [SPAN], {})
    assert not caught.value.refused
    assert workspace.spans == []


def test_without_a_log_in_it_says_what_to_do(
    workspace: DatabricksWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(host: str) -> None:
        raise ImportError(host)

    monkeypatch.setattr(databricks, "_sdk_config", missing)
    with pytest.raises(StoreError, match=r"no log-in to .*name DATABRICKS_TOKEN in forward_env"):
        send(place(workspace), [SPAN], {})


def test_sdk_logs_in_where_nothing_else_does(
    workspace: DatabricksWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    sdk = pytest.importorskip("databricks.sdk.core")
    databricks._sdk_config.cache_clear()
    monkeypatch.setenv("DATABRICKS_TOKEN", workspace.token)
    assert sdk.Config(host=workspace.uri).authenticate()
    send(place(workspace), [SPAN], {})
    assert len(workspace.spans) == 1
    databricks._sdk_config.cache_clear()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        pytest.param(lambda workspace: workspace.throttle(1), "429", id="busy"),
        pytest.param(lambda workspace: workspace.renew_token(), "401", id="ended token"),
        pytest.param(lambda workspace: setattr(workspace, "longest", 1), "413", id="too large"),
        pytest.param(lambda workspace: setattr(workspace, "location", "a.b.c"), "404", id="table"),
    ],
)
def test_what_it_refuses_is_an_error(
    workspace: DatabricksWorkspace, spoil: Callable[[DatabricksWorkspace], Any], said: str
) -> None:
    environ = {"DATABRICKS_TOKEN": workspace.token}
    spoil(workspace)
    with pytest.raises(StoreError, match=said) as caught:
        send(place(workspace), [SPAN], environ)
    # By which the sender halves a batch.
    assert caught.value.refused == (said == "413")
    assert (caught.value.retry_after == 1) == (said == "429")
    assert workspace.spans == []


@pytest.mark.parametrize(
    ("spoil", "steps"),
    [
        pytest.param(lambda _: None, {"reach": None, "login": None, "experiment": None}, id="well"),
        pytest.param(lambda workspace: workspace.renew_token(), {"reach": None}, id="ended token"),
        pytest.param(
            lambda workspace: setattr(workspace, "location", "a.b.c"),
            {"reach": None, "login": None, "experiment": None},
            id="no such table",
        ),
        pytest.param(lambda workspace: workspace.close(), {}, id="away"),
    ],
)
def test_access_is_told_step_by_step(
    workspace: DatabricksWorkspace,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[DatabricksWorkspace], Any],
    steps: dict[str, None],
) -> None:
    """And nothing is stored for it."""
    monkeypatch.setenv("DATABRICKS_TOKEN", workspace.token)
    uri = str(place(workspace).tracking_uri)
    spoil(workspace)
    found = access(uri, TABLE)
    *before, last = found
    assert dict.fromkeys(before) == steps
    assert (found[last] is None) == (last == "write" and workspace.location == "main.traces.legal")
    assert b"".join(body for _, body in workspace.spans) == b""


@pytest.mark.parametrize("host", ["", "adb-1.2.azuredatabricks.net", "https://me:secret@host"])
def test_address_that_is_none_is_refused_without_being_shown(host: str) -> None:
    with pytest.raises(UnsupportedStoreError, match="workspace's address") as caught:
        databricks.table_uri(host)
    assert "secret" not in str(caught.value)
