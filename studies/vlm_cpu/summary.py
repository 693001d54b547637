"""Tables, figures and pictures of README.md, from the runs of this study:

    python -m studies.vlm_cpu.summary [RUNS]

With RUNS (what `vlm.train --out` named) it first writes results.parquet, looks.csv (what
`vlm.information_flow` finds, run by run) and predictions.png beside this file; floors.csv is floors.py's. The
figures, and what stands between the markers `<!-- NAME -->` and `<!-- /NAME -->` in README.md, are made from
the two tables.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.tables import agreed, by_seed, fill
from analysis.vlm_plots import main_rows
from ssm_retrieval.statistics import geometric_mean_interval
from ssm_retrieval.style import NAMES, save, theme
from ssm_retrieval.tables import markdown
from ssm_retrieval.training.tables import concatenated, files
from studies.vlm_cpu.runs import LAYOUTS
from vlm.results import GUESSES

HERE = Path(__file__).parent
RESULTS, LOOKS, FLOORS = HERE / "results.parquet", HERE / "looks.csv", HERE / "floors.csv"
EXAMPLES = 200  # held-out grounding questions that vlm.information_flow asks each run
FAMILIES = ("transformer", "mamba")
WORDS = {"attention": "read", "write": "written", "kept": "kept", "share": "part of the state"}
PICTURED = ("grounding", "attribute", "reading-word")


def main(runs: Path | None) -> None:
    """Make the figures and the tables of README.md anew; first from a folder of runs, if given."""
    if runs is not None:
        collect(runs)
    results, looks = pd.read_parquet(RESULTS), pd.read_csv(LOOKS)
    import matplotlib

    matplotlib.use("Agg")
    from studies.vlm_cpu import figures

    with theme():
        save(figures.accuracy(results), HERE / "accuracy")
        save(figures.looking(looks), HERE / "looking")
    from ssm_retrieval.training import store

    path = HERE / "README.md"
    store.write_bytes(path, filled(path.read_text(encoding="utf-8")).encode())


# --- from the runs ------------------------------------------------------------------------------------------


def collect(out: Path) -> None:
    """The committed tables and pictures of trained and evaluated runs."""
    import torch

    import vlm.config
    from ssm_retrieval.training import store
    from ssm_retrieval.training.parquet import rows_of, to_parquet
    from vlm.information_flow import target_ratios, target_table
    from vlm.results import COLUMNS

    torch.set_num_threads(2)
    found = concatenated(files(out))
    if found is None:
        raise SystemExit(f"error: no results in {out}; run vlm.train and vlm.evaluate first")
    store.write_bytes(RESULTS, to_parquet(rows_of(found), COLUMNS))
    planned = vlm.config.read_file(HERE / "runs.py")
    looks = [target_ratios(target_table(run, out, EXAMPLES)) for run in planned]
    store.write_bytes(LOOKS, pd.concat(looks).to_csv(index=False, float_format="%.5g").encode())
    with theme():
        chosen = [run for run in planned if (run.layout, run.image_size, run.seed) == ("agnostic", 64, 0)]
        save(pictures(chosen, out), HERE / "predictions", kinds=("png",), dpi=120)


def pictures(runs: Sequence[Any], out: Path) -> Any:
    """Of both families: the first right and the first wrong answer to three kinds of questions.

    Scenes that are already shown are passed over.
    """
    import matplotlib.pyplot as plt

    from ssm_retrieval.training import store
    from vlm.predict import RIGHT, SAID, WRONG, draw
    from vlm.prompts import parse_box
    from vlm.results import answers_path

    figure, axes = plt.subplots(
        len(PICTURED), 2 * len(runs), figsize=(2.1 * 2 * len(runs), 2.75 * len(PICTURED))
    )
    shown: set[str] = set()
    for column, run in enumerate(runs):
        answers = store.read_rows(answers_path(out, run.name))
        for row, task in enumerate(PICTURED):
            source = run.evaluation[task].build(answers=False)
            for right in (True, False):
                ax = axes[row, 2 * column + (not right)]
                ax.axis("off")
                mine = [
                    a for a in answers
                    if a["task"] == task and a["right"] is right and a["image"] not in shown
                ]  # fmt: skip
                if not mine:
                    ax.set_title(f"{NAMES[run.family]}: none", fontsize=8)
                    continue
                found = mine[0]
                shown.add(found["image"])
                picture, framed = source.picture(found["image"]), []
                if "box" in found["target"]:
                    height, width = picture.shape[:2]
                    framed.append((found["target"]["box"], RIGHT, ""))
                    said = parse_box(found["said"], width, height)
                    framed += [] if said is None else [(said, SAID, "")]
                ax.imshow(draw(picture, framed, zoom=3))
                color = [value / 255 for value in (RIGHT if right else WRONG)]
                ax.set_title(f"{NAMES[run.family]}\n{_lines(source, found)}", fontsize=7, color=color)
    return figure


def _lines(source: Any, found: dict[str, Any]) -> str:
    """Question and answer of a picture."""
    import textwrap

    from vlm.scenes import make_example
    from vlm.scenes.scene import sample_scene

    scene = sample_scene(source.seed, source.split, int(found["image"]))
    asked = textwrap.fill(make_example(scene, found["task"]).question, 32)
    said = found["said"].strip()
    if found["right"] or "box" in found["target"]:
        return f"{asked}\nsaid: {said}"
    return f"{asked}\nsaid: {said}  (right: {found['target']['answer']})"


# --- the tables of README.md --------------------------------------------------------------------------------


def filled(text: str) -> str:
    """README with its tables made anew."""
    results, looks = pd.read_parquet(RESULTS), pd.read_csv(LOOKS)
    return fill(
        text,
        {
            "tasks": tasks(results),
            "families": families(results),
            "layouts": layouts(results),
            "sizes": sizes(results),
            "captions": captions(results),
            "agreement": agreed(compared(results)),
            "floors": floors(results),
            "looks": looked(looks),
            "cost": cost(results),
        },
    )


def points(values: Any) -> str:
    """Shares of every seed in points, their mean before them."""
    data = 100 * np.asarray(values, float)
    return f"{data.mean():.1f} ({by_seed(data, 1)})"


def cells(results: pd.DataFrame) -> list[tuple[str, int]]:
    """(layout, pixels) of the runs, the lower resolution first."""
    found = set(zip(results["layout"], results["image_size"], strict=True))
    return sorted(found, key=lambda cell: (cell[1], LAYOUTS.index(cell[0])))


def named(cell: tuple[str, int]) -> str:
    """A cell in words: "agnostic, 64 px"."""
    return f"{cell[0]}, {cell[1]} px"


def part_of(rows: pd.DataFrame, family: str, cell: tuple[str, int]) -> pd.DataFrame:
    """Choose the rows of a family, layout and resolution.

    Args:
        rows: Of a table of results.
        family: Name of the architecture.
        cell: Layout and pixels.

    Returns:
        The rows, in the order of seeds.
    """
    layout, size = cell
    mine = rows[(rows["family"] == family) & (rows["layout"] == layout) & (rows["image_size"] == size)]
    return mine.sort_values("seed")


def tasks(results: pd.DataFrame) -> str:
    """Shares of right answers: tasks and families down, layouts and resolutions across."""
    rows, lines = main_rows(results), []
    for task, part in rows.groupby("task", sort=False):
        first = part.iloc[0]
        for family in FAMILIES:
            shares = [points(part_of(part, family, cell)["value"]) for cell in cells(rows)]
            lines.append([str(task), NAMES[family], *(_share(first[guess]) for guess in GUESSES), *shares])
    head = ["task", "model", "chance", "question only", "image only"]
    return markdown([*head, *map(named, cells(rows))], lines)


def _share(value: float) -> str:
    return "–" if pd.isna(value) else f"{100 * value:.1f}"


def families(results: pd.DataFrame) -> str:
    """Mamba - Transformer in points, by task, layout and resolution, seeds as pairs."""
    rows = main_rows(results)
    lines = [
        [str(task), *(points(apart(part, cell, cell, FAMILIES)) for cell in cells(rows))]
        for task, part in rows.groupby("task", sort=False)
    ]
    return markdown(["task", *map(named, cells(rows))], lines)


def apart(
    rows: pd.DataFrame, first: tuple[str, int], second: tuple[str, int], families: tuple[str, str]
) -> np.ndarray[Any, Any]:
    """Subtract the first family's and cell's values from the second's, seed by seed.

    Args:
        rows: Of one task and metric.
        first: Layout and pixels of the values to subtract.
        second: Layout and pixels of the others.
        families: The first and the second family.

    Returns:
        Differences [seeds].
    """
    before, after = (
        part_of(rows, family, cell).set_index("seed")["value"]
        for family, cell in zip(families, (first, second), strict=True)
    )
    return (after - before).loc[sorted(before.index)].round(9).to_numpy()  # equal scores differ by rounding


def layouts(results: pd.DataFrame) -> str:
    """Other layouts - agnostic in points, by task and family, at the lower resolution."""
    rows = main_rows(results)
    size = rows["image_size"].min()
    agnostic = (LAYOUTS[0], size)
    return _against(rows, agnostic, [(layout, size) for layout in LAYOUTS[1:]])


def sizes(results: pd.DataFrame) -> str:
    """The higher resolution - the lower, in points, by task and family; image first."""
    rows = main_rows(results)
    low, high = sorted(rows["image_size"].unique())
    return _against(rows, (LAYOUTS[0], low), [(LAYOUTS[0], high)])


def _against(rows: pd.DataFrame, base: tuple[str, int], others: Sequence[tuple[str, int]]) -> str:
    """Points that other cells gain on one of the same family: a line per task."""
    lines = [
        [str(task), *(points(apart(part, base, cell, (family, family)))
                      for cell in others for family in FAMILIES)]
        for task, part in rows.groupby("task", sort=False)
    ]  # fmt: skip
    return markdown(
        ["task", *(f"{NAMES[family]}, {named(cell)}" for cell in others for family in FAMILIES)], lines
    )


def captions(results: pd.DataFrame) -> str:
    """CIDEr by family, layout and resolution, and Mamba - Transformer, seeds as pairs."""
    rows = results[results["metric"] == "cider"]
    lines = [
        [NAMES[family], *(mean(part_of(rows, family, cell)["value"]) for cell in cells(rows))]
        for family in FAMILIES
    ]
    lines.append(["Mamba − Transformer", *(mean(apart(rows, cell, cell, FAMILIES)) for cell in cells(rows))])
    return markdown(["CIDEr", *map(named, cells(rows))], lines)


def mean(values: Any) -> str:
    """Mean, and every seed."""
    return f"{np.mean(values):.2f} ({by_seed(values, 2)})"


def floors(results: pd.DataFrame) -> str:
    """Guesses that ignore the picture or the question, beside the models' means over all runs of a family."""
    rows = results[results["metric"].isin(["accuracy", "iou@0.5", "cider"])]
    lines = []
    for floor in pd.read_csv(FLOORS).to_dict("records"):
        part = rows[rows["task"] == floor["task"]]
        points = floor["task"] != "caption"
        words = [f"{100 * v:.1f}" if points else f"{v:.2f}" for v in (floor["value"], *_range(part))]
        lines.append(
            [floor["task"], floor["guess"], words[0], *(f"{words[i]} to {words[i + 1]}" for i in (1, 3))]
        )
    return markdown(["task", "guess", "gets", *(f"{NAMES[family]}, all runs" for family in FAMILIES)], lines)


def _range(part: pd.DataFrame) -> list[float]:
    """Lowest and highest value of each family."""
    values = part.groupby("family")["value"]
    return [float(end[family]) for family in FAMILIES for end in (values.min(), values.max())]


def compared(results: pd.DataFrame) -> list[np.ndarray[Any, Any]]:
    """The differences of every comparison of the tables, by seed."""
    shares, scores = main_rows(results), results[results["metric"] == "cider"]
    size, higher = (f(shares["image_size"]) for f in (min, max))
    base = (LAYOUTS[0], size)
    pairs = [(cell, cell, FAMILIES) for cell in cells(shares)]
    others = [*((layout, size) for layout in LAYOUTS[1:]), (LAYOUTS[0], higher)]
    alone = [(base, cell, (family, family)) for cell in others for family in FAMILIES]
    found = [apart(part, *pair) for _, part in shares.groupby("task") for pair in (*pairs, *alone)]
    return found + [apart(scores, *pair) for pair in pairs]


def ratio(values: Any) -> str:
    """Geometric mean over seeds and its interval."""
    mean, low, high = geometric_mean_interval(values)
    return f"{mean:.3g} [{low:.3g}, {high:.3g}]"


def looked(looks: pd.DataFrame) -> str:
    """Target over other shapes, by family, quantity and layer, at the answer; the lower resolution."""
    rows = at_answer(looks)
    rows = rows[rows["image_size"] == rows["image_size"].min()]
    lines = []
    for (family, quantity, layer), part in rows.groupby(["family", "quantity", "layer"], sort=False):
        cells = [ratio(part.loc[part["layout"] == layout, "ratio"]) for layout in LAYOUTS]
        lines.append([NAMES[family], WORDS[str(quantity)], str(layer), *cells])
    return markdown(["model", "target's patches over other shapes'", "layer", *LAYOUTS], lines)


def at_answer(looks: pd.DataFrame) -> pd.DataFrame:
    """A row per run, layer and quantity: `write` where it happens, the others at the answer's tokens."""
    rows = looks[looks["at"].isin(["answer", "patch"])]
    order = [(family, quantity) for family in FAMILIES for quantity in WORDS]
    place = [order.index(pair) for pair in zip(rows["family"], rows["quantity"], strict=True)]
    return rows.assign(place=place).sort_values(["place", "layer"], kind="stable")


def cost(results: pd.DataFrame) -> str:
    """Seconds of training by family and resolution, one thread each; the first stage is shared by both."""
    runs = results.drop_duplicates("stage")
    lines = []
    for (family, size), part in runs.groupby(["family", "image_size"], sort=False):
        lines.append(
            [NAMES[str(family)], str(size), f"{part['parameters'].iloc[0]:,}", str(part["steps"].iloc[0]),
             f"{part['seconds'].mean():.0f}"]
        )  # fmt: skip
    head = ["model", "px", "weights", "steps", "seconds of a model, both stages"]
    return markdown(head, lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
