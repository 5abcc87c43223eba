"""Writes docs/settings.md from the one definition of the settings, ``Config``."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path

from mlflow_ctx_autolog.config import ENV_PREFIX, Config, kinds

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"

_HEAD = f"""# Settings

By keyword, `ctx_autolog.enable(flush_timeout=30)`; all at once, as `ctx_autolog.Config(...)`; or by
environment variable on the driver, `{ENV_PREFIX}FLUSH_TIMEOUT=30`, which sets the default.

- The first `enable()` begins with the defaults. A later one changes what it names and nothing else;
  with `reset=True` it begins with the defaults again. A `Config` names all of its fields.
- Leaving `with ctx_autolog.enable(...):` restores what was before it.
- A [budget](budget.md) counts on across all of these.
- At INFO, the log of `mlflow_ctx_autolog` says what has changed from what to what; what `enable()`
  returns says what is on, when it is shown.
- A misspelt name, a value of another type or out of its range is an error at once; type checkers
  and editors know each name.

This page is written from their definition, by `make settings-page`.
"""


def documented() -> dict[str, str]:
    """Return what the docstring of ``Config`` says of each setting, as Markdown."""
    section = inspect.getdoc(Config) or ""
    section = section.partition("Args:\n")[2].partition("\nRaises:")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", section, re.MULTILINE)
    return {name: _markdown(text) for name, text in found}


def _markdown(text: str) -> str:
    text = " ".join(text.split()).replace("``", "`")
    text = re.sub(r":func:`(?:~[\w.]*\.)?(\w+)`", r"`\1()`", text)
    return re.sub(r":class:`(?:~[\w.]*\.)?(\w+)`", r"`\1`", text)


def page() -> str:
    """Return the page's text."""
    texts = documented()
    parts = [_HEAD, "| setting | takes | default |\n|---|---|---|"]
    for name, kind in kinds().items():
        default = getattr(Config(), name)
        shown = f"`{default!r}`" if default or default is False else "none"
        if isinstance(default, int) and not isinstance(default, bool):
            shown = f"{default:,}"
        parts[-1] += f"\n| [`{name}`](#{name}) | {kind} | {shown} |"
    for name, text in texts.items():
        filled = textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
        parts.append(f"\n### `{name}`\n\n{filled}")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
