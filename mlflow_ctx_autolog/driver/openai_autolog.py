"""MLflow's OpenAI autolog, for the driver's own calls."""

from __future__ import annotations

import contextvars
import functools
import importlib
import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import mlflow.openai
from mlflow.entities import SpanEvent
from mlflow.entities.span import NoOpSpan
from mlflow.utils.autologging_utils import safety

from mlflow_ctx_autolog.driver.mlflow_traces import record_usage
from mlflow_ctx_autolog.mlflow_bridge.flavors import Autolog
from mlflow_ctx_autolog.patching import Patch
from mlflow_ctx_autolog.prices import Pricing
from mlflow_ctx_autolog.recorder.annotations import (
    current_annotations,
    labelled,
    set_last_call,
)
from mlflow_ctx_autolog.recorder.client_hooks import OpenAIClientHooks
from mlflow_ctx_autolog.recorder.request import fingerprint
from mlflow_ctx_autolog.spans.attributes import (
    ANNOTATION,
    COST,
    FINGERPRINT,
    RESEND_COUNT,
    STREAM_OUTCOME,
    TIME_TO_FIRST_CHUNK,
    USAGE,
)

__all__ = ["OpenAIAutolog"]

# The function of the same name hides the module from an import statement.
_autolog_module = importlib.import_module("mlflow.openai.autolog")

# Of a client derived from OpenAI's, such as Databricks', before MLflow 3.14: the second is no type
# of a span, and no store takes such a span.
_UNKNOWN_TYPES = ("UNKNOWN", ("UNKNOWN", None))


class OpenAIAutolog:
    """Turns MLflow's OpenAI autolog on, and adds to its spans what it leaves out.

    That is how often the client has sent the request again, usage of calls other than chat, the
    time to the first chunk of a stream; and the end of the spans of calls that were cancelled, and
    of streams that fail or are not read to their end.

    Args:
        propagates_headers: Whether calls may take a ``traceparent`` header along.
        fingerprint_key: For the fingerprints of requests.
        pricing: Returns what the user says of prices.
        names_calls_by: Returns the annotation whose value stands behind the name of a call's span.
    """

    def __init__(
        self,
        *,
        propagates_headers: Callable[[], bool] = lambda: True,
        fingerprint_key: str | None = None,
        pricing: Callable[[], Pricing] = Pricing,
        names_calls_by: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._fingerprint_key = fingerprint_key
        self._patches = [
            Patch(_autolog_module, "start_span_no_context", self._start_span),
            Patch(_autolog_module, "_end_span_on_success", self._end_span),
            Patch(_autolog_module, "set_span_chat_attributes", self._set_chat_attributes),
            *_remembering(),
        ]
        self._client = OpenAIClientHooks(self)
        self._propagates_headers = propagates_headers
        self._pricing = pricing
        self._names_calls_by = names_calls_by
        # Older releases of MLflow send none.
        if hasattr(_autolog_module, "_inject_tracing_headers"):
            self._patches.append(
                Patch(_autolog_module, "_inject_tracing_headers", self._inject_tracing_headers)
            )
        self._autolog = Autolog(mlflow.openai.FLAVOR_NAME)
        self._unread: set[_Answer] = set()
        # The span of the call that is being made, until the client returns from it.
        self._calling: contextvars.ContextVar[Any] = contextvars.ContextVar(
            "ctx_autolog_calling", default=None
        )

    def install(self) -> None:
        """Turn autolog on, unless the user has done so. Idempotent."""
        self._autolog.install()
        for patch in self._patches:
            patch.apply()
        self._client.install()

    def uninstall(self) -> None:
        """Undo :meth:`install`; an autolog that the user turned on stays on. Idempotent."""
        self._client.close_dropped()
        for patch in self._patches:
            patch.revert()
        self._client.uninstall()
        self._autolog.uninstall()

    # What the client tells of the call that is being made.

    def sends(self) -> None:
        """No request of the driver's is held back."""

    def said(self, document: Any, headers: Mapping[str, str]) -> None:  # noqa: ARG002
        """Take what its headers say; MLflow reads what the client makes of the document."""
        span = self._calling.get()
        if span is not None and (cost := self._pricing().cost((), {}, headers)):
            span.set_attribute(COST, cost)

    def resends(self) -> None:
        span = self._calling.get()
        if span is not None and span.end_time_ns is None:
            span.set_attribute(RESEND_COUNT, (span.get_attribute(RESEND_COUNT) or 0) + 1)

    def interrupted(self, error: BaseException) -> None:
        span = self._calling.get()
        if span is not None and span.end_time_ns is None:
            _autolog_module._end_span_on_exception(span, error)

    def _inject_tracing_headers(
        self, original: Callable[..., None], arguments: Any, span: Any
    ) -> None:
        if self._propagates_headers() and not isinstance(span, NoOpSpan):
            original(arguments, span)

    def _start_span(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._client.close_dropped()
        if self._calling.get() is not None and _is_of_parse(kwargs.get("inputs")):
            return NoOpSpan()
        if kwargs.get("span_type") in _UNKNOWN_TYPES:
            kwargs["span_type"] = _type_of(str(kwargs.get("name")), kwargs.get("inputs") or {})
        kwargs["attributes"] = {
            **(kwargs.get("attributes") or {}),
            **self._fingerprint(kwargs),
            **{ANNOTATION + name: value for name, value in current_annotations().items()},
        }
        if "name" in kwargs:
            kwargs["name"] = labelled(kwargs["name"], self._names_calls_by())
        span = original(*args, **kwargs)
        if isinstance(span, NoOpSpan):
            self._calling.set(None)
        else:
            self._calling.set(span)
            set_last_call(span.trace_id, span.span_id)
        return span

    def _fingerprint(self, call: Mapping[str, Any]) -> dict[str, str]:
        inputs = call.get("inputs")
        if self._fingerprint_key is None or not isinstance(inputs, dict):
            return {}
        found = fingerprint(self._fingerprint_key, str(call.get("name")), inputs)
        return {} if found is None else {FINGERPRINT: found}

    def _end_span(
        self,
        original: Callable[..., None],
        span: Any,
        inputs: dict[str, Any],
        raw_result: Any,
        is_responses_api: bool,
    ) -> None:
        if self._calling.get() is span:
            self._calling.set(None)
        result = _autolog_module._try_parse_raw_response(raw_result)
        if not isinstance(span, NoOpSpan):
            answer = _Answer(span, inputs, is_responses_api, self._unread)
            if self._client.follow(result, answer):
                self._unread.add(answer)
                return
        original(span, inputs, result, is_responses_api)
        if span.end_time_ns is None:
            # MLflow could not make sense of it: of a tool without parameters, for one.
            span.end(outputs=result)

    def _set_chat_attributes(
        self, original: Callable[..., None], span: Any, inputs: dict[str, Any], result: Any
    ) -> None:
        try:
            original(span, inputs, result)
        finally:
            record_usage(span, getattr(result, "usage", None))
            self._set_cost(span, (getattr(result, "model", None), inputs.get("model")))

    def _set_cost(self, span: Any, models: tuple[object, ...]) -> None:
        usage = span.get_attribute(USAGE)
        cost = {} if span.get_attribute(COST) else self._pricing().cost(models, usage or {}, {})
        if cost:
            span.set_attribute(COST, cost)


def _remembering() -> Iterator[Patch]:
    """Yield patches that spare each call what MLflow would find out anew, always with one result.

    It tries imports in vain for the type of a client's spans, and reads the signature of the
    client's method.
    """
    types: WeakKeyDictionary[type, Any] = WeakKeyDictionary()

    def span_type(original: Callable[[type], Any], of_class: type) -> Any:
        if of_class not in types:
            types[of_class] = original(of_class)
        return types[of_class]

    def update_wrapper(original: Callable[..., Any], wrapper: Any, wrapped: Any) -> Any:
        if str(getattr(wrapped, "__module__", None)).partition(".")[0] == "openai":
            with suppress(Exception):
                # Where inspect.signature() looks first.
                wrapped.__signature__ = inspect.signature(wrapped)
        return original(wrapper, wrapped)

    for owner, name, replacement in (
        (_autolog_module, "_get_span_type", span_type),
        (safety, "update_wrapper_extended", update_wrapper),
    ):
        if hasattr(owner, name):
            yield Patch(owner, name, replacement)


def _type_of(name: str, inputs: Any) -> str:
    """Return the type of a call of a client whose classes MLflow does not know."""
    return "CHAT_MODEL" if "messages" in inputs or name.endswith("Responses") else "UNKNOWN"


def _is_of_parse(inputs: Any) -> bool:
    """Whether a call is a part of parse(), which has a span of its own, as before openai 1.92."""
    headers = (inputs or {}).get("extra_headers") or {}
    return str(headers.get("X-Stainless-Helper-Method")).endswith(".completions.parse")


class _Answer:
    """An answer that is read after the call has returned, and the span that lasts as long."""

    def __init__(
        self, span: Any, inputs: dict[str, Any], is_responses_api: bool, unread: set[_Answer]
    ) -> None:
        self._span = span
        self._inputs = inputs
        self._is_responses_api = is_responses_api
        self._unread = unread
        self._chunks: list[Any] = []
        self._latest = time.time_ns()

    def said(self, document: Any, headers: Mapping[str, str]) -> None:
        """MLflow reads what the client makes of it."""

    def received(self, chunk: Any) -> None:
        if self not in self._unread:
            return
        self._latest = time.time_ns()
        if not self._chunks:
            seconds = (self._latest - self._span.start_time_ns) / 1e9
            self._span.set_attribute(TIME_TO_FIRST_CHUNK, seconds)
        _autolog_module._add_span_event(self._span, len(self._chunks), chunk)
        self._chunks.append(chunk)

    def answered(self, result: Any) -> None:
        if self._is_taken():
            _autolog_module._end_span_on_success(
                self._span, self._inputs, result, self._is_responses_api
            )

    def rejected(self, error: BaseException) -> None:
        """It may still be read in another way."""

    def ended(self) -> None:
        if self._is_taken():
            self._end_with_chunks()

    def failed(self, error: BaseException) -> None:
        if self._is_taken():
            self._span.add_event(SpanEvent.from_exception(error))
            self._span.set_status("ERROR")
            self._end_with_chunks()

    def closed(self) -> None:
        if self._is_taken():
            self._span.set_attribute(STREAM_OUTCOME, "closed early")
            # It may come to light long after the last chunk was read.
            self._span.end = functools.partial(self._span.end, end_time_ns=self._latest)
            self._end_with_chunks()

    def _is_taken(self) -> bool:
        """Take the right to end the span, which may be claimed from several threads."""
        try:
            self._unread.remove(self)
        except KeyError:
            return False
        return True

    def _end_with_chunks(self) -> None:
        chunks, self._chunks = self._chunks, []
        latest = chunks[-1] if chunks else None
        _autolog_module._process_last_chunk(
            self._span, latest, self._inputs, chunks, self._is_responses_api
        )
        if self._span.end_time_ns is None:
            # MLflow could not put the chunks together.
            self._span.end()
