"""Settings: ranges, environment variables, and what may be done with a settings object."""

from __future__ import annotations

import dataclasses
import inspect
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import settings_page

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog import Config
from mlflow_ctx_autolog.config import (
    CAPTURE_CONTENT_VARIABLE,
    PROPAGATIONS,
    TRANSPORTS,
    UNCHANGED,
    Sampling,
)

ROOT = Path(__file__).parents[2]
NAMES = [field.name for field in dataclasses.fields(Config)]
FLAGS = ["strict", "capture_content", "propagate_headers", "join_trace", "progress", "quiet"]
FUNCTIONS = ["redact", "databricks_token"]
OTHERS = [
    "spool_directory",
    "transport",
    "propagation",
    "redact",
    "databricks_token",
    "forward_env",
    "prices",
    "cost_header",
    "name_calls_by",
    "sampling",
    "reuse_answers",
    "answers_key",
]
NUMBERS = [name for name in NAMES if name not in (*FLAGS, *OTHERS)]
# None of its settings is the default.
OTHER = Config(
    flush_timeout=2.5,
    batch_size=7,
    send_interval=0.5,
    spool_directory="/var/spool/spans",
    spool_max_bytes=1,
    max_waiting_bytes=2_000_000,
    strict=True,
    transport="driver",
    propagation="broadcast",
    capture_content=False,
    max_content_chars=100,
    redact=repr,
    databricks_token=str,
    propagate_headers=False,
    join_trace=True,
    forward_env=("MLFLOW_TRACKING_TOKEN",),
    max_calls=100,
    max_cost=2.5,
    max_repeats=10,
    prices={"gpt-x": (2.5, 10.0)},
    cost_header="x-cost",
    max_spans_per_trace=50,
    sampling="errors+5%",
    name_calls_by="doc_id",
    progress=True,
    quiet=True,
    reuse_answers="/answers",
    answers_key="$ANSWERS_KEY",
    max_answer_bytes=1,
)


def test_other_settings_are_all_other() -> None:
    """The settings that these tests copy differ from the defaults, each one."""
    defaults = Config().to_dict()
    assert [name for name, value in OTHER.to_dict().items() if value == defaults[name]] == []


@pytest.mark.parametrize(
    "settings",
    [
        {"flush_timeout": 0.001},
        {"flush_timeout": 3600},
        {"batch_size": 1},
        {"batch_size": 10_000},
        {"send_interval": 0.001},
        {"send_interval": 3600},
        {"spool_directory": None},
        {"spool_directory": "/var/spool/spans"},
        {"spool_max_bytes": 0},
        {"spool_max_bytes": 10**13},
        {"max_waiting_bytes": 1_000_000},
        {"max_waiting_bytes": 10**10},
        {"strict": True},
        {"max_content_chars": 1},
        {"max_content_chars": None},
        {"redact": len},
        {"forward_env": ("A", "_b2")},
        {"max_calls": 1},
        {"max_cost": 0.01},
        {"max_repeats": 0},
        {"prices": {"gpt-x": (0, 1e6)}},
        {"max_spans_per_trace": 10},
        {"max_spans_per_trace": None},
        {"sampling": "errors"},
        {"sampling": "slow + 0%"},
        {"sampling": "100%"},
        *({"transport": transport} for transport in TRANSPORTS),
        *({"propagation": propagation} for propagation in PROPAGATIONS),
    ],
)
def test_ends_of_each_range_are_allowed(settings: dict[str, Any]) -> None:
    """The limits that the documentation gives can be set themselves."""
    config = Config(**settings)

    assert {name: getattr(config, name) for name in settings} == settings


@pytest.mark.parametrize(
    ("settings", "value", "limits"),
    [
        ({"flush_timeout": 0}, "0", "more than 0 and at most 3,600"),
        ({"flush_timeout": -1.5}, "-1.5", "more than 0 and at most 3,600"),
        ({"flush_timeout": 3600.5}, "3600.5", "more than 0 and at most 3,600"),
        ({"flush_timeout": float("inf")}, "inf", "more than 0 and at most 3,600"),
        ({"flush_timeout": float("nan")}, "nan", "more than 0 and at most 3,600"),
        ({"batch_size": 0}, "0", "at least 1 and at most 10,000"),
        ({"batch_size": 10_001}, "10001", "at least 1 and at most 10,000"),
        ({"send_interval": 0.0}, "0.0", "more than 0 and at most 3,600"),
        ({"send_interval": 3601}, "3601", "more than 0 and at most 3,600"),
        ({"spool_max_bytes": -1}, "-1", "at least 0"),
        ({"max_waiting_bytes": 999_999}, "999999", "at least 1,000,000"),
        ({"max_content_chars": 0}, "0", "at least 1"),
        ({"max_calls": 0}, "0", "at least 1"),
        ({"max_cost": 0}, "0", "more than 0"),
        ({"max_repeats": -1}, "-1", "at least 0"),
        ({"max_spans_per_trace": 9}, "9", "at least 10"),
    ],
)
def test_value_out_of_range_is_refused(settings: dict[str, Any], value: str, limits: str) -> None:
    """A value out of range is refused with a message that names setting, value and range."""
    name = next(iter(settings))

    with pytest.raises(ValueError, match=re.escape(f"{name}={value} ")) as caught:
        Config(**settings)

    assert limits in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("flush_timeout", "30", "a number"),
        ("flush_timeout", None, "a number"),
        ("flush_timeout", True, "a number"),
        ("send_interval", [1], "a number"),
        ("batch_size", 1.0, "a whole number"),
        ("batch_size", "200", "a whole number"),
        ("batch_size", True, "a whole number"),
        ("spool_max_bytes", 1e9, "a whole number"),
        ("max_waiting_bytes", None, "a whole number"),
        ("spool_directory", 7, "a text"),
        ("spool_directory", Path("/var/spool"), "a text"),
        ("strict", 1, "True or False"),
        ("strict", "true", "True or False"),
        ("capture_content", None, "True or False"),
        ("propagate_headers", "no", "True or False"),
        ("max_content_chars", 1.5, "a whole number"),
        ("redact", "***", "a function"),
        ("forward_env", "TOKEN", "a list of names"),
        ("forward_env", None, "a list of names"),
        ("max_spans_per_trace", 2e3, "a whole number"),
        ("sampling", 0.05, "a text"),
    ],
)
def test_value_of_wrong_type_is_refused(name: str, value: Any, kind: str) -> None:
    """A value of another type is refused with a message that names the setting and the value."""
    with pytest.raises(TypeError, match=re.escape(f"{name}={value!r} is not {kind}")):
        Config(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
def test_number_beyond_floats_is_no_crash(name: str) -> None:
    """A whole number too large for a float is taken or refused like any other number."""
    if name.endswith(("bytes", "chars", "calls", "repeats", "per_trace")):
        assert getattr(Config(**{name: 10**400}), name) == 10**400
    else:
        with pytest.raises(ValueError, match=f"{name}=1000"):
            Config(**{name: 10**400})


@pytest.mark.parametrize("path", ["", "spools", "./spools", "~/spools"])
def test_relative_spool_directory_is_refused(path: str) -> None:
    """A directory that would be another one on each worker is refused with a reason."""
    with pytest.raises(ValueError, match="not an absolute path") as caught:
        Config(spool_directory=path)

    assert f"spool_directory={path!r}" in str(caught.value)


@pytest.mark.parametrize("transport", ["Direct", "", None, ["auto"]])
def test_unknown_transport_is_refused(transport: Any) -> None:
    """Another transport than those there are is refused with a message that lists them."""
    with pytest.raises(ValueError, match="is unknown") as caught:
        Config(transport=transport)

    for known in TRANSPORTS:
        assert known in str(caught.value)


def test_unknown_name_is_refused() -> None:
    """A misspelt setting is refused with a message that names it and lists the settings."""
    with pytest.raises(ValueError, match="'flush_time'") as caught:
        Config().updated({"flush_time": 1.0})

    for name in NAMES:
        assert name in str(caught.value)


def test_updated_changes_a_copy() -> None:
    """Changing a setting gives new settings and leaves the old ones as they were."""
    before = Config(batch_size=50)
    after = before.updated({"send_interval": 2.0})

    assert after == Config(batch_size=50, send_interval=2.0)
    assert before == Config(batch_size=50)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("errors+slow+5%", Sampling(errors=True, slow=True, share=0.05)),
        (" 2.5% + errors", Sampling(errors=True, share=0.025)),
        ("slow", Sampling(slow=True)),
        ("100%", Sampling(share=1.0)),
    ],
)
def test_sampling_is_read(text: str, parsed: Sampling) -> None:
    """In any order, and without what is not to be kept."""
    assert Sampling.parse(text) == parsed


@pytest.mark.parametrize(
    "text",
    ["", "5", "error", "errors,slow", "errors+", "101%", "-1%", "nan%", "%", "5%+5%", "1%+2%"],
)
def test_sampling_that_cannot_be_read_is_refused(text: str) -> None:
    """With its text, and what can be read."""
    with pytest.raises(ValueError, match="errors, slow and a percentage") as caught:
        Config(sampling=text)

    assert f"sampling={text!r}" in str(caught.value)


@pytest.mark.parametrize("name", ["", "A=1", "1A", "A B", 7])
def test_variables_to_forward_are_named(name: Any) -> None:
    """What cannot be the name of an environment variable is refused."""
    with pytest.raises(ValueError, match=f"forward_env holds {name!r}"):
        Config(forward_env=[name])


@pytest.mark.parametrize(
    ("text", "captures"),
    [("true", True), ("False", False), ("NO_CONTENT", False), ("span_and_event", True)],
)
def test_opentelemetrys_variable_on_content_is_heeded(text: str, captures: bool) -> None:
    """Unless the setting itself is given, by variable or keyword."""
    environment = {CAPTURE_CONTENT_VARIABLE: text}
    own = {**environment, "MLFLOW_CTX_AUTOLOG_CAPTURE_CONTENT": str(not captures)}

    assert Config.from_env(environment).capture_content is captures
    assert Config.from_env(own).capture_content is not captures
    assert (
        Config.from_env(environment, capture_content=not captures).capture_content is not captures
    )


def test_another_text_in_opentelemetrys_variable_is_refused() -> None:
    """Rather than taken for a yes, or for a no."""
    with pytest.raises(ValueError, match="MESSAGE_CONTENT='nope' is none of true, "):
        Config.from_env({CAPTURE_CONTENT_VARIABLE: "nope"})


def test_a_function_cannot_be_a_variable() -> None:
    """What cannot be given by environment variable says so."""
    with pytest.raises(ValueError, match="REDACT='len' is not a function"):
        Config.from_env({"MLFLOW_CTX_AUTOLOG_REDACT": "len"})


def test_updated_checks_ranges() -> None:
    """A changed setting must lie in its range, too."""
    with pytest.raises(ValueError, match="max_waiting_bytes=10 "):
        Config(batch_size=50).updated({"max_waiting_bytes": 10})


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("MLFLOW_CTX_AUTOLOG_FLUSH_TIMEOUT", "2.5", "flush_timeout", 2.5),
        ("MLFLOW_CTX_AUTOLOG_BATCH_SIZE", "17", "batch_size", 17),
        ("MLFLOW_CTX_AUTOLOG_SEND_INTERVAL", "3", "send_interval", 3),
        ("MLFLOW_CTX_AUTOLOG_SPOOL_DIRECTORY", "/var/spool", "spool_directory", "/var/spool"),
        ("MLFLOW_CTX_AUTOLOG_SPOOL_MAX_BYTES", "0", "spool_max_bytes", 0),
        ("MLFLOW_CTX_AUTOLOG_MAX_WAITING_BYTES", "5000000", "max_waiting_bytes", 5_000_000),
        ("MLFLOW_CTX_AUTOLOG_STRICT", "true", "strict", True),
        ("MLFLOW_CTX_AUTOLOG_STRICT", "True", "strict", True),
        ("MLFLOW_CTX_AUTOLOG_STRICT", "1", "strict", True),
        ("MLFLOW_CTX_AUTOLOG_STRICT", "FALSE", "strict", False),
        ("MLFLOW_CTX_AUTOLOG_STRICT", "0", "strict", False),
        ("MLFLOW_CTX_AUTOLOG_TRANSPORT", "driver", "transport", "driver"),
        ("MLFLOW_CTX_AUTOLOG_MAX_CONTENT_CHARS", "500", "max_content_chars", 500),
        ("MLFLOW_CTX_AUTOLOG_MAX_SPANS_PER_TRACE", "500", "max_spans_per_trace", 500),
        ("MLFLOW_CTX_AUTOLOG_MAX_SPANS_PER_TRACE", "None", "max_spans_per_trace", None),
        ("MLFLOW_CTX_AUTOLOG_SAMPLING", "errors+5%", "sampling", "errors+5%"),
        ("MLFLOW_CTX_AUTOLOG_FORWARD_ENV", "A, B,", "forward_env", ("A", "B")),
    ],
)
def test_environment_variable_sets_its_field(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, name: str, value: Any
) -> None:
    """Each setting has an environment variable, and the others keep their defaults."""
    # Which is set for all tests.
    monkeypatch.delenv("MLFLOW_CTX_AUTOLOG_SPOOL_DIRECTORY")
    monkeypatch.setenv(variable, text)

    assert Config.from_env() == dataclasses.replace(Config(), **{name: value})


def test_other_environment_variables_are_ignored() -> None:
    """Variables of MLflow and of others have no effect."""
    environment = {"MLFLOW_TRACKING_URI": "http://host", "BATCH_SIZE": "7", "PATH": "/bin"}

    assert Config.from_env(environment) == Config()


@pytest.mark.parametrize("text", ["", "many", "1,5", "0x10"])
@pytest.mark.parametrize("name", NUMBERS)
def test_environment_variable_that_is_no_number_is_refused(name: str, text: str) -> None:
    """A variable that holds no number is refused with a message that names it and its text."""
    variable = f"MLFLOW_CTX_AUTOLOG_{name.upper()}"

    with pytest.raises(ValueError, match=re.escape(f"{variable}={text!r} is not a number")):
        Config.from_env({variable: text})


@pytest.mark.parametrize("text", ["", "yes", "2", "tru"])
def test_environment_variable_that_is_no_flag_is_refused(text: str) -> None:
    """A variable that is neither true nor false is refused with a message that names both."""
    with pytest.raises(ValueError, match=re.escape(f"STRICT={text!r} is not true or false")):
        Config.from_env({"MLFLOW_CTX_AUTOLOG_STRICT": text})


def test_fraction_for_a_whole_number_is_refused() -> None:
    """A fraction in the variable of a setting that counts spans is refused, not cut off."""
    with pytest.raises(ValueError, match=re.escape("MLFLOW_CTX_AUTOLOG_BATCH_SIZE='2.5'")):
        Config.from_env({"MLFLOW_CTX_AUTOLOG_BATCH_SIZE": "2.5"})


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("MLFLOW_CTX_AUTOLOG_FLUSH_TIMEOUT", "nan"),
        ("MLFLOW_CTX_AUTOLOG_SEND_INTERVAL", "inf"),
        ("MLFLOW_CTX_AUTOLOG_BATCH_SIZE", "0"),
        ("MLFLOW_CTX_AUTOLOG_SPOOL_MAX_BYTES", "-1"),
        ("MLFLOW_CTX_AUTOLOG_MAX_WAITING_BYTES", "10"),
    ],
)
def test_environment_variable_out_of_range_is_refused(variable: str, text: str) -> None:
    """Values from the environment have the same ranges as keywords."""
    with pytest.raises(ValueError, match="out of range"):
        Config.from_env({variable: text})


def test_unknown_environment_variable_is_refused() -> None:
    """A misspelt variable is refused rather than silently without effect."""
    with pytest.raises(ValueError, match=r"(?i)flush_tiemout"):
        Config.from_env({"MLFLOW_CTX_AUTOLOG_FLUSH_TIEMOUT": "3"})


def test_keyword_wins_over_environment() -> None:
    """A setting given as a keyword counts, and the environment counts for the others."""
    environment = {"MLFLOW_CTX_AUTOLOG_BATCH_SIZE": "17", "MLFLOW_CTX_AUTOLOG_SEND_INTERVAL": "3"}

    assert Config.from_env(environment, batch_size=50) == Config(batch_size=50, send_interval=3.0)


def test_settings_cannot_be_changed_in_place() -> None:
    """Settings are fixed once made, so that they can be shared between threads."""
    config = Config()

    with pytest.raises(dataclasses.FrozenInstanceError):
        config.batch_size = 1  # type: ignore[misc]

    assert config == Config()


def test_settings_can_be_pickled_and_hashed() -> None:
    """Settings survive pickling, and equal settings are one key of a dictionary."""
    copy = pickle.loads(pickle.dumps(OTHER))

    assert copy == OTHER
    assert {OTHER: "found"}[copy] == "found"


def test_settings_as_a_dictionary_make_the_same_settings() -> None:
    """The dictionary is enough to make them again, but for the function among them."""
    without_function = dataclasses.replace(OTHER, redact=None, databricks_token=None)
    assert Config(**OTHER.to_dict()) == without_function
    assert Config(**json.loads(json.dumps(OTHER.to_dict()))) == without_function


def _arguments(docstring: str) -> dict[str, str]:
    """Return what the section "Args" of a docstring says of each."""
    section = docstring.partition("Args:\n")[2].partition("\n    Raises:")[0]
    found = re.findall(r"^        (\w+): (.*(?:\n            .*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def test_enable_takes_every_setting_by_keyword() -> None:
    """By the same name and of the same type, so that editors and type checkers know them."""
    parameters = inspect.signature(ctx_autolog.enable).parameters
    settings = {name: each for name, each in parameters.items() if each.default is UNCHANGED}

    assert list(settings) == NAMES
    assert {each.kind for each in settings.values()} == {inspect.Parameter.KEYWORD_ONLY}
    declared = {field.name: field.type for field in dataclasses.fields(Config)}
    assert {name: each.annotation for name, each in settings.items()} == declared


def test_every_setting_is_documented_once() -> None:
    """enable() says of each what the first sentence of Config's documentation says."""
    details = _arguments(Config.__doc__ or "")
    brief = _arguments(ctx_autolog.enable.__doc__ or "")

    assert list(details) == NAMES
    for name in NAMES:
        assert details[name].startswith(brief[name]), name


def test_the_page_of_settings_is_made_of_them() -> None:
    """Names, ranges, defaults and texts of docs/settings.md are those of Config."""
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == settings_page.page()


@pytest.mark.parametrize("name", [n for n in NAMES if n not in (*FUNCTIONS, "answers_key")])
def test_every_setting_can_be_a_variable(name: str) -> None:
    """What its kind writes into a variable, it reads back."""
    value = getattr(OTHER, name)
    text = json.dumps(value) if name == "prices" else value
    text = value.path if name == "reuse_answers" else text
    text = ",".join(value) if name == "forward_env" else str(text)

    found = Config.from_env({f"MLFLOW_CTX_AUTOLOG_{name.upper()}": text})
    assert getattr(found, name) == value


def test_differences_are_named_with_both_values() -> None:
    """Of the settings that differ, and of no others."""
    differing = Config(max_calls=10, strict=True).differences(Config(max_calls=20, strict=True))
    assert differing == {"max_calls": ("10", "20")}
