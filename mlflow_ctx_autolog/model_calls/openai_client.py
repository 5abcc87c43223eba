"""The OpenAI client's insides: where it sends requests again, and how its answers are read."""

from __future__ import annotations

import functools
import importlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.util import find_spec
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from mlflow_ctx_autolog.exceptions import UnsupportedVersionError
from mlflow_ctx_autolog.patching import Patch

__all__ = ["AnswerReader", "CallObserver", "OpenAIClient"]

_logger = logging.getLogger(__name__)


class CallObserver(Protocol):
    """Who is told of the call that is being made in this execution context."""

    def sends(self) -> None:
        """The client is about to send a request. What this raises, the call raises."""

    def resends(self) -> None:
        """The client is about to send the request once more."""

    def interrupted(self, error: BaseException) -> None:
        """What interrupts the call is no error of its own: a cancelled task, an interrupt."""


class AnswerReader(Protocol):
    """Who is told how an answer is read that was not all there when the call returned."""

    def received(self, chunk: Any) -> None:
        """One more piece of a stream has come."""

    def answered(self, result: Any) -> None:
        """The whole answer has come, and it was no stream."""

    def ended(self) -> None:
        """The answer was read to its end."""

    def failed(self, error: BaseException) -> None:
        """Reading it has failed."""

    def closed(self) -> None:
        """It will be read no further. Does nothing when it has ended or failed."""


class OpenAIClient:
    """Watches the OpenAI client, sync and async, of every kind.

    A client that keeps these things elsewhere than the releases known so far is not watched, with
    one warning: its calls are traced all the same.
    """

    def __init__(self, observer: CallObserver) -> None:
        self._observer = observer
        self._readers: WeakKeyDictionary[Any, AnswerReader] = WeakKeyDictionary()
        self._dropped: deque[AnswerReader] = deque()
        self._patches: list[Patch] = []
        self._has_warned = False

    def install(self) -> None:
        """Idempotent."""
        self._patches = self._patches or list(self._new_patches())
        for patch in self._patches:
            try:
                patch.apply()
            except UnsupportedVersionError as error:
                self._warn(str(error))

    def _new_patches(self) -> Iterator[Patch]:
        for module, owner, name, replacement in self._places():
            if (found := _find(module, owner)) is not None:
                yield Patch(found, name, replacement)
            else:
                self._warn(f"there is no {module}.{owner}")

    def uninstall(self) -> None:
        """Idempotent."""
        for patch in self._patches:
            patch.revert()

    def follow(self, result: Any, reader: AnswerReader) -> bool:
        """Tell ``reader`` how the answer is read; return False if it is all there already."""
        # Not at the top: where it is missing, enable() says so.
        from openai import AsyncStream, Stream

        if isinstance(result, (Stream, AsyncStream)):
            result._iterator = _FollowedChunks(result._iterator, reader, self._dropped.append)
            self._readers[result.response] = reader
            return True
        if isinstance(result, _find("openai._response", "BaseAPIResponse") or ()):
            self._readers[result.http_response] = reader
            return True
        return False

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
        yield "openai._response", "BaseAPIResponse", "_parse", self._parse
        helpers = {"chat": "ChatCompletionStream"}
        if find_spec("openai.lib.streaming.responses") is not None:
            # From openai 1.66 on.
            helpers["responses"] = "ResponseStream"
        for kind in ("", "Async"):
            yield "openai._response", f"{kind}APIResponse", "close", self._close_response
            yield "openai", f"{kind}Stream", "close", self._close
            for module, name in helpers.items():
                yield f"openai.lib.streaming.{module}", f"{kind}{name}", "close", self._close

    def _warn(self, reason: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            _logger.warning(
                "Calls are traced, but repeated requests or streams that are not read to their "
                "end are not recorded in full: %s",
                reason,
            )

    def _resend(self, original: Callable[..., float], *args: Any, **kwargs: Any) -> float:
        self._observer.sends()
        _tell(self._observer.resends)
        return original(*args, **kwargs)

    def _request(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            self._observer.sends()
            return original(*args, **kwargs)
        except BaseException as error:
            self._interrupted(error)
            raise

    async def _async_request(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            self._observer.sends()
            return await original(*args, **kwargs)
        except BaseException as error:
            self._interrupted(error)
            raise

    def _interrupted(self, error: BaseException) -> None:
        if not isinstance(error, Exception):
            _tell(self._observer.interrupted, error)

    def _parse(self, original: Callable[..., Any], response: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(response, *args, **kwargs)
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
                _tell(response._parse)
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
def _find(module: str, name: str) -> Any:
    """Return a class of the client; None where this release has none of that name."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError:
        return None
