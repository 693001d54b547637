"""Linear probes: what can be read off the residual stream and the state, with their controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.plots.common import SHARES, SITE_WORDS, families, shuffled_means
from analysis.plots.linear import LAG, MARKERS, UNITS, lag_table, lag_ticks, layer_table
from analysis.report.parts import Block, Figure, Key, Panel, Section, View
from analysis.report.runs import Run
from analysis.report.sections.probed import beside_untrained, label, tables
from analysis.report.traces import SYMBOLS, chance_line, color_of, control, control_key, curve, plot
from ssm_retrieval.style import NAMES, faintness

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
SIGNS = {"o": "●", "s": "■"}


def section(runs: Sequence[Run]) -> Section:
    """The section on linear probes of all runs."""
    found, missing = tables(runs, "linear", "token")
    figures = []
    if found:
        names = families(pd.concat([table["family"].to_frame() for _, table in found]))
        keys = [Key(f"{NAMES[name]}, trained", color_of(name)) for name in names]
        keys += [control_key(name) for name in ("untrained weights", "shuffled labels", "chance")]
        keys += [Key(f"{SITE_WORDS[s]}, by layer", marker=SIGNS[m]) for s, m in MARKERS.items()]
        views = [View(label(run, "linear probes"), _blocks(table)) for run, table in found]
        caption = "Test accuracy of linear probes by lag and by layer, with controls."
        figures.append(Figure("linear", "Shown", views, keys, caption))
    return Section("linear", "Linear probes", READING, figures=figures, missing=missing)


def _blocks(table: pd.DataFrame) -> list[Block]:
    blocks = []
    for family, mine in lag_table(table).groupby("family", sort=False):
        panels = [_lags(str(family), str(site), part) for site, part in mine.groupby("site", sort=False)]
        blocks.append(Block(NAMES[str(family)], panels))
    layers = [
        _by_layer(part, UNITS[str(name)], chance=name == "answer")
        for name, part in layer_table(table).groupby("part", sort=False)
    ]
    return [*blocks, Block("Layer by layer", layers, wide=True)]


def _lags(family: str, site: str, part: pd.DataFrame) -> Panel:
    layers = sorted(part["layer"].unique())
    every = bool((part["place"] == part["lag"] + 1).all())
    axes = ("symbols since" if every else "place", "accuracy")
    traces: list[Any] = []
    for (weights, layer), rows in part.groupby(["weights", "layer"], sort=False):
        own = weights == "trained"
        more = ({} if every else {"symbols since": rows["lag"] + 1}) | (_more(rows) if own else {})
        look: Any = dict(color=color_of(family)) if own else control("untrained weights")
        traces += curve(
            f"{weights}, layer {layer}", rows["place"], rows["value"], axes, low=rows["low"],
            high=rows["high"], alpha=faintness(layer, layers), mode="lines", more=more, **look,
        )  # fmt: skip
    trained = part[part["weights"] == "trained"]
    shuffled = shuffled_means(part, "place")
    name = "shuffled labels, mean over layers"
    traces += curve(name, shuffled.index, shuffled, axes, mode="lines", **control("shuffled labels"))
    ends = float(part["place"].min()), float(part["place"].max())
    traces.append(chance_line(float(trained["chance"].iloc[0]), ends, "accuracy"))
    best = trained.groupby("lag")["value"].max()
    alt = (
        f"Accuracy of linear probes on the {SITE_WORDS[site]} of {NAMES[family]} by lag: best layer "
        f"{best.iloc[0]:.2f} for the last symbol, {best.iloc[-1]:.2f} for the first."
    )
    places, labels = lag_ticks(part)
    layout: Any = dict(xaxis={"tickvals": places, "ticktext": labels}, yaxis={"range": list(SHARES)})
    return Panel(SITE_WORDS[site], alt, plot(traces, LAG, UNITS["token"], **layout), height=300)


def _more(rows: pd.DataFrame) -> dict[str, Any]:
    return {"chance": rows["chance"], "shuffled": rows["shuffled"], "answers": rows["n"]}


def _sample(rows: pd.DataFrame) -> dict[str, Any]:
    """What a capacity rests on."""
    names = {"half": "with half of them", "n": "training sequences", "features": "features of the probe"}
    return {"shuffled": rows["shuffled"]} | {words: rows[name] for name, words in names.items()}


def _by_layer(part: pd.DataFrame, unit: str, chance: bool) -> Panel:
    traces: list[Any] = []
    words = []
    axes = ("layer", unit)
    for (family, site), mine in part.groupby(["family", "site"], sort=False):
        name = f"{NAMES[str(family)]}, {SITE_WORDS[str(site)]}"
        more, symbol = _more if chance else _sample, SYMBOLS[MARKERS[str(site)]]
        drawn, trained = beside_untrained(name, mine, axes, color_of(str(family)), more, symbol=symbol)
        traces += drawn
        words.append(f"{name} {trained['value'].iloc[-1]:.2f} at the last layer")
    trained = part[part["weights"] == "trained"]
    shuffled, look = shuffled_means(part, "layer"), control("shuffled labels")
    traces += curve("shuffled labels, mean", shuffled.index, shuffled, axes, mode="lines", **look)
    layout: Any = dict(xaxis={"dtick": max(1, int(part["layer"].max()) // 8)})
    if chance:
        ends = (0.0, float(part["layer"].max()))
        traces.append(chance_line(float(trained["chance"].iloc[0]), ends, unit))
        layout["yaxis"] = {"range": list(SHARES)}
    alt = f"{unit} by layer: {'; '.join(words)}."
    return Panel(unit, alt, plot(traces, "layer", unit, **layout), height=320)
