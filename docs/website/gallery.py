"""The gallery: every figure of the project, and whether its numbers are published or measured.

Figures of `python -m analysis.figures` stand in its index, a list of {file, title, source, caption}; those of
the studies and guides are found in their pages. So no figure is listed by hand.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pages

PAGE = "gallery.md"
INDEX = "docs/images/figures/index.json"
IMAGE = re.compile(r"!\[(?P<title>[^\]]+)\]\((?P<file>[^)]+)\)")
INTRODUCTION = """\
# Gallery

Every figure of the project. Each says whose numbers it shows: **published** ones are copied from the paper's
public repository and were measured by its authors; **measured** ones come from runs of this toolkit, whose
tables are committed beside them.
"""
OF_PAGES = """\
## Of the studies and guides

All **measured** by this toolkit or drawn by it: none shows published numbers.
"""


def figures(root: Path) -> list[dict[str, Any]]:
    """Entries of the index, with files relative to the repository; none if there is no index yet."""
    path = root / INDEX
    if not path.exists():
        return []
    return [
        entry | dict(file=str(Path(INDEX).parent / entry["file"])) for entry in json.loads(path.read_text())
    ]


def images(root: Path) -> list[str]:
    """Files that the gallery shows, as paths in the repository."""
    return [entry["file"] for entry in figures(root)] + [file for _, file, _ in shown(root)]


def shown(root: Path) -> list[tuple[str, str, str]]:
    """(title, file, page) of every picture in a page of the site; both are paths in the repository."""
    found = []
    for page in pages.own():
        text = (root / page).read_text(encoding="utf-8")
        found += [(m["title"], pages.goal(m["file"], page), page) for m in IMAGE.finditer(text)]
    return found


def page(root: Path) -> str:
    """The page in Markdown."""
    parts = [INTRODUCTION]
    for entry in figures(root):
        parts.append(_figure(entry["title"], entry["file"], f"**{entry['source']}** · {entry['caption']}"))
    parts.append(OF_PAGES)
    for title, file, source in shown(root):
        heading = re.search(r"^# (.+)$", (root / source).read_text(encoding="utf-8"), re.MULTILINE)
        name = heading.group(1) if heading else source
        parts.append(_figure(title, file, f"From [{name}]({pages.uri(source)})"))
    return "\n".join(parts)


def _figure(title: str, file: str, words: str) -> str:
    return f"### {title}\n\n{words}\n\n![{title}]({pages.uri(file)}){{ loading=lazy }}\n"
