"""Accuracy by where in the context the target stood."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.plots.common import SHARES
from analysis.plots.sweep import PLACE, PLACE_UNIT
from analysis.report.parts import Block, Figure, Missing, Panel, Section, View
from analysis.report.runs import Run
from analysis.report.sections.learning import dash_of, keys
from analysis.report.traces import chance_line, color_of, curve, plot
from analysis.scaling import BINS, accuracy_by_position

READING = (
    "Final held-out accuracy by the place of the queried symbol in the context, in up to 8 equal parts of "
    "it, with Wilson 95 % intervals; the dash-dotted line is chance. A flat line says that the model "
    "retrieves equally well from everywhere. A line that is high only at the right end says that it knows "
    "the last symbols and has lost the early ones, as a state of fixed size does; one that is high at the "
    "left end, that it keeps what it wrote first."
)


def section(runs: Sequence[Run]) -> Section:
    """The section on accuracy by position of all runs."""
    missing, traces, words = [], [], []
    for run in runs:
        table = binned(run)
        for family in run.plans:
            mine = table[table["model"] == family] if len(table) else table
            if mine.empty:
                text = (
                    f"{run.title(family)} has no final evaluation by position: its training has not finished."
                )
                missing.append(Missing(text, run.train_command()))
                continue
            more = {
                "first position": mine["first"],
                "last position": mine["last"],
                "right answers": mine["correct"],
                "of": mine["count"],
                "chance": mine["chance"],
            }
            traces += curve(
                run.title(family),
                mine["relative"],
                mine["accuracy"],
                ("place", "accuracy"),
                color_of(family),
                low=mine["ci_low"],
                high=mine["ci_high"],
                more=more,
                bars=True,
                dash=dash_of(runs, run),
            )
            ends = mine["accuracy"].iloc[[0, -1]]
            words.append(
                f"{run.title(family)} {ends.iloc[0]:.2f} at the start, {ends.iloc[1]:.2f} at the end"
            )
    chances = {round(float(c), 6) for run in runs for c in _column(run.positions, "chance")}
    figures = []
    if traces:
        traces += [chance_line(chance, (0, 1), PLACE_UNIT) for chance in sorted(chances)]
        layout = {"yaxis": {"range": list(SHARES)}, "xaxis": {"range": [0, 1]}}
        alt = f"Line chart of accuracy against the place of the target: {'; '.join(words)}."
        panel = Panel("", alt, plot(traces, PLACE, PLACE_UNIT, **layout), height=340, wide=True)
        caption = "Accuracy by the target's place in the context, with Wilson 95 % intervals."
        figures.append(Figure("position", "", [View("", [Block("", [panel])])], keys(runs), caption))
    return Section("position", "Accuracy by position", READING, figures=figures, missing=missing)


def binned(run: Run) -> pd.DataFrame:
    """Final accuracy of a run by family and part of the context.

    Returns:
        The columns of `analysis.scaling.accuracy_by_position`, and first and last: the positions (0-based) at
        the ends of the part. Empty if the run has not finished.
    """
    if run.positions.empty:
        return run.positions
    lengths = {family: plan["seq_len"] for family, plan in run.plans.items()}
    rows = run.positions.assign(seq_len=run.positions["model"].map(lengths))
    table = accuracy_by_position(rows)
    width = table["seq_len"] / table["seq_len"].clip(upper=BINS)
    first = np.ceil(table["bin"] * width)
    return table.assign(first=first, last=np.ceil((table["bin"] + 1) * width) - 1)


def _column(table: pd.DataFrame, name: str) -> Sequence[float]:
    return list(table[name]) if name in table else []
