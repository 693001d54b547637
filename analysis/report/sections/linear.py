"""Linear probes: what can be read off the residual stream and the state, with their controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.plots.common import families
from analysis.report.parts import Block, Figure, Key, Panel, Section, View
from analysis.report.runs import Run
from analysis.report.sections.probed import beside_untrained, label, tables
from analysis.report.traces import NEUTRAL, color_of, curve, level, opacity, plot
from ssm_retrieval.style import NAMES

READING = (
    "Ridge probes are trained on what stands where the answer is due, and tested on other sequences. The "
    "first plots ask which context symbol stood so many symbols ago: a line that falls within a few symbols "
    "is a memory of the last ones only. Layers go from faint to full, bands are Wilson 95 % intervals. The "
    "last two plots ask, layer by layer, which part of the context holds the target (what the task wants), "
    "and how many symbols can be recovered in all. Three controls say what a probe could do without the "
    "model's learning: untrained weights (dotted), the same labels dealt out at random (shuffled, dashed) "
    "and chance; what a trained model has above all three, it has learned. How many symbols are recovered is "
    "a lower bound that grows with the sequences that train the probe: hovering shows how many those were, "
    "for how many features, and what half of them give."
)
SITES = {"residual": "residual stream", "state": "SSM state"}


def section(runs: Sequence[Run]) -> Section:
    found, missing = tables(runs, "linear", "token")
    figures = []
    if found:
        names = families(pd.concat([table["family"].to_frame() for _, table in found]))
        keys = [Key(f"{NAMES[name]}, trained", color_of(name)) for name in names]
        keys += [
            Key("untrained weights", dash="dot"),
            Key("shuffled labels", dash="dash"),
            Key("chance", dash="longdashdot"),
            Key("residual stream, by layer", marker="●"),
            Key("SSM state, by layer", marker="■"),
        ]
        views = [View(label(run, "linear probes"), _blocks(table)) for run, table in found]
        caption = "Test accuracy of linear probes by lag and by layer, with controls."
        figures.append(Figure("linear", "Shown", views, keys, caption))
    return Section("linear", "Linear probes", READING, figures=figures, missing=missing)


def _blocks(table: pd.DataFrame) -> list[Block]:
    token = table[table["part"] == "token"]
    blocks = []
    for family in families(table):
        mine = token[token["family"] == family]
        sites = [site for site in SITES if (mine["site"] == site).any()]
        panels = [_lags(family, site, mine[mine["site"] == site]) for site in sites]
        blocks.append(Block(NAMES[family], panels))
    layers = [
        _by_layer(table[table["part"] == part], unit, chance)
        for part, unit, chance in (
            ("answer", "accuracy: part of the context with the target", True),
            ("capacity", "expected number of symbols recovered", False),
        )
    ]
    return [*blocks, Block("Layer by layer", layers, wide=True)]


def _lags(family: str, site: str, part: pd.DataFrame) -> Panel:
    layers = sorted(part["layer"].unique())
    lags = np.sort(part["lag"].unique()).astype(int)
    # all lags of a short context; a long one is probed densely at its ends, and each lag gets as much room
    every = len(lags) == lags[-1] + 1
    place = {lag: lag + 1 if every else i for i, lag in enumerate(lags)}
    axes = ("symbols since" if every else "place", "accuracy")
    traces: list[Any] = []
    for weights in ("untrained", "trained"):
        own = weights == "trained"
        for layer in layers:
            rows = part[(part["layer"] == layer) & (part["weights"] == weights)].sort_values("lag")
            more = ({} if every else {"symbols since": rows["lag"] + 1}) | (_more(rows) if own else {})
            look: Any = dict(color=NEUTRAL, dash="dot", width=1.2)
            if own:
                look = dict(color=color_of(family), low=rows["low"], high=rows["high"])
            traces += curve(
                f"{weights}, layer {layer}", rows["lag"].map(place), rows["value"], axes,
                alpha=opacity(layer, layers), mode="lines", more=more, **look,
            )  # fmt: skip
    trained = part[part["weights"] == "trained"]
    shuffled = trained.groupby("lag")["shuffled"].mean()
    where = list(place.values())
    name = "shuffled labels, mean over layers"
    traces += curve(name, where, shuffled, axes, NEUTRAL, dash="dash", width=1.5, mode="lines")
    chance = float(trained["chance"].iloc[0])
    traces.append(level("chance", chance, (where[0], where[-1]), "accuracy", "longdashdot"))
    best = trained.groupby("lag")["value"].max()
    alt = (
        f"Accuracy of linear probes on the {SITES[site]} of {NAMES[family]} by symbols since: best layer "
        f"{best.iloc[0]:.2f} for the last symbol, {best.iloc[-1]:.2f} for the first."
    )
    x: Any = {} if every else {"tickvals": where[::3], "ticktext": [str(lag + 1) for lag in lags[::3]]}
    layout: Any = dict(xaxis=x, yaxis={"range": [-0.03, 1.03]})
    figure = plot(traces, "symbols since (1 = the last)", "test accuracy", **layout)
    return Panel(SITES[site], alt, figure, height=300)


def _more(rows: pd.DataFrame) -> dict[str, Any]:
    return {"chance": rows["chance"], "shuffled": rows["shuffled"], "answers": rows["n"]}


def _sample(rows: pd.DataFrame) -> dict[str, Any]:
    """What a capacity rests on."""
    names = {"half": "with half of them", "n": "training sequences", "features": "features of the probe"}
    return {"shuffled": rows["shuffled"]} | {words: rows[name] for name, words in names.items()}


def _by_layer(part: pd.DataFrame, unit: str, chance: bool) -> Panel:
    traces: list[Any] = []
    words = []
    for family in families(part):
        for site, symbol in (("residual", "circle"), ("state", "square")):
            mine = part[(part["family"] == family) & (part["site"] == site)].sort_values("layer")
            if mine.empty:
                continue
            color, axes = color_of(family), ("layer", unit)
            name = f"{NAMES[family]}, {SITES[site]}"
            more = _more if chance else _sample
            drawn, trained = beside_untrained(name, mine, axes, color, more, symbol=symbol)
            traces += drawn
            words.append(f"{name} {trained['value'].iloc[-1]:.2f} at the last layer")
    trained = part[part["weights"] == "trained"]
    shuffled = trained.groupby("layer")["shuffled"].mean()
    traces += curve(
        "shuffled labels, mean",
        shuffled.index,
        shuffled,
        ("layer", unit),
        NEUTRAL,
        dash="dash",
        width=1.5,
        mode="lines",
    )
    layout: Any = dict(xaxis={"dtick": max(1, int(part["layer"].max()) // 8)})
    if chance:
        ends = (0.0, float(part["layer"].max()))
        traces.append(level("chance", float(trained["chance"].iloc[0]), ends, unit, "longdashdot"))
        layout["yaxis"] = {"range": [-0.03, 1.03]}
    alt = f"{unit} by layer: {'; '.join(words)}."
    return Panel(unit, alt, plot(traces, "layer", unit, **layout), height=320)
