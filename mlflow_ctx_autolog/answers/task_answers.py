"""Which answers one task attempt may be given: those that its partition was given before."""

from __future__ import annotations

import functools
import hashlib
import heapq
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from mlflow_ctx_autolog.answers.directory import ALWAYS, default_root
from mlflow_ctx_autolog.answers.entry import Entry, cipher
from mlflow_ctx_autolog.answers.request import request_digest
from mlflow_ctx_autolog.answers.store import AnswerStore, Shelf
from mlflow_ctx_autolog.answers_settings import Answers, AnswersKey
from mlflow_ctx_autolog.delivery.directory import default_directory, directory_problem
from mlflow_ctx_autolog.delivery.host_account import Event, HostAccount, open_account
from mlflow_ctx_autolog.exceptions import warn_once
from mlflow_ctx_autolog.log_ins import safe_logger

__all__ = [
    "CountedTurns",
    "Place",
    "Question",
    "TaskAnswers",
    "Turns",
    "job_of",
    "open_task_answers",
    "root_of",
]

_logger = safe_logger(__name__)

# Task attempts whose evaluations a host remembers, of each application: those that run, and more.
_REMEMBERED = 4096
# Seconds to wait at most for another process that looks.
_ACCOUNT_PATIENCE = 1.0
# When one ended that has not.
_NOT_ENDED = 1e99
# Seconds that the end of a task waits for the disk.
_PATIENCE = 2.0


@dataclass(frozen=True)
class Place:
    """What a task attempt is of, by which its answers are found again.

    Args:
        job: Names the job.
        function: Names the function, by the same name whenever it is the same.
        partition: Names the partition; None where there is none.
        attempt: Spark's application and its id of the attempt, between them a slash; "" where
            ``partition`` is known to name one evaluation.
    """

    job: str
    function: str
    partition: str | None
    attempt: str

    def to_json(self) -> str:
        return json.dumps([self.job, self.function, self.partition, self.attempt])

    @classmethod
    def from_json(cls, text: str) -> Place:
        return cls(*json.loads(text))


class Turns(Protocol):
    """Counts how many times a task attempt asks each request."""

    def take(self, request: str) -> int | None:
        """Return which time it is, from 0, that is not taken; None where nobody can tell."""

    def give_back(self, request: str, turn: int) -> None:
        """Say that it was not answered, so that it does not count."""


class CountedTurns:
    """Counts in this process, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next: dict[str, int] = {}
        self._free: dict[str, list[int]] = {}

    def take(self, request: str) -> int | None:
        with self._lock:
            if free := self._free.get(request):
                return heapq.heappop(free)
            turn = self._next.get(request, 0)
            self._next[request] = turn + 1
            return turn

    def give_back(self, request: str, turn: int) -> None:
        with self._lock:
            heapq.heappush(self._free.setdefault(request, []), turn)


class FirstTurn:
    """Where the request alone decides, it is always the first time."""

    def take(self, request: str) -> int | None:  # noqa: ARG002
        return 0

    def give_back(self, request: str, turn: int) -> None:
        """Nothing was counted."""


class Question:
    """One request that a task attempt asks, and the answer that it was given before, if any."""

    def __init__(self, answers: TaskAnswers, digest: str, turn: int) -> None:
        self._answers = answers
        self._digest = digest
        self._turn = turn
        self._name = f"{digest}.{turn}"

    def find(self) -> Entry | None:
        """Return the answer that was given before."""
        return self._answers.store.find(self._answers.shelf(self._digest), self._name)

    def keep(self, size: int, finish: Callable[[], Entry | None]) -> threading.Event | None:
        """Keep the answer that was given now; see :meth:`AnswerStore.keep`."""
        shelf = self._answers.shelf(self._digest)
        return self._answers.store.keep(shelf, self._name, size, finish)

    def give_back(self) -> None:
        """Say that it was not answered."""
        self._answers.turns.give_back(self._digest, self._turn)


class TaskAnswers:
    """The answers of one task attempt.

    Args:
        store: Where they are kept.
        place: What the attempt is of.
        answers: The settings.
        key: Of the digests of requests.
        turns: Counts requests; by default, this process's.
        spool_directory: Where the processes of a host share what they know of a task attempt.
    """

    def __init__(
        self,
        store: AnswerStore,
        place: Place,
        answers: Answers,
        key: bytes,
        turns: Turns | None = None,
        spool_directory: str | None = None,
    ) -> None:
        self.store = store
        self.place = place
        self._settings = answers
        self._key = key
        self._is_shared = answers.match == "request"
        self.turns: Turns = FirstTurn() if self._is_shared else turns or CountedTurns()
        self._expires = answers.seconds_kept if answers.scope == "always" else None
        self._spool_directory = spool_directory
        self._lock = threading.Lock()
        self._shelves: dict[str, Shelf] = {}
        self._evaluation: _Evaluation | None = None
        self._arrived = time.time()

    def question(
        self, method: str, url: str, headers: Iterable[tuple[str, str]], body: bytes
    ) -> Question | None:
        """Return what is asked; None where no other answer would do. See :func:`request_digest`."""
        digest = request_digest(method, url, headers, body, self._key)
        if digest is None or (turn := self.turns.take(digest)) is None:
            return None
        return Question(self, digest, turn)

    def shelf(self, digest: str) -> Shelf:
        """Return where the answers to a request lie."""
        part = digest[:2] if self._is_shared else ""
        if (found := self._shelves.get(part)) is not None:
            return found
        with self._lock:
            if part not in self._shelves:
                is_always = self._settings.scope == "always"
                job = ALWAYS if is_always else _digest(self._key, self.place.job)
                name = part or _digest(self._key, self.place.function, self.partition)
                self._shelves[part] = self.store.shelf(job, name, self._expires)
            return self._shelves[part]

    def arrived(self, at: float) -> None:
        """Say when the function came to this process, before it was given any row.

        Args:
            at: Seconds since the epoch.
        """
        self._arrived = at

    def locate(self, partition: int) -> None:
        """Say which partition of its RDD the attempt evaluates, before it asks anything."""
        self.place = replace(self.place, partition=f"rdd-{partition}", attempt="")

    @property
    def partition(self) -> str:
        """Names the partition, and how many others the attempt has evaluated before it."""
        if not self.place.attempt:
            return str(self.place.partition)
        if self._evaluation is None:
            self._evaluation = _Evaluation(self.place, self._arrived, self._spool_directory)
        return f"{self.place.partition}/{self._evaluation.name}"

    def located(self) -> str:
        """Return what a child process needs to ask on behalf of this attempt."""
        with self._lock:
            partition = self.place.partition if self._is_shared else self.partition
        return replace(self.place, partition=partition, attempt="").to_json()

    def close(self) -> None:
        """To be called at the end of the attempt: waits a moment for what is to be kept."""
        if self._evaluation is not None:
            self._evaluation.close()
        if not self.store.flush(_PATIENCE):
            warn_once(
                _logger,
                "slow",
                f"Calls may be made and paid for again, since {self.store.root} is too slow to "
                "keep all answers before the end of the task",
            )


class _Evaluations:
    """The partitions that the task attempts of a host have evaluated lately: what they share."""

    def __init__(self) -> None:
        # By attempt and function, and by the evaluation's id: its number, and when it ended.
        self._of: dict[tuple[str, str], dict[str, tuple[int, float]]] = {}

    def enter(self, event: Event) -> None:
        attempt, function, evaluation, number, ended = event
        found = self._of.setdefault((str(attempt), str(function)), {})
        found[str(evaluation)] = (int(number), float(ended))
        if len(self._of) > _REMEMBERED:
            del self._of[next(iter(self._of))]

    def events(self) -> list[Event]:
        return [
            [*key, evaluation, *facts]
            for key, found in self._of.items()
            for evaluation, facts in found.items()
        ]

    def number(self, attempt: str, function: str, arrived: float) -> int:
        """Return the number of an evaluation whose function has come at that time."""
        found = self._of.get((attempt, function), {}).values()
        same = [number for number, ended in found if ended > arrived]
        return max(same, default=max((number + 1 for number, _ in found), default=0))


class _Evaluation:
    """Which of the partitions that a task attempt evaluates this one is.

    Spark evaluates several in one attempt where coalesce() has put them together, one after the
    other, and calls all by one number. Where it evaluates one twice, as where the optimiser has
    duplicated a UDF, both get their function before one of them has ended. The processes of the
    host share what they know, since each evaluation can be in another one.
    """

    def __init__(self, place: Place, arrived: float, spool_directory: str | None) -> None:
        self.number = 0
        self._account: HostAccount[_Evaluations] | None = None
        self._event: Event = [place.attempt, place.function, uuid.uuid4().hex]
        application = place.attempt.partition("/")[0]
        self._account = open_account(
            spool_directory, application, "evaluations", _Evaluations, _ACCOUNT_PATIENCE
        )
        try:
            if not self._account.is_shared:
                raise OSError("the processes of this host share no file")
            with self._account.changing() as (known, tell):
                self.number = known.number(place.attempt, place.function, arrived)
                tell(*self._event, self.number, _NOT_ENDED)
        except OSError as error:
            # Rather than give two partitions one answer.
            self.name, self._account = uuid.uuid4().hex, None
            self._warn(error)
        else:
            self.name = str(self.number)

    def close(self) -> None:
        if self._account is not None:
            try:
                with self._account.changing() as (_, tell):
                    tell(*self._event, self.number, time.time())
            except OSError as error:
                self._warn(error)

    @staticmethod
    def _warn(error: OSError) -> None:
        warn_once(_logger, "evaluation", f"Calls of a task may be made and paid for again: {error}")


def open_task_answers(
    answers: Answers | None,
    place: Place | None,
    *,
    job_key: str | None,
    answers_key: AnswersKey | None,
    max_bytes: int,
    spool_directory: str | None,
    turns: Turns | None = None,
) -> TaskAnswers | None:
    """Return the answers of a task attempt; None where none are kept. Never raises.

    Args:
        answers: The settings.
        place: What the attempt is of; None where that is not known.
        job_key: A random key that the job's processes share; for digests.
        answers_key: With what answers are encrypted.
        max_bytes: Size of all answers at most.
        spool_directory: Where spools are kept; None for the default one.
        turns: See :class:`TaskAnswers`.
    """
    if answers is None or place is None:
        return None
    if place.partition is None and answers.match == "partition":
        return None
    try:
        secret = None if answers_key is None else answers_key.secret()
        root = root_of(answers, spool_directory)
        if answers.path is None:
            _make_private(root.parent, is_default=spool_directory is None)
        store = _store(root, answers.seconds_kept, max_bytes, secret, os.getpid())
    except (ImportError, OSError, ValueError) as error:
        warn_once(
            _logger,
            "open",
            f"Answers are neither kept nor given again by this worker, since {error}",
        )
        return None
    key = _key(secret or (root if answers.scope == ALWAYS else job_key or root))
    return TaskAnswers(store, place, answers, key, turns, spool_directory)


def root_of(answers: Answers, spool_directory: str | None) -> Path:
    """Return the directory of answers on this host."""
    if answers.path is not None:
        return Path(answers.path)
    return default_root(default_directory() if spool_directory is None else Path(spool_directory))


@functools.lru_cache(maxsize=8)
def _make_private(folder: Path, *, is_default: bool) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (reason := directory_problem(None if is_default else folder)) is not None:
        raise OSError(reason)


@functools.lru_cache(maxsize=8)
def _store(
    root: Path, ttl: float, max_bytes: int, secret: str | None, _process: int
) -> AnswerStore:
    """Return the store of a directory; a forked child has one of its own."""
    return AnswerStore(root, ttl, max_bytes, None if secret is None else cipher(secret))


def _key(secret: str | Path) -> bytes:
    return hashlib.blake2b(str(secret).encode(), person=b"answers").digest()


def _digest(key: bytes, *texts: str) -> str:
    text = json.dumps(texts)
    return hashlib.blake2b(text.encode(), key=key, digest_size=16).hexdigest()


def job_of(
    trace_id: str | None, application_id: str | None, facts: Mapping[str, Any]
) -> str | None:
    """Return what names the job of a task; None where nothing does.

    Args:
        trace_id: That of the driver.
        application_id: Spark's.
        facts: What Spark says of the task, as ``task_attributes()`` returns it.
    """
    job = trace_id or application_id
    batch = facts.get("spark.streaming.batch")
    return job if job is None or batch is None else f"{job}/{batch}"
