"""Where the OpenAI client sends its requests: those that were answered before are not sent."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any, Protocol

from mlflow_ctx_autolog.answers.entry import Entry
from mlflow_ctx_autolog.answers.replay import Recording, is_readable, recorded, replayed
from mlflow_ctx_autolog.answers.task_answers import Question, TaskAnswers
from mlflow_ctx_autolog.exceptions import UnsupportedVersionError, warn_once
from mlflow_ctx_autolog.log_ins import safe_logger
from mlflow_ctx_autolog.patching import Patch

__all__ = ["CallInProgress", "ReusedAnswers"]

_logger = safe_logger(__name__)

# Where httpx sends one request, with all its headers, and all that it sends goes through.
_SEND = "_send_single_request"
# Seconds that a call waits for its answer to be on the disk. Where that takes longer, it follows.
_PATIENCE = 0.001
# An answer that is larger is not kept.
_LARGEST = 64 * 1024 * 1024


class CallInProgress(Protocol):
    """A call of a traced task, as long as the client is about it."""

    @property
    def answers(self) -> TaskAnswers | None:
        """The answers of its task; None where it is to be made in any case."""

    @property
    def name(self) -> str:
        """What its span is called among all: ``trace_id/span_id``; "" where it has none."""

    def admit(self) -> None:
        """The client is about to send a request. What this raises, the call raises."""

    def reused(self, paid_by: str) -> None:
        """It gets the answer that another call was given, and nothing is sent.

        Args:
            paid_by: That call's :attr:`name`.
        """


class ReusedAnswers:
    """Gives the calls of tasks the answers that were paid for before, and keeps new ones.

    Args:
        current: Returns the call that is being made in this execution context; None where there is
            none, or none of a task.
    """

    def __init__(self, current: Callable[[], CallInProgress | None]) -> None:
        self._current = current
        self._patches: dict[type, Patch] = {}
        self._exchange: contextvars.ContextVar[_Exchange | None] = contextvars.ContextVar(
            "ctx_autolog_exchange", default=None
        )

    def uninstall(self) -> None:
        """Leave httpx as it was. Idempotent."""
        for patch in self._patches.values():
            patch.revert()

    def request(
        self, original: Callable[..., Any], client: Any, /, *args: Any, **kwargs: Any
    ) -> Any:
        """Have a client make a request, all its attempts of it: ``original(client, ...)``."""
        exchange = self._begin(client)
        if exchange is None:
            return original(client, *args, **kwargs)
        token = self._exchange.set(exchange)
        try:
            return original(client, *args, **kwargs)
        except _NotAdmitted as refused:
            raise refused.error from None
        finally:
            self._exchange.reset(token)
            exchange.end()

    async def async_request(
        self, original: Callable[..., Any], client: Any, /, *args: Any, **kwargs: Any
    ) -> Any:
        """The same for an async client."""
        exchange = self._begin(client)
        if exchange is None:
            return await original(client, *args, **kwargs)
        token = self._exchange.set(exchange)
        try:
            return await original(client, *args, **kwargs)
        except _NotAdmitted as refused:
            raise refused.error from None
        finally:
            self._exchange.reset(token)
            exchange.end()

    def _begin(self, client: Any) -> _Exchange | None:
        call = self._current()
        if call is None or call.answers is None:
            return None
        try:
            self._watch(client._client)
        except (AttributeError, UnsupportedVersionError) as error:
            warn_once(
                _logger,
                "client",
                "Calls may be made and paid for again, since this release of the OpenAI client "
                f"sends its requests in another way than is known: {error}",
            )
            call.admit()
            return None
        return _Exchange(call, call.answers)

    def _watch(self, http: Any) -> None:
        # Its class, or the one that it inherits from: httpx's, httpx2's or the user's.
        kinds = type(http).__mro__
        owner = next((kind for kind in kinds if _SEND in vars(kind)), kinds[0])
        if (patch := self._patches.get(owner)) is None:
            send = self._async_send if hasattr(http, "aclose") else self._send
            patch = self._patches.setdefault(owner, Patch(owner, _SEND, send))
        if not patch.active:
            patch.apply()

    def _send(self, original: Callable[..., Any], http: Any, request: Any) -> Any:
        exchange = self._exchange.get()
        if exchange is None:
            return original(http, request)
        question = exchange.ask(request)
        entry = None if question is None else exchange.find(question, request)
        if entry is not None:
            response = exchange.replay(question, http, request, entry)
            if response is not None:
                return response
        exchange.admit()
        response = original(http, request)
        if question is not None:
            exchange.record(question, request, response, is_async=False)
        return response

    async def _async_send(self, original: Callable[..., Any], http: Any, request: Any) -> Any:
        exchange = self._exchange.get()
        if exchange is None:
            return await original(http, request)
        question = exchange.ask(request)
        entry = None
        if question is not None and exchange.waits:
            # Here, where the client has imported it, and workers without one need not.
            from anyio import to_thread

            entry = await to_thread.run_sync(exchange.find, question, request)
        elif question is not None:
            entry = exchange.find(question, request)
        if entry is not None:
            response = exchange.replay(question, http, request, entry, is_async=True)
            if response is not None:
                return response
        exchange.admit()
        response = await original(http, request)
        if question is not None:
            exchange.record(question, request, response, is_async=True)
        return response


class _NotAdmitted(BaseException):
    """Carries an error through the client, which would take an exception for one of its own."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def _guarded(default: Any = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a method of ours fail without the user's call: what it fails in is then not reused."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            except Exception as error:
                warn_once(
                    _logger,
                    f"failure of {method.__name__}",
                    f"Calls may be made and paid for again, since an answer is not kept: {error!r}",
                )
                return default

        return guarded

    return decorate


class _Exchange:
    """The requests that the client sends for one call: retries, redirects, a renewed log-in."""

    def __init__(self, call: CallInProgress, answers: TaskAnswers) -> None:
        self._call = call
        self._answers = answers
        self._questions: dict[tuple[str, str, bytes], Question | None] = {}
        self._recordings: dict[Question, Recording] = {}
        self._replayed: set[Question] = set()
        self.waits = answers.store.is_remote

    @_guarded()
    def ask(self, request: Any) -> Question | None:
        """Return what is asked: the same where the client sends it again."""
        try:
            body = request.content
        except Exception:
            # It is sent as it is read, and can be read once.
            return None
        url = str(request.url)
        authorization = request.headers.get("authorization", "")
        key = (url, authorization, body)
        if key not in self._questions:
            headers = request.headers.multi_items()
            self._questions[key] = self._answers.question(request.method, url, headers, body)
        return self._questions[key]

    @_guarded()
    def find(self, question: Question, request: Any) -> Entry | None:
        """Return the answer that was given before, where this client can read it."""
        entry = question.find()
        if entry is None or not is_readable(entry, request.headers.get("accept-encoding", "")):
            return None
        return entry

    @_guarded()
    def replay(
        self, question: Question, http: Any, request: Any, entry: Entry, is_async: bool = False
    ) -> Any:
        """Return that answer as a response."""
        response = replayed(entry, request, is_async)
        response.default_encoding = getattr(http, "_default_encoding", "utf-8")
        self._call.reused(entry.paid_by)
        self._replayed.add(question)
        return response

    def admit(self) -> None:
        """Have the call admitted, before a request of it is sent.

        Raises:
            _NotAdmitted: It may not be sent.
        """
        try:
            self._call.admit()
        except Exception as error:
            raise _NotAdmitted(error) from error

    @_guarded()
    def record(self, question: Question, request: Any, response: Any, is_async: bool) -> None:
        """Keep an answer, when it has come whole."""
        if response.status_code != 200:
            return
        url, paid_by = str(request.url), self._call.name

        def done(recording: Recording) -> None:
            kept = question.keep(recording.size, lambda: recording.entry(url, paid_by))
            # An event loop has others to see to.
            if kept is not None and not is_async:
                kept.wait(_PATIENCE)

        recording = self._recordings[question] = Recording(response, _LARGEST, done)
        recorded(response, recording, is_async)

    @_guarded()
    def end(self) -> None:
        """Let those turns count that were answered, also in part."""
        for question in self._questions.values():
            if question is not None and question not in self._replayed:
                recording = self._recordings.get(question)
                if recording is None or recording.has_failed:
                    question.give_back()
