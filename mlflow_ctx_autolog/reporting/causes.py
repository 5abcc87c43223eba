"""Why a request was made again: decided from what the spans carry, or unknown."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow_ctx_autolog.reporting.calls import Attempt, Call
from mlflow_ctx_autolog.stores.stored_trace import ANY_FUNCTION

__all__ = ["CAUSES", "CLIENT_RETRY", "Cause", "Judged", "judge", "skewed_hosts"]


@dataclass(frozen=True)
class Cause:
    """Why requests were made again.

    Args:
        key: By which programs know it.
        name: By which people do.
        fix: What to do, in one line.
    """

    key: str
    name: str
    fix: str


ANOTHER_ACTION = Cause(
    "another_action",
    "evaluated again by another action",
    "persist() or checkpoint() the result, or write it and read it back, before the first action.",
)
PLAN_TWICE = Cause(
    "plan_twice",
    "evaluated again inside one action: the plan contains the function twice",
    "persist() or checkpoint() the function's result before it is joined or united with itself.",
)
UDF_DUPLICATED = Cause(
    "udf_duplicated",
    "evaluated again inside one action: the UDF is called twice for a row",
    "Use its column twice, not the UDF; if Spark's optimiser has doubled it: asNondeterministic().",
)
LOST_CACHE = Cause(
    "lost_cache",
    "evaluated again since a cached block was missing",
    "persist(StorageLevel.MEMORY_AND_DISK_2), give executors more memory, or checkpoint() instead.",
)
TASK_RETRY = Cause(
    "task_retry",
    "task retry",
    "Catch errors row by row inside the function, or make partitions smaller: repartition().",
)
STAGE_RETRY = Cause(
    "stage_retry",
    "stage retry",
    "checkpoint() or write the result before the shuffle; find out why executors are lost.",
)
SPECULATIVE_COPY = Cause(
    "speculative_copy",
    "speculative copy",
    "Turn spark.speculation off for this job; a slow model call is no faster elsewhere.",
)
DUPLICATE_ROW = Cause(
    "duplicate_row",
    "duplicate row",
    "dropDuplicates() the input before the function, and join the answers back.",
)
CLIENT_RETRY = Cause(
    "client_retry",
    "the client's own retry",
    "Lower max_retries on the client, or ask it less at a time; see its errors and Retry-After.",
)
UNKNOWN = Cause(
    "unknown",
    "unknown",
    "The spans do not say; docs/report.md lists the facts that each cause is decided from.",
)

CAUSES = (
    ANOTHER_ACTION,
    PLAN_TWICE,
    UDF_DUPLICATED,
    LOST_CACHE,
    TASK_RETRY,
    STAGE_RETRY,
    SPECULATIVE_COPY,
    DUPLICATE_ROW,
    CLIENT_RETRY,
    UNKNOWN,
)

_CACHE_SCAN = "InMemoryTableScan"
# Attempts at most that one call is compared with: a request may be made in thousands.
_COMPARED = 200


@dataclass(slots=True)
class Judged:
    """A call and what was found out about it.

    Args:
        call: The call.
        cause: Why it repeats an earlier one; None for the first of its kind.
        repeats: The call that it repeats; None for the first of its kind.
        kept: Whether its answer is the one that was needed: the first of its kind that succeeded.
    """

    call: Call
    cause: Cause | None = None
    repeats: Call | None = None
    kept: bool = True


def skewed_hosts(attempts: Sequence[Attempt], opened: int | None) -> dict[str, float]:
    """Return hosts whose clock is known to disagree with the driver's, and seconds at least.

    A task that seems to begin before the driver's span that it belongs to shows it.

    Args:
        attempts: Of one trace.
        opened: When the driver's span began, in nanoseconds since the epoch; None if not known.
    """
    found: dict[str, float] = {}
    for attempt in attempts:
        if opened is not None and attempt.host is not None and attempt.started < opened:
            behind = (opened - attempt.started) / 1e9
            found[attempt.host] = max(behind, found.get(attempt.host, 0.0))
    return found


def judge(
    calls: Sequence[Call],
    *,
    attempts: Sequence[Attempt] = (),
    key: Callable[[Call], Hashable] | None = None,
    skewed: Collection[str] = (),
) -> list[Judged]:
    """Return each call with the cause of its repetition.

    Args:
        calls: In the order of their time.
        attempts: All task attempts, also those that have made no call.
        key: Returns by what the same request is recognised, None where it is like no other; by
            default function and fingerprint.
        skewed: Hosts whose times cannot be compared with those of others.
    """
    judged = [Judged(call) for call in calls]
    groups: defaultdict[Hashable, list[Judged]] = defaultdict(list)
    for each in judged:
        if each.call.reused_from is not None:
            # Nothing was sent, so that nothing was repeated.
            continue
        name = _request(each.call) if key is None else key(each.call)
        if name is not None:
            groups[name].append(each)
    repeated = [group for group in groups.values() if len(group) > 1]
    if repeated:
        rules = _Rules(calls, attempts, skewed)
        for group in repeated:
            _judge_group(group, rules)
    return judged


def _request(call: Call) -> Hashable:
    return None if call.request is None else (call.function, call.request)


def _judge_group(group: list[Judged], rules: _Rules) -> None:
    kept = next((each for each in group if not each.call.failed), group[0])
    # The latest call of each attempt is as close as any of it.
    latest: dict[str | None, Call] = {}
    for each in group:
        each.kept = each is kept
        own = None if each.call.attempt is None else each.call.attempt.span_id
        if latest:
            earlier = [latest[own]] if own in latest else list(latest.values())[-_COMPARED:]
            each.repeats, each.cause = rules.explain(earlier, each.call)
        latest.pop(own, None)
        latest[own] = each.call


class _Rules:
    """Decides the cause of one call, knowing all.

    Args:
        calls: All calls.
        attempts: All task attempts.
        skewed: Hosts whose times cannot be compared with those of others.
    """

    def __init__(
        self, calls: Sequence[Call], attempts: Sequence[Attempt], skewed: Collection[str]
    ) -> None:
        self._skewed = set(skewed)
        self._requests: defaultdict[str, Counter[Any]] = defaultdict(Counter)
        self._handovers: defaultdict[Any, set[str | None]] = defaultdict(set)
        self._functions: defaultdict[Any, set[str]] = defaultdict(set)
        for attempt in attempts:
            self._functions[attempt.operation].add(attempt.function)
        for call in calls:
            if call.attempt is not None:
                self._requests[call.attempt.span_id][call.request] += 1
                self._handovers[_use(call.attempt)].add(call.attempt.handover)

    def explain(self, earlier: Sequence[Call], call: Call) -> tuple[Call, Cause]:
        """Return the earlier call that is closest to this one, and why it was made again."""
        # Of those that are equally close, the latest.
        closest = max(reversed(earlier), key=lambda other: _closeness(other, call))
        return closest, self._cause(closest, call)

    def _cause(self, earlier: Call, call: Call) -> Cause:
        one, two = earlier.attempt, call.attempt
        if one is two:
            if earlier.failed and (earlier.ended or 0) <= call.started:
                return CLIENT_RETRY
            return UNKNOWN if one is None else DUPLICATE_ROW
        if one is None or two is None:
            return UNKNOWN
        if one.application != two.application:
            return UNKNOWN if None in (one.application, two.application) else ANOTHER_ACTION
        if one.attempt_id is None or two.attempt_id is None:
            return UNKNOWN
        # Ids grow in the order in which Spark has launched them; clocks of hosts may disagree.
        first, second = sorted((one, two), key=lambda attempt: attempt.attempt_id or 0)
        if first.attempt_id == second.attempt_id:
            return self._inside_one_attempt(first, second)
        if first.action != second.action:
            return self._another_action(first, second)
        if first.stage != second.stage:
            return self._other_stage(first, second)
        if first.partition != second.partition:
            return self._other_partition(first, second)
        return self._other_attempt(first, second)

    def _inside_one_attempt(self, one: Attempt, two: Attempt) -> Cause:
        if one.handover is None or two.handover is None:
            return UNKNOWN
        if one.handover != two.handover:
            return PLAN_TWICE
        if one.process != two.process or one.overlaps(two):
            return UDF_DUPLICATED
        # One after the other, as where coalesce() has put several partitions into one task.
        return self._other_partition(one, two)

    def _another_action(self, first: Attempt, second: Attempt) -> Cause:
        plans = [_plan(attempt) or {} for attempt in (first, second)]
        return LOST_CACHE if all(plan.get(_CACHE_SCAN) for plan in plans) else ANOTHER_ACTION

    def _other_stage(self, first: Attempt, second: Attempt) -> Cause:
        if first.action is None:
            return self._other_stage_of_rdd(first, second)
        if first.handover != second.handover:
            return UNKNOWN if None in (first.handover, second.handover) else PLAN_TWICE
        uses = self._uses_in_plan(second)
        if uses is None:
            # What was lost is made again after it was there, and never at the same time.
            return PLAN_TWICE if self._overlap(first, second) else UNKNOWN
        if uses > 1:
            return PLAN_TWICE
        if first.partition != second.partition:
            return UNKNOWN
        # AQE runs each stage as a job of its own, so that a shuffle's lost blocks are made again
        # by a stage with another id.
        return LOST_CACHE if (_plan(second) or {}).get(_CACHE_SCAN) else STAGE_RETRY

    def _other_stage_of_rdd(self, first: Attempt, second: Attempt) -> Cause:
        jobs = [attempt.facts.jobs.get(attempt.stage or 0) for attempt in (first, second)]
        if None not in jobs:
            return ANOTHER_ACTION if jobs[0] != jobs[1] else PLAN_TWICE
        if None not in (first.call_site, second.call_site) and first.call_site != second.call_site:
            return ANOTHER_ACTION
        return UNKNOWN

    def _other_partition(self, one: Attempt, two: Attempt) -> Cause:
        if one.handover is None or two.handover is None:
            return UNKNOWN
        if one.handover != two.handover:
            return PLAN_TWICE
        uses = self._uses_in_plan(two)
        if uses == 1:
            return DUPLICATE_ROW
        if not one.outcome == two.outcome == "completed":
            return UNKNOWN
        if self._requests[one.span_id] != self._requests[two.span_id]:
            # What is evaluated again is a whole partition.
            return DUPLICATE_ROW
        return UNKNOWN if uses is None else PLAN_TWICE

    def _other_attempt(self, first: Attempt, second: Attempt) -> Cause:
        if first.number is None or second.number is None:
            return UNKNOWN
        if second.number <= first.number:
            # Numbers begin anew with each attempt of a stage.
            return STAGE_RETRY
        speculative = second.facts.speculative
        if speculative is not None and not self._is_recent(second):
            return SPECULATIVE_COPY if second.attempt_id in speculative else TASK_RETRY
        if second.speculation is False or (
            first.outcome == "failed" and self._ended(first, second)
        ):
            return TASK_RETRY
        if self._overlap(first, second):
            return SPECULATIVE_COPY
        return TASK_RETRY if self._ended(first, second) else UNKNOWN

    def _uses_in_plan(self, attempt: Attempt) -> int | None:
        """Return how often the final plan runs this use of the function; None if not known."""
        plan = _plan(attempt)
        if plan is None:
            return None
        nodes = plan.get(attempt.function, 0)
        if ANY_FUNCTION in plan:
            if self._functions[attempt.operation] != {attempt.function}:
                return None
            nodes = plan[ANY_FUNCTION]
        others = len(self._handovers[_use(attempt)]) - 1
        return max(1, nodes - others)

    def _comparable(self, one: Attempt, two: Attempt) -> bool:
        return one.host == two.host or not self._skewed.intersection((one.host, two.host))

    def _overlap(self, one: Attempt, two: Attempt) -> bool:
        return self._comparable(one, two) and one.overlaps(two)

    def _ended(self, first: Attempt, second: Attempt) -> bool:
        return self._comparable(first, second) and first.ended_before(second)

    @staticmethod
    def _is_recent(attempt: Attempt) -> bool:
        # Of stages after the driver's span, nothing was learnt.
        return attempt.stage not in attempt.facts.jobs


def _use(attempt: Attempt) -> Hashable:
    return attempt.application, attempt.action, attempt.function


def _plan(attempt: Attempt) -> Mapping[str, int] | None:
    keys = (attempt.operation, attempt.execution)
    plans = attempt.facts.plans
    return next((plans[key] for key in keys if key is not None and key in plans), None)


def _closeness(earlier: Call, call: Call) -> tuple[bool, ...]:
    """Order earlier calls by how much they have in common with one."""
    one, two = earlier.attempt, call.attempt
    if one is two:
        return (True,)
    if one is None or two is None or one.application != two.application:
        return (False,)
    same_task = one.attempt_id == two.attempt_id
    same_action = one.action == two.action
    same_stage = same_action and one.stage == two.stage
    same_partition = one.partition == two.partition
    return (
        False,
        same_task,
        same_stage and same_partition,
        same_stage,
        same_action,
        same_partition,
    )
