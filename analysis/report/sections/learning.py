"""Learning curves: accuracy, loss and context length in training against tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.plots.common import SHARES
from analysis.report.parts import Block, Figure, Key, Missing, Panel, Section, View
from analysis.report.runs import Run
from analysis.report.traces import DASHES, chance_line, color_of, control_key, curve, in_order, plot
from ssm_retrieval.style import NAMES
from ssm_retrieval.training.learning_curve import LENGTH, TOKENS, curve_table, length_axis

READING = (
    "Held-out accuracy at the run's full context length while the models were trained, with the Wilson 95 % "
    "interval of each evaluation as a band; the dash-dotted line is chance. Read it from left to right: a "
    "curve that rises early needs few examples, one that stays at chance has not learned to retrieve at that "
    "length. Where training used a length curriculum, the third panel says which context length was being "
    "trained; a curve can only rise once that comes near the full length. Hover over a point for its "
    "numbers; the same numbers are in the folded list below the figure."
)


def section(runs: Sequence[Run]) -> Section:
    """The section on learning curves of all runs."""
    curves = [(run, family, full) for run in runs for family, full in _full(run)]
    missing = [
        Missing(f"{run.title(family)} has not been evaluated at its full length yet.", run.train_command())
        for run in runs
        for family in run.plans
        if not any(run is r and family == f for r, f, _ in curves)
    ]
    section = Section("learning", "Learning curves", READING, missing=missing)
    if not curves:
        return section
    panels = [
        _panel(curves, "accuracy", "held-out accuracy", interval=True),
        _panel(curves, "loss", "held-out loss (nats)"),
        _panel(curves, "train_length", LENGTH, step=True),
    ]
    figure = Figure(
        "learning",
        "",
        [View("", [Block("", panels)])],
        keys(runs),
        "Held-out accuracy and loss at the full length, and the length in training, against tokens seen.",
    )
    return Section(section.name, section.title, READING, figures=[figure], missing=missing)


def keys(runs: Sequence[Run]) -> list[Key]:
    """The legend of figures that show all runs: colours of families, dashes of runs, and chance."""
    families = in_order(family for run in runs for family in run.plans)
    found = [Key(NAMES[family], color_of(family)) for family in families]
    if len(runs) > 1:
        found += [Key(f"run {run.letter}", dash=dash_of(runs, run)) for run in runs]
    return [*found, control_key("chance")]


def dash_of(runs: Sequence[Run], run: Run) -> str:
    """The dashes of one of several runs, in plotly's words."""
    return DASHES[list(runs).index(run) % len(DASHES)]


def _full(run: Run) -> Iterator[tuple[str, pd.DataFrame]]:
    """Family -> its evaluations at the full length, in order."""
    for family, plan in run.plans.items():
        if run.metrics.empty:
            continue
        mine = curve_table(run.metrics[run.metrics["model"] == family], plan["seq_len"])
        if len(mine):
            yield family, mine


def _panel(
    curves: Sequence[tuple[Run, str, pd.DataFrame]],
    column: str,
    unit: str,
    interval: bool = False,
    step: bool = False,
) -> Panel:
    runs = list({id(run): run for run, _, _ in curves}.values())
    traces, words = [], []
    for run, family, full in curves:
        more = {name: full[name] for name in ("step", "examples") if name != column}
        if interval:
            more |= {"right answers": full["correct"], "of": full["count"]}
        bounds: Any = dict(low=full["ci_low"], high=full["ci_high"]) if interval else {}
        made = curve(
            run.title(family),
            full["millions"],
            full[column],
            (TOKENS, unit),
            color_of(family),
            dash=dash_of(runs, run),
            more=more,
            **bounds,
        )
        if step:
            made[-1].line.shape = "hv"
        traces += made
        words.append(f"{run.title(family)} ends at {full[column].iloc[-1]:.3g}")
    ends = (0.0, 1.03 * max(full["millions"].max() for _, _, full in curves))
    layout: Any = {"xaxis": {"range": ends}, "yaxis": {"rangemode": "tozero"}}
    if step:
        lengths, limits = length_axis(
            int(v) for _, _, full in curves for v in (*full[column], *full["length"])
        )
        layout["yaxis"] = {"type": "log", "range": np.log10(limits).tolist()}
        layout["yaxis"] |= {"tickvals": lengths, "ticktext": [f"{v:,}" for v in lengths]}
    if column == "accuracy":
        layout["yaxis"] = {"range": list(SHARES)}
        for chance in sorted({float(full["chance"].iloc[-1]) for _, _, full in curves}):
            traces.append(chance_line(chance, ends, unit))
    alt = f"Line chart of {unit} against training tokens: {'; '.join(words)}."
    return Panel(unit, alt, plot(traces, TOKENS, unit, **layout), height=320)
