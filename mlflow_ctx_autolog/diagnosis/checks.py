"""The checks of ``doctor()``, in their order: each takes facts and says what they mean.

A new check is one function in one of the modules of checks, under ``@check``; its docstring and its
advice are what the page "No traces?" says of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlflow_ctx_autolog.diagnosis import job_checks, process_checks, store_checks
from mlflow_ctx_autolog.diagnosis.check import (
    UNKNOWN,
    Check,
    Facts,
    Finding,
    Level,
    Process,
    Silence,
    Subject,
    Verdict,
    checks_of,
)

__all__ = ["CHECKS", "examine", "likely_causes"]

CHECKS: list[Check] = [
    each
    for module in (process_checks, store_checks, job_checks)
    for each in checks_of(module.__name__)
]


def examine(facts: Facts, *, at_enable: bool = False) -> list[Finding]:
    """Put facts to the checks, in their order.

    Args:
        facts: The facts.
        at_enable: Only what ``enable()`` asks the driver, and what it has to say.
    """
    findings = []
    for each in CHECKS:
        if at_enable:
            if each.at_enable is not None:
                finding = _finding(each, "driver", facts, [facts.driver])
                if _BADNESS[finding.level] >= _BADNESS[each.at_enable]:
                    findings.append(finding)
            continue
        if each.where in ("driver", "both"):
            findings.append(_finding(each, "driver", facts, [facts.driver]))
        if each.where in ("workers", "both") and facts.workers is not None:
            findings.append(_finding(each, "workers", facts, facts.workers))
        if each.where == "job":
            findings.append(_finding(each, "job", facts, [facts.driver]))
    return findings


def likely_causes(silence: Silence) -> str:
    """Return a text that names the checks which most likely explain a silence."""
    titles = "; ".join(each.title for each in CHECKS if silence in each.explains)
    return f"Most likely, one of these is not so: {titles}. ctx_autolog.doctor() checks them."


_BADNESS: dict[Level, int] = {"unknown": 0, "pass": 1, "warn": 2, "fail": 3}


def _finding(each: Check, where: str, facts: Facts, processes: Sequence[Process]) -> Finding:
    """Return the worst verdict of some processes, and the hosts that it is of."""
    hosts: dict[Verdict, set[str]] = {}
    for process in processes:
        verdict = each.judge(Subject(facts, process)) or UNKNOWN
        hosts.setdefault(verdict, set()).add(str(process.get("host")))
    worst = max(hosts, key=lambda verdict: _BADNESS[verdict.level], default=UNKNOWN)
    found = worst.found
    if where == "workers" and worst.level in ("warn", "fail"):
        found = f"{', '.join(sorted(hosts[worst]))}: {found}"
    advice = each.advice if worst.level in ("warn", "fail") else ""
    return Finding(each.name, each.title, where, worst.level, found, advice)
