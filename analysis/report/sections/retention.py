"""What is left of a context token in the state when the answer is due."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.plots.common import families
from analysis.plots.retention import LEAST, UNITS
from analysis.report.parts import Block, Figure, Key, Panel, Section, View
from analysis.report.runs import Run
from analysis.report.sections.probed import label, tables
from analysis.report.traces import NEUTRAL, color_of, curve, opacity, plot
from ssm_retrieval.style import NAMES

READING = (
    "How much of what a context token wrote is left in an SSM's state when the answer is due, exactly, from "
    "the linear recurrence, against how many tokens ago it was written: of its own write (left) and "
    "relative to the whole state (right). Layers go from faint to full, bands are 95 % intervals over "
    "sequences. If the lines of the target and of distractors (dashed) run together, the state keeps the "
    "symbol that will be asked for no better than any other; the slope is how fast it forgets. Untrained "
    "weights are dotted."
)


def section(runs: Sequence[Run]) -> Section:
    found, missing = tables(runs, "retention", "curve")
    figures = []
    if found:
        names = families(pd.concat([table["family"].to_frame() for _, table in found]))
        keys = [Key(f"target, {NAMES[name]}", color_of(name)) for name in names]
        keys += [Key("distractors", dash="dash"), Key("target, untrained weights", dash="dot")]
        views = [View(label(run, "retention"), _blocks(table)) for run, table in found]
        caption = "What is left of a token in the state when the answer is due, by its distance."
        figures.append(Figure("retention", "Shown", views, keys, caption))
    return Section("retention", "What the state keeps", READING, figures=figures, missing=missing)


def _blocks(table: pd.DataFrame) -> list[Block]:
    curves = table[table["part"] == "curve"]
    blocks = []
    for family in families(curves):
        mine = curves[curves["family"] == family]
        panels = [
            _panel(family, mine[mine["quantity"] == quantity], unit) for quantity, unit in UNITS.items()
        ]
        errors = table[(table["part"] == "reconstruction") & (table["family"] == family)]["value"]
        note = f"The layer's own output is reproduced with a relative error of {errors.max():.0e} at most."
        blocks.append(Block(NAMES[family], panels, note))
    return blocks


def _panel(family: str, part: pd.DataFrame, unit: str) -> Panel:
    part = part[part["value"] > LEAST]
    layers = sorted(part["layer"].unique())
    looks: Any = {
        ("target", "untrained"): dict(color=NEUTRAL, dash="dot", width=1.2),
        ("distractor", "trained"): dict(color=NEUTRAL, dash="dash", width=1.5),
        ("target", "trained"): dict(color=color_of(family)),
    }
    traces: list[Any] = []
    for (role, weights), look in looks.items():
        for layer in layers:
            rows = part[(part["layer"] == layer) & (part["role"] == role) & (part["weights"] == weights)]
            rows = rows.sort_values("distance")
            bounds = (
                dict(low=rows["low"].clip(LEAST), high=rows["high"])
                if role == "target" and weights == "trained"
                else {}
            )
            traces += curve(
                f"{role}, {weights}, layer {layer}",
                rows["distance"],
                rows["value"],
                ("tokens before the answer", "left"),
                alpha=opacity(layer, layers),
                mode="lines",
                more={"sequences": rows["n"]},
                **look,
                **bounds,
            )
    x: Any = {"type": "log"} if part["distance"].max() > 64 else {"type": "linear"}
    ends = np.log10([part["value"].min() / 2, part["value"].max() * 2]).tolist()  # not down to a band's 0
    figure = plot(traces, "tokens before the answer", unit, xaxis=x, yaxis={"type": "log", "range": ends})
    trained = part[(part["role"] == "target") & (part["weights"] == "trained")]
    far = trained[trained["distance"] == trained["distance"].max()]["value"]
    alt = f"{unit} by distance in {NAMES[family]}; of the farthest target {far.min():.2g} to {far.max():.2g}."
    return Panel(unit, alt, figure, height=320)
