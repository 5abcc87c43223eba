"""HTTP responses as the client reads them: recorded while it does, and made again."""

from __future__ import annotations

import datetime
import functools
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

from mlflow_ctx_autolog.answers.entry import Entry

__all__ = ["REUSED_FROM", "Recording", "is_readable", "recorded", "replayed"]

# Header of a response that was given before: the call that paid for it, "trace_id/span_id".
REUSED_FROM = "x-mlflow-ctx-autolog-reused-from"

# Headers of the connection or of the moment, and what identifies the client.
_NOT_OF_THE_ANSWER = frozenset(
    {
        "alt-svc",
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "retry-after",
        "retry-after-ms",
        "set-cookie",
        "set-cookie2",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "www-authenticate",
        REUSED_FROM,
    }
)
_LIMITS = "x-ratelimit-"

# A response of the responses API is whole with one of these; "failed" was not paid for.
_WHOLE = ("completed", "incomplete")


class Recording:
    """What has come of a response's body so far, and whether that is all.

    Args:
        response: Of httpx, not read yet.
        limit: Bytes that are kept at most.
        done: Called once, with the recording, when the body has come to its end, or was closed.
    """

    def __init__(self, response: Any, limit: int, done: Callable[[Recording], None]) -> None:
        self.size = 0
        self.is_at_end = False
        self.has_failed = False
        self._response_type = type(response)
        self._headers = [
            (str(name).lower(), str(value)) for name, value in response.headers.multi_items()
        ]
        self._limit = limit
        self._done: Callable[[Recording], None] | None = done
        self._chunks: list[bytes] = []

    def add(self, chunk: bytes) -> None:
        """Take one more piece of the body."""
        self.size += len(chunk)
        if self.size <= self._limit:
            self._chunks.append(chunk)
        else:
            self._chunks.clear()

    def add_all(self, body: bytes) -> None:
        """Take the whole body, which was decompressed before."""
        of_compressed = ("content-encoding", "content-length")
        self._headers = [each for each in self._headers if each[0] not in of_compressed]
        self.add(body)
        self.ended()

    def failed(self) -> None:
        """The body has broken off."""
        self.has_failed = True
        self._done = None
        self._chunks.clear()

    def ended(self) -> None:
        """The body has come to its end."""
        self.is_at_end = True
        self._finish()

    def closed(self) -> None:
        """It is read no further. Does nothing where it has ended or failed."""
        self._finish()

    def _finish(self) -> None:
        done, self._done = self._done, None
        if done is not None and self.size <= self._limit:
            done(self)

    def entry(self, url: str, paid_by: str) -> Entry | None:
        """Return the answer, if it is a whole and successful one. Takes its time: it is parsed."""
        body = b"".join(self._chunks)
        try:
            # Decompressed as the client does it.
            text = self._response_type(200, headers=self._headers, content=body).content
            is_stream = "text/event-stream" in dict(self._headers).get("content-type", "")
            is_whole = _is_whole_stream(text, url) if is_stream else _is_whole(json.loads(text))
        except Exception:
            # Not JSON, or cut off where it is compressed.
            return None
        if not is_whole or not (is_stream or self.is_at_end):
            return None
        headers = tuple(
            (name, value)
            for name, value in self._headers
            if name not in _NOT_OF_THE_ANSWER and not name.startswith(_LIMITS)
        )
        return Entry(headers, tuple(self._chunks), paid_by)


def _is_whole(answer: Any) -> bool:
    if not isinstance(answer, dict) or answer.get("error"):
        return False
    if answer.get("object") == "response" or "output" in answer:
        return answer.get("status") in _WHOLE
    choices = answer.get("choices") or ()
    return not any(
        isinstance(choice, dict) and (choice.get("error") or choice.get("finish_reason") == "error")
        for choice in choices
    )


def _is_whole_stream(text: bytes, url: str) -> bool:
    """Whether server-sent events come to the end that their API gives them, without an error."""
    events = [
        line[5:].strip() for line in text.splitlines() if line.startswith(b"data:") and line[5:]
    ]
    is_done = bool(events) and events[-1] == b"[DONE]"
    documents = [json.loads(event) for event in events[: len(events) - is_done]]
    if not documents or not all(isinstance(each, dict) for each in documents):
        return False
    if any(each.get("error") or each.get("type") == "error" for each in documents):
        return False
    if url.partition("?")[0].endswith("/responses"):
        answer = documents[-1].get("response")
        return isinstance(answer, dict) and _is_whole(answer)
    return is_done and all(_is_whole(each) for each in documents)


def is_readable(entry: Entry, accept_encoding: str) -> bool:
    """Whether a client that sends this ``Accept-Encoding`` can decompress an answer."""
    encoding = dict(entry.headers).get("content-encoding", "identity")
    accepted = {each.partition(";")[0].strip() for each in accept_encoding.lower().split(",")}
    return {each.strip() for each in encoding.lower().split(",")} <= {*accepted, "identity"}


def recorded(response: Any, recording: Recording, is_async: bool) -> None:
    """Have a response tell a recording how it is read."""
    if hasattr(response, "_content"):
        # From a transport that has read it, as mocks do.
        recording.add_all(response.content)
        return
    kind = _streams(type(response).__module__.partition(".")[0])[2 if is_async else 0]
    response.stream = kind(response.stream, recording)


def replayed(entry: Entry, request: Any, is_async: bool) -> Any:
    """Return a response to a request of httpx, to be read as if it had just come."""
    library = type(request).__module__.partition(".")[0]
    kind = _streams(library)[3 if is_async else 1]
    response = sys.modules[library].Response(
        200,
        headers=[*entry.headers, (REUSED_FROM, entry.paid_by)],
        stream=kind(entry.chunks),
        request=request,
    )
    # Which httpx knows once it is closed.
    response.elapsed = datetime.timedelta()
    return response


@functools.cache
def _streams(library: str) -> tuple[type[Any], type[Any], type[Any], type[Any]]:
    """Return types of streams: recorded and replayed ones, sync; and the same, async.

    There is httpx, and httpx2 in newer releases of the client, each with types of its own.
    """
    httpx = sys.modules[library]

    class RecordedStream(httpx.SyncByteStream):  # type: ignore[misc, name-defined]
        def __init__(self, stream: Iterable[bytes], recording: Recording) -> None:
            self._stream = stream
            self._recording = recording

        def __iter__(self) -> Iterator[bytes]:
            try:
                for chunk in self._stream:
                    self._recording.add(chunk)
                    yield chunk
            except GeneratorExit:
                raise
            except BaseException:
                self._recording.failed()
                raise
            self._recording.ended()

        def close(self) -> None:
            self._stream.close()  # type: ignore[attr-defined]
            self._recording.closed()

    class ReplayedStream(httpx.SyncByteStream):  # type: ignore[misc, name-defined]
        def __init__(self, chunks: Iterable[bytes]) -> None:
            self._chunks = chunks

        def __iter__(self) -> Iterator[bytes]:
            yield from self._chunks

    class AsyncRecordedStream(httpx.AsyncByteStream):  # type: ignore[misc, name-defined]
        def __init__(self, stream: Any, recording: Recording) -> None:
            self._stream = stream
            self._recording = recording

        async def __aiter__(self) -> AsyncIterator[bytes]:
            try:
                async for chunk in self._stream:
                    self._recording.add(chunk)
                    yield chunk
            except GeneratorExit:
                raise
            except BaseException:
                self._recording.failed()
                raise
            self._recording.ended()

        async def aclose(self) -> None:
            await self._stream.aclose()
            self._recording.closed()

    class AsyncReplayedStream(httpx.AsyncByteStream):  # type: ignore[misc, name-defined]
        def __init__(self, chunks: Iterable[bytes]) -> None:
            self._chunks = chunks

        async def __aiter__(self) -> AsyncIterator[bytes]:
            for chunk in self._chunks:
                yield chunk

    return RecordedStream, ReplayedStream, AsyncRecordedStream, AsyncReplayedStream
