"""What training shows on a terminal, in a notebook and in a file; each tool's own text is shown as it is."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ssm_retrieval.training import display


@pytest.fixture
def cells(monkeypatch):
    """What a notebook's line said, one after the other."""
    said = []

    class Handle:
        def update(self, content, raw):
            said.append(content["text/plain"])

    monkeypatch.setattr("IPython.display.display", lambda *_, **__: Handle())
    return said


def shown(**how) -> str:
    content = io.StringIO()
    with display.Display("a [red] title", Console(file=content, width=120, **how), left="at most") as bar:
        for step in range(1, 4):
            bar.show(step, f"loss [{step}]", total=1500)
        bar.line("a line [bold]")
    return content.getvalue()


def test_a_terminal_has_a_bar_and_no_lines():
    said = shown(force_terminal=True, color_system=None)
    assert "a [red] title" in said and "loss [3]" in said and "at most" in said
    assert "a line" not in said


def test_a_file_has_the_lines_alone():
    assert shown(markup=False) == "a line [bold]\n"


def test_a_notebook_has_one_line_that_says_how_far_it_is(cells, monkeypatch):
    monkeypatch.setattr(display, "PAUSE", -1.0)
    assert shown(force_jupyter=True) == ""
    assert cells == [f"a [red] title {step}/1,500  loss [{step}]" for step in (1, 2, 3)]


def test_a_notebooks_line_changes_now_and_then_or_at_once(cells, monkeypatch):
    monkeypatch.setattr(display, "PAUSE", 1e9)
    with display.Display("a title", Console(file=io.StringIO(), force_jupyter=True), total=9) as bar:
        bar.show(1, "too soon")
        bar.show(2, "an evaluation", at_once=True)
    assert cells == ["a title     2/9  an evaluation"]


def test_a_quiet_console_shows_nothing(cells):
    assert shown(quiet=True) == "" and shown(quiet=True, force_jupyter=True) == "" and cells == []
