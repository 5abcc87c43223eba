"""The OpenAI client's insides: where it sends, what the server says, and how that is read."""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import suppress
from types import ModuleType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from mlflow_ctx_autolog.answers.client import ReusedAnswers
from mlflow_ctx_autolog.exceptions import UnsupportedVersionError
from mlflow_ctx_autolog.imports import when_imported
from mlflow_ctx_autolog.log_ins import safe_logger
from mlflow_ctx_autolog.patching import Patch

__all__ = ["AnswerReader", "CallObserver", "OpenAIClientHooks"]

_logger = safe_logger(__name__)


class CallObserver(Protocol):
    """Who is told of the call that is being made in this execution context."""

    def sends(self) -> None:
        """The client is about to send a request. What this raises, the call raises."""

    def resends(self) -> None:
        """The client is about to send the request once more."""

    def said(self, document: Any, headers: Mapping[str, str]) -> None:
        """The server has answered with this document: JSON, before the client looks at it."""

    def interrupted(self, error: BaseException) -> None:
        """What interrupts the call is no error of its own: a cancelled task, an interrupt."""


class AnswerReader(Protocol):
    """Who is told how an answer is read that was not all there when the call returned."""

    def said(self, document: Any, headers: Mapping[str, str]) -> None:
        """The server has sent this document: a piece of a stream, or the answer."""

    def received(self, chunk: Any) -> None:
        """What the client makes of a piece of a stream is about to be handed on."""

    def answered(self, result: Any) -> None:
        """What the client makes of the whole answer is about to be handed on."""

    def rejected(self, error: BaseException) -> None:
        """The client makes nothing of the answer. It may still be read in another way."""

    def ended(self) -> None:
        """The answer was read to its end."""

    def failed(self, error: BaseException) -> None:
        """Reading it has failed."""

    def closed(self) -> None:
        """It will be read no further. Does nothing when it has ended or failed."""


class OpenAIClientHooks:
    """Watches the OpenAI client, sync and async, of every kind, as soon as it is imported.

    A client that keeps these things elsewhere than the releases known so far is not watched, with
    one warning: its calls are recorded all the same.

    Args:
        observer: Is told of each call.
        answers: Knows which requests need not be sent, since they were answered before; by default
            all are sent.
    """

    def __init__(self, observer: CallObserver, answers: ReusedAnswers | None = None) -> None:
        self._observer = observer
        self._answers = answers or ReusedAnswers(lambda: None)
        self._readers: WeakKeyDictionary[Any, AnswerReader] = WeakKeyDictionary()
        self._dropped: deque[AnswerReader] = deque()
        self._patches: list[Patch] = []
        self._is_installed = False
        self._has_warned = False
        self._is_waiting = False

    def install(self) -> None:
        """Idempotent."""
        self._is_installed = True
        for patch in self._patches:
            self._apply(patch)
        if not self._is_waiting:
            self._is_waiting = True
            for module, owner, name, replacement in self._places():
                when_imported(module, functools.partial(self._watch, owner, name, replacement))

    def _watch(
        self, owner: str, name: str, replacement: Callable[..., Any], module: ModuleType
    ) -> None:
        found = getattr(module, owner, None)
        if found is None:
            self._warn(f"there is no {module.__name__}.{owner}")
            return
        patch = Patch(found, name, replacement)
        self._patches.append(patch)
        if self._is_installed:
            self._apply(patch)

    def _apply(self, patch: Patch) -> None:
        try:
            patch.apply()
        except UnsupportedVersionError as error:
            self._warn(str(error))

    def uninstall(self) -> None:
        """Idempotent."""
        self._is_installed = False
        for patch in self._patches:
            patch.revert()
        self._answers.uninstall()

    def follow(self, result: Any, reader: AnswerReader) -> bool:
        """Tell ``reader`` how the answer is read; return False if it is all there already."""
        streams = _classes("openai._streaming", "Stream", "AsyncStream")
        if isinstance(result, streams):
            result._iterator = _FollowedChunks(result._iterator, reader, self._dropped.append)
            self._readers[result.response] = reader
            return True
        if isinstance(result, _classes("openai._response", "BaseAPIResponse")):
            self._readers[result.http_response] = reader
            return True
        return False

    def parsed(self, result: Any) -> Any:
        """Return what a raw response parses to, as the user's own ``parse()`` will; else itself."""
        if not isinstance(result, _classes("openai._legacy_response", "LegacyAPIResponse")):
            return result
        try:
            # Which the response remembers.
            return result.parse()
        except Exception:
            return result

    def close_dropped(self) -> None:
        """Tell the readers of those streams that nobody can read any more."""
        while self._dropped:
            self.close(self._dropped.popleft())

    def close(self, reader: AnswerReader) -> None:
        """Tell a reader that its answer will be read no further. Never raises."""
        _tell(reader.closed)

    def _places(self) -> Iterator[tuple[str, str, str, Callable[..., Any]]]:
        # Which the client, sync or async, asks before each request that it sends again.
        yield "openai._base_client", "BaseClient", "_calculate_retry_timeout", self._resend
        yield "openai._base_client", "SyncAPIClient", "request", self._request
        yield "openai._base_client", "AsyncAPIClient", "request", self._async_request
        yield "openai._base_client", "BaseClient", "_process_response_data", self._process_data
        yield "openai._response", "BaseAPIResponse", "_parse", self._parse
        for kind in ("", "Async"):
            yield "openai._response", f"{kind}APIResponse", "close", self._close_response
            yield "openai._streaming", f"{kind}Stream", "close", self._close
            chat, responses = "openai.lib.streaming.chat", "openai.lib.streaming.responses"
            yield chat, f"{kind}ChatCompletionStream", "close", self._close
            yield responses, f"{kind}ResponseStream", "close", self._close

    def _warn(self, reason: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            _logger.warning(
                "Calls are recorded, but repeated requests, streams that are not read to their "
                "end, or answers that the client rejects are not recorded in full: %s",
                reason,
            )

    def _resend(self, original: Callable[..., float], *args: Any, **kwargs: Any) -> float:
        self._observer.sends()
        _tell(self._observer.resends)
        return original(*args, **kwargs)

    def _request(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            self._observer.sends()
            return self._answers.request(original, *args, **kwargs)
        except BaseException as error:
            self._interrupted(error)
            raise

    async def _async_request(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            self._observer.sends()
            return await self._answers.async_request(original, *args, **kwargs)
        except BaseException as error:
            self._interrupted(error)
            raise

    def _interrupted(self, error: BaseException) -> None:
        if not isinstance(error, Exception):
            _tell(self._observer.interrupted, error)

    def _process_data(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        response = kwargs.get("response")
        reader = None if response is None else self._readers.get(response)
        said = self._observer.said if reader is None else reader.said
        _tell(said, kwargs.get("data"), getattr(response, "headers", {}))
        return original(*args, **kwargs)

    def _parse(self, original: Callable[..., Any], response: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            result = original(response, *args, **kwargs)
        except BaseException as error:
            if (reader := self._readers.get(response.http_response)) is not None:
                _tell(reader.rejected, error)
            raise
        reader = self._readers.pop(response.http_response, None)
        if reader is not None and not self.follow(result, reader):
            _tell(reader.answered, result)
        return result

    def _close_response(self, original: Callable[..., Any], response: Any) -> Any:
        http_response = response.http_response
        reader = self._readers.get(http_response)
        if reader is not None:
            if hasattr(http_response, "_content"):
                # Read as bytes, text or JSON: all is there, and parsing it tells the reader.
                with suppress(Exception):
                    response._parse()
            _tell(reader.ended if http_response.is_closed else reader.closed)
        return original(response)

    def _close(self, original: Callable[..., Any], stream: Any) -> Any:
        response = getattr(stream, "response", None) or getattr(stream, "_response", None)
        reader = self._readers.get(response)
        if reader is not None:
            _tell(reader.closed)
        return original(stream)


class _FollowedChunks:
    """The chunks of a stream, each told to a reader before it is handed on."""

    def __init__(
        self,
        chunks: Iterator[Any] | AsyncIterator[Any],
        reader: AnswerReader,
        dropped: Callable[[AnswerReader], None],
    ) -> None:
        self._chunks: Any = chunks
        self._reader = reader
        self._dropped = dropped

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            chunk = next(self._chunks)
        except BaseException as error:
            self._over(error)
            raise
        _tell(self._reader.received, chunk)
        return chunk

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        try:
            chunk = await self._chunks.__anext__()
        except BaseException as error:
            self._over(error)
            raise
        _tell(self._reader.received, chunk)
        return chunk

    def _over(self, error: BaseException) -> None:
        if isinstance(error, (StopIteration, StopAsyncIteration)):
            _tell(self._reader.ended)
        else:
            _tell(self._reader.failed, error)

    def __del__(self) -> None:
        # The collector calls this at any moment, with any lock held: no more than a note of it.
        self._dropped(self._reader)


def _tell(what: Callable[..., Any], *args: Any) -> None:
    """Call what is ours, or of use to us alone, lest it fail in the middle of a user's call."""
    try:
        what(*args)
    except Exception:
        _logger.warning("A call of the OpenAI client is not recorded in full", exc_info=True)


@functools.cache
def _classes(module: str, *names: str) -> tuple[Any, ...]:
    """Return classes of the client, which has been imported; those that this release has."""
    found = (getattr(sys.modules.get(module), name, None) for name in names)
    return tuple(each for each in found if each is not None)
