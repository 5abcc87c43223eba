"""Jobs that never ran: reports on calls drawn at random, with what is to be found in them."""

from __future__ import annotations

import random
from dataclasses import dataclass

from mlflow_ctx_autolog import CallReport
from mlflow_ctx_autolog.reporting.calls import Attempt, Call, SparkFacts
from mlflow_ctx_autolog.reporting.causes import judge
from mlflow_ctx_autolog.reporting.jobs import Job
from mlflow_ctx_autolog.reporting.signals import add_signals_of_all

SECOND = 1_000_000_000
_PRICE_IN, _PRICE_OUT = 2.5e-6, 10e-6


@dataclass
class Made:
    """What a job is like.

    Args:
        calls: Rows, each with one call.
        tasks: Partitions.
        prompt: How many times as long as usual prompts are.
        cut_off: Share of answers that are cut off.
        not_json: Share of answers that are no JSON.
        errors: Share of calls that fail.
        slow: How many times as slow as usual.
        retried: Chance of a task to be made again, all its calls with it.
        twice: Whether each call is made by two actions.
        model: Its name.
        function: Its name.
        priced: Whether costs are known.
    """

    calls: int = 2000
    tasks: int = 8
    prompt: float = 1.0
    cut_off: float = 0.01
    not_json: float = 0.002
    errors: float = 0.01
    slow: float = 1.0
    retried: float = 0.05
    twice: bool = False
    model: str = "gpt-x"
    function: str = "extract"
    priced: bool = True


def job(seed: int, made: Made | None = None, name: str = "tr-1") -> CallReport:
    """Return the report on a job with these numbers, drawn with a seed."""
    made = made or Made()
    numbers = random.Random(seed)
    attempts: list[Attempt] = []
    calls: list[Call] = []
    rows = [made.calls // made.tasks] * made.tasks
    rows[0] += made.calls - sum(rows)
    attempt_id = 0
    for action in range(1 + made.twice):
        for partition, size in enumerate(rows):
            for number in range(1 + (numbers.random() < made.retried)):
                attempt = _attempt(name, made, partition, number, attempt_id, action, size)
                attempt_id += 1
                attempts.append(attempt)
                calls += [_call(numbers, made, attempt, row) for row in range(size)]
    calls.sort(key=lambda call: call.started)
    add_signals_of_all(calls)
    last = max((call.ended or 0 for call in calls), default=0)
    return CallReport(
        judge(calls, attempts=attempts),
        attempts,
        [name],
        jobs=[Job(name, "0", "nightly", SECOND, last)],
    )


def _attempt(
    name: str, made: Made, partition: int, number: int, attempt_id: int, action: int, rows: int
) -> Attempt:
    start = SECOND * (1 + 1000 * action + 500 * number)
    return Attempt(
        f"{name}-t{attempt_id}",
        name,
        made.function,
        SparkFacts(),
        application="app-1",
        action=str(action),
        execution=str(action),
        operation=None,
        stage=action,
        partition=partition,
        number=number,
        attempt_id=attempt_id,
        handover="one",
        call_site=None,
        speculation=False,
        host=f"worker-{partition % 2}",
        process=100 + partition,
        outcome="completed",
        started=start,
        ended=start + 400 * SECOND,
        last_seen=start + 400 * SECOND,
        rows=rows,
    )


def _call(numbers: random.Random, made: Made, attempt: Attempt, row: int) -> Call:
    # Prompts and answers are as long, and answers as slow, as a few dozen percent of chance make.
    asked = int(made.prompt * numbers.lognormvariate(6.5, 0.4))
    said = int(numbers.lognormvariate(4.5, 0.6))
    seconds = made.slow * numbers.lognormvariate(0.0, 0.5)
    failed = numbers.random() < made.errors
    signals = set()
    if not failed and numbers.random() < made.cut_off:
        signals.add("cut_off")
    if not failed and numbers.random() < made.not_json:
        signals.add("invalid_json")
    started = attempt.started + numbers.randrange(300 * SECOND)
    usage = {} if failed else {"input_tokens": asked, "output_tokens": said}
    cost = 0.0 if failed else asked * _PRICE_IN + said * _PRICE_OUT
    return Call(
        attempt.trace_id,
        "0",
        f"{attempt.span_id}-{row}",
        "Completions",
        made.model,
        attempt,
        started,
        started + int(seconds * SECOND),
        failed,
        "RateLimitError: slow down" if failed else None,
        f"{attempt.partition}-{row}",
        {},
        0,
        {name: float(number) for name, number in usage.items()},
        cost if made.priced or failed else None,
        seconds / 4,
        f"What does document {attempt.partition}-{row} grant?",
        '{"entitlements": ["support", "updates"]}',
        frozenset(signals),
        () if failed else ("length",) if "cut_off" in signals else ("stop",),
        None if failed else 4 * said,
        None if failed else f"{attempt.partition}-{row}",
        "system, user; json_schema",
    )
