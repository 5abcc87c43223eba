"""What may be said of answers that are kept, and what is refused."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog import Answers, Config
from mlflow_ctx_autolog.answers_settings import AnswersKey
from mlflow_ctx_autolog.driver.answers import check_answers

KEY = "0123456789abcdef0123456789abcdef0123456789A="


@pytest.mark.parametrize(
    ("value", "answers"),
    [
        (None, None),
        (False, None),
        (True, Answers()),
        ("/answers/", Answers("/answers")),
        (Path("/answers"), Answers("/answers")),
        ("same request", Answers(match="request")),
        (Answers("/a", scope="always"), Answers("/a", scope="always", ttl=7 * 24 * 3600.0)),
    ],
)
def test_what_it_takes(value: Any, answers: Answers | None) -> None:
    config = Config(reuse_answers=value)
    assert config.reuse_answers == answers
    # As it travels.
    assert Config().updated(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("answers", ValueError, "reuse_answers='answers' is not an absolute path"),
        ("", ValueError, "reuse_answers='' is not an absolute path"),
        (7, TypeError, "reuse_answers=7 is of the wrong type; it must be True, False, an absolute"),
        ([], TypeError, "reuse_answers"),
    ],
)
def test_what_it_refuses(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.replace("(", r"\(")):
        Config(reuse_answers=value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": "relative"}, ValueError, "'relative' is not an absolute path"),
        ({"path": 7}, TypeError, "7 is of the wrong type"),
        ({"scope": "day"}, ValueError, "scope='day'.* must be one of job, always"),
        ({"match": "row"}, ValueError, "match='row'.* must be one of partition, request"),
        ({"scope": "always"}, ValueError, "needs a path"),
        ({"ttl": 0}, ValueError, "ttl=0.* must be more than 0"),
        ({"ttl": "1h"}, TypeError, "ttl='1h'.* is not a number of seconds"),
        ({"ttl": True}, TypeError, "ttl=True"),
        ({"ttl": float("nan")}, ValueError, "ttl=nan"),
    ],
)
def test_what_answers_refuse(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Answers(**arguments)


@pytest.mark.parametrize(
    ("text", "answers"),
    [("true", Answers()), ("0", None), ("/answers", Answers("/answers"))],
)
def test_by_variable(text: str, answers: Answers | None) -> None:
    config = Config.from_env({"MLFLOW_CTX_AUTOLOG_REUSE_ANSWERS": text})
    assert config.reuse_answers == answers


def test_a_key_is_not_shown_and_travels_only_where_it_is_named() -> None:
    """Given to enable(), it travels; from a variable, the workers need that variable."""
    config = Config(answers_key=KEY)
    assert KEY not in repr(config)
    assert config.to_dict()["answers_key"] == KEY
    assert config.answers_key.secret() == KEY  # type: ignore[union-attr]
    by_variable = Config.from_env({"MLFLOW_CTX_AUTOLOG_ANSWERS_KEY": KEY})
    assert KEY not in json.dumps(by_variable.to_dict())
    found = by_variable.answers_key
    assert isinstance(found, AnswersKey)
    assert found.secret({"MLFLOW_CTX_AUTOLOG_ANSWERS_KEY": KEY}) == KEY
    with pytest.raises(ValueError, match=r"MLFLOW_CTX_AUTOLOG_ANSWERS_KEY.* is not set"):
        found.secret({})
    with pytest.raises(ValueError, match="MLFLOW_CTX_AUTOLOG_ANSWERS_KEY is no key"):
        found.secret({"MLFLOW_CTX_AUTOLOG_ANSWERS_KEY": "secret"})


@pytest.mark.parametrize("key", ["short secret", "x" * 44, f"{KEY}=", b"short secret"])
def test_what_is_no_key_is_refused_unseen(key: Any) -> None:
    with pytest.raises(ValueError, match=r"answers_key is no key, a text of .*Fernet") as error:
        Config(answers_key=key)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("key", [7, "$not a name", "$"])
def test_other_keys_that_are_none(key: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="answers_key"):
        Config(answers_key=key)


def test_without_cryptography_a_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.setitem(sys.modules, "cryptography.fernet", None)
    with pytest.raises(ImportError, match="pip install 'mlflow-ctx-autolog\\[answers\\]'"):
        check_answers(None, AnswersKey(KEY))


def test_enable_refuses_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    """What can be told on the driver is told there, with the reason."""
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match=r"reuse_answers='.*file' cannot be used: .*not a direct"):
        ctx_autolog.enable(reuse_answers=str(file))
    tmp_path.chmod(0o777)
    with pytest.raises(ValueError, match=r"other users may write to .*mode 0777.*chmod go-w"):
        ctx_autolog.enable(reuse_answers=str(tmp_path))
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o777
    # Only the workers may see it.
    check_answers(Answers(str(tmp_path / "not" / "there")), None)
