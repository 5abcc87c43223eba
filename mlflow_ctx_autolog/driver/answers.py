"""What the driver sees to of answers that are kept: where they can be, and forgetting them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from mlflow_ctx_autolog.answers.directory import forget, problem
from mlflow_ctx_autolog.answers.entry import cipher
from mlflow_ctx_autolog.answers.task_answers import root_of
from mlflow_ctx_autolog.answers_settings import Answers, AnswersKey
from mlflow_ctx_autolog.driver.handover import settings
from mlflow_ctx_autolog.driver.spark import active_session, run_on_workers

__all__ = ["check_answers", "forget_answers"]


def check_answers(answers: Any, key: Any) -> None:
    """Raise where what is set cannot work, as far as it can be told from here.

    Args:
        answers: The setting ``reuse_answers``.
        key: The setting ``answers_key``.

    Raises:
        ValueError: The directory is none, or not to be used; or what is to hold the key holds none.
        ImportError: What encrypts is not installed.
    """
    if isinstance(answers, Answers) and answers.path is not None:
        # Where it is not there, workers may have it all the same.
        reason = problem(answers.path)
        if reason is not None:
            raise ValueError(f"reuse_answers={answers.path!r} cannot be used: {reason}")
    if isinstance(key, AnswersKey):
        if find_spec("cryptography") is None:
            cipher(str(key))
        try:
            key.secret()
        except ValueError:
            # Only the workers may have it.
            if not key.startswith("$"):
                raise


def forget_answers() -> int:
    """Remove at once all answers that are kept where the settings say; return how many.

    Those in files of each host are removed on the driver's host and, by a small Spark job where a
    session is active, on the hosts of its workers; what lies where none of its tasks happens to run
    is removed when its time is over. Of a directory that you have named, nothing else is removed.

    Raises:
        Exception: What Spark raises where that job fails.
    """
    config = settings()
    answers = config.reuse_answers
    if not isinstance(answers, Answers):
        answers = Answers()
    removed = forget(root_of(answers, config.spool_directory))
    session = active_session()
    if answers.path is None and session is not None:
        removed += sum(map(int, run_on_workers(session, forget_here, config.spool_directory or "")))
    return removed


def forget_here(spool_directory: str) -> str:
    """Remove all answers in files of this host; return how many, in digits.

    Args:
        spool_directory: Where spools are kept; "" for the default one.
    """
    return str(forget(root_of(Answers(), spool_directory or None)))
