"""What mkdocs does to the pages besides: links out of the docs, and llms.txt."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./[^)]*\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Keep the text of links to files of the repository, which the site does not have."""
    depth = page.file.src_uri.count("/")
    return markdown if depth else _OUTSIDE.sub(r"\1", markdown)


def on_post_build(config: Any, **_: Any) -> None:
    """Write llms.txt: the pages, with what each begins with, for assistants."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}."]
    for entry in config.nav:
        ((section, pages),) = entry.items()
        if isinstance(pages, str):
            continue
        lines += ["", f"## {section}", ""]
        for each in pages:
            ((title, path),) = each.items()
            text = Path(config.docs_dir, path).read_text(encoding="utf-8")
            address = path.removesuffix(".md").replace("README", "index") + ".html"
            lines.append(f"- [{title}]({address}): {_beginning(text)}")
    Path(config.site_dir, "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _beginning(markdown: str) -> str:
    """Return the first sentence of a page."""
    text = re.sub(r"^```.*?^```$", "", markdown.partition("\n")[2], flags=re.MULTILINE | re.DOTALL)
    paragraphs = (" ".join(each.split()) for each in re.split(r"\n\s*\n", text))
    first = next((each for each in paragraphs if re.match(r"(- )?[\w`*]", each)), "")
    first = first.removeprefix("- ").replace("**", "")
    first = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", first)
    return re.split(r"(?<=[.:?]) (?=[A-Z])", first)[0].rstrip(":")
