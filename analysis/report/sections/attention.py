"""Attention of heads beside the hidden attention of SSM layers: maps, and the row of a chosen token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.plots.attention import BESIDE, QUANTITIES, head_words, map_table, score_table
from analysis.plots.common import MAP_LIMITS, SHARES, families, grid_of, target_cell
from analysis.report.parts import Block, Figure, Key, Mark, Move, Panel, Section, Slider, View
from analysis.report.runs import Run
from analysis.report.sections.probed import label, tables
from analysis.report.traces import ACCENT, color_of, curve, frame, heat, plot, viridis
from ssm_retrieval.style import NAMES, NEUTRAL, faintness

READING = (
    "Who reads whom, in one held-out sequence: a row of a map is the token that reads (query), a column the "
    "token that is read (key), and each row sums to 1. For attention layers it is the pattern of the head "
    "that retrieves best; an SSM layer has no attention, but its output is a weighted sum of its inputs all "
    "the same, and the map shows the size of those weights (hidden attention, Ali et al. 2024: |alpha| with "
    "rows normalised, by head in Mamba-2, the mean over channels in Mamba). The dotted frame is the target, "
    "which the last row has to find: a retrieving layer has its mass there. The slider chooses the row that "
    "is drawn below the maps, layers from faint to full. The last plots give the mass on the target when the "
    "answer is due for every layer and head, with 95 % intervals over sequences, beside uniform attention "
    "(dash) and untrained weights (hollow)."
)
TO_TARGET = QUANTITIES["retrieval"].replace("\n", " ")
AXES = ("key", "query", "attention")


def section(runs: Sequence[Run]) -> Section:
    """The section on attention maps and scores of all runs."""
    found, missing = tables(runs, "attention", "map")
    views = [_view(run, table, weights) for run, table in found for weights in ("trained", "untrained")]
    figures = []
    if views:
        keys = [
            Key("attention", colors=[color for _, color in viridis()], ends=("≤ 0.0001", "1")),
            Key("row chosen with the slider", ACCENT),
            Key("the target", ACCENT, dash="dot"),
            Key("uniform attention", marker="—"),
            Key("untrained weights", marker="○"),
        ]
        caption = "Attention and hidden attention of one sequence; the chosen row; attention to the target."
        figures.append(Figure("attention", "Shown", views, keys, caption))
    return Section("attention", "Attention and hidden attention", READING, figures=figures, missing=missing)


def _view(run: Run, table: pd.DataFrame, weights: str) -> View:
    maps = map_table(table, weights)
    starts = np.sort(maps["query"].unique()).astype(int)
    size = int(starts[1] - starts[0]) if len(starts) > 1 else 1
    each = [f"token {t}" if size == 1 else f"tokens {t} to {t + size - 1}" for t in starts]
    last = int(starts[-1])
    texts = [
        (f"{text} of {last}" if size == 1 else text) + (", where the answer is due" if t == last else "")
        for text, t in zip(each, starts, strict=True)
    ]
    blocks = [
        _block(family, maps[maps["family"] == family], table[table["family"] == family], starts)
        for family in families(maps)
    ]
    return View(label(run, f"{weights} weights"), blocks, Slider("Token that reads", texts, len(texts) - 1))


def _block(family: str, maps: pd.DataFrame, table: pd.DataFrame, starts: np.ndarray) -> Block:
    target, column = float(maps["target"].iloc[0]), target_cell(maps)
    half = float(starts[1] - starts[0]) / 2 if len(starts) > 1 else 0.5
    centre = starts + half - 0.5
    lines = []
    if column is not None:
        cell = float(centre[column])
        lines.append(frame("x", cell - half, cell + half, dash="dot"))
    panels, rows = [], {}
    for layer, part in maps.groupby("layer"):
        grid = rows[int(str(layer))] = grid_of(part)
        image = heat(grid, centre, centre, AXES, log=True, limits=MAP_LIMITS)
        which = head_words(table, part)
        shapes = [frame("y", float(centre[-1]) - half, float(centre[-1]) + half), *lines]
        plain = {"showgrid": False, "zeroline": False}
        layout: Any = dict(shapes=shapes, xaxis=plain, yaxis=plain | {"autorange": "reversed"})
        best = int(starts[int(np.nanargmax(grid[-1]))])
        alt = (
            f"Attention map of {NAMES[family]}, layer {layer}, {which}, {len(starts)} tokens square: "
            f"the last row reads position {best} most"
            + (f", the target is at {target:.0f}." if column is not None else ".")
        )
        panels.append(
            Panel(
                f"Layer {layer}, {which}",
                alt,
                plot([image], "key: token read", "query: token that reads", **layout),
                height=300,
                marks=[Mark(0, "y", centre - half, centre + half)],
            )
        )
    panels.append(_row(family, rows, centre, lines))
    scores = score_table(table)
    scores = scores[scores["quantity"] == "retrieval"]
    if len(scores):
        panels.append(_scores(family, scores))
    return Block(NAMES[family], panels)


def _row(family: str, rows: dict[int, np.ndarray], centre: np.ndarray, lines: list[dict[str, Any]]) -> Panel:
    """The chosen row of every layer."""
    traces = []
    for layer, grid in rows.items():
        traces += curve(
            f"layer {layer}",
            centre,
            grid[-1],
            ("key", "attention"),
            color_of(family),
            alpha=faintness(layer, rows),
            mode="lines",
        )
    moves = [Move(i, "y", grid) for i, grid in enumerate(rows.values())]
    layout: Any = dict(
        shapes=lines,
        yaxis={"type": "log", "range": [-4.1, 0.1]},
        xaxis={"range": [float(centre[0]) - 0.5, float(centre[-1]) + 0.5]},
    )
    alt = f"What the chosen token reads in {NAMES[family]}: attention against the token read, a line a layer."
    figure = plot(traces, "key: token read", "attention (log)", **layout)
    return Panel("The chosen row", alt, figure, wide=True, moves=moves)


def _scores(family: str, scores: pd.DataFrame) -> Panel:
    """Attention to the target when the answer is due, by layer and head."""
    looks: Any = {
        "untrained": dict(color=NEUTRAL, symbol="circle-open"),
        "trained": dict(color=color_of(family)),
    }
    axes = ("place", TO_TARGET)
    traces: list[Any] = []
    for weights, part in scores.groupby("weights", sort=False):
        name, more = str(weights), {"layer": part["layer"], "head": part["head"], "sequences": part["n"]}
        place = part["place"] + BESIDE[name]
        bounds: Any = dict(low=part["low"], high=part["high"], mode="markers", bars=True)
        traces += curve(name, place, part["value"], axes, more=more, **bounds, **looks[name])
        if name == "trained":
            uniform: Any = dict(color=NEUTRAL, mode="markers", symbol="line-ew-open")
            traces += curve("uniform attention", part["place"], part["baseline"], axes, **uniform)
    labels = scores.drop_duplicates("label").set_index("place")["label"].sort_index()
    step = -(-len(labels) // 12)
    x: Any = {
        "tickvals": labels.index[::step].tolist(),
        "ticktext": labels[::step].tolist(),
        "range": [-0.6, len(labels) - 0.4],
        "type": "linear",
    }
    best = scores[scores["weights"] == "trained"].nlargest(1, "value").iloc[0]
    alt = f"Attention to the target by layer and head of {NAMES[family]}; the largest is {best['value']:.3f}."
    kind = "layer.head" if "." in labels.iloc[0] else "layer"
    figure = plot(traces, kind, TO_TARGET, xaxis=x, yaxis={"range": list(SHARES)})
    return Panel("Attention to the target when the answer is due", alt, figure, wide=True)
