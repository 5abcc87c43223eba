"""Delivery: nobody waits for the store, and nothing is lost or doubled on the way to it."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from mlflow_ctx_autolog import Config
from mlflow_ctx_autolog.delivery import Delivery, Destination

A = Destination("http://a", "1")
B = Destination("http://b", "1")

# Spans leave by count or by flush only: nothing here depends on how fast the machine is.
UNHURRIED = Config(send_interval=3600)
# Seconds after which a test gives up; none takes nearly as long.
LONG = 30.0


class QuickToRetry(Delivery[Any]):
    """Pauses shortly after each failed attempt, so that tests see several."""

    _first_pause = _longest_pause = 0.01


class Store:
    """Records what it is sent, and can be told to refuse or to hang."""

    def __init__(self) -> None:
        self.requests: list[tuple[Destination, list[Any]]] = []
        self.attempts = 0
        self.refusing = False
        self._changed = threading.Condition()
        self._answering = threading.Event()
        self._answering.set()

    def __call__(self, destination: Destination, spans: Sequence[Any], /) -> None:
        with self._changed:
            self.attempts += 1
            refused = self.refusing
            self._changed.notify_all()
        self._answering.wait()
        if refused:
            raise ConnectionError("no route to the store")
        with self._changed:
            self.requests.append((destination, list(spans)))
            self._changed.notify_all()

    @property
    def stored(self) -> list[Any]:
        return [span for _, spans in self.requests for span in spans]

    def hang(self) -> None:
        self._answering.clear()

    def answer(self) -> None:
        self._answering.set()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, LONG)


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    # Lets the sender thread of a failed test go.
    store.refusing = False
    store.answer()


def submit_all(delivery: Delivery[Any], spans: Sequence[Any]) -> None:
    for span in spans:
        delivery.submit(span)


def flushed(delivery: Delivery[Any]) -> bool:
    # After an outage a single flush is impatient, which is for another test.
    return any(delivery.flush(LONG) for _ in range(int(LONG)))


def warnings_of(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("mlflow_ctx_autolog")
        and record.levelno == logging.WARNING
        and text in record.getMessage()
    ]


def test_submit_does_not_wait_for_the_store(store: Store) -> None:
    """Handing over finished spans returns while the store hangs."""
    store.hang()
    delivery: Delivery[int] = Delivery(A, store, config=Config(batch_size=1, send_interval=3600))
    delivery.submit(0)
    store.wait_for(lambda: store.attempts == 1)

    caller = threading.Thread(target=submit_all, args=(delivery, range(1, 101)), daemon=True)
    caller.start()
    caller.join(LONG)

    assert not caller.is_alive()
    assert delivery.waiting == 101
    assert store.stored == []
    store.answer()
    assert delivery.flush(LONG)
    assert store.stored == list(range(101))


def test_spans_are_stored_in_order_and_in_batches(store: Store) -> None:
    """Spans are stored in the order they finished, at most batch_size to a request."""
    delivery: Delivery[int] = Delivery(A, store, config=Config(batch_size=3, send_interval=3600))
    submit_all(delivery, range(7))

    assert delivery.flush(LONG)
    assert [spans for _, spans in store.requests] == [[0, 1, 2], [3, 4, 5], [6]]
    assert (delivery.delivered, delivery.waiting, delivery.lost) == (7, 0, 0)


def test_full_batch_is_sent_at_once(store: Store) -> None:
    """As soon as batch_size spans have gathered they are sent, without a flush."""
    delivery: Delivery[int] = Delivery(A, store, config=Config(batch_size=3, send_interval=3600))
    submit_all(delivery, range(2))
    # Long enough for the sender to have gone to sleep over the first two.
    threading.Event().wait(0.2)
    delivery.submit(2)

    store.wait_for(lambda: store.stored == [0, 1, 2])


def test_lonely_span_is_sent_after_the_interval(store: Store) -> None:
    """A span that finds no company is sent when send_interval has passed, without a flush."""
    delivery: Delivery[int] = Delivery(A, store, config=Config(send_interval=0.01))
    delivery.submit(0)
    store.wait_for(lambda: store.stored == [0])

    delivery.submit(1)
    store.wait_for(lambda: store.stored == [0, 1])


def test_settings_can_be_changed_on_the_way(store: Store) -> None:
    """Settings that a later task brings along are in force for the spans that follow."""
    delivery: Delivery[int] = Delivery(A, store, config=UNHURRIED)
    submit_all(delivery, range(4))
    assert delivery.flush(LONG)

    delivery.config = Config(batch_size=2, send_interval=3600)
    submit_all(delivery, range(4, 8))
    assert delivery.flush(LONG)

    assert [spans for _, spans in store.requests] == [[0, 1, 2, 3], [4, 5], [6, 7]]


def test_store_that_refuses_holds_up_no_other(store: Store) -> None:
    """While one destination refuses its spans, those for another are stored."""
    refusing = Store()
    refusing.refusing = True
    down = QuickToRetry(A, refusing, config=UNHURRIED)
    up: Delivery[int] = Delivery(B, store, config=UNHURRIED)
    down.submit(0)
    up.submit(1)

    assert down.flush(0.05) is False
    assert up.flush(LONG)
    assert store.requests == [(B, [1])]
    refusing.refusing = False
    assert flushed(down)
    assert refusing.requests == [(A, [0])]


def test_refused_batch_is_sent_again(store: Store) -> None:
    """What the store refuses is sent again by itself, and is stored exactly once."""
    store.refusing = True
    delivery: Delivery[int] = Delivery(A, store, config=Config(batch_size=2, send_interval=3600))
    submit_all(delivery, range(3))
    store.wait_for(lambda: store.attempts >= 2)
    submit_all(delivery, range(3, 5))
    assert (delivery.waiting, delivery.delivered) == (5, 0)

    store.refusing = False
    store.wait_for(lambda: len(store.stored) >= 4)

    assert flushed(delivery)
    assert store.stored == [0, 1, 2, 3, 4]
    assert (delivery.delivered, delivery.waiting, delivery.lost) == (5, 0, 0)


def test_batch_refused_at_a_flush_is_sent_again_by_itself(store: Store) -> None:
    """What a flush at the end of a task could not store is tried again without another flush."""
    store.refusing = True
    delivery = QuickToRetry(A, store, config=UNHURRIED)
    delivery.submit(0)
    assert delivery.flush(0.01) is False
    store.wait_for(lambda: store.attempts >= 1)

    store.refusing = False
    store.wait_for(lambda: store.stored == [0])


def test_spans_beyond_max_waiting_are_counted_as_lost(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """While the store hangs, spans beyond max_waiting are lost, counted, and warned of once."""
    store.hang()
    config = Config(batch_size=2, max_waiting=3, send_interval=3600)
    delivery: Delivery[int] = Delivery(A, store, config=config)

    submit_all(delivery, range(6))

    assert (delivery.waiting, delivery.lost) == (3, 3)
    assert len(warnings_of(caplog, "max_waiting")) == 1

    store.answer()
    assert delivery.flush(LONG)
    assert store.stored == [0, 1, 2]

    delivery.submit(6)
    assert delivery.flush(LONG)
    assert store.stored == [0, 1, 2, 6]
    assert (delivery.delivered, delivery.lost) == (4, 3)


def test_each_outage_is_warned_of_once(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """Each outage gives one warning with its reason, and one when the store is back."""
    delivery = QuickToRetry(A, store, config=Config(send_interval=0.01))

    for outage in (1, 2):
        store.refusing = True
        enough = store.attempts + 3
        delivery.submit(outage)
        store.wait_for(lambda enough=enough: store.attempts >= enough)  # type: ignore[misc]
        assert len(warnings_of(caplog, "did not take")) == outage
        assert len(warnings_of(caplog, "takes spans again")) == outage - 1

        store.refusing = False
        assert flushed(delivery)
        assert len(warnings_of(caplog, "did not take")) == outage
        assert len(warnings_of(caplog, "takes spans again")) == outage

    first = warnings_of(caplog, "did not take")[0]
    assert "http://a" in first
    assert "ConnectionError: no route to the store" in first
    assert "experiment 1" in first


def test_no_warning_while_all_is_well(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """A store that takes what it is sent gives no warning."""
    delivery: Delivery[int] = Delivery(A, store, config=Config(batch_size=2, send_interval=3600))
    submit_all(delivery, range(10))

    assert delivery.flush(LONG)
    assert store.stored == list(range(10))
    assert warnings_of(caplog, "") == []


def test_flush_says_whether_all_is_stored(store: Store) -> None:
    """A flush is true once all is stored, false while the store hangs, true when it is back."""
    delivery: Delivery[int] = Delivery(A, store, config=UNHURRIED)
    delivery.submit(0)
    assert delivery.flush(LONG) is True
    assert store.stored == [0]

    store.hang()
    delivery.submit(1)
    assert delivery.flush(0.01) is False
    assert delivery.waiting == 1

    store.answer()
    assert flushed(delivery) is True
    assert store.stored == [0, 1]


def test_flush_of_nothing_is_true(store: Store) -> None:
    """With nothing to store, a flush is true and asks nothing of the store."""
    store.hang()
    delivery: Delivery[int] = Delivery(A, store, config=UNHURRIED)

    assert delivery.flush(LONG) is True
    assert store.attempts == 0


def test_flush_tries_again_at_once(store: Store) -> None:
    """A flush does not wait for the pause that follows a failed attempt."""

    class Patient(Delivery[int]):
        _first_pause = _longest_pause = 3600.0

    store.refusing = True
    delivery = Patient(A, store, config=UNHURRIED)
    delivery.submit(0)
    assert delivery.flush(0.01) is False
    store.wait_for(lambda: store.attempts == 1)

    store.refusing = False
    assert flushed(delivery)
    assert store.stored == [0]


def test_flushes_from_many_threads_all_succeed(store: Store) -> None:
    """Tasks that end at the same time may all flush, and each learns that all is stored."""
    delivery: Delivery[int] = Delivery(A, store, config=UNHURRIED)
    submit_all(delivery, range(10))
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda: results.append(delivery.flush(LONG))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)

    assert results == [True] * 8
    assert store.stored == list(range(10))


def test_open_spans_go_along_and_are_not_counted(store: Store) -> None:
    """Spans still open go along with each batch for their destination, without being counted."""
    delivery: Delivery[str] = Delivery(
        A,
        store,
        accompany=lambda destination: [f"open in {destination.tracking_uri}"],
        config=Config(batch_size=2, send_interval=3600),
    )
    submit_all(delivery, ["a1", "a2", "a3"])

    assert delivery.flush(LONG)
    assert store.requests == [
        (A, ["a1", "a2", "open in http://a"]),
        (A, ["a3", "open in http://a"]),
    ]
    assert (delivery.delivered, delivery.waiting, delivery.lost) == (3, 0, 0)


def test_open_spans_are_looked_up_for_each_attempt(store: Store) -> None:
    """A batch that is sent again goes with the spans that are open by then."""
    open_spans = ["early"]
    delivery: Delivery[str] = Delivery(A, store, accompany=lambda _: open_spans, config=UNHURRIED)
    store.refusing = True
    delivery.submit("finished")
    assert delivery.flush(0.01) is False
    store.wait_for(lambda: store.attempts >= 1)

    open_spans[:] = ["late"]
    store.refusing = False
    assert flushed(delivery)
    assert store.requests == [(A, ["finished", "late"])]


def test_failure_to_find_open_spans_is_tried_again(store: Store) -> None:
    """If the open spans cannot be looked up, the batch is kept and tried again."""
    answers: Iterator[list[str]] = iter([["open"]])
    failed = threading.Event()

    def accompany(_: Destination) -> Sequence[str]:
        if not failed.is_set():
            failed.set()
            raise RuntimeError("not now")
        return next(answers)

    delivery: Delivery[str] = Delivery(A, store, accompany, config=UNHURRIED)
    delivery.submit("finished")

    assert flushed(delivery)
    assert failed.is_set()
    assert store.requests == [(A, ["finished", "open"])]


def test_many_threads_lose_nothing(store: Store) -> None:
    """Spans from many threads at once are all stored, once each, and in each thread's order."""
    delivery: Delivery[tuple[int, int]] = Delivery(
        A, store, config=Config(batch_size=50, send_interval=0.01)
    )
    together = threading.Barrier(8)

    def work(number: int) -> None:
        together.wait(LONG)
        submit_all(delivery, [(number, index) for index in range(500)])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)

    assert delivery.flush(LONG)
    assert (delivery.delivered, delivery.waiting, delivery.lost) == (4000, 0, 0)
    assert max(len(spans) for _, spans in store.requests) <= 50
    for number in range(8):
        assert [span for span in store.stored if span[0] == number] == [
            (number, index) for index in range(500)
        ]
    assert len(store.stored) == 4000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_forked_child_starts_empty(store: Store) -> None:
    """A forked child delivers its own spans only, and the parent those it held."""
    parent = os.getpid()
    sent_by_child: list[Any] = []

    def send(destination: Destination, spans: Sequence[Any], /) -> None:
        if os.getpid() == parent:
            store(destination, spans)
        else:
            sent_by_child.extend(spans)

    store.hang()
    config = Config(batch_size=1, max_waiting=2, send_interval=3600)
    delivery: Delivery[str] = Delivery(A, send, config=config)
    submit_all(delivery, ["parent 1", "parent 2", "lost"])
    store.wait_for(lambda: store.attempts == 1)
    assert (delivery.waiting, delivery.lost) == (2, 1)

    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            inherited = [delivery.waiting, delivery.lost, delivery.delivered]
            delivery.submit("child")
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

    store.answer()
    assert delivery.flush(LONG)
    assert store.stored == ["parent 1", "parent 2"]
    assert delivery.delivered == 2


def test_sender_does_not_keep_the_process_alive(store: Store) -> None:
    """The thread that sends spans does not keep a worker from ending while the store hangs."""
    before = set(threading.enumerate())
    store.hang()
    delivery: Delivery[int] = Delivery(A, store, config=Config(batch_size=1))
    delivery.submit(0)
    store.wait_for(lambda: store.attempts == 1)

    started = set(threading.enumerate()) - before
    assert [thread.daemon for thread in started] == [True]


def test_spans_for_the_driver_are_kept_until_taken(store: Store) -> None:
    """Without a tracking URI nothing is sent: the spans wait for whoever takes them home."""
    delivery: Delivery[int] = Delivery(Destination(None, "1"), store, config=Config(batch_size=1))
    submit_all(delivery, range(3))

    assert delivery.flush(LONG) is False
    assert delivery.take() == [0, 1, 2]
    assert delivery.waiting == 0
    assert delivery.flush(LONG) is True
    assert store.attempts == 0


def test_spans_that_were_taken_are_not_sent_again(store: Store) -> None:
    """After take(), only the batch that was on its way may still arrive; later spans do."""
    store.hang()
    delivery: Delivery[int] = Delivery(A, store, config=Config(batch_size=2, send_interval=3600))
    submit_all(delivery, range(4))
    store.wait_for(lambda: store.attempts == 1)

    assert delivery.take() == [0, 1, 2, 3]
    store.answer()
    store.wait_for(lambda: len(store.requests) == 1)
    delivery.submit(4)
    assert delivery.flush(LONG)
    assert [spans for _, spans in store.requests] == [[0, 1], [4]]
    assert delivery.waiting == 0


def test_delivery_remembers_why_the_store_refused(store: Store) -> None:
    """The last error is kept, for the one who delivers instead."""
    store.refusing = True
    delivery = QuickToRetry(A, store, config=UNHURRIED)
    delivery.submit(0)

    assert delivery.flush(0.05) is False
    store.wait_for(lambda: delivery.last_error is not None)
    assert str(delivery.last_error) == "no route to the store"
