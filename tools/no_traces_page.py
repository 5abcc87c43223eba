"""Writes docs/no-traces.md from what the checks of doctor() say of themselves."""

from __future__ import annotations

import textwrap
from pathlib import Path

from mlflow_ctx_autolog.diagnosis.checks import CHECKS

PAGE = Path(__file__).parents[1] / "docs" / "no-traces.md"

_HEAD = """# No traces? Start here

No error, no warning, and no calls in MLflow: on the driver, ask

```python
print(ctx_autolog.doctor(spark))
```

or, where the driver would run, `mlflow-ctx-autolog doctor --master URL` (or `--remote URL`, for
Spark Connect). It looks at the driver, at real workers of your cluster and at the tracking store,
makes one call to a stand-in for a model in a real task, and reads it back from the store. It takes
less than a minute, spends no token, shows no secret, and deletes its traces. It says first whether
a call arrived, then what fails and what to look at, with what to do, and in a line what passed and
what could not be found out. In a notebook it is a table. The command's exit status is 2 where
something fails, and with `--strict` 1 where something warns; `--json` is for programs.

`enable()` asks by itself what costs nothing on the driver (marked * below) and warns of it; with
`strict=True` it raises. After a job, a warning on the driver tells of tasks whose calls left no
span.

This is what it checks. The page is written from the checks themselves, by `make no-traces-page`.
"""

_PLACES = {
    "driver": "Checked on the driver.",
    "workers": "Checked on the workers.",
    "both": "Checked on the driver and on the workers.",
    "job": "Checked for the job as a whole.",
}


def page() -> str:
    """Return the page's text."""
    parts = [_HEAD]
    for check in CHECKS:
        mark = " *" if check.at_enable else ""
        advice = f"**What to do:** {check.advice} {_PLACES[check.where]}"
        parts.append(f"## {check.title}{mark}\n\n{_filled(check.why)}\n\n{_filled(advice)}\n")
    return "\n".join(parts)


def _filled(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
