"""What of the repository is a page of the site, and where a link between two files leads there.

The site has what docs/ has, and beside it README.md (the home page), CONTRIBUTING.md, CHANGELOG.md and the
studies. Their links are those of the repository, so both views work: on the site a link to a page leads to
that page, one to a folder to its page or to a list of its files, and any other file goes along as a download.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = "README.md"
FENCED = re.compile(r"^(```|~~~).*?^\1", flags=re.MULTILINE | re.DOTALL)
STUDY = re.compile(r"^(studies/[^/]+)/README\.md$")
LINK = re.compile(r"\]\((?![a-z]+:|#|/)(?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")


def own() -> list[str]:
    """Paths, relative to the repository, of the files that are pages: README.md first."""
    found = [path for pattern in ("docs/*.md", "studies/*/README.md") for path in sorted(ROOT.glob(pattern))]
    return [HOME, "CONTRIBUTING.md", "CHANGELOG.md", *(path.relative_to(ROOT).as_posix() for path in found)]


def uri(path: str) -> str:
    """Where a file of the repository is on the site.

    README.md              -> index.md
    docs/tasks.md          -> tasks.md
    studies/NAME/README.md -> studies/NAME.md
    """
    if path == HOME:
        return "index.md"
    return STUDY.sub(r"\1.md", path.removeprefix("docs/"))


def path(uri: str) -> str:
    """The inverse of `uri`, for pages that come from the repository."""
    if uri == "index.md":
        return HOME
    study = f"{uri.removesuffix('.md')}/README.md"
    candidates = (f"docs/{uri}", study if STUDY.match(study) else uri)
    return next((path for path in candidates if (ROOT / path).exists()), uri)


def goal(target: str, source: str) -> str:
    """Where a relative link leads.

    Args:
        target: The link.
        source: The page that has it, as a path in the repository.

    Returns:
        A path in the repository; for a folder, that of its page.

    Raises:
        ValueError: If the link leads to nothing or out of the repository.
    """
    found = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if found.startswith("..") or not (ROOT / found).exists():
        raise ValueError(f"{source} links to {target}, which is not there")
    if not (ROOT / found).is_dir():
        return found
    return f"{found}/README.md" if (ROOT / found / "README.md").exists() else f"{found}/index.md"


def goals(source: str) -> set[str]:
    """Find the files that a page links to or shows.

    Args:
        source: The page, as a path in the repository.

    Returns:
        Paths in the repository; FOLDER/index.md stands for the list of a folder's files.

    Raises:
        ValueError: If a link leads to nothing.
    """
    text = FENCED.sub("", (ROOT / source).read_text(encoding="utf-8"))
    found = {goal(match["target"], source) for match in LINK.finditer(text)}
    folders = {posixpath.dirname(path) for path in found if not (ROOT / path).exists()}
    return found.union(
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).iterdir()
        if path.is_file()
    )


def relinked(text: str, source: str) -> str:
    """The text of the page `source`, a path in the repository, with the links that it needs on the site."""
    here = posixpath.dirname(uri(source))

    def relink(match: re.Match[str]) -> str:
        there = posixpath.relpath(uri(goal(match["target"], source)), here or ".")
        return f"]({there}{match['anchor'] or ''})"

    parts, end = [], 0
    for fence in [*FENCED.finditer(text), None]:
        start = len(text) if fence is None else fence.start()
        parts.append(LINK.sub(relink, text[end:start]))
        if fence is not None:
            parts.append(fence.group())
            end = fence.end()
    return "".join(parts)


def listing(folder: str) -> str:
    """A page of links to the files of a folder that has no page."""
    names = sorted(path.name for path in (ROOT / folder).iterdir() if path.is_file())
    return "\n".join([f"# Files of {folder}", "", *(f"* [{name}]({name})" for name in names), ""])
