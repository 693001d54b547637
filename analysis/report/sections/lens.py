"""The logit lens: from which layer on the answer can be read with the model's own head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.plots.common import families
from analysis.plots.lens import UNITS
from analysis.report.parts import Block, Figure, Key, Panel, Section, View
from analysis.report.runs import Run
from analysis.report.sections.learning import dash_of, keys
from analysis.report.sections.probed import beside_untrained, tables
from analysis.report.traces import color_of, level, plot

READING = (
    "The residual stream where the answer is due, after every block, read with the model's own last norm and "
    "head. The layer at which accuracy leaves chance is the one that has fetched the answer; the rest of the "
    "model only passes it on. Bands are 95 % intervals (Wilson's, Student's), hollow points are untrained "
    "weights, the dotted lines are chance: a guess among the answers, and an even guess over the vocabulary."
)


def section(runs: Sequence[Run]) -> Section:
    found, missing = tables(runs, "lens", "accuracy")
    figures = []
    if found:
        panels = [_panel(runs, found, part) for part in UNITS]
        legend = [*keys([run for run, _ in found], ["chance"]), Key("untrained weights", marker="○")]
        caption = "What the model's own head reads after each block, at the place of the answer."
        figures.append(Figure("lens", "", [View("", [Block("", panels)])], legend, caption))
    return Section("lens", "Logit lens", READING, figures=figures, missing=missing)


def _panel(runs: Sequence[Run], found: Sequence[tuple[Run, pd.DataFrame]], part: str) -> Panel:
    traces: list[Any] = []
    unit, words, axes = UNITS[part], [], ("blocks passed", UNITS[part])
    layers, chances = 0, set()
    for run, table in found:
        rows = table[table["part"] == part].sort_values("layer")
        layers = max(layers, int(rows["layer"].max()))
        chances |= set(rows["chance"].round(6))
        for family in families(rows):
            mine, name = rows[rows["family"] == family], run.title(family)
            drawn, trained = beside_untrained(
                name, mine, axes, color_of(family), lambda t: {"answers": t["n"]}, dash=dash_of(runs, run)
            )
            traces += drawn
            words.append(f"{name} ends at {trained['value'].iloc[-1]:.3g}")
    traces += [level("chance", float(chance), (0, layers), unit) for chance in sorted(chances)]
    layout: Any = dict(xaxis={"dtick": max(1, layers // 8)})
    if part == "accuracy":
        layout["yaxis"] = {"range": [-0.03, 1.03]}
    alt = f"Line chart of {unit} by layer: {'; '.join(words)}."
    return Panel(unit, alt, plot(traces, "blocks passed (0 = embedding)", unit, **layout), height=320)
