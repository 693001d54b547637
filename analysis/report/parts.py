"""What the page is made of, section by section: what `page` turns into HTML, and report.js into plots.

A section shows figures; a figure has views, of which the reader chooses one; a view has blocks of panels and
may have a slider, whose steps exchange numbers of traces (`Move`) and move frames (`Mark`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from ssm_retrieval.style import NEUTRAL


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a line, a sign, or a scale of colours.

    Attributes:
        label: Its text.
        color: Of the line or sign.
        dash: Of the line, in plotly's words.
        marker: A sign drawn instead of a line.
        colors: Of a scale, from low to high.
        ends: Labels of the ends of the scale.
    """

    label: str
    color: str = NEUTRAL
    dash: str = "solid"
    marker: str = ""
    colors: Sequence[str] = ()
    ends: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Move:
    """What a slider changes: `rows[k]` becomes an attribute of a trace at step k.

    Attributes:
        trace: Its number in the panel.
        path: The attribute: y, error_y.array, ...
        rows: [steps, points].
    """

    trace: int
    path: str
    rows: np.ndarray


@dataclass(frozen=True)
class Mark:
    """A frame that a slider moves: at step k it lies around the row or column from `low[k]` to `high[k]`.

    Attributes:
        shape: Its number among the shapes of the panel.
        axis: "y" for a row, "x" for a column.
        low: [steps].
        high: [steps].
    """

    shape: int
    axis: str
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        title: Text above it.
        alt: What it shows, for readers who do not see it.
        figure: Plotly's.
        height: In pixels.
        wide: As wide as its block, with no other panel beside it.
        moves: What the view's slider changes in it.
        marks: Frames that the slider moves.
        scale: The colours of a map whose ends are its own.
    """

    title: str
    alt: str
    figure: go.Figure
    height: int = 280
    wide: bool = False
    moves: Sequence[Move] = ()
    marks: Sequence[Mark] = ()
    scale: Key | None = None


@dataclass(frozen=True)
class Block:
    """Panels that belong together, such as those of a family.

    Attributes:
        title: Text above them.
        panels: The panels.
        note: A line below them.
        wide: With no other block beside it.
    """

    title: str
    panels: Sequence[Panel]
    note: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Slider:
    """A slider over the steps of a view.

    Attributes:
        label: What is moved.
        texts: What each step is, in words.
        start: The step that is shown first.
    """

    label: str
    texts: Sequence[str]
    start: int


@dataclass(frozen=True)
class View:
    """One of the views of a figure.

    Attributes:
        label: Its name in the choice of views.
        blocks: What it shows.
        slider: Moves through it; None for a view without steps.
    """

    label: str
    blocks: Sequence[Block]
    slider: Slider | None = None


@dataclass(frozen=True)
class Figure:
    """A figure: one or several views with a common legend.

    Attributes:
        name: Unique on the page.
        label: Of the choice of views.
        views: The views; a choice is offered if there are several.
        keys: The legend.
        caption: One line below the figure.
    """

    name: str
    label: str
    views: Sequence[View]
    keys: Sequence[Key]
    caption: str


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        caption: Above it.
        headers: Of its columns.
        rows: Its cells.
        marked: Numbers of the rows to highlight.
        folded: Closed until the reader opens it.
    """

    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()
    folded: bool = False


@dataclass(frozen=True)
class Missing:
    """What is not there.

    Attributes:
        text: Says so.
        command: The command that makes it; "" where none can.
    """

    text: str
    command: str = ""


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        name: Unique on the page.
        title: Its heading.
        reading: One paragraph that says what is shown and how to read it.
        tables: Its tables.
        figures: Its figures.
        missing: What it would show if more had been run.
    """

    name: str
    title: str
    reading: str
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    missing: Sequence[Missing] = ()
