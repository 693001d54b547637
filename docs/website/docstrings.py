"""The house's docstrings as Markdown, for mkdocstrings.

They are prose with the parameters named where they come, `queries: K, number of queries a row.`, and indented
blocks for formulas and commands. Here parameters become a list, *Returns* and *Raises* paragraphs, and what
only looks like Markdown or HTML (`<bos>`, a * b) is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import pairwise
from typing import Any

import griffe

CODE = re.compile(r"(`+)(.+?)\1")
SPECIAL = re.compile(r"[\\*\[\]<>]|(?<!\w)_|_(?!\w)")
BULLET = re.compile(r"\s*([-*]|\d+\.) ")
NAMES = re.compile(r"(?:^|(?<=[.;] ))(\w+(?:, \w+)*)(?= ?:[ ]|:$)")
SHOWN = re.compile(r" {4}|python |.*\S {3,}\S")  # a formula, a command, a table: shown as it is
OUTCOME = re.compile(r"(?:^|(?<=[.;] ))(Returns|Raises|Yields)(?= )")


class Docstrings(griffe.Extension):
    """Rewrites every docstring of a package, and leaves out fields without one: a signature shows them."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        _rewrite(pkg)


def _rewrite(obj: griffe.Object) -> None:
    if obj.docstring is not None:
        obj.docstring.value = markdown(obj.docstring.value, parameters(obj))
    for name, member in list(obj.members.items()):
        if isinstance(member, griffe.Attribute) and obj.is_class and member.docstring is None:
            del obj.members[name]
        elif isinstance(member, griffe.Object):
            _rewrite(member)


def parameters(obj: griffe.Object) -> set[str]:
    """Names that a docstring may explain: parameters of a function, fields of a class."""
    if isinstance(obj, griffe.Function):
        return {parameter.name for parameter in obj.parameters}
    if isinstance(obj, griffe.Class):
        init = obj.members.get("__init__")
        found = parameters(init) if isinstance(init, griffe.Function) else set()
        return found | {name for name, member in obj.members.items() if isinstance(member, griffe.Attribute)}
    return set()


def markdown(docstring: str, names: Collection[str] = ()) -> str:
    """A docstring as Markdown; names: of the parameters that become a list."""
    blocks = re.split(r"\n\s*\n", docstring.strip("\n"))
    return "\n\n".join(_block(block, names) for block in blocks if block.strip())


def escaped(text: str) -> str:
    """Text outside of backticks shown as it is."""
    parts, end = [], 0
    for code in [*CODE.finditer(text), None]:
        start = len(text) if code is None else code.start()
        parts.append(SPECIAL.sub(lambda match: f"&#{ord(match.group())};", text[end:start]))
        if code is not None:
            parts.append(code.group())
            end = code.end()
    return "".join(parts)


def _block(block: str, names: Collection[str]) -> str:
    lines = block.split("\n")
    if SHOWN.match(lines[0]):
        return "\n".join(["```text", *(line.removeprefix("    ") for line in lines), "```"])
    parts: list[str] = []
    for line in lines:
        if BULLET.match(line):
            parts.append(f"* {BULLET.sub('', line, count=1)}")
        elif parts and (line.startswith(" ") or not parts[-1].startswith("* ")):
            parts[-1] = f"{parts[-1]} {line.strip()}"
        else:
            parts.append(line.strip())
    made = [f"* {escaped(part[2:])}" if part[:2] == "* " else _paragraph(part, names) for part in parts]
    return "\n\n".join(made)


def _paragraph(text: str, names: Collection[str]) -> str:
    """Prose, then a list of the parameters it explains, then what is returned and raised."""
    starts = [
        match.start() for match in NAMES.finditer(text) if set(match.group(1).split(", ")) <= set(names)
    ]
    starts += [match.start() for match in OUTCOME.finditer(text) if match.start() == 0 or starts]
    bounds = sorted({0, *starts, len(text)})
    pieces = [text[a:b].strip() for a, b in pairwise(bounds)]
    made = ""
    for piece in pieces:
        named = NAMES.match(piece)
        if named and set(named.group(1).split(", ")) <= set(names):
            quoted = ", ".join(f"`{name}`" for name in named.group(1).split(", "))
            gap = "\n" if made.rpartition("\n")[2].startswith("* ") else "\n\n"
            made += f"{gap}* {quoted}{escaped(piece[named.end() :])}"
        elif outcome := OUTCOME.match(piece):
            made += f"\n\n**{outcome.group()}**{escaped(piece[outcome.end() :])}"
        else:
            made += escaped(piece)
    return made.strip()
