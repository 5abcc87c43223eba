"""What a comparison of jobs finds, and how seldom it finds what is not there."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from synthetic import Made, job

import mlflow_ctx_autolog as ctx_autolog
from mlflow_ctx_autolog.reporting import chance
from mlflow_ctx_autolog.reporting.comparison import Comparison, compare
from mlflow_ctx_autolog.reporting.gate import NotJudgedError, failures, parse_condition

TRIES = 20


def compared(seed: int, **after: Any) -> Comparison:
    return compare(job(seed, name="tr-1"), job(seed + 10_000, Made(**after), name="tr-2"))


def changed(comparison: Comparison) -> dict[str, float]:
    return {each.metric: each.change or 0.0 for each in comparison.changed}


@pytest.mark.parametrize(
    ("after", "metric", "size", "within"),
    [
        ({"prompt": 1.3}, "input_tokens", 0.3, 0.06),
        ({"cut_off": 0.06}, "cut_off", 0.05, 0.02),
        ({"not_json": 0.02}, "invalid_json", 0.018, 0.009),
    ],
    ids=["prompt grew by 30 %", "began to be cut off", "no JSON for 2 % of rows"],
)
def test_what_changed_is_found_with_its_size(
    after: dict[str, Any], metric: str, size: float, within: float
) -> None:
    """In at least 19 of 20 tries with other random numbers."""
    found = [changed(compared(seed, **after)).get(metric) for seed in range(TRIES)]

    assert sum(each is not None and abs(each - size) <= within for each in found) >= 19


@pytest.mark.slow
def test_job_that_is_as_before_raises_no_alarm() -> None:
    """In no more than 5 of 100 tries, over all differences of a comparison together."""
    few = Made(calls=800)
    alarms = [
        bool(compare(job(seed, few), job(seed + 10_000, few, name="tr-2")).changed)
        for seed in range(100)
    ]

    assert sum(alarms) <= 5


def test_few_calls_do_not_cry_wolf() -> None:
    """Of 12 calls nothing can be told, unless it is as plain as can be."""
    few = Made(calls=12, tasks=2)
    for seed in range(TRIES):
        before = job(seed, few)
        assert compare(before, job(seed + 100, few, name="tr-2")).changed == []
        slower = compare(before, job(seed + 100, Made(calls=12, tasks=2, prompt=1.3), name="tr-2"))
        assert slower.changed == []
    verdicts = {each.metric: each.verdict for each in slower.differences}
    assert verdicts["input_tokens"] == verdicts["p95"] == "too few"


@pytest.mark.slow
def test_job_that_is_made_twice_is_found_and_one_accident_is_not() -> None:
    """Each call by two actions is no chance; one task of eight that was retried may be."""
    quiet = Made(retried=0.0)
    twice = changed(compare(job(1, quiet), job(2, Made(retried=0.0, twice=True), name="tr-2")))
    assert twice["repeats:another_action"] == pytest.approx(0.5)
    assert twice["calls_per_row"] == pytest.approx(1.0)
    one_task = next(
        report
        for seed in range(100)
        if 0 < (report := job(seed, Made(retried=0.1), name="tr-2")).repeats <= 250
    )
    assert compare(job(1, quiet), one_task).changed == []


def test_news() -> None:
    """Functions, models and prompts' shapes that are new, or gone."""
    before, after = job(1), job(2, Made(model="gpt-y"), name="tr-2")
    after.calls[0].call.shape = "system, user; json_schema; 2 tools"
    news = compare(before, after).news

    assert news["models"] == {"new": {"gpt-y": after.made.calls}, "vanished": {"gpt-x": 2000}}
    assert news["functions"] == {"new": {}, "vanished": {}}
    assert news["prompts"]["new"] == {"system, user; json_schema; 2 tools": 1}


def test_parts_are_told_apart() -> None:
    """What changed in one function of two is said of that one."""

    def both(seed: int, prompt: float) -> Any:
        one, two = job(seed), job(seed + 50, Made(function="classify", prompt=prompt))
        one.calls += two.calls
        one.attempts += two.attempts
        return one

    found = compare(both(1, 1.0), both(2, 1.5)).changed

    parts = {each.part for each in found if each.metric == "input_tokens"}
    assert parts == {"all", "classify, gpt-x"}


def test_result_in_every_form(tmp_path: Path) -> None:
    """Text, HTML, rows and JSON say the same; nothing from outside is obeyed."""
    script, escape = "</script><script>alert(1)</script>", "\x1b[31m"
    made = Made(model=f"m{script}{escape}", prompt=1.5)
    before = job(1, Made(model=f"m{script}{escape}"))
    found = compare(before, job(2, made, name="tr-2"))

    text = str(found)
    assert "tokens in per call: +5" in text
    assert "\x1b" not in text
    assert repr(found).count("\n") == 0
    assert "<script>alert" not in found._repr_html_()
    page = found.to_html(tmp_path / "c.html")
    assert page.stat().st_mode & 0o777 == 0o600
    assert "<script>alert" not in page.read_text(encoding="utf-8")
    document = json.loads(found.to_json())
    assert [each["metric"] for each in document["changed"]] == list(changed(found))
    rows = found.to_pandas()
    assert len(rows) == len(found.differences)
    assert set(rows["verdict"]) <= {"changed", "small", "chance", "too few", "not known", ""}


def test_costs_that_are_not_known_are_not_compared() -> None:
    """A sum that is "at least" is neither more nor less than another."""
    found = compare(job(1), job(2, Made(priced=False), name="tr-2"))

    verdicts = {each.metric: each.verdict for each in found.differences}
    assert verdicts["cost"] == verdicts["cost_per_call"] == "not known"
    with pytest.raises(NotJudgedError, match="cost is not known of both jobs; give prices"):
        failures(found, [parse_condition("cost>10%")])


def test_gate() -> None:
    """Growth fails where it is more than chance, a share where it surely is above its limit."""
    conditions = [parse_condition(each) for each in ("cost>10%", "invalid_json>1%")]
    as_before = compared(1)
    assert failures(as_before, conditions) == []
    worse = compared(1, prompt=1.5, not_json=0.03)
    one, two = failures(worse, conditions)
    assert one.startswith("cost>10%: cost grew by +")
    assert two.startswith("invalid_json>1%: answers: no JSON: 2.6 %")
    assert failures(worse, [parse_condition("input_tokens@extract>60%")]) == []
    assert len(failures(worse, [parse_condition("input_tokens@extract>20%")])) == 1
    with pytest.raises(NotJudgedError, match="nothing named 'other'"):
        failures(worse, [parse_condition("cost@other>1%")])


def test_gate_fails_for_chance_only_where_it_is_strict() -> None:
    """One answer of 12 that is no JSON proves nothing, and is more than a percent."""
    before = job(1, Made(calls=12, tasks=2, not_json=0.0))
    after = job(2, Made(calls=12, tasks=2, not_json=0.0), name="tr-2")
    after.calls[3].call.signals = frozenset({"invalid_json"})
    found = compare(before, after)

    assert failures(found, [parse_condition("invalid_json>1%")]) == []
    (reason,) = failures(found, [parse_condition("invalid_json>1%")], strict=True)
    assert "8.3 % (1 of 12) after, 0 % before" in reason


@pytest.mark.parametrize(
    "text", ["", "cost", "cost>", "cost>ten%", "cots>1%", "cost<1%", "p95>1..2"]
)
def test_conditions_that_are_none(text: str) -> None:
    """What cannot be meant is refused, with what can."""
    with pytest.raises(ValueError, match=r"is no condition: it must be METRIC>|is no number"):
        parse_condition(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"before": "tr-1"}, "name both jobs"),
        ({"before": "last week", "after": "tr-1"}, "'last week' is no trace"),
        ({"before": "e@soon..", "after": "tr-1"}, "holds 'soon', which is no time"),
        ({"before": {"trace": "tr-1"}, "after": "tr-1"}, r"is not what report\(\) takes"),
        ({"least": {"size": 1}}, "least has 'size'"),
        ({"least": {"share": -1}}, r"least\['share'\] is -1"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, ctx_autolog.CtxAutologError), match=message):
        compare(**arguments)


def test_tests_hold_their_level() -> None:
    """Amounts with a long tail, and jobs of other sizes, alarm no oftener than they may."""
    numbers = random.Random(7)

    def draw(count: int) -> list[float]:
        return [numbers.lognormvariate(0, 1) for _ in range(count)]

    tries = 600
    for one, two in ((30, 30), (30, 600), (400, 400)):
        p = [chance.means(draw(one), draw(two)) or 0 for _ in range(tries)]
        assert sum(each <= 0.05 for each in p) / tries < 0.05 + 3 * (0.05 * 0.95 / tries) ** 0.5
        assert sum(each <= 0.005 for each in p) / tries < 0.005 + 3 * (0.005 / tries) ** 0.5
        q = [chance.quantiles(draw(one), draw(two), 50) or 0 for _ in range(tries)]
        assert sum(each <= 0.05 for each in q) / tries < 0.05 + 3 * (0.05 * 0.95 / tries) ** 0.5


def test_holm() -> None:
    """As in Holm's paper: each times as many as are left, and never less than the one before."""
    assert chance.holm([0.01, None, 0.04, 0.03, 0.005]) == [0.03, None, 0.06, 0.06, 0.02]
    assert chance.holm([]) == []
