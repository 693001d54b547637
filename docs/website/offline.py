"""Does a built site load anything from another machine? Links are fine; scripts, styles, images are not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

ELSEWHERE = re.compile(r"(https?:)?//")
STYLE = re.compile(r"url\(\s*['\"]?((?:https?:)?//[^'\")\s]+)|@import\s+['\"]((?:https?:)?//[^'\"]+)")
LOADING = ("stylesheet", "icon", "preload", "modulepreload", "manifest", "preconnect", "dns-prefetch")


def loads(site: Path) -> list[str]:
    """One line for each thing that a page or style sheet of the folder loads from elsewhere."""
    found = []
    for path in sorted(site.rglob("*.html")):
        found += [f"{path.relative_to(site)}: {url}" for url in of_page(path.read_text(encoding="utf-8"))]
    for path in sorted(site.rglob("*.css")):
        found += [f"{path.relative_to(site)}: {url}" for url in of_style(path.read_text(encoding="utf-8"))]
    return found


def of_page(html: str) -> list[str]:
    """Addresses that an HTML page loads from elsewhere. A Mermaid diagram does: its script is on a CDN."""
    parser = _Parser()
    parser.feed(html)
    return parser.found


def of_style(css: str) -> list[str]:
    """Addresses that a style sheet loads from elsewhere."""
    return [first or second for first, second in STYLE.findall(css)]


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.found += [url for url in _loaded(tag, values) if ELSEWHERE.match(url)]
        self.found += of_style(values.get("style", ""))
        if "mermaid" in values.get("class", "").split():
            self.found.append("the Mermaid script, for a diagram")


def _loaded(tag: str, values: dict[str, str]) -> Iterator[str]:
    if tag != "link" or set(values.get("rel", "").split()) & set(LOADING):
        yield values.get("href", "") if tag == "link" else ""
    if tag != "a":
        yield values.get("src", "")
        yield values.get("poster", "")
        yield from (part.split()[0] for part in values.get("srcset", "").split(",") if part.strip())
    if tag == "object":
        yield values.get("data", "")
