"""Pages of the API reference: one for every public module, found by reading the source, and an index.

A name that begins with an underscore makes a module, and all below it, private.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("ssm_retrieval", "synthetic", "probes", "analysis", "vlm")
TITLE = "API reference"
INTRODUCTION = """\
Every public module, from its docstrings. Shapes are in brackets; *Raises* says which mistakes are refused in
one line. A package's page has what it offers under its own name, such as `models.build`.
"""


def modules(root: Path, packages: Sequence[str] = PACKAGES) -> list[str]:
    """Dotted names of the public modules below `root`, sorted; a package stands before what is in it."""
    found = []
    for package in packages:
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if not any(part.startswith("_") for part in parts):
                found.append(".".join(parts))
    return sorted(found, key=lambda name: (packages.index(name.split(".")[0]), name))


def page(module: str, root: Path) -> str:
    """Where a module's page is: `api/synthetic/run.md`; a package's is the `index.md` of its folder."""
    folder = (root / module.replace(".", "/")).is_dir()
    return f"api/{module.replace('.', '/')}{'/index' if folder else ''}.md"


def pages(root: Path) -> dict[str, str]:
    """The Markdown of each page by its place on the site, `api/index.md` first."""
    names = modules(root)
    made = {"api/index.md": f"# {TITLE}\n\n{INTRODUCTION}"}
    for package in PACKAGES:
        mine = [name for name in names if f"{name}.".startswith(f"{package}.")]
        made["api/index.md"] += f"\n## {package}\n\n{_table(mine, root, 'api')}\n"
    for name in names:
        where = page(name, root)
        made[where] = f"---\ntitle: {name}\n---\n\n::: {name}\n"  # the title that search shows
        if where.endswith("/index.md"):
            below = [other for other in names if other.rpartition(".")[0] == name]
            made[where] += f"\n## Modules\n\n{_table(below, root, where.removesuffix('/index.md'))}\n"
    return made


def navigation(root: Path) -> list[Any]:
    """The entries of `nav` in mkdocs.yml for these pages: a section for every package."""
    tree: dict[str, list[Any]] = {"": ["api/index.md"]}
    for name in modules(root):
        parent, _, last = name.rpartition(".")
        where = page(name, root)
        if where.endswith("/index.md"):
            tree[name] = [where]
            tree[parent].append({last: tree[name]})
        else:
            tree[parent].append({last: where})
    return tree[""]


def summary(docstring: str) -> str:
    """The first sentence without its full stop, as one line that fits into a table."""
    first = re.split(r"(?<!\.)\.(?= [A-Z`]|$)", " ".join(docstring.split("\n\n")[0].split()))[0]
    return first.removesuffix(":").replace("|", "\\|")


def _table(names: Sequence[str], root: Path, here: str) -> str:
    rows = ["| module | what it is |", "|---|---|"]
    for name in names:
        link = page(name, root).removeprefix(f"{here}/")
        rows.append(f"| [`{name}`]({link}) | {summary(_docstring(name, root))} |")
    return "\n".join(rows)


def _docstring(module: str, root: Path) -> str:
    """A module's docstring, without importing it. Raises ValueError if it has none."""
    path = root / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    if not docstring:
        raise ValueError(f"{file.relative_to(root)} has no docstring; say in one what the module is for")
    return docstring
