"""The carrier: what the driver writes is what workers read, and damage is said plainly."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mlflow_ctx_autolog import CarrierError, Config, CtxAutologError, DriverContext
from mlflow_ctx_autolog.context import CARRIER_VERSION

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
FULL = DriverContext(
    tracking_uri="https://mlflow.example:5000/präfix",
    experiment_id="12",
    traceparent=TRACEPARENT,
    tracestate='rojo=00f067aa0ba902b7,quote="',
    session_id="session-1",
    application_id="app-20260101-0001",
    process_id="abc-42",
    config=Config(
        flush_timeout=2.5,
        batch_size=7,
        send_interval=0.5,
        spool_directory="/var/spool/späne",
        spool_max_bytes=0,
        max_waiting_bytes=2_000_000,
        strict=True,
        transport="direct",
    ),
)
BARE = DriverContext(tracking_uri="http://localhost:5000", experiment_id="0")

# Longer than any message should be, shorter than the damage in these tests.
SHORT = 400


def damaged(**fields: Any) -> str:
    return json.dumps({**json.loads(FULL.to_json()), **fields})


def without(name: str) -> str:
    document = json.loads(FULL.to_json())
    del document[name]
    return json.dumps(document)


@pytest.mark.parametrize(
    "context", [FULL, BARE, DriverContext("0")], ids=["full", "bare", "by way of the driver"]
)
def test_round_trip(context: DriverContext) -> None:
    """Workers read exactly what the driver captured, with or without an active span."""
    assert DriverContext.from_json(context.to_json()) == context


@pytest.mark.parametrize("flags", ["00", "01"])
def test_round_trip_keeps_the_sampling_decision(flags: str) -> None:
    """A span that was dropped by sampling is carried like any other."""
    context = DriverContext("0", "http://localhost", traceparent=f"{TRACEPARENT[:-2]}{flags}")

    assert DriverContext.from_json(context.to_json()).traceparent == context.traceparent


def test_carrier_says_its_version() -> None:
    """The text is a JSON object that says which version of the format it is written in."""
    assert json.loads(BARE.to_json())["version"] == CARRIER_VERSION


def test_only_required_fields_are_needed() -> None:
    """A carrier without the optional fields is read with their defaults."""
    text = json.dumps({"version": 1, "experiment_id": "0"})

    assert DriverContext.from_json(text) == DriverContext("0", tracking_uri=None, config=Config())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("not a carrier", "'not a carrier'"),
        (FULL.to_json()[:-1], "not JSON"),
        ("[1, 2]", "not a JSON object: '[1, 2]'"),
        ("null", "not a JSON object: 'null'"),
        ('"text"', "not a JSON object"),
        (without("experiment_id"), "experiment_id is None, not a text"),
        (damaged(experiment_id=12), "experiment_id is 12, not a text"),
        (damaged(tracking_uri=["a"]), "tracking_uri is ['a'], not a text"),
        (damaged(session_id=1.5), "session_id is 1.5, not a text"),
        (damaged(process_id={}), "process_id is {}, not a text"),
        (damaged(traceparent=7), "traceparent is 7, not a text"),
        (damaged(traceparent=""), "traceparent '' is not a W3C traceparent"),
        (damaged(traceparent=TRACEPARENT.upper()), "not a W3C traceparent"),
        (damaged(traceparent=TRACEPARENT[:-1]), "not a W3C traceparent"),
        (damaged(traceparent=f"{TRACEPARENT}\n"), "not a W3C traceparent"),
        (damaged(traceparent=f"00-{'0' * 32}-b7ad6b7169203331-01"), "not a W3C traceparent"),
        (damaged(traceparent=f"{TRACEPARENT[:36]}{'0' * 16}-01"), "not a W3C traceparent"),
        (damaged(config=None), "config cannot be used"),
        (damaged(config=5), "config cannot be used"),
        (damaged(config={"batch_size": 0}), "batch_size=0 is out of range"),
        (damaged(config={"batch_size": "7"}), "batch_size='7' is not a whole number"),
        (damaged(config={"spool_directory": "spools"}), "'spools' is not an absolute path"),
        (damaged(config={"spool_directory": 7}), "spool_directory=7 is not a text"),
        (damaged(config={"strict": "yes"}), "strict='yes' is not True or False"),
        (damaged(config={"transport": "post"}), "transport='post' is unknown"),
        (damaged(autologs=["anthropic"]), "autologs cannot be used"),
        (damaged(autologs={"anthropic": True}), "autologs cannot be used"),
        (damaged(autologs={"anthropic": {"extra": "text"}}), "autologs cannot be used"),
    ],
)
def test_damaged_carrier_is_refused(text: str, said: str) -> None:
    """A damaged carrier is refused with a message that says what is wrong with it."""
    with pytest.raises(CarrierError) as caught:
        DriverContext.from_json(text)

    assert said in str(caught.value)
    assert "carrier" in str(caught.value)


@pytest.mark.parametrize("text", [None, 7, ["a"]])
def test_no_text_at_all_is_refused(text: Any) -> None:
    """Something other than a text is refused as a damaged carrier, not by a crash."""
    with pytest.raises(CarrierError, match="not JSON"):
        DriverContext.from_json(text)


@pytest.mark.parametrize("config", [[], "abc"], ids=["list", "text"])
def test_config_that_is_no_object_is_refused(config: Any) -> None:
    """A carrier whose settings are no JSON object is damaged, not one with default settings."""
    with pytest.raises(CarrierError, match="config"):
        DriverContext.from_json(damaged(config=config))


def test_settings_too_large_for_a_float_are_refused_or_read() -> None:
    """A carrier with an absurd number in its settings does not crash the worker."""
    text = damaged(config={"flush_timeout": 10**400})

    with pytest.raises(CarrierError, match="flush_timeout"):
        DriverContext.from_json(text)


def test_deeply_nested_text_is_refused() -> None:
    """A text nested too deeply for the JSON parser is refused as a damaged carrier."""
    with pytest.raises(CarrierError):
        DriverContext.from_json("[" * 100_000)


def test_newer_version_is_refused() -> None:
    """A carrier of a newer format is refused with both versions and what to do about it."""
    with pytest.raises(CarrierError) as caught:
        DriverContext.from_json(damaged(version=987))

    message = str(caught.value)
    assert "version 987" in message
    assert f"version {CARRIER_VERSION};" in message
    assert "install the same mlflow-ctx-autolog" in message


def test_missing_version_is_refused() -> None:
    """A JSON object without a version is not taken for a carrier."""
    with pytest.raises(CarrierError, match="version None"):
        DriverContext.from_json(without("version"))


def test_unknown_fields_are_ignored() -> None:
    """Fields and settings that a later release may add do not stop an older worker."""
    config = {**FULL.config.to_dict(), "colour": "blue"}

    assert DriverContext.from_json(damaged(shoe_size=44, config=config)) == FULL


def test_missing_settings_keep_their_defaults() -> None:
    """Settings that the driver's release does not know yet have their default on the worker."""
    context = DriverContext.from_json(damaged(config={"batch_size": 7}))

    assert context.config == Config(batch_size=7)


@pytest.mark.parametrize(
    "text",
    [
        "x" * 1_000_000,
        json.dumps(["x" * 1_000_000]),
        damaged(version="x" * 1_000_000),
        damaged(traceparent="x" * 1_000_000),
        damaged(tracking_uri=["x" * 1_000_000]),
        damaged(config={"batch_size": "x" * 1_000_000}),
    ],
    ids=["not JSON", "not an object", "version", "traceparent", "field", "setting"],
)
def test_message_on_a_huge_damaged_carrier_is_short(text: str) -> None:
    """However large the damaged text, the message shows no more than its beginning."""
    with pytest.raises(CarrierError) as caught:
        DriverContext.from_json(text)

    assert len(str(caught.value)) < SHORT


def test_carrier_error_can_be_caught_by_its_bases() -> None:
    """A damaged carrier can be caught as a ValueError and as this library's error."""
    for base in (ValueError, CtxAutologError):
        with pytest.raises(base):
            DriverContext.from_json("damaged")


def test_context_is_a_value() -> None:
    """Equal contexts are equal keys, so that workers can tell one driver's context from another."""
    copy = DriverContext.from_json(FULL.to_json())

    assert {FULL: "found"}[copy] == "found"
    assert BARE not in {FULL}
