"""The logit lens: from which layer on the answer can be read with the model's own head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.plots.common import SHARES
from analysis.plots.lens import DEPTH, UNITS, lens_table
from analysis.report.parts import Block, Figure, Key, Panel, Section, View
from analysis.report.runs import Run
from analysis.report.sections.learning import dash_of, keys
from analysis.report.sections.probed import beside_untrained, tables
from analysis.report.traces import chance_line, color_of, plot

READING = (
    "The residual stream where the answer is due, after every block, read with the model's own last norm and "
    "head. The layer at which accuracy leaves chance is the one that has fetched the answer; the rest of the "
    "model only passes it on. Bands are 95 % intervals (Wilson's, Student's), hollow points are untrained "
    "weights, dash-dotted lines are chance: a guess among the answers, and an even guess over the vocabulary."
)


def section(runs: Sequence[Run]) -> Section:
    """The section on the logit lens of all runs."""
    found, missing = tables(runs, "lens", "accuracy")
    figures = []
    if found:
        panels = [_panel(runs, found, part) for part in UNITS]
        legend = [*keys([run for run, _ in found]), Key("untrained weights", marker="○")]
        caption = "What the model's own head reads after each block, at the place of the answer."
        figures.append(Figure("lens", "", [View("", [Block("", panels)])], legend, caption))
    return Section("lens", "Logit lens", READING, figures=figures, missing=missing)


def _panel(runs: Sequence[Run], found: Sequence[tuple[Run, pd.DataFrame]], part: str) -> Panel:
    traces: list[Any] = []
    unit, words, axes = UNITS[part], [], ("blocks passed", UNITS[part])
    layers, chances = 0, set()
    for run, table in found:
        rows = lens_table(table)
        rows = rows[rows["part"] == part]
        layers = max(layers, int(rows["layer"].max()))
        chances |= set(rows["chance"].round(6))
        for family, mine in rows.groupby("family", sort=False):
            name, look = run.title(str(family)), dict(color=color_of(str(family)), dash=dash_of(runs, run))
            drawn, trained = beside_untrained(name, mine, axes, more=lambda t: {"answers": t["n"]}, **look)
            traces += drawn
            words.append(f"{name} ends at {trained['value'].iloc[-1]:.3g}")
    traces += [chance_line(float(chance), (0, layers), unit) for chance in sorted(chances)]
    layout: Any = dict(xaxis={"dtick": max(1, layers // 8)})
    if part == "accuracy":
        layout["yaxis"] = {"range": list(SHARES)}
    alt = f"Line chart of {unit} by layer: {'; '.join(words)}."
    return Panel(unit, alt, plot(traces, DEPTH, unit, **layout), height=320)
