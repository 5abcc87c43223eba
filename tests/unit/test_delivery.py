"""Delivery: nobody waits for the store, and nothing is lost or doubled on the way to it."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlflow_ctx_autolog import Config
from mlflow_ctx_autolog.delivery import intake as intake_module
from mlflow_ctx_autolog.delivery import pacing as pacing_module
from mlflow_ctx_autolog.delivery import sender as delivery_module
from mlflow_ctx_autolog.delivery.deliveries import Deliveries
from mlflow_ctx_autolog.delivery.intake import Intake
from mlflow_ctx_autolog.delivery.outbox import Outbox
from mlflow_ctx_autolog.delivery.pacing import Pacing
from mlflow_ctx_autolog.delivery.receipts import Counts, Loss
from mlflow_ctx_autolog.delivery.recovery import Recovered, recover
from mlflow_ctx_autolog.delivery.segments import Segment
from mlflow_ctx_autolog.delivery.sender import Delivery
from mlflow_ctx_autolog.delivery.spool import Destination, Record, Spool, spool_files
from mlflow_ctx_autolog.exceptions import StoreError

A = Destination("http://a", "1")
B = Destination("http://b", "1")
# For tests that look at warnings: threads of the tests before may still warn of other stores.
C = Destination("http://c", "1")

# Seconds after which a test gives up; none takes nearly as long.
LONG = 30.0
# Seconds that are long for what should not wait, and short beside LONG.
STALL = 5.0

Settings = Callable[..., Config]


class QuickToRetry(Delivery):
    """Pauses shortly after each failed attempt, so that tests see several."""

    class _pacing_class(Pacing):  # noqa: N801 - takes its place
        first_pause = longest_pause = 0.01


class SlowToRetry(Delivery):
    """Does not try again by itself within a test."""

    class _pacing_class(Pacing):  # noqa: N801 - takes its place
        first_pause = longest_pause = 3600.0


class QuickToGiveUp(SlowToRetry):
    """Waits but a moment for a store that is known to be down."""

    _patience_when_down = 0.05


class Store:
    """Records what it is sent, and can be told to refuse or to hang."""

    def __init__(self) -> None:
        self.requests: list[tuple[Destination, list[Record]]] = []
        self.attempts = 0
        # Raised in the place of an answer.
        self.error: Exception | None = None
        # Keys of what it will never have.
        self.refuses: set[str] = set()
        # Keys of what it breaks down over.
        self.fails_over: set[str] = set()
        # Keys of each request, with "!" in front of those refused.
        self.log: list[str] = []
        self._changed = threading.Condition()
        self._answering = threading.Event()
        self._answering.set()

    def __call__(self, destination: Destination, records: Sequence[Record], /) -> None:
        with self._changed:
            self.attempts += 1
            error = self.error
            if self.refuses & {record.key for record in records}:
                error = StoreError("it answered 400", refused=True)
            if self.fails_over & {record.key for record in records}:
                error = StoreError("it answered 500", failed=True)
            keys = " ".join(record.key for record in records)
            self.log.append(f"! {keys}" if error else keys)
            self._changed.notify_all()
        self._answering.wait()
        if error is not None:
            raise error
        with self._changed:
            self.requests.append((destination, list(records)))
            self._changed.notify_all()

    @property
    def stored(self) -> list[str]:
        return [record.key for _, records in self.requests for record in records]

    @property
    def batches(self) -> list[list[str]]:
        return [[record.key for record in records] for _, records in self.requests]

    def fail(self, error: Exception | None = None) -> None:
        self.error = error or ConnectionError("no route to the store")

    def recover(self) -> None:
        self.error = None

    def hang(self) -> None:
        self._answering.clear()

    def answer(self) -> None:
        self._answering.set()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, LONG)


class Disk:
    """A disk that can be told to hang: the spool's writes wait until it answers."""

    def __init__(self) -> None:
        self.called = threading.Event()
        self._answering = threading.Event()
        self._answering.set()

    def wait(self) -> None:
        self.called.set()
        self._answering.wait()

    def hold_up(self, delivery: Delivery, record: Record) -> None:
        """Hang, and be writing this record, for a call that waits."""
        self.hang()
        threading.Thread(target=delivery.submit, args=(record,), daemon=True).start()
        assert self.called.wait(LONG)

    def hang(self) -> None:
        self.called.clear()
        self._answering.clear()

    def answer(self) -> None:
        self._answering.set()


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    # Lets the sender thread of a failed test go.
    store.recover()
    store.refuses = store.fails_over = set()
    store.answer()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    real = Segment.add

    def add(segment: Segment, numbered: Any) -> None:
        disk.wait()
        real(segment, numbered)

    monkeypatch.setattr(Segment, "add", add)
    yield disk
    disk.answer()


@pytest.fixture
def settings(spools: Path) -> Settings:
    def settings(**changed: Any) -> Config:
        # Spans leave by count or by flush only: nothing here depends on the machine's speed.
        return Config(**{"send_interval": 3600, "spool_directory": str(spools), **changed})

    return settings


@pytest.fixture
def unhurried(settings: Settings) -> Config:
    return settings()


def span(key: object, owner: str = "", size: int = 0) -> Record:
    return Record("span", str(key), f"payload of {key}".encode().ljust(size), owner)


def spans(keys: Iterable[object], owner: str = "", size: int = 0) -> list[Record]:
    return [span(key, owner, size) for key in keys]


def lost_by(way: Loss, *, made: int, count: int, delivered: int = 0) -> Counts:
    return Counts(made=made, delivered=delivered, losses=Counter({way: count}))


def names(*numbers: int) -> list[str]:
    return [str(number) for number in range(*numbers)]


def submit_all(delivery: Delivery, records: Iterable[Record]) -> None:
    for record in records:
        delivery.submit(record)


def flushed(delivery: Delivery) -> bool:
    # An attempt that was on its way when the store came back may cost a long pause.
    return any(delivery.flush(1.0) for _ in range(int(LONG)))


def until(condition: Callable[[], bool]) -> None:
    """Wait for what no event tells of."""
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def in_time(function: Callable[..., Any], *args: Any) -> Any:
    """Return what a call returns, having made sure that it does not take long."""
    results: list[Any] = []
    caller = threading.Thread(target=lambda: results.append(function(*args)), daemon=True)
    caller.start()
    caller.join(STALL)
    assert results, "it takes too long"
    return results[0]


def warnings_of(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("mlflow_ctx_autolog")
        and record.levelno == logging.WARNING
        and text in record.getMessage()
    ]


# Nobody waits.


def test_submit_does_not_wait_for_the_store(store: Store, settings: Settings) -> None:
    """Handing over finished spans returns while the store hangs."""
    store.hang()
    delivery = Delivery(A, store, settings(batch_size=1))
    delivery.submit(span(0))
    store.wait_for(lambda: store.attempts == 1)

    caller = threading.Thread(target=submit_all, args=(delivery, spans(names(1, 101))), daemon=True)
    caller.start()
    caller.join(LONG)

    assert not caller.is_alive()
    assert delivery.waiting == 101
    assert store.stored == []
    store.answer()
    assert delivery.flush(LONG)
    assert store.stored == names(101)


def test_submit_does_not_wait_for_a_disk_that_hangs(
    store: Store, disk: Disk, unhurried: Config
) -> None:
    """Handing over finished spans returns while the disk hangs, and they are stored after that."""
    delivery = Delivery(A, store, unhurried)
    disk.hold_up(delivery, span(0))

    started = time.monotonic()
    submit_all(delivery, spans(names(1, 1001)))
    assert time.monotonic() - started < STALL
    assert delivery.waiting == 1001

    disk.answer()
    assert delivery.flush(LONG)
    assert store.stored == names(1001)


def test_flush_does_not_wait_longer_than_it_should_for_a_disk_that_hangs(
    store: Store, disk: Disk, unhurried: Config
) -> None:
    """The end of a task does not wait for a hanging disk beyond the timeout."""
    delivery = Delivery(A, store, unhurried)
    disk.hold_up(delivery, span(0))

    assert in_time(delivery.flush, 0.05) is False


def test_taking_does_not_wait_for_a_disk_that_hangs(
    store: Store, disk: Disk, unhurried: Config
) -> None:
    """What waits can be asked for while the disk hangs; there is nothing then."""
    delivery = QuickToGiveUp(A, store, unhurried)
    disk.hold_up(delivery, span(0))

    assert in_time(delivery.take) == []


def test_new_settings_do_not_wait_for_a_disk_that_hangs(
    store: Store, disk: Disk, settings: Settings
) -> None:
    """The next task can begin with other settings while the disk hangs, and loses nothing."""
    delivery = Delivery(A, store, settings())
    disk.hold_up(delivery, span(0))

    in_time(lambda: [delivery.configure(settings(batch_size=7))])
    disk.answer()
    assert delivery.flush(LONG)
    assert store.stored == ["0"]


def test_spans_that_a_hanging_disk_has_no_room_for_are_lost(
    store: Store, disk: Disk, settings: Settings
) -> None:
    """While the disk hangs, memory is bounded: spans beyond it are lost, and nobody waits long."""

    class Impatient(Delivery):
        class _intake_class(Intake):  # noqa: N801 - takes its place
            patience_without_room = 0.05

    delivery = Impatient(A, store, settings(max_waiting_bytes=1_000_000))
    disk.hold_up(delivery, span(0, size=400_000))
    submit_all(delivery, spans(names(1, 5), size=400_000))

    assert (delivery.waiting, delivery.lost) == (3, 2)
    disk.answer()
    assert delivery.flush(LONG)
    assert store.stored == ["0", "1", "2"]


def test_those_who_can_wait_do_so_for_a_slow_disk(
    store: Store, disk: Disk, settings: Settings
) -> None:
    """Where nobody's call waits, records wait for room rather than being lost."""
    disk.hang()
    delivery = Delivery(A, store, settings(max_waiting_bytes=1_000_000))
    caller = threading.Thread(
        target=delivery.submit_all, args=(spans(names(5), size=400_000),), daemon=True
    )
    caller.start()
    assert disk.called.wait(LONG)
    disk.answer()
    caller.join(LONG)

    assert not caller.is_alive()
    assert delivery.flush(LONG)
    assert sorted(store.stored) == names(5)
    assert delivery.lost == 0


def test_those_who_can_wait_do_not_do_so_for_each_record(
    store: Store, disk: Disk, settings: Settings
) -> None:
    """However many records come together, waiting for a disk that hangs has an end."""

    class Patient(Delivery):
        _patience_for_room = 0.2

    disk.hang()
    delivery = Patient(A, store, settings(max_waiting_bytes=1_000_000))
    in_time(lambda: [delivery.submit_all(spans(names(50), size=600_000))])

    assert (delivery.waiting, delivery.lost) == (1, 49)


def test_a_process_without_threads_loses_nothing(
    store: Store, unhurried: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no thread can be started, submit does not raise, and the span waits for one."""

    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    delivery = Delivery(A, store, unhurried)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        delivery.submit(span(0))
        assert delivery.waiting == 1

    delivery.submit(span(1))
    assert delivery.flush(LONG)
    assert store.stored == ["0", "1"]


def test_threads_do_not_keep_the_process_alive(store: Store, settings: Settings) -> None:
    """The threads of a delivery do not keep a worker from ending while the store hangs."""
    before = set(threading.enumerate())
    store.hang()
    delivery = Delivery(A, store, settings(batch_size=1))
    delivery.submit(span(0))
    store.wait_for(lambda: store.attempts == 1)

    started = set(threading.enumerate()) - before
    # None to write: the calls do that themselves, as long as the disk is prompt.
    assert [thread.name for thread in started] == ["mlflow-ctx-autolog-sender"]
    assert all(thread.daemon for thread in started)


def test_threads_end_when_there_is_nothing_to_do(store: Store, unhurried: Config) -> None:
    """Idle threads go, and others come when there is something again."""

    class Restless(Delivery):
        _idle_time = 0.01

    before = set(threading.enumerate())
    delivery = Restless(A, store, unhurried)
    for number in range(3):
        delivery.submit(span(number))
        assert delivery.flush(LONG)
        until(lambda: set(threading.enumerate()) <= before)
    assert store.stored == names(3)


# Batches, and when they go.


def test_spans_are_stored_in_order_and_in_batches(store: Store, settings: Settings) -> None:
    """Spans are stored in the order they finished, at most batch_size to a request."""
    store.hang()
    delivery = Delivery(A, store, settings(batch_size=3))
    submit_all(delivery, spans(names(7)))
    store.answer()

    assert delivery.flush(LONG)
    assert store.stored == names(7)
    assert max(map(len, store.batches)) == 3
    assert (delivery.delivered, delivery.waiting, delivery.lost) == (7, 0, 0)


def test_large_spans_go_in_small_batches(store: Store, settings: Settings) -> None:
    """A request is no larger than a store takes, unless it is a single span."""

    class Small(Delivery):
        _request_bytes = 250

    delivery = Small(A, store, settings())
    submit_all(delivery, [*spans("abc", size=100), span("large", size=1000), span("d")])

    assert delivery.flush(LONG)
    assert store.batches == [["a", "b"], ["c"], ["large"], ["d"]]


def test_full_batch_is_sent_at_once(store: Store, settings: Settings) -> None:
    """As soon as batch_size spans have gathered they are sent, without a flush."""
    delivery = Delivery(A, store, settings(batch_size=3))
    submit_all(delivery, spans(names(2)))
    # Long enough for the sender to have gone to sleep over the first two.
    threading.Event().wait(0.2)
    assert store.attempts == 0
    delivery.submit(span(2))

    store.wait_for(lambda: store.stored == names(3))


def test_lonely_span_is_sent_after_the_interval(store: Store, settings: Settings) -> None:
    """A span that finds no company is sent when send_interval has passed, without a flush."""
    delivery = Delivery(A, store, settings(send_interval=0.01))
    delivery.submit(span(0))
    store.wait_for(lambda: store.stored == ["0"])

    delivery.submit(span(1))
    store.wait_for(lambda: store.stored == ["0", "1"])


def test_what_is_to_be_sent_at_once_does_not_wait(store: Store, unhurried: Config) -> None:
    """What the user wants to see is sent at once, together with what waits."""
    delivery = Delivery(A, store, unhurried)
    delivery.submit_all(spans("a"), at_once=True)
    store.wait_for(lambda: store.stored == ["a"])

    # Only then: the next ones wait for company.
    delivery.submit_all(spans("b"))
    threading.Event().wait(0.1)
    assert store.stored == ["a"]
    delivery.submit_all(spans("c"), at_once=True)
    store.wait_for(lambda: store.stored == ["a", "b", "c"])


def test_interval_grows_while_a_task_lasts(store: Store, settings: Settings) -> None:
    """The longer a task lasts, the longer its spans wait for company."""
    delivery = Delivery(A, store, settings(send_interval=0.05))
    waited = []
    for number in range(4):
        submitted = time.monotonic()
        delivery.submit(span(number))
        store.wait_for(lambda enough=number + 1: len(store.stored) == enough)  # type: ignore[misc]
        waited.append(time.monotonic() - submitted)
        until(lambda enough=number + 1: delivery.delivered == enough)  # type: ignore[misc]

    for number, seconds in enumerate(waited):
        assert seconds >= 0.05 * 2**number


def test_interval_starts_anew_with_the_next_task(store: Store, settings: Settings) -> None:
    """After a flush the first span is sent soon again, however long the last task was."""
    delivery = Delivery(A, store, settings(send_interval=0.01))
    # A minute, after so many batches.
    delivery._pacing._batches = 16
    delivery.submit(span(0))
    threading.Event().wait(0.1)
    assert store.attempts == 0
    assert delivery.flush(LONG)

    delivery.submit(span(1))
    store.wait_for(lambda: store.stored == ["0", "1"])


class Clock:
    """Time as the delivery sees it, which can be put forward."""

    ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (delivery_module, intake_module, pacing_module):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.mark.parametrize(("seconds", "size"), [(0.0, 2), (1.1, 6), (100.0, 20)])
def test_batches_grow_where_the_store_is_slow(
    store: Store, settings: Settings, clock: Clock, seconds: float, size: int
) -> None:
    """A store that answers slowly gets fewer and larger requests, up to ten times as large."""
    store.hang()
    delivery = Delivery(A, store, settings(batch_size=2))
    submit_all(delivery, spans(names(2)))
    store.wait_for(lambda: store.attempts == 1)
    clock.ahead += seconds
    # All at once, so that none of them goes before the others are there.
    delivery.submit_all(spans(names(2, 32)))
    until(lambda: len(delivery._spool) == 32)
    store.answer()

    assert flushed(delivery)
    assert store.stored == names(32)
    assert len(store.batches[1]) == size


def test_slow_store_is_left_alone_for_a_while(
    store: Store, settings: Settings, clock: Clock
) -> None:
    """After a slow answer a pause is made, also before a full batch; a flush does without it."""
    store.hang()
    delivery = Delivery(A, store, settings(batch_size=1))
    delivery.submit(span(0))
    store.wait_for(lambda: store.attempts == 1)
    clock.ahead += 3
    store.answer()
    until(lambda: delivery.delivered == 1)

    submit_all(delivery, spans(names(1, 51)))
    threading.Event().wait(0.1)
    assert store.stored == ["0"]
    assert delivery.flush(LONG)
    assert store.stored == names(51)


def test_answer_that_is_overdue_is_not_waited_for(
    store: Store, unhurried: Config, clock: Clock
) -> None:
    """Whoever gives up does so at once where the answer has taken longer already."""
    store.hang()
    delivery = Delivery(A, store, unhurried)
    delivery.submit_all([span(0)], at_once=True)
    store.wait_for(lambda: store.attempts == 1)
    clock.ahead += 2 * LONG
    started = time.monotonic()
    assert delivery.flush(LONG, give_up=True) is False
    assert time.monotonic() - started < STALL
    store.answer()
    assert flushed(delivery)


def test_slow_answer_is_expected_again(store: Store, unhurried: Config, clock: Clock) -> None:
    """Whoever gives up does not wait where the last answer took longer, but not for ever."""
    store.hang()
    delivery = Delivery(A, store, unhurried)
    delivery.submit_all([span(0)], at_once=True)
    store.wait_for(lambda: store.attempts == 1)
    clock.ahead += 1.5 * LONG
    store.answer()
    until(lambda: delivery.delivered == 1)

    store.hang()
    delivery.submit(span(1))
    started = time.monotonic()
    assert delivery.flush(LONG, give_up=True) is False
    assert time.monotonic() - started < STALL
    threading.Timer(0.2, store.answer).start()
    assert any(delivery.flush(LONG, give_up=True) for _ in range(10))


def test_settings_can_be_changed_on_the_way(store: Store, settings: Settings) -> None:
    """Settings that a later task brings along are in force for the spans that follow."""
    delivery = Delivery(A, store, settings())
    submit_all(delivery, spans(names(4)))
    assert delivery.flush(LONG)

    delivery.configure(settings(batch_size=2))
    delivery.submit_all(spans(names(4, 8)))
    assert delivery.flush(LONG)

    assert store.stored == names(8)
    assert max(map(len, store.batches[1:])) <= 2


def test_spool_is_made_by_the_settings_of_the_day(
    store: Store, settings: Settings, tmp_path: Path, spools: Path
) -> None:
    """Another directory is used once the spool is empty, and not before."""
    store.fail()
    delivery = QuickToRetry(A, store, settings())
    delivery.submit(span(0))
    until(lambda: len(spool_files(spools)) == 1)
    delivery.configure(settings(spool_directory=str(tmp_path / "other")))
    delivery.submit(span(1))
    until(lambda: len(delivery._spool) == 2)
    assert spool_files(tmp_path / "other") == []

    store.recover()
    assert flushed(delivery)
    delivery.configure(settings(spool_directory=str(tmp_path / "third")))
    delivery.submit(span(2))
    until(lambda: len(spool_files(tmp_path / "third")) == 1)
    assert spool_files(spools) == []
    assert delivery.flush(LONG)
    assert store.stored == names(3)


def test_ends_of_tasks_share_a_request(store: Store, settings: Settings) -> None:
    """What they have made is sent soon, however long the process has lasted, and together."""
    delivery = Delivery(A, store, settings(send_interval=0.3))
    # A minute, after so many batches.
    delivery._pacing._batches = 16
    for task in range(5):
        delivery.submit(span(task, "task"))
        delivery.send_soon()
    assert store.attempts == 0
    store.wait_for(lambda: store.stored == names(5))
    assert store.attempts == 1

    delivery.submit(span(5))
    threading.Event().wait(0.5)
    assert store.attempts == 1
    delivery.send_soon()
    store.wait_for(lambda: store.attempts == 2)


def test_an_empty_file_is_removed_without_a_flush(
    store: Store, settings: Settings, spools: Path
) -> None:
    """By a process that lives on and has nothing more to send."""

    class Tidy(Delivery):
        _linger = 0.05

    delivery = Tidy(A, store, settings(send_interval=0.01))
    delivery.submit(span(0))
    store.wait_for(lambda: store.stored == ["0"])
    until(lambda: list(spools.iterdir()) == [])
    delivery.submit(span(1))
    store.wait_for(lambda: store.stored == ["0", "1"])


def test_flush_of_nothing_does_not_hurry_what_comes_later(store: Store, unhurried: Config) -> None:
    """A span that ends after a flush waits for company, also where that had nothing to send."""
    deliveries = Deliveries(lambda destination: Delivery(destination, store, unhurried))
    delivery = deliveries.to(A)
    assert deliveries.flush(LONG)

    delivery.submit(span(0))
    threading.Event().wait(0.2)
    assert store.attempts == 0


# A store that is down.


def test_store_that_fails_holds_up_no_other(store: Store, unhurried: Config) -> None:
    """While one destination takes no spans, those for another are stored."""
    failing = Store()
    failing.fail()
    down = QuickToRetry(A, failing, unhurried)
    up = Delivery(B, store, unhurried)
    down.submit(span(0))
    up.submit(span(1))

    assert down.flush(0.05) is False
    assert up.flush(LONG)
    assert store.requests == [(B, [span(1)])]
    failing.recover()
    assert flushed(down)
    assert failing.requests == [(A, [span(0)])]


def test_batch_that_failed_is_sent_again(store: Store, settings: Settings) -> None:
    """What the store did not take is sent again by itself, and is stored exactly once."""
    store.fail()
    delivery = QuickToRetry(A, store, settings(batch_size=2))
    submit_all(delivery, spans(names(3)))
    store.wait_for(lambda: store.attempts >= 2)
    submit_all(delivery, spans(names(3, 5)))
    assert (delivery.waiting, delivery.delivered) == (5, 0)

    store.recover()
    store.wait_for(lambda: len(store.stored) >= 4)

    assert flushed(delivery)
    assert store.stored == names(5)
    assert (delivery.delivered, delivery.waiting, delivery.lost) == (5, 0, 0)


def test_batch_that_failed_at_a_flush_is_sent_again_by_itself(
    store: Store, unhurried: Config
) -> None:
    """What a flush at the end of a task could not store is tried again without another flush."""
    store.fail()
    delivery = QuickToRetry(A, store, unhurried)
    delivery.submit(span(0))
    assert delivery.flush(0.05) is False
    store.wait_for(lambda: store.attempts >= 1)

    store.recover()
    store.wait_for(lambda: store.stored == ["0"])


def test_flush_says_whether_all_is_stored(store: Store, unhurried: Config) -> None:
    """A flush is true once all is stored, false while the store hangs, true when it is back."""
    delivery = Delivery(A, store, unhurried)
    delivery.submit(span(0))
    assert delivery.flush(LONG) is True
    assert store.stored == ["0"]

    store.hang()
    delivery.submit(span(1))
    assert delivery.flush(0.05) is False
    assert delivery.waiting == 1

    store.answer()
    assert flushed(delivery) is True
    assert store.stored == ["0", "1"]


def test_flush_of_nothing_is_true(store: Store, unhurried: Config, spools: Path) -> None:
    """With nothing to store, a flush is true, and asks nothing of store or disk."""
    store.hang()
    delivery = Delivery(A, store, unhurried)

    assert delivery.flush(LONG) is True
    assert store.attempts == 0
    assert spool_files(spools) == []


def test_flush_tries_again_at_once(store: Store, unhurried: Config) -> None:
    """A flush does not wait for the pause that follows a failed attempt."""
    store.fail()
    delivery = SlowToRetry(A, store, unhurried)
    delivery.submit(span(0))
    assert delivery.flush(0.05) is False
    until(lambda: delivery.first_error is not None)

    store.recover()
    assert delivery.flush(LONG)
    assert store.stored == ["0"]


def test_flush_that_gives_up_tries_twice(store: Store, unhurried: Config) -> None:
    """Where others deliver what is left, two attempts are waited for, and no more."""
    store.fail()
    delivery = QuickToRetry(A, store, unhurried)
    delivery.submit(span(0))
    started = time.monotonic()

    assert delivery.flush(LONG, give_up=True) is False
    assert time.monotonic() - started < STALL
    assert store.attempts >= 2


def test_flush_keeps_trying(store: Store, unhurried: Config) -> None:
    """Where nobody else could store the spans, a flush tries as long as its timeout lasts."""
    store.fail()
    delivery = QuickToRetry(A, store, unhurried)
    delivery.submit(span(0))
    results: list[bool] = []
    waiting = threading.Thread(target=lambda: results.append(delivery.flush(LONG)))
    waiting.start()
    store.wait_for(lambda: store.attempts >= 5)
    assert results == []
    store.recover()
    waiting.join(LONG)

    assert results == [True]


def test_store_known_to_be_down_is_not_waited_for_again(store: Store, unhurried: Config) -> None:
    """Of tasks that give up, only the first that ends while the store hangs waits for it."""
    store.hang()
    delivery = QuickToGiveUp(A, store, unhurried)
    delivery.submit(span(0))
    assert delivery.store_is_down is False
    assert delivery.flush(0.05, give_up=True) is False
    for number in range(1, 4):
        delivery.submit(span(number))
        assert delivery.store_is_down is True
        started = time.monotonic()
        assert delivery.flush(LONG, give_up=True) is False
        assert time.monotonic() - started < STALL

    # It has its full time again when it is back.
    store.answer()
    assert flushed(delivery)
    assert store.stored == names(4)
    assert delivery.store_is_down is False
    store.hang()
    delivery.submit(span(4))
    threading.Timer(0.5, store.answer).start()
    assert delivery.flush(LONG, give_up=True) is True


def test_store_that_is_down_gets_one_attempt_of_each_flush(store: Store, unhurried: Config) -> None:
    """A store that is known to be down is asked once more at the end of each task."""
    store.fail()
    delivery = SlowToRetry(A, store, unhurried)
    delivery.submit(span(0))
    assert delivery.flush(0.2) is False
    for attempts in range(store.attempts + 1, store.attempts + 4):
        assert delivery.flush(LONG, give_up=True) is False
        assert store.attempts == attempts


@pytest.mark.parametrize("give_up", [True, False])
def test_store_is_left_alone_as_long_as_it_asks(
    store: Store, unhurried: Config, give_up: bool
) -> None:
    """A flush does not overrule the store's Retry-After, and neither does the next one."""
    store.fail(StoreError("it answered 429", retry_after=3600.0))
    delivery = QuickToRetry(A, store, unhurried)
    delivery.submit(span(0))
    delivery.flush(0.2)
    assert store.attempts == 1

    store.recover()
    started = time.monotonic()
    assert delivery.flush(LONG if give_up else 0.2, give_up=give_up) is False
    assert time.monotonic() - started < STALL
    assert store.attempts == 1


def test_store_is_asked_again_when_the_time_is_up(store: Store, unhurried: Config) -> None:
    """When the store has been left alone as long as it asked, the spans are sent again."""
    store.fail(StoreError("it answered 429", retry_after=0.3))
    delivery = QuickToRetry(A, store, unhurried)
    delivery.submit(span(0))
    delivery.hurry()
    store.wait_for(lambda: store.attempts == 1)
    asked = time.monotonic()

    store.recover()
    store.wait_for(lambda: store.stored == ["0"])
    # Less the moments between the answer and the look at the clock.
    assert time.monotonic() - asked > 0.2


def test_each_outage_is_warned_of_once(
    store: Store, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """Each outage gives one warning with its reason, and one when the store is back."""
    delivery = QuickToRetry(C, store, settings(send_interval=0.01))

    for outage in (1, 2):
        store.fail()
        enough = store.attempts + 3
        delivery.submit(span(outage))
        store.wait_for(lambda enough=enough: store.attempts >= enough)  # type: ignore[misc]
        assert len(warnings_of(caplog, "http://c did not take")) == outage
        assert len(warnings_of(caplog, "http://c takes spans again")) == outage - 1

        store.recover()
        assert flushed(delivery)
        until(
            lambda outage=outage: len(warnings_of(caplog, "http://c takes spans again")) == outage
        )  # type: ignore[misc]
        assert len(warnings_of(caplog, "http://c did not take")) == outage

    first = warnings_of(caplog, "http://c did not take")[0]
    assert "ConnectionError('no route to the store')" in first
    assert "experiment 1" in first


def test_no_warning_while_all_is_well(
    store: Store, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """A store that takes what it is sent gives no warning."""
    delivery = Delivery(C, store, settings(batch_size=2))
    submit_all(delivery, spans(names(10)))

    assert delivery.flush(LONG)
    assert store.stored == names(10)
    assert warnings_of(caplog, "http://c") == []


def test_first_reason_is_remembered(store: Store, unhurried: Config) -> None:
    """Why the store did not take spans at first is kept, for the one who delivers instead."""
    delivery = QuickToRetry(A, store, unhurried)
    assert delivery.first_error is None
    store.fail(StoreError("it answered 503"))
    delivery.submit(span(0))
    delivery.hurry()
    store.wait_for(lambda: store.attempts >= 2)
    store.fail(StoreError("it answered 500"))
    enough = store.attempts + 2
    store.wait_for(lambda: store.attempts >= enough)

    assert delivery.first_error == "it answered 503"


def test_reason_is_forgotten_when_all_is_well(store: Store, unhurried: Config) -> None:
    """After an outage that cost nothing, a later one is told by its own reason."""
    delivery = QuickToRetry(A, store, unhurried)
    for reason in ("it answered 503", "it answered 500"):
        store.fail(StoreError(reason))
        delivery.submit(span(reason))
        delivery.hurry()
        until(lambda: delivery.first_error is not None)
        assert delivery.first_error == reason
        store.recover()
        assert flushed(delivery)
        assert delivery.first_error is None


def test_store_that_takes_no_spans_is_known_until_it_does(store: Store, unhurried: Config) -> None:
    """Whether the store's last answer was that it takes no single spans can be asked."""
    delivery = QuickToRetry(A, store, unhurried)
    store.fail(StoreError("it answered 501", unsupported=True))
    delivery.submit(span(0))
    assert delivery.flush(LONG, give_up=True) is False
    assert delivery.is_unsupported

    store.recover()
    assert flushed(delivery)
    assert not delivery.is_unsupported


# A record that the store refuses.


def set_aside(spools: Path) -> list[Path]:
    return sorted(spools.glob("*.refused.spool"))


def test_what_is_refused_is_set_aside(
    store: Store, unhurried: Config, spools: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In a file that says why and is kept for recovery; it is waited for and sent no more."""
    store.refuses = {"1"}
    delivery = Delivery(C, store, unhurried)
    submit_all(delivery, spans(names(3), "task"))

    assert in_time(delivery.flush, LONG) is True
    assert sorted(store.stored) == ["0", "2"]
    assert (delivery.waiting, delivery.set_aside, delivery.holds_only_refused) == (0, 1, True)
    assert delivery.counts("task") == Counts(made=3, delivered=2, set_aside=1)
    assert delivery.counts("task").waiting == 1

    [file] = set_aside(spools)
    assert b"it answered 400" in file.read_bytes()
    assert b"payload of 1" in file.read_bytes()
    assert b"payload of 2" not in file.read_bytes()
    assert f"it answered 400; span 1 is kept in {file}" in str(delivery.first_error)
    [warning] = warnings_of(caplog, "http://c does not take one")
    assert "it answered 400; span 1 is kept" in warning

    attempts = store.attempts
    delivery.submit(span(3))
    assert in_time(delivery.flush, LONG) is True
    assert store.attempts == attempts + 1
    # Not by those who send what dead processes have left, but by whoever asks for it.
    assert spool_files(spools) == []
    assert spool_files(spools, refused=True) == [file]
    found = recover(file, store)
    assert (found.stored, found.left, found.problem) == (0, 1, "it answered 400")
    store.refuses = set()
    assert recover(file, store) == Recovered(stored=1)
    assert set_aside(spools) == []


def test_batch_that_is_refused_is_halved(store: Store, unhurried: Config) -> None:
    """A refused batch is halved until the refused record is alone; the others are stored once."""
    store.refuses = {"5"}
    delivery = QuickToRetry(A, store, unhurried)
    submit_all(delivery, spans(names(8)))
    assert delivery.flush(LONG)

    assert sorted(store.stored) == [name for name in names(8) if name != "5"]
    assert store.log[:3] == ["! 0 1 2 3 4 5 6 7", "0 1 2 3", "! 4 5 6 7"]
    assert store.log.count("! 5") == 1
    assert delivery.delivered == 7


def test_batches_grow_again_after_a_refusal(store: Store, settings: Settings) -> None:
    """When a refused batch was halved and taken, later batches are larger again."""
    store.refuses = {"0"}
    delivery = QuickToRetry(A, store, settings(batch_size=8))
    delivery.submit(span(0))
    delivery.submit(span(1))
    assert delivery.flush(LONG)
    assert store.stored == ["1"]

    delivery.submit_all(spans(names(2, 10)))
    assert delivery.flush(LONG)
    assert store.batches[-1] == names(2, 10)


def test_those_that_are_refused_share_a_file(
    store: Store, settings: Settings, spools: Path
) -> None:
    """However many there are."""
    store.refuses = {*names(20)}
    delivery = QuickToRetry(A, store, settings(batch_size=4))
    submit_all(delivery, spans(names(20)))
    assert delivery.flush(LONG)

    [file] = set_aside(spools)
    store.refuses = {"7"}
    found = recover(file, store)
    assert (found.stored, found.left) == (19, 1)
    assert file.exists()


def test_what_is_refused_without_a_disk_is_lost(store: Store, settings: Settings) -> None:
    """And is counted so, rather than sent for ever."""
    store.refuses = {"0"}
    delivery = QuickToRetry(A, store, settings(spool_max_bytes=0))
    submit_all(delivery, spans(names(3), "task"))
    assert delivery.flush(LONG)

    assert sorted(store.stored) == ["1", "2"]
    assert delivery.counts("task") == lost_by(Loss.REFUSED, made=3, delivered=2, count=1)
    assert "no file can be had" in str(delivery.first_error)


def test_refused_record_that_was_taken_is_forgotten(store: Store, settings: Settings) -> None:
    """A record that is refused when somebody else has it already is none of a flush's business."""
    store.hang()
    store.refuses = {"0"}
    delivery = Delivery(A, store, settings(batch_size=1))
    delivery.submit(span(0))
    store.wait_for(lambda: store.attempts == 1)
    assert delivery.take() == [span(0)]
    store.answer()
    delivery.submit(span(1))
    store.wait_for(lambda: store.stored == ["1"])
    until(lambda: delivery.delivered == 1)

    assert (delivery.set_aside, delivery.lost, delivery.waiting) == (0, 0, 0)


# A store that fails over one record.


@pytest.mark.parametrize("poisoned", ["0", "57", "199"])
def test_record_that_the_store_fails_over_holds_up_no_others(
    store: Store, unhurried: Config, spools: Path, poisoned: str
) -> None:
    """After a few attempts the others go first, and it is set aside as it fails again."""
    store.fails_over = {poisoned}
    delivery = QuickToRetry(A, store, unhurried)
    delivery.submit_all(spans(names(200), "task"))

    assert delivery.flush(LONG)
    assert sorted(store.stored) == sorted(name for name in names(200) if name != poisoned)
    assert delivery.counts("task") == Counts(made=200, delivered=199, set_aside=1)
    assert store.attempts < 60
    [file] = set_aside(spools)
    assert b"it answered 500" in file.read_bytes()
    store.fails_over = set()
    assert recover(file, store).stored == 1


def test_nothing_is_set_aside_while_the_store_fails_over_all(
    store: Store, settings: Settings, spools: Path
) -> None:
    """As a server does whose database is away: what it fails over is not to blame."""
    store.fail(StoreError("it answered 500", failed=True))
    delivery = QuickToRetry(A, store, settings(batch_size=4))
    submit_all(delivery, spans(names(8)))
    delivery.hurry()
    store.wait_for(lambda: store.attempts >= 30)
    assert set_aside(spools) == []

    store.recover()
    assert flushed(delivery)
    assert sorted(store.stored) == names(8)
    assert delivery.set_aside == 0


def test_one_alone_that_the_store_fails_over_is_kept(store: Store, unhurried: Config) -> None:
    """Where there are no others, nobody can tell; it is tried less and less often."""
    store.fails_over = {"0"}
    delivery = QuickToRetry(A, store, unhurried)
    delivery.submit(span(0))
    assert delivery.flush(0.3) is False
    assert (delivery.waiting, delivery.set_aside) == (1, 0)

    delivery.submit(span(1))
    assert delivery.flush(LONG)
    assert (store.stored, delivery.set_aside) == (["1"], 1)


def test_a_later_state_is_not_overtaken_by_an_earlier_one(store: Store, unhurried: Config) -> None:
    """What ends while it is on its way as begun is sent after it, by the same process."""
    store.hang()
    delivery = Delivery(A, store, unhurried)
    delivery.submit_all([Record("span", "1", b"running")], at_once=True)
    store.wait_for(lambda: store.attempts == 1)
    delivery.submit_all([Record("span", "1", b"ended"), Record("span", "2", b"ended")])
    until(lambda: delivery._intake.pending == 0)

    # Whoever takes the rest may be faster than what is on its way.
    assert [record.key for record in delivery.take()] == ["2"]
    store.answer()
    assert delivery.flush(LONG)
    states = [record.payload for _, records in store.requests for record in records]
    assert states == [b"running", b"ended"]


def test_what_has_ended_is_not_sent_as_begun(
    store: Store, unhurried: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a state sent that was replaced, or taken, just as it was about to be."""
    delivery = Delivery(A, store, unhurried)
    peek, has_looked = delivery._spool.peek, threading.Event()

    def peek_and_be_slow(count: int, size: int) -> Any:
        found = peek(count, size)
        if not has_looked.is_set():
            has_looked.set()
            delivery._spool.add([Record("span", "1", b"ended")])
        return found

    monkeypatch.setattr(delivery._spool, "peek", peek_and_be_slow)
    delivery.submit_all([Record("span", "1", b"running")], at_once=True)
    assert delivery.flush(LONG)
    assert has_looked.is_set()
    states = [record.payload for _, records in store.requests for record in records]
    assert states == [b"ended"]


# A store that refuses some, and does not say which.


def test_success_in_part_is_not_sent_again(store: Store, unhurried: Config) -> None:
    """Those that are missing are lost, and said to be."""
    store.fail(StoreError("it rejected 2 spans: too long", rejected=2))
    delivery = Delivery(A, store, unhurried)
    submit_all(delivery, spans(names(5), "task"))

    assert delivery.flush(LONG)
    assert store.attempts == 1
    assert delivery.counts("task") == lost_by(Loss.REFUSED_UNNAMED, made=5, delivered=3, count=2)
    assert (delivery.delivered, delivery.lost) == (3, 2)
    assert "rejected 2 spans: too long" in str(delivery.first_error)


# Memory and disk have an end.


def test_spans_beyond_the_room_are_counted_as_lost(
    store: Store, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """While the store hangs, spans that find no room are lost, counted, and warned of once."""
    store.hang()
    delivery = Delivery(A, store, settings(spool_max_bytes=0, max_waiting_bytes=1_000_000))

    for record in spans(names(6), "task", size=400_000):
        delivery.submit(record)
        until(lambda: delivery._intake.pending == 0)

    assert (delivery.waiting, delivery.lost) == (2, 4)
    assert delivery.counts("task") == lost_by(Loss.NO_ROOM, made=6, count=4)
    assert len(warnings_of(caplog, "max_waiting_bytes")) == 1

    store.answer()
    assert delivery.flush(LONG)
    assert store.stored == ["0", "1"]

    delivery.submit(span(6, size=400_000))
    assert delivery.flush(LONG)
    assert store.stored == ["0", "1", "6"]
    assert (delivery.delivered, delivery.lost) == (3, 4)


def test_spool_takes_what_memory_does_not(store: Store, settings: Settings, spools: Path) -> None:
    """While the store hangs, far more than memory may hold waits on the disk, and arrives."""
    store.hang()
    delivery = Delivery(A, store, settings(max_waiting_bytes=1_000_000))
    delivery.submit_all(spans(names(30), size=200_000))
    until(lambda: delivery._intake.pending == 0)

    assert (delivery.waiting, delivery.lost) == (30, 0)
    assert sum(path.stat().st_size for path in spools.iterdir()) > 30 * 200_000
    store.answer()
    assert delivery.flush(LONG)
    assert store.stored == names(30)


def test_eight_threads_with_images_lose_nothing(store: Store, settings: Settings) -> None:
    """Where all at once end spans that together are more than may wait in memory."""
    delivery = Delivery(A, store, settings(max_waiting_bytes=1_000_000))
    together = threading.Barrier(8)

    def work(thread: int) -> None:
        together.wait(LONG)
        submit_all(delivery, spans((f"{thread}-{n}" for n in range(3)), "task", size=3_000_000))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert delivery.flush(LONG)
    assert delivery.counts("task") == Counts(made=24, delivered=24)


def test_no_delivered_prompt_stays_while_others_wait(
    store: Store, settings: Settings, spools: Path
) -> None:
    """What the store has is wiped out of the file, though the file is needed."""
    delivery = SlowToRetry(A, store, settings(batch_size=2))
    store.refuses = {"none"}
    submit_all(delivery, spans(names(2), size=5000))
    until(lambda: delivery.delivered == 2)
    store.fail()
    submit_all(delivery, spans(names(2, 4), size=5000))
    assert delivery.flush(0.2) is False

    content = b"".join(path.read_bytes() for path in spools.iterdir())
    assert b"payload of 2" in content
    assert b"payload of 0" not in content
    assert b"payload of 1" not in content


def test_nothing_stays_on_the_disk_after_a_flush(
    store: Store, unhurried: Config, spools: Path
) -> None:
    """When all is stored there is no file, and none of what was in it."""
    delivery = Delivery(A, store, unhurried)
    submit_all(delivery, spans(names(3)))
    until(lambda: len(spool_files(spools)) == 1)

    assert delivery.flush(LONG)
    assert list(spools.iterdir()) == []


KILLED = """
import sys, threading
from mlflow_ctx_autolog.config import Config
from mlflow_ctx_autolog.delivery.sender import Delivery
from mlflow_ctx_autolog.delivery.spool import Destination, Record

class Delivery(Delivery):
    # As long as a slow machine may need.
    _patience_with_disk = 30.0

def send(destination, records):
    threading.Event().wait()

config = Config(spool_directory=sys.argv[1], batch_size=1)
delivery = Delivery(Destination("http://a", "1"), send, config)
for number in range(20):
    delivery.submit(Record("span", f"{number}", b"payload"))
print("ready", flush=True)
sys.stdin.read()
"""


def test_what_was_submitted_outlives_a_killed_process(store: Store, spools: Path) -> None:
    """When submit has returned in time, the span can be recovered from a killed process."""
    command = [sys.executable, "-c", KILLED, str(spools)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)

    [path] = spool_files(spools)
    assert recover(path, store).stored == 20
    assert store.stored == names(20)


# Counting.


def test_spans_are_counted_for_their_owner(store: Store, unhurried: Config) -> None:
    """Each task learns of its own spans, and those without an owner are nobody's."""
    store.hang()
    delivery = QuickToGiveUp(A, store, unhurried)
    submit_all(delivery, [*spans("abc", "one"), span("d", "two"), span("e")])
    assert delivery.flush(0.05) is False
    assert delivery.counts("one") == Counts(made=3)
    assert delivery.counts("one").waiting == 3
    assert delivery.counts("two") == Counts(made=1)

    store.answer()
    assert flushed(delivery)
    assert delivery.counts("one") == Counts(made=3, delivered=3)
    assert delivery.counts("one").waiting == 0
    assert delivery.counts("two") == Counts(made=1, delivered=1)
    assert delivery.counts("") == delivery.counts("unknown") == Counts()
    assert delivery.delivered == 5


def test_forgotten_owner_has_no_counts(store: Store, unhurried: Config) -> None:
    """When a task has ended, nothing is kept of its counts, and the others keep theirs."""
    delivery = Delivery(A, store, unhurried)
    submit_all(delivery, [span("a", "one"), span("b", "two")])
    assert delivery.flush(LONG)
    delivery.forget("one")
    delivery.forget("unknown")

    assert delivery.counts("one") == Counts()
    assert delivery.counts("two") == Counts(made=1, delivered=1)


def test_owner_stays_forgotten_when_its_spans_arrive_late(store: Store, unhurried: Config) -> None:
    """A long-lived process keeps no counts of tasks that ended while the store was down."""
    store.hang()
    delivery = QuickToGiveUp(A, store, unhurried)
    delivery.submit(span("a", "task"))
    assert delivery.flush(0.05) is False
    delivery.forget("task")
    store.answer()
    assert flushed(delivery)

    assert delivery.counts("task") == Counts()


def test_later_record_replaces_one_that_waits(store: Store, unhurried: Config) -> None:
    """Of an announced span that ends while its announcement waits, only the end is sent."""
    delivery = Delivery(A, store, unhurried)
    delivery.submit(Record("span", "a", b"open"))
    until(lambda: delivery._intake.pending == 0)
    delivery.submit(Record("span", "a", b"ended", "task"))

    assert delivery.flush(LONG)
    assert store.requests == [(A, [Record("span", "a", b"ended", "task")])]
    assert (delivery.delivered, delivery.waiting) == (1, 0)
    assert delivery.counts("task") == Counts(made=1, delivered=1)


def test_record_that_is_replaced_before_it_is_written(
    store: Store, disk: Disk, unhurried: Config, spools: Path
) -> None:
    """Where an announcement and the end of a span are written together, only the end is sent."""
    delivery = Delivery(A, store, unhurried)
    disk.hold_up(delivery, span("first"))
    delivery.submit(Record("span", "a", b"open"))
    delivery.submit(Record("span", "a", b"ended", "task"))
    disk.answer()

    assert delivery.flush(STALL) is True
    assert store.requests[-1][1][-1] == Record("span", "a", b"ended", "task")
    assert delivery.waiting == 0
    assert list(spools.iterdir()) == []


def test_record_that_is_replaced_on_its_way_is_sent_again(store: Store, settings: Settings) -> None:
    """A span that ends while its announcement is on its way is stored as it ended."""
    store.hang()
    delivery = Delivery(A, store, settings(batch_size=1))
    delivery.submit(Record("span", "a", b"open"))
    store.wait_for(lambda: store.attempts == 1)
    delivery.submit(Record("span", "a", b"ended"))
    until(lambda: delivery._intake.pending == 0)
    store.answer()

    assert delivery.flush(LONG)
    assert [record.payload for _, [record] in store.requests] == [b"open", b"ended"]
    assert delivery.waiting == 0


def test_flush_and_counts_agree(
    store: Store, unhurried: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a flush says that all is stored, so do the counts, at any moment."""
    removed, go_on = threading.Event(), threading.Event()
    real = Spool.remove

    def remove(spool: Spool, numbers: Iterable[int]) -> set[int]:
        found = real(spool, numbers)
        removed.set()
        go_on.wait(LONG)
        return found

    monkeypatch.setattr(Spool, "remove", remove)
    delivery = Delivery(A, store, unhurried)
    delivery.submit(span("a", "task"))
    delivery.hurry()
    assert removed.wait(LONG)
    # As when the sender is held up between the disk and the book.
    threading.Timer(0.3, go_on.set).start()

    is_stored = delivery.flush(LONG)
    assert (is_stored, delivery.counts("task").waiting) == (True, 0)


# Many at once.


def test_flushes_from_many_threads_all_succeed(store: Store, unhurried: Config) -> None:
    """Tasks that end at the same time may all flush, and each learns that all is stored."""
    delivery = Delivery(A, store, unhurried)
    submit_all(delivery, spans(names(10)))
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda: results.append(delivery.flush(LONG))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)

    assert results == [True] * 8
    assert store.stored == names(10)


def test_many_threads_lose_nothing(store: Store, settings: Settings) -> None:
    """Spans from many threads at once are all stored, once each, and in each thread's order."""
    delivery = Delivery(A, store, settings(batch_size=50, send_interval=0.01))
    together = threading.Barrier(8)

    def work(thread: int) -> None:
        together.wait(LONG)
        submit_all(delivery, spans((f"{thread}-{index}" for index in range(200)), f"{thread}"))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)

    assert delivery.flush(LONG)
    assert (delivery.delivered, delivery.waiting, delivery.lost) == (1600, 0, 0)
    for number in range(8):
        own = [key for key in store.stored if key.startswith(f"{number}-")]
        assert own == [f"{number}-{index}" for index in range(200)]
        assert delivery.counts(f"{number}") == Counts(made=200, delivered=200)
    assert len(store.stored) == 1600


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_forked_child_starts_empty(store: Store, settings: Settings, spools: Path) -> None:
    """A forked child delivers its own spans only, and the parent those it held."""
    parent = os.getpid()
    sent_by_child: list[str] = []

    def send(destination: Destination, records: Sequence[Record], /) -> None:
        if os.getpid() == parent:
            store(destination, records)
        else:
            sent_by_child.extend(record.key for record in records)

    store.hang()
    delivery = Delivery(A, send, settings(batch_size=1))
    submit_all(delivery, spans(["parent 1", "parent 2"], "task"))
    store.wait_for(lambda: store.attempts == 1)
    until(lambda: delivery._intake.pending == 0)
    assert delivery.waiting == 2

    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            inherited = [delivery.waiting, delivery.lost, delivery.counts("task").made]
            delivery.submit(span("child"))
            stored = delivery.flush(LONG)
            report = {"inherited": inherited, "stored": stored, "sent": sent_by_child}
            os.write(write_end, json.dumps(report).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        text = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert json.loads(text) == {"inherited": [0, 0, 0], "stored": True, "sent": ["child"]}

    assert len(spool_files(spools)) == 1
    store.answer()
    assert delivery.flush(LONG)
    assert store.stored == ["parent 1", "parent 2"]
    assert delivery.delivered == 2
    assert list(spools.iterdir()) == []


# What somebody else delivers.


def test_spans_for_the_driver_are_kept_until_taken(settings: Settings) -> None:
    """What the driver stores is not sent: the spans wait for whoever takes them home."""
    delivery = Outbox(Destination(None, "1", "driver"), settings(batch_size=1))
    records = spans(names(3), "task")
    submit_all(delivery, records)

    assert delivery.flush(LONG, give_up=True) is False
    assert delivery.take() == records
    assert delivery.waiting == 0
    assert delivery.take() == []
    assert delivery.flush(LONG) is True


def test_what_was_taken_is_gone(store: Store, unhurried: Config, spools: Path) -> None:
    """What somebody else delivers is not sent as well, and not left on the disk."""
    store.fail()
    delivery = SlowToRetry(A, store, unhurried)
    submit_all(delivery, spans(names(3)))
    assert delivery.flush(0.2) is False

    assert delivery.take() == spans(names(3))
    assert delivery.waiting == 0
    assert list(spools.iterdir()) == []
    store.recover()
    delivery.submit(span(3))
    assert flushed(delivery)
    assert store.stored == ["3"]


def test_all_that_waits_is_taken(settings: Settings) -> None:
    """However much waits, on the disk and in memory, it is taken at once."""
    delivery = Outbox(
        Destination(None, "1", "driver"), settings(spool_max_bytes=5_000_000, batch_size=1)
    )
    records = spans(names(100), size=100_000)
    delivery.submit_all(records)
    until(lambda: delivery._intake.pending == 0)

    assert delivery.lost == 0
    assert sorted(delivery.take()) == sorted(records)
    assert delivery.waiting == 0


def test_batch_on_its_way_may_arrive_though_taken(store: Store, settings: Settings) -> None:
    """After take(), what was on its way still arrives, later spans do, and the books agree."""
    store.hang()
    delivery = Delivery(A, store, settings(batch_size=2))
    submit_all(delivery, spans(names(4)))
    store.wait_for(lambda: store.attempts == 1)
    until(lambda: delivery._intake.pending == 0)

    assert delivery.take() == spans(names(4))
    assert delivery.waiting == 0
    delivery.submit(span(4))
    until(lambda: delivery.waiting == 1)
    store.answer()
    store.wait_for(lambda: len(store.requests) > 0)
    assert flushed(delivery)
    assert store.stored[-1] == "4"
    assert set(store.stored) <= {"0", "1", "4"}
    until(lambda: delivery.waiting == 0)


def test_what_was_taken_does_not_count_for_a_flush(store: Store, settings: Settings) -> None:
    """That a batch arrives which was taken does not make a flush of later spans true."""
    answers = threading.Semaphore(0)

    def send(destination: Destination, records: Sequence[Record], /) -> None:
        store(destination, records)
        answers.acquire()

    delivery = Delivery(A, send, settings(batch_size=1))
    delivery.submit(span(0))
    store.wait_for(lambda: store.attempts == 1)
    delivery.take()
    delivery.submit(span(1))
    until(lambda: delivery.waiting == 1)

    threading.Timer(0.2, answers.release).start()
    is_stored = delivery.flush(1.0)
    for _ in range(10):
        answers.release()
    assert is_stored is False


def test_record_that_comes_after_the_one_taken_waits(store: Store, settings: Settings) -> None:
    """A span that ends after its announcement was taken is delivered, too."""
    delivery = Delivery(Destination(None, "1"), store, settings())
    delivery.submit(Record("span", "a", b"open"))
    assert len(delivery.take()) == 1
    delivery.submit(Record("span", "a", b"ended"))

    assert delivery.waiting == 1
    assert delivery.take() == [Record("span", "a", b"ended")]


def test_no_failure_where_all_has_been_taken(
    store: Store, unhurried: Config, caplog: pytest.LogCaptureFixture
) -> None:
    """That there is nothing left to send is no failure of the store."""
    failed = threading.Event()

    class Watched(Delivery):
        def _failed(self, *args: Any) -> None:
            super()._failed(*args)
            failed.set()

    delivery = Watched(A, store, unhurried)
    delivery.submit(span(0))
    until(lambda: delivery._sender is not None)
    assert len(delivery.take()) == 1
    assert delivery.flush(LONG) is True

    failed.wait(0.5)
    assert delivery.first_error is None
    assert warnings_of(caplog, "did not take") == []
    assert store.attempts == 0


# A process's deliveries.


def test_each_destination_has_one_delivery(store: Store, unhurried: Config) -> None:
    """A delivery is made on first use, and the same one is used after that."""
    deliveries = Deliveries(lambda destination: Delivery(destination, store, unhurried))
    assert deliveries.all() == []
    first = deliveries.to(A)

    assert deliveries.to(Destination("http://a", "1")) is first
    assert deliveries.to(B) is not first
    assert deliveries.to(Destination("http://a", "2")) is not first
    assert len(deliveries.all()) == 3
    assert first.destination == A


def test_all_deliveries_are_flushed(store: Store, unhurried: Config) -> None:
    """A flush of all is true when all are stored, and one that hangs does not cost the others."""
    hanging = Store()
    hanging.hang()
    stores = {A: hanging, B: store}
    deliveries = Deliveries(lambda to: QuickToGiveUp(to, stores[to], unhurried))
    assert deliveries.flush(LONG) is True
    for destination in (A, B):
        deliveries.to(destination).submit(span(0))

    assert deliveries.flush(0.5) is False
    store.wait_for(lambda: store.stored == ["0"])
    hanging.answer()
    assert deliveries.flush(LONG) is True
    assert hanging.stored == ["0"]


def test_deliveries_give_up_only_those_that_are_down(store: Store, unhurried: Config) -> None:
    """A store known to be down is not waited for, and one that is merely slow is."""
    hanging = Store()
    hanging.hang()
    stores = {A: hanging, B: store}
    deliveries = Deliveries(lambda to: QuickToGiveUp(to, stores[to], unhurried))
    deliveries.to(A).submit(span(0))
    assert deliveries.flush(0.05) is False
    store.hang()
    deliveries.to(B).submit(span(1))
    threading.Timer(0.5, store.answer).start()

    started = time.monotonic()
    assert deliveries.flush(LONG, give_up_if_down=True) is False
    assert time.monotonic() - started < STALL
    assert store.stored == ["1"]
    hanging.answer()
