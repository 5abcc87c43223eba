"""Which span is active where an action runs, told to Spark beside the plan.

On classic Spark that is a local property of the thread, on Spark Connect a tag of the operation.
Both reach the tasks, neither is part of a plan, and no setting or tag that the user reads back has
it.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
from collections.abc import Callable
from typing import Any

from mlflow_ctx_autolog.context import ActionContext
from mlflow_ctx_autolog.driver.instrumentor import find_class
from mlflow_ctx_autolog.exceptions import warn_once
from mlflow_ctx_autolog.log_ins import safe_logger
from mlflow_ctx_autolog.patching import Patch, Redirect
from mlflow_ctx_autolog.tracing import current_context
from mlflow_ctx_autolog.worker.spark_task import ACTION_PROPERTY

__all__ = ["ActionPropagator", "BatchFunctions"]

_logger = safe_logger(__name__)

_CONNECT_CLIENT = ("pyspark.sql.connect.client.core",)


class ActionPropagator:
    """Keeps what Spark knows of the active span true, for each thread that speaks to it.

    The active span is looked up whenever a command goes to the JVM, which is cheap beside the
    command, and told where it has changed. So it is that of the action, whatever runs the action:
    PySpark, a library, a coroutine that takes turns with others on one thread.

    Args:
        moment: Returns something that equals what it returned before as long as there is nothing
            else to say.
        text: Returns what there is to say, for tasks to read; called where ``moment`` has changed.
        on_request: Called with each request to Spark Connect that is about to be sent.
        settles: Whether ``moment`` stays as it is as long as an object is what
            :func:`~mlflow_ctx_autolog.tracing.current_context` returns, which is quicker to ask.
    """

    def __init__(
        self,
        moment: Callable[[], object],
        text: Callable[[], str],
        on_request: Callable[[Any], None],
        settles: Callable[[object], bool] = lambda _: False,
    ) -> None:
        self._settles = settles
        self._moment = moment
        self._text = text
        self._on_request = on_request
        self._told = threading.local()
        # For each thread, where nothing was left to say, and to which SparkContext.
        self._settled = threading.local()
        self._redirect: Redirect | None = None
        self._patch: Patch | None = None
        self._is_on = False
        # Where several threads share what they say.
        self._speaker: int | None = None

    @property
    def is_on(self) -> bool:
        """Whether Spark is told."""
        return self._is_on

    def install(self) -> None:
        """Idempotent."""
        self._is_on = True
        self._settled = threading.local()
        if self._redirect is None and (
            gateway := find_class(("py4j.java_gateway",), "GatewayClient", "send_command")
        ):
            self._redirect = Redirect(gateway, "send_command", self._tell_jvm, self._is_settled)
        if self._patch is None and (
            client := find_class(
                _CONNECT_CLIENT, "SparkConnectClient", "_execute_plan_request_with_metadata"
            )
        ):
            name = "_execute_plan_request_with_metadata"
            self._patch = Patch(client, name, self._tag_request)
        for patch in (self._redirect, self._patch):
            if patch is not None:
                patch.apply()

    def uninstall(self) -> None:
        """Say no more, and take back what was said on this thread. Idempotent."""
        if self._is_on:
            self._is_on = False
            self._settled = threading.local()
            self._tell_jvm(None)
        for patch in (self._redirect, self._patch):
            if patch is not None:
                patch.revert()

    def heard(self) -> ActionContext | None:
        """Return what Spark has for this thread from whoever started it, and say nothing to it."""
        context = _active_spark_context()
        if getattr(context, "_jsc", None) is None:
            return None
        told = self._told
        before, told.is_telling = getattr(told, "is_telling", False), True
        try:
            text = context._jsc.getLocalProperty(ACTION_PROPERTY)
        finally:
            told.is_telling = before
        return None if text is None else ActionContext.from_text(text)

    def _is_settled(self) -> bool:
        settled = self._settled
        return (
            getattr(settled, "here", None) is current_context()
            and settled.context is _spark_context_class()._active_spark_context
        )

    def _tell_jvm(self, client: Any) -> Any:
        settled, here = self._settled, current_context()
        told = self._told
        if getattr(told, "is_telling", False):
            return client
        told.is_telling = True
        try:
            context = _active_spark_context()
            # A context that is being made, or has been stopped, has no JVM's side.
            if getattr(context, "_jsc", None) is not None:
                moment = self._moment() if self._is_on else None
                if getattr(told, "moment", _NOTHING) != moment or told.context is not context:
                    self._tell(context, moment)
                settled.here = here if self._settles(here) else None
                settled.context = context
        except Exception as error:
            warn_once(
                _logger,
                "propagation",
                "Spark could not be told which span is active, so that calls of its tasks may be "
                f"in traces of their own: {type(error).__name__}: {error}. "
                "propagation='broadcast' does without.",
            )
        finally:
            told.is_telling = False
        return client

    def _tell(self, context: Any, moment: object) -> None:
        text = self._text() if self._is_on else None
        told = self._told
        before = told.text if getattr(told, "context", None) is context else None
        told.moment, told.context = moment, context
        if _is_of_jvm(threading.current_thread()):
            before, text = self._on_thread_of_jvm(context, before, text)
        told.text = text
        if before == text:
            return
        self._warn_if_shared(text)
        context._jsc.setLocalProperty(ACTION_PROPERTY, text)

    def _on_thread_of_jvm(
        self, context: Any, before: str | None, text: str | None
    ) -> tuple[str | None, str | None]:
        """Return what was said and what to say where the JVM calls: a listener, or of a stream.

        It does so on a thread that runs actions of its own. Unless what it calls opens a span, they
        belong where whoever started the stream has said.
        """
        told = self._told
        if not hasattr(told, "heard"):
            before = told.heard = context._jsc.getLocalProperty(ACTION_PROPERTY)
        names_span = text is not None and ActionContext.from_text(text).traceparent is not None
        return before, text if names_span else told.heard

    def _warn_if_shared(self, text: str | None) -> None:
        """Warn where two threads that say something have one thread of the JVM between them."""
        if text is None or os.environ.get("PYSPARK_PIN_THREAD", "true").lower() == "true":
            return
        thread = threading.get_ident()
        if self._speaker not in (None, thread):
            warn_once(
                _logger,
                "pinned threads",
                "PYSPARK_PIN_THREAD is false, so that Spark cannot tell the threads of this "
                "process apart: calls of jobs that run under two spans at once may be in either "
                "trace. Leave PYSPARK_PIN_THREAD at true.",
            )
        self._speaker = thread

    def _tag_request(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        request = original(*args, **kwargs)
        try:
            self._on_request(request)
            request.tags.append(f"{ACTION_PROPERTY}={self._text()}")
        except Exception as error:
            warn_once(_logger, "tag", f"A request to Spark Connect has no tag of its span: {error}")
        return request


class BatchFunctions:
    """Has what ``foreachBatch`` calls on the driver be below the span in which its stream started.

    Spark calls it on a thread of its own, on which no span is active, and which has the local
    properties of the thread that started the stream.

    Args:
        heard: See :meth:`ActionPropagator.heard`.
        activate: Makes the span of a W3C ``traceparent`` the active one, from now on.
    """

    def __init__(
        self,
        heard: Callable[[], ActionContext | None],
        activate: Callable[[str | None], object],
    ) -> None:
        self._heard = heard
        self._activate = activate
        self._redirect: Redirect | None = None

    def install(self) -> None:
        """Idempotent."""
        if self._redirect is None:
            owner = find_class(("pyspark.sql.utils",), "ForeachBatchFunction", "call")
            if owner is None:
                return
            self._redirect = Redirect(owner, "call", self._activate_span_of_stream)
        self._redirect.apply()

    def uninstall(self) -> None:
        """Idempotent."""
        if self._redirect is not None:
            self._redirect.revert()

    def _activate_span_of_stream(self, function: Any) -> Any:
        heard = self._heard()
        self._activate(None if heard is None else heard.traceparent)
        return function


_NOTHING = object()


def _is_of_jvm(thread: threading.Thread) -> bool:
    """Whether a thread runs what the JVM calls, on behalf of one of the JVM's own."""
    module = getattr(getattr(thread, "_target", None), "__module__", None)
    return str(module).startswith("py4j.")


def _active_spark_context() -> Any:
    return _spark_context_class()._active_spark_context


@functools.cache
def _spark_context_class() -> Any:
    return importlib.import_module("pyspark").SparkContext
