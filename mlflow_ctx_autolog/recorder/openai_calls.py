"""Which methods of the OpenAI client are recorded, and where a call begins and ends."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from types import ModuleType
from typing import Any, NamedTuple

from mlflow_ctx_autolog.answers.client import ReusedAnswers
from mlflow_ctx_autolog.imports import when_imported
from mlflow_ctx_autolog.log_ins import remember, safe_logger
from mlflow_ctx_autolog.patching import Patch
from mlflow_ctx_autolog.recorder.annotations import (
    current_annotations,
    labelled,
    set_last_call,
)
from mlflow_ctx_autolog.recorder.call import Call, CallOwner, StreamedAnswer
from mlflow_ctx_autolog.recorder.client_hooks import OpenAIClientHooks
from mlflow_ctx_autolog.recorder.request import fingerprint, request_attributes
from mlflow_ctx_autolog.spans.attributes import ANNOTATION, FINGERPRINT
from mlflow_ctx_autolog.spans.record import OpenSpan
from mlflow_ctx_autolog.spans.values import dump

__all__ = ["OpenAIRecorder"]

_logger = safe_logger(__name__)

_TRACEPARENT = "traceparent"
_SHORTEST_KEY = 12


class _Resource(NamedTuple):
    """A part of the client whose methods call a model.

    Args:
        api: Which of OpenAI's APIs it is.
        span_type: MLflow's type of the spans of its calls.
        modules: Where its classes are, in one release or another.
        name: The sync class; the async one has ``Async`` before it.
        methods: Those that call a model.
    """

    api: str
    span_type: str
    modules: tuple[str, ...]
    name: str
    methods: tuple[str, ...]


_CHAT = "openai.resources.chat.completions"
_BETA = "openai.resources.beta.chat.completions"
_RESPONSES = "openai.resources.responses"
_RESOURCES = (
    _Resource(
        "chat",
        "CHAT_MODEL",
        (_CHAT, f"{_CHAT}.completions", _BETA),
        "Completions",
        ("create", "parse"),
    ),
    _Resource("completions", "LLM", ("openai.resources.completions",), "Completions", ("create",)),
    _Resource(
        "embeddings", "EMBEDDING", ("openai.resources.embeddings",), "Embeddings", ("create",)
    ),
    _Resource("images", "TOOL", ("openai.resources.images",), "Images", ("generate",)),
    _Resource(
        "responses",
        "CHAT_MODEL",
        (_RESPONSES, f"{_RESPONSES}.responses"),
        "Responses",
        ("create", "parse"),
    ),
)
# MLflow's name for how messages look.
_FORMATS = {"CHAT_MODEL": "openai", "LLM": "openai"}


class OpenAIRecorder:
    """Makes a span of each call of the OpenAI client, for whoever owns the call.

    The client need not be imported, and is not imported: it is watched as it is.

    Args:
        owner: Tells whose a call is that is made here and now; None for nobody's, which is not
            recorded.
    """

    def __init__(self, owner: Callable[[], CallOwner | None]) -> None:
        self._owner = owner
        self._hooks = OpenAIClientHooks(self, ReusedAnswers(lambda: self._calling.get()))
        self._patches: dict[tuple[type, str], Patch] = {}
        self._is_installed = False
        self._is_waiting = False
        self._unread: set[StreamedAnswer] = set()
        # The call that is being made, until the client returns from it.
        self._calling: contextvars.ContextVar[Call | None] = contextvars.ContextVar(
            "ctx_autolog_call", default=None
        )

    def install(self) -> None:
        """Record from now on. Idempotent."""
        self._is_installed = True
        self._hooks.install()
        for patch in self._patches.values():
            patch.apply()
        if not self._is_waiting:
            self._is_waiting = True
            for resource in _RESOURCES:
                for module in resource.modules:
                    when_imported(module, functools.partial(self._watch, resource))

    def uninstall(self) -> None:
        """Leave the client as it was. Idempotent."""
        self._is_installed = False
        self._hooks.close_dropped()
        for patch in self._patches.values():
            patch.revert()
        self._hooks.uninstall()

    def close_unread(self, owner: CallOwner) -> None:
        """End the spans of those answers that an owner has not read to their end."""
        self._hooks.close_dropped()
        for answer in list(self._unread):
            if answer.owner is owner:
                self._hooks.close(answer)

    def _watch(self, resource: _Resource, module: ModuleType) -> None:
        for name, wrapper in ((resource.name, self._call), (f"Async{resource.name}", self._acall)):
            found = vars(module).get(name)
            if isinstance(found, type) and found.__module__ == module.__name__:
                for method in resource.methods:
                    if method in vars(found) and (found, method) not in self._patches:
                        replacement = functools.partial(wrapper, resource)
                        self._patches[found, method] = Patch(found, method, replacement)
                        if self._is_installed:
                            self._patches[found, method].apply()

    # What the client tells of the call that is being made.

    def sends(self) -> None:
        if (call := self._calling.get()) is not None:
            call.sends()

    def resends(self) -> None:
        if (call := self._calling.get()) is not None:
            call.resends()

    def said(self, document: Any, headers: Mapping[str, str]) -> None:
        if (call := self._calling.get()) is not None:
            call.said(document, headers)

    def interrupted(self, error: BaseException) -> None:
        """The call sees that itself."""

    def _call(
        self,
        resource: _Resource,
        original: Callable[..., Any],
        client: Any,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        begun = self._begin(resource, client, kwargs)
        if begun is None:
            return original(client, *args, **kwargs)
        call, kwargs = begun
        token = self._calling.set(call)
        try:
            result = original(client, *args, **kwargs)
        except BaseException as error:
            self._tell(call.failed, error)
            raise
        finally:
            self._calling.reset(token)
        self._tell(self._returned, call, result)
        return result

    async def _acall(
        self,
        resource: _Resource,
        original: Callable[..., Any],
        client: Any,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        begun = self._begin(resource, client, kwargs)
        if begun is None:
            return await original(client, *args, **kwargs)
        call, kwargs = begun
        token = self._calling.set(call)
        try:
            result = await original(client, *args, **kwargs)
        except BaseException as error:
            self._tell(call.failed, error)
            raise
        finally:
            # A coroutine may be closed in another context than it ran in.
            with suppress(ValueError):
                self._calling.reset(token)
        self._tell(self._returned, call, result)
        return result

    def _begin(
        self, resource: _Resource, client: Any, kwargs: dict[str, Any]
    ) -> tuple[Call, dict[str, Any]] | None:
        """Return a call that begins, and the arguments to call the client with; None for none."""
        try:
            self._hooks.close_dropped()
            if self._calling.get() is not None and _is_of_parse(kwargs):
                return None
            owner = self._owner()
            if owner is None:
                return None
            return self._begun(resource, owner, client, kwargs)
        except Exception:
            _logger.warning("A call of the OpenAI client is not recorded", exc_info=True)
            return None

    def _begun(
        self, resource: _Resource, owner: CallOwner, client: Any, kwargs: dict[str, Any]
    ) -> tuple[Call, dict[str, Any]]:
        _remember_key(client)
        name = type(client).__name__
        message_format = _FORMATS.get(resource.span_type)
        kwargs, attributes = request_attributes(kwargs, message_format)
        owner.begins()
        key = owner.fingerprint_key
        asked = None if key is None else fingerprint(key, name, kwargs)
        parent = owner.parent()
        if parent is not None and not parent.is_sampled:
            return Call(owner, resource.api, kwargs, asked, None), kwargs
        if asked is not None:
            attributes[FINGERPRINT] = f'"{asked}"'
        for annotation, value in current_annotations().items():
            attributes[ANNOTATION + annotation] = dump(value)
        shown = labelled(name, owner.names_calls_by)
        span = OpenSpan(shown, resource.span_type, parent, attributes)
        owner.started(span)
        set_last_call(span.mlflow_trace_id, span.context.span_id)
        call = Call(owner, resource.api, kwargs, asked, span)
        if owner.propagates_headers and not _has_traceparent(client, kwargs):
            headers = {**span.context.headers, **(kwargs.get("extra_headers") or {})}
            kwargs = {**kwargs, "extra_headers": headers}
        return call, kwargs

    def _returned(self, call: Call, result: Any) -> None:
        # Those of a raw response, which is parsed when the call is over.
        headers = getattr(result, "headers", None)
        result = self._hooks.parsed(result)
        if call.span is not None:
            answer = StreamedAnswer(call, self._unread)
            if self._hooks.follow(result, answer):
                self._unread.add(answer)
                return
        call.answered(result, headers)

    @staticmethod
    def _tell(what: Callable[..., None], *args: Any) -> None:
        try:
            what(*args)
        except Exception:
            _logger.warning("A call of the OpenAI client is not recorded in full", exc_info=True)


def _remember_key(client: Any) -> None:
    """Keep the client's key out of the texts of errors, which servers quote it in."""
    key = getattr(getattr(client, "_client", None), "api_key", None)
    # Servers that ask for none are given words, such as EMPTY.
    if isinstance(key, str) and len(key) >= _SHORTEST_KEY:
        remember(key)


def _is_of_parse(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is a part of parse(), which has a span of its own, as before openai 1.92."""
    headers = kwargs.get("extra_headers") or {}
    return str(headers.get("X-Stainless-Helper-Method")).endswith(".completions.parse")


def _has_traceparent(client: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether the user sends a ``traceparent`` of their own: with the call, or with all calls."""
    return any(
        str(name).lower() == _TRACEPARENT
        for headers in (kwargs.get("extra_headers"), *_default_headers(client))
        for name in headers or ()
    )


def _default_headers(client: Any) -> Iterator[Any]:
    api = getattr(client, "_client", None)
    # Those that the user gave; all others are of the client's own making.
    yield getattr(api, "_custom_headers", None)
    yield getattr(getattr(api, "_client", None), "headers", None)
