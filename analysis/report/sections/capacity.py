"""What can still be asked while a context is read: answers by place and time, with a slider over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.plots.capacity import AXES, UNITS, facts_table
from analysis.plots.common import BELOW, SHARES, families
from analysis.report.parts import Block, Figure, Key, Mark, Move, Panel, Section, Slider, View
from analysis.report.runs import Run
from analysis.report.sections.probed import label, tables
from analysis.report.traces import ACCENT, color_of, control, control_key, curve, frame, line_moves, plot
from ssm_retrieval.style import NAMES

READING = (
    "After n context symbols the model itself is asked for each of them, from a copy of what it has kept. "
    "The slider moves through time, from the first two symbols to the whole context. The upper plot shows "
    "how often the symbol at each place is then found, with 95 % intervals over sequences; hollow: the same "
    "architecture with untrained weights; dash-dotted: chance among n places. The lower plot counts the "
    "symbols found; its frame follows the slider, and the grey line is all that were shown. A model with "
    "room for everything stays on that line. One that runs full leaves it, and the upper plot says what it "
    "gives up: the first symbols, the last ones, or a little of all."
)
PLACE, FOUND = "place in the context (1 = the first)", "symbols found"


def section(runs: Sequence[Run]) -> Section:
    """The section on capacity of all runs."""
    found, missing = tables(runs, "capacity", "place")
    figures = []
    if found:
        names = families(pd.concat([table["family"].to_frame() for _, table in found]))
        keys = [Key(f"{NAMES[name]}, trained", color_of(name)) for name in names]
        keys += [Key("untrained weights", marker="○"), control_key("chance")]
        keys.append(Key("symbols shown, chosen with the slider", ACCENT))
        views = [_view(run, table) for run, table in found]
        caption = "What can still be asked, by place and time, and how many symbols are found."
        figures.append(Figure("capacity", "Shown", views, keys, caption))
    return Section("capacity", "What can still be asked", READING, figures=figures, missing=missing)


def _view(run: Run, table: pd.DataFrame) -> View:
    times = np.sort(table.loc[table["part"] == "place", "shown"].unique()).astype(int)
    texts = [f"{n} of {times[-1]} symbols read" for n in times]
    slider = Slider("Symbols read", texts, len(texts) - 1) if len(texts) > 1 else None
    blocks = [Block("", [_by_place(f, table, times), _facts(f, table, times)]) for f in families(table)]
    return View(label(run, "answers by place and time"), blocks, slider)


def by_place(table: pd.DataFrame, family: str, weights: str, times: np.ndarray) -> dict[str, np.ndarray]:
    """Return what a model answers, a row for each time.

    Args:
        table: Of the probe capacity.
        family: The architecture.
        weights: "trained" or "untrained".
        times: Numbers of symbols shown.

    Returns:
        x (places from 1 on; the middle of a cell of several), value, low, high and chance, each
        (times, places); nan where fewer symbols were shown.
    """
    part = table[
        (table["part"] == "place") & (table["family"] == family) & (table["weights"] == weights)
    ].sort_values(["shown", "place"])
    each = [part[part["shown"] == n] for n in times]
    most = max(map(len, each))
    columns = {name: np.full((len(times), most), np.nan) for name in ("x", "value", "low", "high", "chance")}
    for k, rows in enumerate(each):
        columns["x"][k, : len(rows)] = rows["place"] + (rows["size"] + 1) / 2
        for name in ("value", "low", "high", "chance"):
            columns[name][k, : len(rows)] = rows[name]
    return columns


def _look(family: str, weights: str) -> dict[str, Any]:
    """In the family's colour; untrained weights dotted and hollow."""
    if weights == "trained":
        return dict(color=color_of(family))
    return control("untrained weights") | dict(color=color_of(family), symbol="circle-open")


def _by_place(family: str, table: pd.DataFrame, times: np.ndarray) -> Panel:
    traces: list[Any] = []
    moves: list[Move] = []
    there = set(table.loc[table["family"] == family, "weights"])
    for weights in (name for name in BELOW if name in there):
        rows = by_place(table, family, weights, times)
        traces += curve(
            f"{NAMES[family]}, {weights}", rows["x"][-1], rows["value"][-1], (PLACE, UNITS["place"]),
            **_look(family, weights), low=rows["low"][-1], high=rows["high"][-1], bars=True,
        )  # fmt: skip
        index = len(traces) - 1
        moves += [Move(index, "x", rows["x"]), *line_moves(index, rows)]
    rows = by_place(table, family, "trained", times)
    traces += curve(
        "chance",
        rows["x"][-1],
        rows["chance"][-1],
        (PLACE, UNITS["place"]),
        mode="lines",
        **control("chance"),
    )
    index = len(traces) - 1
    moves += [Move(index, "x", rows["x"]), Move(index, "y", rows["chance"])]
    x: Any = {"range": [0.5, float(times[-1]) + 0.5]}
    last = rows["value"][-1]
    alt = (
        f"Accuracy of {NAMES[family]} by the place of the symbol asked for; of the whole context from "
        f"{np.nanmin(last):.2f} to {np.nanmax(last):.2f}."
    )
    figure = plot(traces, PLACE, UNITS["place"], xaxis=x, yaxis={"range": list(SHARES)})
    return Panel(f"{NAMES[family]}: found, by place", alt, figure, height=280, wide=True, moves=moves)


def _facts(family: str, table: pd.DataFrame, times: np.ndarray) -> Panel:
    facts = facts_table(table)
    facts = facts[facts["family"] == family]
    steps, traces = np.arange(len(times)), []
    for weights, rows in facts.groupby("weights", sort=False):
        at = np.searchsorted(times, rows["shown"])
        traces += curve(
            f"{NAMES[family]}, {weights}", at, rows["value"], (AXES["facts"], FOUND),
            **_look(family, str(weights)), low=rows["low"], high=rows["high"], bars=True,
            more={"shown": rows["shown"], "numbers kept": rows["numbers"]},
        )  # fmt: skip
    asked = facts.groupby("shown")["asked"].mean().reindex(times)
    traces += curve(
        "all of them", steps, asked, (AXES["facts"], FOUND), mode="lines",
        color=control("chance")["color"], width=1.0,
    )  # fmt: skip
    low, high = steps - 0.4, steps + 0.4
    x: Any = {
        "tickvals": steps.tolist(),
        "ticktext": [str(n) for n in times],
        "range": [-0.5, len(times) - 0.5],
    }
    trained = facts[facts["weights"] == "trained"].sort_values("shown")
    said = ", ".join(f"{row['value']:.1f} of {row['shown']:.0f}" for _, row in trained.iterrows())
    figure = plot(traces, AXES["facts"], FOUND, xaxis=x, shapes=[frame("x", float(low[-1]), float(high[-1]))])
    alt = f"Symbols that {NAMES[family]} finds of those shown: {said}."
    return Panel(
        f"{NAMES[family]}: how many are found",
        alt,
        figure,
        height=240,
        wide=True,
        marks=[Mark(0, "x", low, high)],
    )
