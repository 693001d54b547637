"""What is left of a context token in the state when the answer is due."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.plots.common import families
from analysis.plots.retention import (
    DISTANCE,
    LONG,
    UNITS,
    curve_table,
    limits,
    reconstruction_errors,
)
from analysis.report.parts import Block, Figure, Key, Panel, Section, View
from analysis.report.runs import Run
from analysis.report.sections.probed import label, tables
from analysis.report.traces import color_of, control, control_key, curve, plot
from ssm_retrieval.style import NAMES, faintness

READING = (
    "How much of what a context token wrote is left in an SSM's state when the answer is due, exactly, from "
    "the linear recurrence, against how many tokens ago it was written: of its own write (left) and "
    "relative to the whole state (right). Layers go from faint to full, bands are 95 % intervals over "
    "sequences. If the lines of the target and of distractors (dashed) run together, the state keeps the "
    "symbol that will be asked for no better than any other; the slope is how fast it forgets. Untrained "
    "weights are dotted."
)


def section(runs: Sequence[Run]) -> Section:
    """The section on retention curves of all runs."""
    found, missing = tables(runs, "retention", "curve")
    figures = []
    if found:
        names = families(pd.concat([table["family"].to_frame() for _, table in found]))
        keys = [Key(f"target, {NAMES[name]}", color_of(name)) for name in names]
        keys += [control_key("distractors"), control_key("untrained weights")]
        views = [View(label(run, "retention"), _blocks(table)) for run, table in found]
        caption = "What is left of a token in the state when the answer is due, by its distance."
        figures.append(Figure("retention", "Shown", views, keys, caption))
    return Section("retention", "What the state keeps", READING, figures=figures, missing=missing)


def _blocks(table: pd.DataFrame) -> list[Block]:
    blocks = []
    for family, mine in curve_table(table).groupby("family", sort=False):
        name = str(family)
        panels = [_panel(name, part, UNITS[str(q)]) for q, part in mine.groupby("quantity", sort=False)]
        error = reconstruction_errors(table, name).max()
        note = f"The layer's own output is reproduced with a relative error of {error:.0e} at most."
        blocks.append(Block(NAMES[name], panels, note))
    return blocks


def _panel(family: str, part: pd.DataFrame, unit: str) -> Panel:
    layers, traces = set(part["layer"]), []
    for (line, role, weights, layer), rows in part.groupby(["line", "role", "weights", "layer"], sort=False):
        look: Any = dict(color=color_of(family)) if line == "target" else control(str(line))
        traces += curve(
            f"{role}, {weights}, layer {layer}",
            rows["distance"],
            rows["value"],
            (DISTANCE, "left"),
            low=rows["low"],
            high=rows["high"],
            alpha=faintness(layer, layers),
            mode="lines",
            more={"sequences": rows["n"]},
            **look,
        )
    x: Any = {"type": "log"} if part["distance"].max() > LONG else {"type": "linear"}
    figure = plot(
        traces, DISTANCE, unit, xaxis=x, yaxis={"type": "log", "range": np.log10(limits(part)).tolist()}
    )
    trained = part[(part["role"] == "target") & (part["weights"] == "trained")]
    far = trained[trained["distance"] == trained["distance"].max()]["value"]
    alt = f"{unit} by distance in {NAMES[family]}; of the farthest target {far.min():.2g} to {far.max():.2g}."
    return Panel(unit, alt, figure, height=320)
