"""Traces as a tracking store has them, and what can be asserted of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.entities import Span, Trace

__all__ = ["StoredTrace", "TrackingStore", "stored_trace", "stored_traces"]

_CALLS = ("CHAT_MODEL", "LLM", "EMBEDDING")
_SHOWN = 5


@dataclass(frozen=True)
class StoredTrace:
    """A trace as the tracking store has it.

    Args:
        trace: MLflow's ``Trace``.
    """

    trace: Trace

    @property
    def root(self) -> Span:
        """The span that the driver opened; without one, the task's.

        Raises:
            ValueError: There is none in the store, or more than one.
        """
        (root,) = [span for span in self.spans if span.parent_id is None]
        return root

    @property
    def spans(self) -> list[Span]:
        """All its spans."""
        return list(self.trace.data.spans)

    @property
    def tasks(self) -> list[Span]:
        """The spans of Spark task attempts."""
        return [span for span in self.spans if span.span_type == "TASK"]

    @property
    def calls(self) -> list[Span]:
        """The spans of model calls: those of type ``CHAT_MODEL``, ``LLM`` or ``EMBEDDING``."""
        return [span for span in self.spans if span.span_type in _CALLS]

    @property
    def metadata(self) -> dict[str, str]:
        """The trace's metadata."""
        return dict(self.trace.info.trace_metadata)

    @property
    def total_tokens(self) -> int:
        """The tokens that the trace says its calls have used."""
        usage = self.trace.info.token_usage or {}
        return int(usage.get("total_tokens", 0))

    @property
    def calls_per_task(self) -> list[int]:
        """How many calls are below each task attempt, in order of partition and attempt."""
        number = Counter(task.span_id for call in self.calls for task in self._tasks_above(call))
        return [number[task.span_id] for task in sorted(self.tasks, key=_place)]

    def children_of(self, span: Span) -> list[Span]:
        """Return the spans directly below one."""
        return [child for child in self.spans if child.parent_id == span.span_id]

    def path_to(self, span: Span) -> list[str]:
        """Return the names of the spans from the root down to one."""
        return [each.name for each in self._line_of(span)]

    def is_nested(self, call: Span) -> bool:
        """Whether a call is below a task that is directly below the driver's span."""
        return any(task.parent_id == self.root.span_id for task in self._tasks_above(call))

    def assert_nested(self, calls: int | None = None) -> None:
        """Assert that every call is below a task, and that below the driver's span.

        Args:
            calls: How many there must be; by default any number but none.

        Raises:
            AssertionError: Says which calls are elsewhere, or how many there are.
        """
        found = self.calls
        elsewhere = [call for call in found if not self.is_nested(call)]
        assert not elsewhere, (
            f"{len(elsewhere)} of {len(found)} calls are not below a task of {self.root.name!r}: "
            + _listed(" > ".join(self.path_to(call)) for call in elsewhere)
        )
        wanted = "at least one" if calls is None else calls
        assert len(found) == calls if calls is not None else found, (
            f"the trace has {len(found)} calls, not {wanted}"
        )

    def assert_no_repeats(self) -> None:
        """Assert that no call was made twice with the same inputs.

        A failed attempt that Spark has retried, and a second action on the same plan, make calls
        again.

        Raises:
            AssertionError: Says which inputs came how often, and in which tasks.
        """
        tasks: dict[str, list[str]] = {}
        for call in self.calls:
            tasks.setdefault(repr(call.inputs), []).extend(
                _described(task) for task in self._tasks_above(call) or [call]
            )
        repeated = {inputs: where for inputs, where in tasks.items() if len(where) > 1}
        assert not repeated, f"{len(repeated)} calls were made more than once: " + _listed(
            f"{inputs[:200]} in {', '.join(where)}" for inputs, where in repeated.items()
        )

    def _line_of(self, span: Span) -> list[Span]:
        by_id = {each.span_id: each for each in self.spans}
        line = [span]
        while (parent := by_id.get(line[0].parent_id or "")) is not None:
            line.insert(0, parent)
        return line

    def _tasks_above(self, span: Span) -> list[Span]:
        return [each for each in self._line_of(span)[:-1] if each in self.tasks]


def _place(task: Span) -> tuple[Any, ...]:
    names = ("spark.stage.id", "spark.partition.id", "spark.task.attempt_number")
    return (*(task.attributes.get(name) or 0 for name in names), task.start_time_ns)


def _described(task: Span) -> str:
    partition, attempt = _place(task)[1:3]
    return f"{task.name} (partition {partition}, attempt {attempt})"


def _listed(texts: Iterable[str]) -> str:
    lines = list(texts)
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "; ".join(lines[:_SHOWN] + more)


def stored_trace(trace_id: str) -> StoredTrace:
    """Read a trace back from the tracking store that is set.

    Raises:
        AssertionError: It is not there.
    """
    import mlflow

    mlflow.flush_trace_async_logging()
    trace = mlflow.get_trace(trace_id)
    assert trace is not None, f"{trace_id} is not in the store"
    return StoredTrace(trace)


def stored_traces(experiment_id: str, at_most: int = 500) -> list[StoredTrace]:
    """Read the traces of an experiment back from the tracking store that is set, newest first."""
    import mlflow

    mlflow.flush_trace_async_logging()
    found = mlflow.search_traces(locations=[experiment_id], return_type="list", max_results=at_most)
    return [StoredTrace(trace) for trace in found]


@dataclass(frozen=True)
class TrackingStore:
    """A tracking store for one test, which is MLflow's meanwhile.

    Args:
        uri: Its tracking URI.
        experiment_id: The test's own experiment.
    """

    uri: str
    experiment_id: str

    def trace(self, trace_id: str | None = None) -> StoredTrace:
        """Return a trace; by default the only one there is.

        Raises:
            AssertionError: It is not there; or there are others.
        """
        if trace_id is not None:
            _wait_for_spans()
            return stored_trace(trace_id)
        traces = self.traces()
        assert len(traces) == 1, f"the store has {len(traces)} traces, not one"
        return traces[0]

    def traces(self) -> list[StoredTrace]:
        """Return all traces of the test, newest first."""
        _wait_for_spans()
        return stored_traces(self.experiment_id)


def _wait_for_spans() -> None:
    import mlflow_ctx_autolog as ctx_autolog

    # Some may have come home, for the driver to store.
    ctx_autolog.flush()
