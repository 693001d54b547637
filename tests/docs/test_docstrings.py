"""Public docstrings are complete and in the Google style that the site, griffe and editors read."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("griffe", reason='pip install -e ".[docs]"')
from docstring_rules import OPTIONS, STYLE, findings

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "website"))
api = importlib.import_module("api")


@pytest.mark.parametrize("module", api.modules(ROOT))
def test_public_docstrings(module):
    path = ROOT / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert findings(file.read_text(encoding="utf-8")) == []


GOOD = '''"""A module."""


class Scale:
    """A thing."""

    def forward(self, x, y, z): ...

    @property
    def rate(self) -> float:
        """Its rate."""


def add(x: int, *more: int, strict: bool = False) -> tuple[int, int]:
    """Add numbers.

    Args:
        x: The first.
        *more: The others.
        strict: Whether there must be others.

    Returns:
        The sum, and
        how many numbers there were.

    Raises:
        ValueError: If `strict` and there are none.
    """
    if strict and not more:
        raise ValueError("no numbers")
    return sum((x, *more)), 1 + len(more)


def later():
    """A function that raises."""

    def fail():
        raise ValueError("later")

    return fail


def todo():
    """Not written."""
    raise NotImplementedError


def _private(): ...
'''


def test_a_good_module_breaks_no_rule():
    assert findings(GOOD) == []


@pytest.mark.parametrize(
    "old, new, said",
    [
        ('"""A module."""', "", "module: no docstring"),
        ('"""A thing."""', "", "module.Scale: no docstring"),
        ("_private", "private", "module.private: no docstring"),
        ("strict: Whether", "loose: Whether", "module.add: Args: lists ['x', 'more', 'loose'], the sign"),
        ("Args:", "Options:", "module.add: Args: lists [], the signature"),
        ("        *more: The others.\n", "", "module.add: Args: lists ['x', 'strict'], the signature"),
        ("Returns:", "Gives:", "module.add: no Returns:"),
        ("ValueError: If", "TypeError: If", "module.add: Raises: lacks ['ValueError']"),
        ('"""Its rate."""', '"""Rate."""; raise KeyError', "module.Scale.rate: Raises: lacks ['KeyError']"),
        ("x: int,", "x,", "No type or annotation for parameter 'x'"),
    ],
)
def test_each_rule_finds_what_breaks_it(old, new, said):
    assert GOOD.count(old) == 1
    assert said in "\n".join(findings(GOOD.replace(old, new)))


def test_the_site_reads_the_same_style():
    (options,) = (
        plugin["mkdocstrings"]["handlers"]["python"]["options"]
        for plugin in yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["plugins"]
        if "mkdocstrings" in plugin
    )
    assert (options["docstring_style"], options["docstring_options"]) == (STYLE, OPTIONS)
