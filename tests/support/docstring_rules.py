"""What every public docstring has: the rules of tests/docs/test_docstrings.py.

1. A module, a class and a function have a docstring. (A method without one overrides one that has it.)
2. A function with three or more parameters has `Args:`, which names each of them and no other.
3. Beside `Args:`, a function that returns something has `Returns:` or `Yields:`.
4. A function whose own body raises an exception names it in `Raises:`.
5. griffe, which parses them for the site, has nothing to say.
"""

from __future__ import annotations

import ast
import logging
from pathlib import Path

import griffe

STYLE, OPTIONS = "google", {"returns_multiple_items": False}  # as in mkdocs.yml
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
NO_ERRORS = {"NotImplementedError", "StopIteration", "SystemExit", "KeyboardInterrupt", "AttributeError"}


def findings(source: str) -> list[str]:
    """One line for each broken rule in the source of a module."""
    module = griffe.visit("module", filepath=Path("module.py"), code=source)
    raises = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, FUNCTIONS):  # griffe counts from `def` or from a decorator
            raises |= {part.lineno: raised(node) for part in [node, *node.decorator_list]}
    return [f"{obj.path}: {said}" for obj in public(module) for said in broken(obj, raises)]


def public(obj):
    """A module or class and what is public below it; of attributes only properties."""
    yield obj
    for name, member in obj.members.items():
        if not name.startswith("_") and not member.is_alias:
            if member.is_class:
                yield from public(member)
            elif member.is_function or "property" in member.labels:
                yield member


def broken(obj, raises):
    """The rules that one docstring breaks; raises: exceptions of each function, by its first line."""
    if obj.docstring is None:
        if obj.is_module or obj.is_class or obj.parent.is_module:
            yield "no docstring"
        return
    sections, heard = parsed(obj.docstring)
    yield from heard
    if obj.is_module or obj.is_class:
        return
    wanted = [parameter.name for parameter in getattr(obj, "parameters", ())]
    wanted = wanted[1:] if wanted[:1] in (["self"], ["cls"]) else wanted
    listed = [item.name.lstrip("*") for item in sections.get("parameters", ())]
    if ("parameters" in sections or len(wanted) >= 3) and sorted(listed) != sorted(wanted):
        yield f"Args: lists {listed}, the signature {wanted}"
    result = str(getattr(obj, "returns", obj.annotation))
    given = "returns" in sections or "yields" in sections
    if "parameters" in sections and result not in ("None", "NoReturn") and not given:
        yield "no Returns:"
    said = {str(item.annotation).split(".")[-1] for item in sections.get("raises", ())}
    if missing := raises[obj.lineno] - said:
        yield f"Raises: lacks {sorted(missing)}"


def parsed(docstring):
    """Its sections by kind, and griffe's warnings."""
    heard: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("griffe")
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        sections = docstring.parse(STYLE, **OPTIONS)
    finally:
        logger.removeHandler(handler)
    return {section.kind.value: section.value for section in sections}, heard


def raised(function):
    """Names of the exceptions that a function raises itself, not by what is defined or called in it."""
    found, rest = set(), list(function.body)
    while rest:
        node = rest.pop()
        if isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Raise) and node.exc is not None:
            name = ast.unparse(node.exc.func if isinstance(node.exc, ast.Call) else node.exc).split(".")[-1]
            found |= {name} if name[0].isupper() else set()  # a variable is an exception caught above
        rest += ast.iter_child_nodes(node)
    return found - NO_ERRORS
