"""Which trace a finished span is stored in, if any, so that none grows beyond what can be read.

The driver's trace takes all that a job makes, up to a limit. What comes after goes to a trace that
is linked to its task, unless it failed or is among the slowest. Sampling comes before that.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

from mlflow_ctx_autolog.config import Sampling
from mlflow_ctx_autolog.context import DriverContext
from mlflow_ctx_autolog.delivery.host_account import Event, HostAccount, open_account
from mlflow_ctx_autolog.exceptions import warn_once
from mlflow_ctx_autolog.log_ins import safe_logger
from mlflow_ctx_autolog.worker.open_spans import Branch

__all__ = ["Jobs", "Place", "Placement", "Quota", "Slowest", "open_placement"]

_logger = safe_logger(__name__)

# Jobs that a host remembers: each batch of a stream may be one.
_JOBS = 1000
# Seconds that a call may be kept waiting for another process.
_PATIENCE = 0.005
# Spans that a process takes of the quota at once.
_AT_ONCE = 16
# Calls that are the slowest, where no limit says how many a trace has room for.
_SLOWEST = 20


class Place(Enum):
    """Where a span is stored."""

    MAIN = "the driver's trace"
    LINKED = "the linked trace of its task"
    NOWHERE = "nowhere, since sampling leaves it out"


class Jobs:
    """What the traces of a host's jobs have taken, those that were told of last.

    Attributes:
        taken: Of each trace, how many spans of each kind.
        slowest: Of each trace, the seconds that its slowest calls took.
    """

    def __init__(self) -> None:
        self.taken: dict[str, Counter[str]] = {}
        self.slowest: dict[str, list[float]] = {}

    def enter(self, event: Event) -> None:
        """Learn of spans that were taken, or of a slow call."""
        match event:
            case ["taken", str(job), str(kind), int(spans)]:
                taken = self.taken.pop(job, Counter())
                taken[kind] += spans
                self.taken[job] = taken
            case ["slow", str(job), seconds, int(count)]:
                known = self.slowest.pop(job, [])
                self.slowest[job] = sorted([*known, float(seconds)])[-count:]
        for each in (self.taken, self.slowest):
            while len(each) > _JOBS:
                del each[next(iter(each))]

    def events(self) -> list[Event]:
        """Return what tells it anew."""
        taken = [
            ["taken", job, kind, spans]
            for job, kinds in self.taken.items()
            for kind, spans in kinds.items()
        ]
        slow = [
            ["slow", job, seconds, len(known)]
            for job, known in self.slowest.items()
            for seconds in known
        ]
        return [*taken, *slow]


class Quota:
    """Shares out how many spans a trace takes, among the processes of a host.

    Args:
        limits: Of each kind of span, how many.
        account: What was taken on this host.
        job: Names the trace there.
    """

    def __init__(self, limits: dict[str, int], account: HostAccount[Jobs], job: str) -> None:
        self._limits = limits
        self._account = account
        self._job = job
        self._lock = threading.Lock()
        self._stock: Counter[str] = Counter()
        self._used_up: set[str] = set()

    def take(self, kind: str) -> bool:
        """Take one span of a kind; return whether there was one left."""
        with self._lock:
            if not self._stock[kind] and kind not in self._used_up:
                self._stock_up(kind)
            has_room = self._stock[kind] > 0
            self._stock[kind] -= has_room
            return has_room

    def _stock_up(self, kind: str) -> None:
        try:
            with self._account.changing() as (jobs, tell):
                taken = jobs.taken.get(self._job, Counter())[kind]
                given = max(0, min(_AT_ONCE, self._limits[kind] - taken))
                tell("taken", self._job, kind, given)
        except OSError as error:
            _warn(error)
            given = 1
        self._stock[kind] += given
        if not given:
            self._used_up.add(kind)

    def give_back(self) -> None:
        """Leave to others what was not needed. To be called at the end of a task."""
        with self._lock:
            left = {kind: spans for kind, spans in self._stock.items() if spans}
            if left:
                try:
                    with self._account.changing() as (_, tell):
                        for kind, spans in left.items():
                            tell("taken", self._job, kind, -spans)
                except OSError as error:
                    _warn(error)
            self._stock.clear()
            # Others may have given back.
            self._used_up.clear()


class Slowest:
    """Tells the calls that are among the slowest of a job on this host so far.

    In the end those that are the slowest were all told, and of others few: the logarithm of their
    number, times ``count``.

    Args:
        count: How many are the slowest.
        account: What is known of them on this host.
        job: Names the job there.
    """

    def __init__(self, count: int, account: HostAccount[Jobs], job: str) -> None:
        self._count = count
        self._account = account
        self._job = job
        # What is as fast is not among them. It only rises, so that most calls need no look.
        self._floor = -1.0

    def includes(self, seconds: float) -> bool:
        """Whether a call that took so long is among them; it is entered if it is."""
        if seconds <= self._floor:
            return False
        try:
            with self._account.changing() as (jobs, tell):
                known = jobs.slowest.get(self._job, [])
                if len(known) >= self._count:
                    self._floor = known[-self._count]
                if seconds <= self._floor:
                    return False
                tell("slow", self._job, seconds, self._count)
        except OSError as error:
            _warn(error)
            return False
        return True


def _warn(error: OSError) -> None:
    warn_once(_logger, "placement", f"A trace may get larger than it should, since {error}")


@dataclass(frozen=True)
class Placement:
    """Decides where the spans of a task are stored.

    Args:
        quota: What the driver's trace takes; None for all.
        slowest: Tells slow calls.
        sampling: What is stored at all; None for all.
    """

    quota: Quota | None
    slowest: Slowest
    sampling: Sampling | None
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def place(self, branch: Branch, span_id: str, *, failed: bool, seconds: float) -> Place:
        """Return where a span goes that has ended: where its branch does.

        The first span of the branch that ends decides. An error is not left out with its branch.

        Args:
            branch: What it lies in.
            span_id: Its id.
            failed: Whether it ended in an error.
            seconds: How long it took.
        """
        with self._lock:
            # Threads that end spans of one branch at once must not decide differently.
            if branch.place is None:
                branch.place = self._decide(span_id, failed, seconds)
            place: Place = branch.place
        if place is Place.NOWHERE and failed and self.sampling and self.sampling.errors:
            # Kept by itself, not with those that end after it.
            return self._trace(failed, seconds)
        return place

    def place_open(self, branch: Branch) -> Place:
        """Return where a branch goes of which a span is stored before it has ended."""
        with self._lock:
            # Where it is sent ahead, it must be sent again when it ends.
            branch.place = branch.place or Place.MAIN
            place: Place = branch.place
            return place

    def close(self) -> None:
        """To be called at the end of a task."""
        if self.quota is not None:
            self.quota.give_back()

    def _decide(self, span_id: str, failed: bool, seconds: float) -> Place:
        sampling = self.sampling
        if (
            sampling is not None
            and not (sampling.errors and failed)
            # The id is random, and to ask for another number could change what the user's get.
            and int(span_id, 16) / 2**64 >= sampling.share
            and not (sampling.slow and self.slowest.includes(seconds))
        ):
            return Place.NOWHERE
        return self._trace(failed, seconds)

    def _trace(self, failed: bool, seconds: float) -> Place:
        quota = self.quota
        if (
            quota is None
            or quota.take("any")
            or (failed and quota.take("failed"))
            or (self.slowest.includes(seconds) and quota.take("slow"))
        ):
            return Place.MAIN
        return Place.LINKED


def open_placement(context: DriverContext, trace_id: str) -> Placement | None:
    """Return what decides for a task; None where all goes to its trace.

    Args:
        context: What came from the driver.
        trace_id: The trace that is not to grow too large.
    """
    limit, sampling = context.spans_per_host, context.config.sampling
    if limit is None and sampling is None:
        return None
    if context.traceparent is None:
        # Each task is a trace of its own.
        account = HostAccount(None, Jobs, _PATIENCE)
    else:
        account = open_account(
            context.config.spool_directory, "all", "placement", Jobs, patience=_PATIENCE
        )
    quota, slowest = None, _SLOWEST
    if limit is not None:
        eighth = max(1, limit // 8)
        quota = Quota({"any": limit, "failed": eighth, "slow": eighth}, account, trace_id)
        slowest = max(1, limit // 100)
    return Placement(
        quota,
        Slowest(slowest, account, trace_id),
        None if sampling is None else Sampling.parse(sampling),
    )
