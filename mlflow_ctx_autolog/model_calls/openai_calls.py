"""MLflow's OpenAI autolog, for the calls of Spark tasks."""

from __future__ import annotations

import contextvars
import functools
import importlib
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import mlflow.openai
from mlflow.entities import SpanEvent
from mlflow.entities.span import NoOpSpan
from mlflow.utils.autologging_utils import safety

from mlflow_ctx_autolog.exceptions import BudgetExceeded
from mlflow_ctx_autolog.model_calls.annotations import (
    ANNOTATION,
    current_annotations,
    set_last_call,
)
from mlflow_ctx_autolog.model_calls.budget import NOT_SENT
from mlflow_ctx_autolog.model_calls.fingerprint import FINGERPRINT, fingerprint
from mlflow_ctx_autolog.model_calls.flavors import Autolog
from mlflow_ctx_autolog.model_calls.openai_client import OpenAIClient
from mlflow_ctx_autolog.patching import Patch
from mlflow_ctx_autolog.task import Task, current_task
from mlflow_ctx_autolog.tracing import record_usage

__all__ = ["OpenAICalls", "autolog_is_on", "layers_on_calls"]

# The function of the same name hides the module from an import statement.
_autolog_module = importlib.import_module("mlflow.openai.autolog")

# By OpenTelemetry's names.
_RESEND_COUNT = "http.request.resend_count"
_TIME_TO_FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"

# Of a client derived from OpenAI's, such as Databricks', before MLflow 3.14: the second is no type
# of a span, and no store takes such a span.
_UNKNOWN_TYPES = ("UNKNOWN", ("UNKNOWN", None))


class OpenAICalls:
    """Turns MLflow's OpenAI autolog on, and counts the calls of the task that makes them.

    What MLflow does not record is added: how often the client has sent the request again, usage
    of calls other than chat, the time to the first chunk of a stream; and the end of the spans of
    calls that were cancelled, and of streams that fail or are not read to their end.

    Args:
        only_in_tasks: Trace calls only while a task is open; for worker processes, which are
            used again by jobs that have nothing to do with this one.
        propagates_headers: Whether calls outside tasks may take a ``traceparent`` header along;
            those of a task do as its settings say.
        fingerprint_key: For the fingerprints of calls outside tasks.
    """

    def __init__(
        self,
        *,
        only_in_tasks: bool,
        propagates_headers: Callable[[], bool] = lambda: True,
        fingerprint_key: str | None = None,
    ) -> None:
        self._only_in_tasks = only_in_tasks
        self._fingerprint_key = fingerprint_key
        self._patches = [
            Patch(_autolog_module, "start_span_no_context", self._start_span),
            Patch(_autolog_module, "_end_span_on_success", self._end_span),
            Patch(_autolog_module, "set_span_chat_attributes", self._set_chat_attributes),
            *_remembering(),
        ]
        self._client = OpenAIClient(self)
        self._propagates_headers = propagates_headers
        # Older releases of MLflow send none.
        if hasattr(_autolog_module, "_inject_tracing_headers"):
            self._patches.append(
                Patch(_autolog_module, "_inject_tracing_headers", self._inject_tracing_headers)
            )
        self._autolog = Autolog(mlflow.openai.FLAVOR_NAME)
        self._unread: set[_Answer] = set()
        # What the call that is being made asks, where a budget has to admit it.
        self._sending: contextvars.ContextVar[_Request | None] = contextvars.ContextVar(
            "ctx_autolog_sending", default=None
        )
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

    def close_answers(self, task: Task) -> None:
        """End the spans of those answers that the task has not read to their end."""
        self._client.close_dropped()
        for answer in list(self._unread):
            if answer.task is task:
                self._client.close(answer)

    def sends(self) -> None:
        request = self._sending.get()
        if request is None or request.is_over:
            return
        try:
            request.admit()
        except BudgetExceeded:
            span = self._calling.get()
            if span is not None:
                span.set_attribute(NOT_SENT, True)
            raise

    def resends(self) -> None:
        span = self._calling.get()
        if span is not None and span.end_time_ns is None:
            span.set_attribute(_RESEND_COUNT, (span.get_attribute(_RESEND_COUNT) or 0) + 1)

    def interrupted(self, error: BaseException) -> None:
        span = self._calling.get()
        if span is not None and span.end_time_ns is None:
            _autolog_module._end_span_on_exception(span, error)

    def _inject_tracing_headers(self, original: Callable[..., None], *args: Any) -> None:
        task = current_task()
        settings = None if task is None else task.context.config
        if self._propagates_headers() if settings is None else settings.propagate_headers:
            original(*args)

    def _start_span(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._client.close_dropped()
        if self._calling.get() is not None and _is_of_parse(kwargs.get("inputs")):
            return NoOpSpan()
        task = current_task()
        key = self._fingerprint_key
        if task is None:
            if self._only_in_tasks and self._autolog.is_ours:
                return NoOpSpan()
        else:
            key = task.context.fingerprint_key
            task.count_call()
        asked = _fingerprint(key, kwargs)
        request = None
        if task is not None and (task.budget is not None or task.context.config.progress):
            request = _Request(task, kwargs.get("inputs"), asked.get(FINGERPRINT))
        self._sending.set(request)
        if kwargs.get("span_type") in _UNKNOWN_TYPES:
            kwargs["span_type"] = _type_of(str(kwargs.get("name")), kwargs.get("inputs") or {})
        kwargs["attributes"] = {
            **(kwargs.get("attributes") or {}),
            **asked,
            **{ANNOTATION + name: value for name, value in current_annotations().items()},
        }
        span = original(*args, **kwargs)
        if request is not None:
            request.span = span
        if isinstance(span, NoOpSpan):
            self._calling.set(None)
        else:
            self._calling.set(span)
            set_last_call(span.trace_id, span.span_id)
        return span

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
            self._sending.set(None)
        result = _autolog_module._try_parse_raw_response(raw_result)
        if not isinstance(span, NoOpSpan):
            answer = _Answer(span, inputs, is_responses_api, current_task(), self._unread)
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


class _Request:
    """What a task's call asks of a model, and the span of the call."""

    def __init__(self, task: Task, inputs: Any, fingerprint: str | None) -> None:
        self.span: Any = None
        self._task = task
        self._model = str((inputs or {}).get("model"))
        self._fingerprint = fingerprint
        self._was_sent = False

    @property
    def is_over(self) -> bool:
        """Whether the client sends something else by now."""
        if isinstance(self.span, NoOpSpan):
            # Whose end nobody tells.
            return self._was_sent
        return self.span is None or self.span.end_time_ns is not None

    def admit(self) -> None:
        """Enter the request with its task, before it is sent.

        Raises:
            BudgetExceeded: It may not be sent.
        """
        if self._task.budget is not None:
            try:
                self._task.budget.admit(self._model, self._fingerprint)
            except BudgetExceeded:
                if not self._was_sent:
                    self._task.count_call(-1)
                raise
        self._was_sent = True
        if self._fingerprint is not None and self._task.context.config.progress:
            self._task.requests.append(self._fingerprint[:12])


class _Answer:
    """An answer that is read after the call has returned, and the span that lasts as long."""

    def __init__(
        self,
        span: Any,
        inputs: dict[str, Any],
        is_responses_api: bool,
        task: Task | None,
        unread: set[_Answer],
    ) -> None:
        self.task = task
        self._span = span
        self._inputs = inputs
        self._is_responses_api = is_responses_api
        self._unread = unread
        self._chunks: list[Any] = []
        self._latest = time.time_ns()

    def received(self, chunk: Any) -> None:
        if self not in self._unread:
            return
        self._latest = time.time_ns()
        if not self._chunks:
            seconds = (self._latest - self._span.start_time_ns) / 1e9
            self._span.set_attribute(_TIME_TO_FIRST_CHUNK, seconds)
        _autolog_module._add_span_event(self._span, len(self._chunks), chunk)
        self._chunks.append(chunk)

    def answered(self, result: Any) -> None:
        if self._is_taken():
            _autolog_module._end_span_on_success(
                self._span, self._inputs, result, self._is_responses_api
            )

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
            self._span.set_attribute("llm.stream.outcome", "closed early")
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


def autolog_is_on() -> bool:
    """Whether MLflow's OpenAI autolog traces calls of this process."""
    return Autolog(mlflow.openai.FLAVOR_NAME).is_on


# Where other libraries are known to put themselves between a user and the model.
_CALLS = (
    ("openai", "OpenAI.request"),
    ("openai", "AsyncOpenAI.request"),
    ("openai.resources.chat.completions", "Completions.create"),
    ("openai.resources.chat.completions", "AsyncCompletions.create"),
    ("openai.resources.responses", "Responses.create"),
    ("openai.resources.embeddings", "Embeddings.create"),
)
_EXPECTED_LAYERS = {"openai", "mlflow", "mlflow_ctx_autolog"}


def layers_on_calls() -> list[str]:
    """Return the modules of others that have wrapped the OpenAI client's calls, sorted."""
    found: set[str] = set()
    for module, path in _CALLS:
        owner, _, name = path.partition(".")
        try:
            function = getattr(getattr(importlib.import_module(module), owner), name)
        except (ImportError, AttributeError):
            continue
        found.update(_layers(function))
    return sorted(each for each in found if each.partition(".")[0] not in _EXPECTED_LAYERS)


def _layers(function: Any) -> Iterator[str]:
    """Yield the module of each layer of a function, from the outside to the inside."""
    while function is not None:
        if hasattr(function, "__dd_wrapped__"):
            # Whose wrapper is in the bytecode of the function itself.
            yield "ddtrace"
        # Of a proxy by wrapt, what it calls; of a function, where it was written, since wrappers
        # take on the __module__ of what they wrap.
        wrapper = getattr(function, "_self_wrapper", None)
        if wrapper is None:
            yield str(getattr(function, "__globals__", {}).get("__name__", "openai"))
        else:
            yield str(getattr(wrapper, "__module__", None) or type(wrapper).__module__)
        function = getattr(function, "__wrapped__", None)


def _fingerprint(key: str | None, call: dict[str, Any]) -> dict[str, str]:
    inputs = call.get("inputs")
    if key is None or not isinstance(inputs, dict):
        return {}
    # What users put into a request is theirs, and need not have a text.
    with suppress(Exception):
        return {FINGERPRINT: fingerprint(key, str(call.get("name")), inputs)}
    return {}
