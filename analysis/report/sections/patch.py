"""Causal tracing: which activation, moved from a clean into a corrupted run, brings the answer along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.plots.common import SITE_WORDS, families
from analysis.plots.patch import CONTROLS, EFFECT, FADED, answers, tracing_grid, tracing_table
from analysis.report.parts import Block, Figure, Key, Panel, Section, View
from analysis.report.runs import Run
from analysis.report.sections.probed import label, tables
from analysis.report.traces import DIVERGING, heat, plot
from ssm_retrieval.style import NAMES

READING = (
    "Two runs that differ in one thing only (in another symbol that is asked for, or in the place of the "
    "target) give other answers. Each cell says what share of the difference of their logits comes back when "
    "the activation at that layer and token is taken from the clean run and put into the corrupted one: 0, "
    "empty, where it does not matter, 1, full red, where it carries the whole answer. Columns are tokens "
    "with a role, then the other context symbols; rows are layers. Residual is the stream between blocks, "
    "state what an SSM layer has kept up to that token, head the output of single attention heads. The "
    "second map of each pair is the control: the activation of an unrelated run, scaled to the same size. "
    "Follow the red cells upwards to see when the answer moves from the target to the token that is to "
    "answer. The shares mean nothing for a model that does not answer the clean run; such maps are faded."
)


def section(runs: Sequence[Run]) -> Section:
    """The section on patching of all runs."""
    found, missing = tables(runs, "patch", "query")
    views = [_view(run, table, kind) for run, table in found for kind in ("query", "target")]
    figures = []
    if views:
        key = Key(
            EFFECT,
            colors=[color for _, color in DIVERGING],
            ends=("−1", "1"),
        )
        caption = (
            "Causal tracing, layers by tokens; below each map its control, patches from an unrelated run."
        )
        figures.append(Figure("patch", "Clean and corrupted run differ in", views, [key], caption))
    return Section("patch", "Patching", READING, figures=figures, missing=missing)


def _view(run: Run, table: pd.DataFrame, kind: str) -> View:
    part = tracing_table(table, kind)
    blocks = [_block(family, part[part["family"] == family]) for family in families(part)]
    words = {"query": "the query: another symbol is asked for", "target": "the target: it has changed places"}
    return View(label(run, words[kind]), blocks)


def _block(family: str, table: pd.DataFrame) -> Block:
    accuracy, gap = (float(table[name].iloc[0]) for name in ("accuracy_clean", "gap"))
    answered = answers(table)
    panels = []
    for site, words in SITE_WORDS.items():
        mine = table[table["site"] == site]
        for control, what in CONTROLS.items():
            part = mine[mine["control"] == control]
            if len(part):
                panels.append(_panel(f"{NAMES[family]}, {words}: {what}", part, answered))
    note = f"Clean runs answered right: {accuracy:.2f}; gap of logits {gap:.3g}."
    if not answered:
        note += " The model does not answer the clean run, so that these shares mean nothing."
    return Block(NAMES[family], panels, note)


def _panel(title: str, part: pd.DataFrame, answered: bool) -> Panel:
    values, rows, columns = tracing_grid(part)
    names, tokens = [row[2] for row in rows], [column[2] for column in columns]
    x: list[int] = list(range(len(tokens)))
    image = heat(
        values, x, names, ("token", "layer", "effect"), limits=(-1, 1), colors=DIVERGING, x_texts=tokens
    )
    image.opacity = 1.0 if answered else FADED
    alt = f"{title}: map of {len(names)} rows by {len(tokens)} tokens"
    for best in part.dropna(subset="value").nlargest(1, "value").to_dict("records"):
        alt += f", strongest {best['value']:.2f} at layer {best['layer']}, {best['role']}"
    role = sum(column[0] == 0 for column in columns)  # tokens with a role stand first, and all have labels
    shown = x[:role] + x[role :: -(-len(x) // 24)]
    layout: Any = dict(
        xaxis={
            "tickvals": shown,
            "ticktext": [tokens[i] for i in shown],
            "mirror": True,
            "tickangle": -90,
            "tickfont": {"size": 9},
            "showgrid": False,
            "zeroline": False,
        },
        yaxis={"type": "category", "mirror": True, "dtick": max(1, len(names) // 12), "showgrid": False},
    )
    figure = plot([image], "", "layer.head" if "." in names[0] else "layer", **layout)
    return Panel(title, f"{alt}.", figure, height=max(230, 130 + 13 * len(names)), wide=True)
