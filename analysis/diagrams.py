"""Drawings that show no measurement: the architecture, the tasks, the synthetic task."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import pandas as pd

from ssm_retrieval.style import DOUBLE, family_colors
from synthetic import tasks
from vlm import prompts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY, INK = "0.9", "0.15"


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    """A figure whose axes count in hundredths of an inch, without frame."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(width, height))
    figure.set_layout_engine("none")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 100 * width), ylim=(0, 100 * height))
    ax.axis("off")
    return figure, ax


def _box(
    ax: Any, x: float, y: float, w: float, h: float, text: str, colour: Any = GREY, size: float = 7
) -> None:
    from matplotlib.patches import FancyBboxPatch

    ax.add_patch(
        FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=5", fc=colour, ec=INK, lw=0.7)
    )
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size, color=INK)


def _arrow(ax: Any, start: tuple[float, float], stop: tuple[float, float]) -> None:
    ax.annotate("", stop, start, arrowprops=dict(arrowstyle="-|>", lw=0.8, color=INK, shrinkA=0, shrinkB=0))


def architecture() -> Figure:
    """Fig. 1: how an image and text become one sequence of a Mamba-VL or Pythia-VL."""
    colours = family_colors()
    figure, ax = _axes(DOUBLE, 3.3)
    _box(ax, 10, 20, 80, 40, "image\n336 x 336")
    _box(ax, 120, 20, 120, 40, "EVA-02-L, frozen\n576 patches x 1,024")
    _box(ax, 270, 20, 120, 40, "connector\nlinear, GELU, linear")
    for x in (90.0, 240.0):
        _arrow(ax, (x, 40), (x + 30, 40))
    rows = (
        ("agnostic", ("image", "instruction", "query")),
        ("instruction-first", ("instruction", "image", "query")),
        ("query-first", ("instruction", "query", "image")),
    )
    parts: dict[str, tuple[str, float]] = {
        "image": ("### p p ... && p p ... ###", 190),
        "instruction": ("Locate the region ...", 110),
        "query": ("The red star.", 80),
    }
    for i, (name, order) in enumerate(rows):
        y, x = 175.0 - 32 * i, 110.0
        ax.text(100, y + 11, name, ha="right", va="center", fontsize=7, color=INK)
        for part in order:
            text, wide = parts[part]
            _box(ax, x, y, wide, 22, text, "#fff3d6" if part == "image" else GREY, 6.5)
            x += wide + 4
        _box(ax, x, y, 88, 22, "[0.53,0.10,0.71,...", "white", 6.5)
    ax.text(110 + 392, 205, "answer: the loss is here", fontsize=6, color=INK, va="bottom")
    _arrow(ax, (330, 60), (330, 108))
    ax.text(336, 84, "patches p take the placeholders", fontsize=6.5, va="center", color=INK)
    for x, name, family in ((110.0, "Mamba", "mamba"), (330.0, "Pythia (Transformer)", "transformer")):
        _box(ax, x, 250, 200, 36, f"{name}\nnext-token logits", (*colours[family], 0.55), 7)
        _arrow(ax, (x + 100, 218), (x + 100, 250))
    ax.text(
        320, 306, "one of the two language models reads the sequence, left to right", ha="center", fontsize=7
    )
    return figure


EXAMPLES: tuple[tuple[str, list[prompts.Chunk], str], ...] = (
    ("captioning", prompts.captioning("a red star above a digit"), "CIDEr"),
    ("visual questions", prompts.vqa([("is there a red star", "yes")]), "VQA accuracy, exact match"),
    ("multiple choice", prompts.multiple_choice([("what is red", ["star", "circle"], 0)]), "letter is right"),
    ("grounding", prompts.grounding([("the red star", (53, 10, 71, 28))], 100, 100), "IoU above 0.5"),
    (
        "pointing",
        prompts.pointing([("which is the star", [(53, 10, 71, 28), (2, 2, 20, 20)], 0)], 100, 100),
        "letter is right",
    ),
    (
        "region captioning",
        prompts.dense_captioning([((53, 10, 71, 28), "a red star")], 100, 100),
        "(training only)",
    ),
    ("image-text match", prompts.image_text_match("the star is above the digit", True), "accuracy"),
)


def task_table() -> pd.DataFrame:
    """A row per task with its prompt (line breaks are arrows), answer and metric, made by `vlm.prompts`."""
    rows = []
    for name, chunks, metric in EXAMPLES:
        prompt = "".join(chunk.text for chunk in chunks if not chunk.supervised).replace("\n", "↵")
        said = "".join(chunk.text for chunk in chunks if chunk.supervised)
        answer = said.removesuffix(prompts.END).replace("\n", "↵")
        rows.append(dict(task=name, prompt=prompt, answer=answer, metric=metric))
    return pd.DataFrame(rows)


def task_overview(table: pd.DataFrame) -> Figure:
    """Fig. 2: what each task asks and answers, in the published wording."""
    wrapped = [textwrap.wrap(text, 56) for text in table["prompt"]]
    heights = [10 + 10 * len(lines) for lines in wrapped]
    total = sum(heights) + 22
    figure, ax = _axes(DOUBLE, total / 100)
    columns = (8, 105, 395, 530)
    titles = ("task", "prompt (the image stands first, second or last)", "answer", "metric")
    for x, title in zip(columns, titles, strict=True):
        ax.text(x, total - 12, title, fontsize=7, weight="bold", va="center", color=INK)
    y = total - 22.0
    for (_, row), lines, height in zip(table.iterrows(), wrapped, heights, strict=True):
        ax.axhline(y, color="0.7", lw=0.6)
        ax.text(columns[0], y - height / 2, row["task"], fontsize=7, va="center", color=INK)
        ax.text(columns[1], y - height / 2, "\n".join(lines), fontsize=5.6, va="center", family="monospace")
        answer = "\n".join(textwrap.wrap(row["answer"], 25))
        ax.text(columns[2], y - height / 2, answer, fontsize=5.6, va="center", family="monospace")
        ax.text(
            columns[3], y - height / 2, "\n".join(textwrap.wrap(row["metric"], 17)), fontsize=6, va="center"
        )
        y -= height
    return figure


def synthetic_table(seq_len: int = 8, seed: int = 1) -> pd.DataFrame:
    """Tokens of one example in both layouts; their roles are symbol, target, query, answer or mark."""
    rows = []
    for layout in ("suffix", "prefix"):
        task = tasks.build("position", seq_len=seq_len, num_symbols=seq_len, layout=layout)
        batch = task.batch(1, seed=seed, index=0, queries=1)
        names = task.vocabulary.decode(batch.input_ids[0].tolist())
        (answer,) = task.vocabulary.decode([int(batch.labels[0][batch.labels[0] >= 0][0])])
        asked = names[names.index("<query>") + 1]
        for place, name in enumerate(names):
            after_mark = place > 0 and names[place - 1] == "<query>"
            role = "query" if after_mark else "target" if name == asked else "symbol"
            role = "mark" if name in ("<query>", "<bos>") else role
            rows.append(dict(layout=layout, place=place, token=name, role=role))
        rows.append(dict(layout=layout, place=len(names), token=answer, role="answer"))
    return pd.DataFrame(rows)


def synthetic_task(table: pd.DataFrame) -> Figure:
    """Fig. 5: one sequence of the synthetic task, query last and query first."""
    colours = {"symbol": GREY, "target": "#ffd27f", "query": "#ffd27f", "answer": "#9fd6a0", "mark": "white"}
    names = {"suffix": "query last\n(task-agnostic)", "prefix": "query first\n(task-aware)"}
    figure, ax = _axes(DOUBLE, 1.5)
    for i, (layout, part) in enumerate(table.groupby("layout", sort=False)):
        y, x, width = 90 - 62 * i, 95.0, 500 / part["place"].nunique()
        ax.text(88, y + 13, names[str(layout)], ha="right", va="center", fontsize=7, color=INK)
        for _, row in part.iterrows():
            _box(ax, x, y, width - 4, 26, row["token"].strip("<>"), colours[row["role"]], 7)
            x += width
    ax.text(95, 6, "yellow: the queried symbol, green: the answer, its position counted from 0", fontsize=6.5)
    return figure
