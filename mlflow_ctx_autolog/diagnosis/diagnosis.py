"""What ``doctor`` has found, for a program, a terminal and a notebook."""

from __future__ import annotations

import html
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlflow_ctx_autolog.diagnosis.check import Finding, Level

__all__ = ["Diagnosis"]

_MARKS: dict[Level, str] = {"pass": "pass", "warn": "WARN", "fail": "FAIL", "unknown": "?"}
# Of the SGR sequences of a terminal.
_COLOURS: dict[Level, int] = {"fail": 31, "warn": 33, "pass": 32, "unknown": 2}
_WIDTH = 100


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What :func:`doctor` has found. Prints what counts first, and is a table in a notebook.

    Args:
        findings: One for each check and place.
        seconds: How long it took.
        untraced: What of users' code the installed PySpark runs untraced, as it is no task.
    """

    findings: tuple[Finding, ...]
    seconds: float
    untraced: tuple[str, ...] = ()

    @property
    def failures(self) -> list[Finding]:
        """Findings by which traces will be missing."""
        return self._with("fail")

    @property
    def warnings(self) -> list[Finding]:
        """Findings by which they may be, or which cost something."""
        return self._with("warn")

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold.

        ``verdict``, a sentence; ``findings``, each with its fields; ``seconds``; ``untraced``.
        """
        return {
            "verdict": self.verdict(),
            "findings": [asdict(finding) for finding in self.findings],
            "seconds": round(self.seconds, 3),
            "untraced": list(self.untraced),
        }

    def verdict(self) -> str:
        """Return the sentence that counts."""
        wrong, odd = len(self.failures), len(self.warnings)
        if wrong:
            things = "1 thing is" if wrong == 1 else f"{wrong} things are"
            return f"Traces will be missing: {things} wrong."
        arrived = any(each.check == "round_trip" and each.level == "pass" for each in self.findings)
        start = "A call made in a Spark task arrived under the driver's trace"
        if not arrived:
            reason = next(
                (each.found for each in self.findings if each.check == "round_trip"), "not tried"
            )
            start = f"Nothing is known to be wrong, and whether a call arrives was {reason}"
        things = "1 thing is" if odd == 1 else f"{odd} things are"
        return f"{start}; {things} to be looked at." if odd else f"{start}."

    def summary(self) -> str:
        """Return how many checks passed or could not be made, in one line."""
        counts = Counter(finding.level for finding in self.findings)
        passed = counts["pass"]
        parts = ["1 check passed" if passed == 1 else f"{passed} checks passed"]
        if unknown := list(dict.fromkeys(each.title for each in self._with("unknown"))):
            parts.append(f"{counts['unknown']} could not be made ({'; '.join(unknown)})")
        return f"{', '.join(parts)}, in {self.seconds:.1f} s."

    def exceptions(self) -> str:
        """Return what is not traced whatever the checks say, in one line; "" for nothing."""
        # They would be found nowhere else: it is no fault, and there is nothing to set right.
        ways = "; ".join(self.untraced)
        return f"Not traced, whatever it calls: {ways}." if ways else ""

    def to_text(self, *, colour: bool = False) -> str:
        """Return it as lines for a terminal.

        Args:
            colour: Whether the terminal understands colours.
        """

        def painted(text: str, level: Level) -> str:
            return f"\x1b[{_COLOURS[level]}m{text}\x1b[0m" if colour else text

        worst: Level = "fail" if self.failures else "warn" if self.warnings else "pass"
        lines = [painted(self.verdict(), worst)]
        for each in [*self.failures, *self.warnings]:
            head = f"{_MARKS[each.level]}  {each.where:<7}  "
            lines.append(painted(head, each.level) + f"{each.title}: {each.found}")
            if each.advice:
                lines += _filled(f"-> {each.advice}", " " * len(head), " " * (len(head) + 3))
        lines += _filled(self.summary(), "", "  ")
        return "\n".join([*lines, *_filled(self.exceptions(), "", "  ")])

    def __str__(self) -> str:
        return self.to_text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        first = self._table([*self.failures, *self.warnings])
        rest = self._table([*self._with("unknown"), *self._with("pass")])
        return (
            f"<p><b>{html.escape(self.verdict())}</b></p>{first}"
            f"<details><summary>{html.escape(self.summary())}</summary>{rest}</details>"
            f"<p>{html.escape(self.exceptions())}</p>"
        )

    def _with(self, level: Level) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == level]

    def _table(self, findings: Sequence[Finding]) -> str:
        if not findings:
            return ""
        head = _html_row(("", "where", "what has to be so", "found", "what to do"), "th")
        rows = (
            (_MARKS[each.level], each.where, each.title, each.found, each.advice)
            for each in findings
        )
        return f"<table>{head}{''.join(_html_row(row, 'td') for row in rows)}</table>"


def _filled(text: str, first: str, others: str) -> list[str]:
    wrap: Callable[..., list[str]] = textwrap.wrap
    return wrap(
        text,
        width=_WIDTH,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _html_row(cells: Sequence[str], tag: str) -> str:
    inner = "".join(
        f'<{tag} style="text-align: left">{html.escape(cell)}</{tag}>' for cell in cells
    )
    return f"<tr>{inner}</tr>"
