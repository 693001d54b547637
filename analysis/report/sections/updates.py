"""The state-update map: what every token does to every layer's state, with a slider over the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.plots.common import families, role_words
from analysis.plots.updates import LINEAR, QUANTITIES
from analysis.report.parts import Block, Figure, Key, Mark, Move, Panel, Section, Slider, View
from analysis.report.runs import Run
from analysis.report.sections.probed import label, tables
from analysis.report.traces import ACCENT, color_of, curve, frame, heat, line_moves, plot, viridis
from ssm_retrieval.style import NAMES, NEUTRAL

READING = (
    "Each cell of the map is one token (left to right) at one SSM layer (bottom to top). The relative update "
    "is |h_t − h_(t−1)| / |h_(t−1)|: how much of the state a token changes; the write norm is the size of "
    "what it adds (both with logarithmic colours), the mean decay the share of the old state that it keeps. "
    "The slider moves through the sequence: the frame on the map follows it, and the plot below shows that "
    "position layer by layer, with 95 % intervals over sequences and, as a control, the same architecture "
    "with untrained weights (hollow). A model that selects what to remember would show bright columns at "
    "tokens that matter; if all context columns look alike, every symbol is written with the same force, "
    "whether it will be asked for or not. The first tokens meet an almost empty state, so their relative "
    "updates are large by construction."
)
MAPS = ("relative", "write", "decay")  # quantities with a map by position


def section(runs: Sequence[Run]) -> Section:
    """The section on state updates of all runs."""
    found, missing = tables(runs, "updates", "position")
    views = [view for run, table in found for view in _views(run, table)]
    figures = []
    if views:
        names = families(pd.concat([table["family"].to_frame() for _, table in found]))
        keys = [Key(f"{NAMES[name]}, trained", color_of(name)) for name in names]
        keys += [Key("untrained weights", marker="○"), Key("position chosen with the slider", ACCENT)]
        caption = "State updates by layer and position, and at the chosen position."
        figures.append(Figure("updates", "Shown", views, keys, caption))
    return Section("updates", "State updates", READING, figures=figures, missing=missing)


def _views(run: Run, table: pd.DataFrame) -> list[View]:
    sequence = table[(table["part"] == "sequence") & (table["weights"] == "trained")]
    tokens = sequence[sequence["layer"] == sequence["layer"].min()].drop_duplicates("position")
    views = []
    for quantity in MAPS:
        part = table[(table["part"] == "position") & (table["quantity"] == quantity)]
        n = int(part["n"].max())
        steps = _steps(np.sort(part["position"].unique()), tokens, of_one=False)
        blocks = [_block(family, part[part["family"] == family], quantity) for family in families(part)]
        slider = Slider("Position in the sequence", steps, len(steps) // 2)
        views.append(View(label(run, f"{QUANTITIES[quantity][0]}, mean over {n} sequences"), blocks, slider))
    part = table[table["part"] == "sequence"]
    steps = _steps(np.sort(part["position"].unique()), tokens, of_one=True)
    blocks = [_block(family, part[part["family"] == family], "relative") for family in families(part)]
    at = int(np.flatnonzero(tokens["role"] == "target")[0])
    slider = Slider("Position in the sequence", steps, at)
    return [*views, View(label(run, "relative update, one held-out sequence"), blocks, slider)]


def _steps(positions: np.ndarray, tokens: pd.DataFrame, of_one: bool) -> list[str]:
    """What each position is: its token in one sequence, its role where that is the same in all."""
    size = int(positions[1] - positions[0]) if len(positions) > 1 else 1
    last = int(tokens["position"].max())
    texts = []
    for start in positions.astype(int):
        if size > 1:
            texts.append(f"positions {start} to {min(start + size - 1, last)} of {last}")
            continue
        row = tokens[tokens["position"] == start].iloc[0]
        role = role_words(str(row["role"]))
        role = "context symbol" if not of_one and role in ("target", "distractor") else role
        texts.append(f"position {start} of {last}: {str(row['token']) + ', ' if of_one else ''}{role}")
    return texts


def _block(family: str, part: pd.DataFrame, quantity: str) -> Block:
    words, log = QUANTITIES[quantity][0], quantity != LINEAR
    unit = " ".join(QUANTITIES[quantity])
    trained = part[part["weights"] == "trained"]
    values = _wide(trained, "value")
    layers, positions = [str(layer) for layer in values.index], values.columns.to_numpy()
    size = positions[1] - positions[0] if len(positions) > 1 else 1
    centre = positions + (size - 1) / 2
    low, high = centre - size / 2, centre + size / 2
    drawn = part["value"][np.isfinite(part["value"]) & (part["value"] > 0)]
    limits = (float(drawn.min()), float(drawn.max())) if log else (0.0, 1.0)
    limits = limits if limits[1] > limits[0] else (limits[0], 2 * limits[0])
    name = NAMES[family]
    image = heat(values.to_numpy(), centre, layers, ("position", "layer", words), log=log, limits=limits)
    ends = f"from {values.min().min():.3g} to {values.max().max():.3g}"
    alt = f"Map of the {words} of {name}: {len(layers)} layers by {len(positions)} positions, {ends}."
    plain = {"showgrid": False, "zeroline": False}
    layout: Any = dict(
        shapes=[frame("x", float(low[0]), float(high[0]))], xaxis=plain, yaxis=plain | {"type": "category"}
    )
    map_ = Panel(
        f"{name}: {unit}",
        alt,
        plot([image], "position in the sequence", "layer", **layout),
        height=max(190, 110 + 24 * len(layers)),
        wide=True,
        marks=[Mark(0, "x", low, high)],
        scale=Key(
            "", colors=[color for _, color in viridis()], ends=(f"{limits[0]:.2g}", f"{limits[1]:.2g}")
        ),
    )
    return Block("", [map_, _profile(family, part, layers, unit, limits, log)])


def _profile(
    family: str, part: pd.DataFrame, layers: list[str], unit: str, limits: tuple[float, float], log: bool
) -> Panel:
    """By layer at the chosen position: trained with intervals, untrained beside it."""
    traces: list[Any] = []
    moves: list[Move] = []
    for weights, symbol in (("untrained", "circle-open"), ("trained", "circle")):
        mine = part[part["weights"] == weights]
        rows = {name: _wide(mine, name).to_numpy().T for name in ("value", "low", "high")}
        if not len(rows["value"]):
            continue
        traces += curve(
            weights,
            np.arange(len(layers)),
            rows["value"][0],
            ("layer", unit),
            color_of(family) if weights == "trained" else NEUTRAL,
            low=rows["low"][0],
            high=rows["high"][0],
            bars=True,
            mode="lines+markers",
            width=1.5,
            dash="solid" if weights == "trained" else "dot",
            symbol=symbol,
        )
        moves += line_moves(len(traces) - 1, rows)
    ends = np.log10(limits) if log else np.asarray(limits)
    room = 0.06 * (ends[1] - ends[0])
    y: Any = {"range": [float(ends[0] - room), float(ends[1] + room)], "type": "log" if log else "linear"}
    x: Any = {"tickvals": list(range(len(layers))), "ticktext": layers, "range": [-0.5, len(layers) - 0.5]}
    alt = f"{unit} of {NAMES[family]} by layer at the chosen position, trained beside untrained weights."
    return Panel(
        f"{NAMES[family]}: layer by layer at the chosen position",
        alt,
        plot(traces, "layer", unit, xaxis=x, yaxis=y),
        height=240,
        wide=True,
        moves=moves,
    )


def _wide(part: pd.DataFrame, column: str) -> pd.DataFrame:
    """(layers, positions) of a column."""
    return part.set_index(["layer", "position"])[column].unstack("position").sort_index()
