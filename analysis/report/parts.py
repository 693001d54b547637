"""What the page is made of, section by section: what `page` turns into HTML, and report.js into plots.

A section shows figures; a figure has views, of which the reader chooses one; a view has blocks of panels and
may have a slider, whose steps exchange numbers of traces (`Move`) and move frames (`Mark`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

NEUTRAL = "#7d8590"  # of controls and chance: to be seen on white and on black


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a line or, with `colors`, a scale from low to high, whose ends have labels."""

    label: str
    color: str = NEUTRAL
    dash: str = "solid"
    marker: str = ""  # a sign drawn instead of a line
    colors: Sequence[str] = ()
    ends: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Move:
    """rows[k] becomes attribute `path` (y, error_y.array, ...) of a trace at step k of the slider."""

    trace: int
    path: str
    rows: np.ndarray  # (steps, points)


@dataclass(frozen=True)
class Mark:
    """At step k shape number `shape` frames the row or column (axis y or x) from low[k] to high[k]."""

    shape: int
    axis: str
    low: np.ndarray  # (steps,)
    high: np.ndarray  # (steps,)


@dataclass(frozen=True)
class Panel:
    """One plot. title: above it, as text. alt: what it shows, for readers who do not see it.

    height: pixels. wide: as wide as its block, with no other panel beside it. scale: of a map whose colours
    have ends of their own.
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
    """Panels that belong together, such as those of a family. wide: with no other block beside it."""

    title: str
    panels: Sequence[Panel]
    note: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Slider:
    """label: what is moved. texts: what each step is, in words. start: the step shown first."""

    label: str
    texts: Sequence[str]
    start: int


@dataclass(frozen=True)
class View:
    label: str
    blocks: Sequence[Block]
    slider: Slider | None = None


@dataclass(frozen=True)
class Figure:
    """name: unique on the page. label: of the choice of views. caption: one line below."""

    name: str
    label: str
    views: Sequence[View]
    keys: Sequence[Key]
    caption: str


@dataclass(frozen=True)
class Table:
    """marked: rows to be highlighted."""

    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()
    folded: bool = False


@dataclass(frozen=True)
class Missing:
    """What is not there, and the command that makes it ("" where none can)."""

    text: str
    command: str = ""


@dataclass(frozen=True)
class Section:
    """reading: one paragraph that says what is shown and how to read it."""

    name: str
    title: str
    reading: str
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    missing: Sequence[Missing] = ()
