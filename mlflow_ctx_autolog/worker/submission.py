"""What came to a worker with a function, and which span the calls of a task belong to by it."""

from __future__ import annotations

import functools
import os
import time
import uuid
from dataclasses import dataclass, field, replace
from typing import Any

from mlflow_ctx_autolog.context import BY_PROPERTY, ActionContext, DriverContext
from mlflow_ctx_autolog.exceptions import CarrierError, warn_once
from mlflow_ctx_autolog.log_ins import safe_logger
from mlflow_ctx_autolog.stores.sending import appends
from mlflow_ctx_autolog.worker import attempt
from mlflow_ctx_autolog.worker.spark_task import action_scope, action_text, stream_query

__all__ = ["Submission", "process_id", "read_carrier"]

_logger = safe_logger(__name__)

_process_token = uuid.uuid4().hex


def process_id() -> str:
    """Return a text that names this process among all processes of a cluster."""
    return f"{_process_token}-{os.getpid()}"


def read_carrier(carrier: object) -> DriverContext:
    """Return the context that a carrier holds.

    Args:
        carrier: A Spark broadcast of a :class:`DriverContext`'s JSON, that JSON, or the context.

    Raises:
        CarrierError: It is none of these, damaged, or of a newer version.
    """
    if isinstance(carrier, DriverContext):
        return carrier
    text = carrier
    if not isinstance(carrier, str):
        try:
            text = carrier.value  # type: ignore[attr-defined]
        except Exception as error:
            raise CarrierError(
                f"no driver context can be read from {type(carrier).__name__!r}: {error}"
            ) from error
    if not isinstance(text, str):
        raise CarrierError(f"the carrier holds {type(text).__name__!r}, not the JSON of a context")
    return _parse(text)


_parse = functools.lru_cache(maxsize=64)(DriverContext.from_json)


@dataclass(frozen=True)
class Submission:
    """What came with a function from where it was handed to Spark.

    Args:
        name: The name of its task spans.
        carrier: See :func:`read_carrier`.
        required: Raise where the carrier cannot be read, rather than run untraced.
        repeated: Whether the task attempt calls the function many times, and ends when Spark says
            so; else it is called once, and the attempt ends with it.
        relay: A Spark accumulator for receipts, and spans that cannot be stored from here; None
            where there is none.
        filters: The user's functions that spans go through, as Spark pickles them: ``redact``,
            and MLflow's span processors.
        function: What names the function whenever it is the same; "" for its name.
        arrived: When it came to this process, in seconds since the epoch.
    """

    name: str
    carrier: object
    required: bool = False
    repeated: bool = True
    relay: Any = None
    filters: bytes | None = None
    function: str = ""
    arrived: float = field(default_factory=time.time)

    def context(self) -> DriverContext:
        """Return what the calls of the running task belong to.

        Raises:
            CarrierError: The carrier cannot be read.
        """
        context = read_carrier(self.carrier)
        if context.propagation != BY_PROPERTY:
            return context
        action = _action()
        attempt.acknowledge(action.acknowledged)
        context = context.under(action)
        return context if context.traceparent is not None else self._of_action(context, action)

    def _of_action(self, context: DriverContext, action: ActionContext) -> DriverContext:
        """Return the context of a task whose action is a trace, since no span is active there."""
        if appends(context.tracking_uri):
            # It takes a span but once, and nobody knows which task is the last.
            return context
        what = None if action.action is None else action.action.partition(".")[2]
        if (stream := stream_query()) is not None:
            query, batch = stream
            what = f"batch {batch}"
            context = replace(context, session_id=context.session_id or query)
        name = self.name if what is None else f"{self.name}: {what}"
        return context.of_action(name, action_scope(action.action), _sampling_ratio(context))


def _sampling_ratio(context: DriverContext) -> float:
    try:
        ratio = float(context.environment.get("MLFLOW_TRACE_SAMPLING_RATIO", "1"))
    except ValueError:
        return 1.0
    return ratio if 0.0 <= ratio <= 1.0 else 1.0


def _action() -> ActionContext:
    """Return what the driver says of the task's action; if nothing, that no span is active."""
    text = action_text()
    problem = "the driver did not say which span its action is of, or this task cannot be told"
    try:
        if text is not None:
            return ActionContext.from_text(text)
    except CarrierError as error:
        problem = str(error)
    warn_once(_logger, "action", f"Calls of this task are in a trace of their own, since {problem}")
    return ActionContext()
