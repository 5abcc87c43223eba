"""Receipts: what a task hands back is what the driver reads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mlflow_ctx_autolog.delivery.receipts import Receipt, TaskReceipt

FULL = TaskReceipt(
    trace_id="tr-1",
    task_span_id="abc",
    made=10,
    delivered=5,
    waiting=3,
    lost=2,
    first_error='it answered 503: "später"',
    seconds_waiting=1.5,
    usage={"input_tokens": 7, "output_tokens": 8},
    cost={"total_cost": 0.25},
    calls=6,
    errors=1,
    spent=0.25,
    requests=("0123456789ab",),
    repeats=3,
    requests_untold=2,
    function="extract",
)
BARE = TaskReceipt("tr-1", "abc", made=0)


def changed(**fields: Any) -> str:
    return json.dumps({**json.loads(FULL.to_json()), **fields})


def without(name: str) -> str:
    fields = json.loads(FULL.to_json())
    del fields[name]
    return json.dumps(fields)


@pytest.mark.parametrize("receipt", [FULL, BARE], ids=["full", "bare"])
def test_round_trip(receipt: TaskReceipt) -> None:
    """The driver reads exactly what the task handed back."""
    assert TaskReceipt.from_json(receipt.to_json()) == receipt


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not a receipt",
        "null",
        "7",
        "[1, 2]",
        '"text"',
        "{}",
        FULL.to_json()[:-1],
        without("made"),
    ],
)
def test_what_is_no_receipt_is_refused(text: str) -> None:
    """Something else is refused as one kind of error, whose message shows it."""
    with pytest.raises(ValueError, match="not the receipt of a task") as caught:
        TaskReceipt.from_json(text)

    assert text[:20] in str(caught.value).replace("\\'", "'")


def test_what_a_later_release_adds_is_ignored() -> None:
    """Workers may have another release than the driver."""
    receipt = TaskReceipt.from_json(changed(colour="green"))
    assert receipt == TaskReceipt.from_json(changed())


def test_message_on_a_huge_text_is_short() -> None:
    """However large the text, the message shows no more than its beginning."""
    with pytest.raises(ValueError, match="xxx") as caught:
        TaskReceipt.from_json("x" * 1_000_000)

    assert len(str(caught.value)) < 300


def test_amounts_that_are_none_are_left_out() -> None:
    """Usage that is missing or no object does not cost the counts."""
    receipt = TaskReceipt.from_json(changed(usage=None, cost={"total_cost": "dear"}))

    assert (receipt.usage, receipt.cost, receipt.made) == ({}, {}, 10)


def test_span_of_a_task_is_a_receipt() -> None:
    """From the attributes of a stored task's span comes the same receipt, all of it delivered."""
    attributes = TaskReceipt.attributes(10, FULL.usage, FULL.cost)

    assert TaskReceipt.from_attributes("tr-1", "abc", attributes) == TaskReceipt(
        "tr-1", "abc", made=10, delivered=10, usage=FULL.usage, cost=FULL.cost
    )


def test_attributes_have_short_names() -> None:
    """The attributes can be read by people."""
    assert TaskReceipt.attributes(3, {"input_tokens": 1}, {"total_cost": 0.5}) == {
        "spans.made": 3,
        "llm.tokens.input": 1,
        "llm.cost.total": 0.5,
    }


def test_other_attributes_are_ignored() -> None:
    """Whatever else is on a task's span has no part in the receipt, but for calls and rows."""
    attributes = {
        **TaskReceipt.attributes(3, {}, {}),
        "llm.calls": 7,
        "spark.rows.in": 8,
        "spark.rows.out": 9,
        "llm.tokens.input": "many",
    }

    assert TaskReceipt.from_attributes("tr-1", "abc", attributes) == TaskReceipt(
        "tr-1", "abc", made=3, delivered=3, calls=7, rows=8
    )


@pytest.mark.parametrize(
    "attributes", [{}, {"spans.made": "3"}, {"spans.made": None}, {"llm.tokens.input": 1}]
)
def test_span_that_has_not_ended_is_no_receipt(attributes: dict[str, Any]) -> None:
    """A task's span that was announced and never ended says nothing."""
    assert TaskReceipt.from_attributes("tr-1", "abc", attributes) is None


@pytest.mark.parametrize(
    ("receipt", "complete"),
    [
        (Receipt("tr-1", made=10, stored=10), True),
        (Receipt("tr-1", made=10, stored=11), True),
        (Receipt("tr-1", made=10, stored=10, first_error="it answered 503"), True),
        (Receipt("tr-1", made=0, stored=0), True),
        (Receipt("tr-1", made=10, stored=9), False),
        (Receipt("tr-1", made=10, stored=9, waiting=1), False),
        (Receipt("tr-1", made=10, stored=10, lost=1), False),
        (Receipt("tr-1", made=0), False),
    ],
)
def test_trace_is_complete_when_the_store_has_all(receipt: Receipt, complete: bool) -> None:
    """A trace is complete when the store has said that it has all spans, and none is lost."""
    assert receipt.complete is complete


def test_receipt_as_a_text() -> None:
    """The text names what there is, and is silent on what there is not."""
    assert str(Receipt("tr-1", made=1234, stored=1234)) == "1,234 spans made, 1,234 stored"
    text = str(Receipt("tr-1", made=2000, stored=0, waiting=1500, lost=500))
    assert text == "2,000 spans made, 0 stored, 1,500 waiting, 500 lost"
    assert "did not say" in str(Receipt("tr-1", made=1))
