"""Tables, figures and pictures of README.md, from the runs of this study:

    python studies/vlm-cpu/report.py [RUNS]

With RUNS (what `vlm.train --out` named) it first writes results.parquet, looks.csv (what `vlm.looking` finds,
run by run) and predictions.png beside this file. The figures, and what stands between the markers
`<!-- NAME -->` and `<!-- /NAME -->` in README.md, are made from the two tables.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.statistics import mean_interval
from analysis.style import DOUBLE, NAMES, family_colors, legend, save, theme
from analysis.tables import concatenated, files, fill
from analysis.vlm_plots import main_rows
from vlm.prompts import LAYOUTS

HERE = Path(__file__).parent
RESULTS, LOOKS = HERE / "results.parquet", HERE / "looks.csv"
EXAMPLES = 200  # held-out grounding questions that vlm.looking asks each run
FAMILIES = ("transformer", "mamba")
WORDS = {"attention": "read", "write": "written", "kept": "kept", "share": "part of the state"}
PICTURED = ("grounding", "attribute", "reading-word")
MARKS = {"agnostic": "s", "instruction-first": "D", "query-first": "o"}


def main(runs: Path | None) -> None:
    if runs is not None:
        collect(runs)
    results, looks = pd.read_parquet(RESULTS), pd.read_csv(LOOKS)
    import matplotlib

    matplotlib.use("Agg")
    with theme():
        save(accuracy(results), HERE / "accuracy")
        save(looking(looks), HERE / "looking")
    from synthetic import store

    path = HERE / "README.md"
    store.write_bytes(path, filled(path.read_text(encoding="utf-8"), results, looks).encode())


# --- from the runs ------------------------------------------------------------------------------------------


def collect(out: Path) -> None:
    """The committed tables and pictures of trained and evaluated runs."""
    import torch

    import vlm.config
    from synthetic import store
    from synthetic.results import to_parquet
    from vlm import looking as probe
    from vlm.results import COLUMNS

    torch.set_num_threads(2)
    found = concatenated(files(out))
    if found is None:
        raise SystemExit(f"error: no results in {out}; run vlm.train and vlm.evaluate first")
    rows: Any = found.astype(object).where(found.notna(), None).to_dict("records")
    store.write_bytes(RESULTS, to_parquet(rows, COLUMNS))
    planned = vlm.config.read_file(HERE / "config.py")
    looks = [probe.contrast(probe.table(run, out, EXAMPLES)) for run in planned]
    store.write_bytes(LOOKS, pd.concat(looks).to_csv(index=False, float_format="%.5g").encode())
    with theme():
        chosen = [run for run in planned if (run.layout, run.image_size, run.seed) == ("query-first", 64, 0)]
        save(pictures(chosen, out), HERE / "predictions", kinds=("png",), dpi=120)


def pictures(runs: Sequence[Any], out: Path) -> Any:
    """Of both families: the first right and the first wrong answer to three kinds of questions."""
    import matplotlib.pyplot as plt

    from synthetic import store
    from vlm.predict import RIGHT, SAID, WRONG, draw
    from vlm.prompts import parse_box
    from vlm.results import answers_path

    figure, axes = plt.subplots(
        len(PICTURED), 2 * len(runs), figsize=(2.1 * 2 * len(runs), 2.75 * len(PICTURED))
    )
    for column, run in enumerate(runs):
        answers = store.read_rows(answers_path(out, run.name))
        for row, task in enumerate(PICTURED):
            source = run.evaluation[task].build(answers=False)
            for right in (True, False):
                ax = axes[row, 2 * column + (not right)]
                ax.axis("off")
                mine = [a for a in answers if a["task"] == task and a["right"] is right]
                if not mine:
                    ax.set_title(f"{NAMES[run.family]}: none", fontsize=8)
                    continue
                found = mine[0]
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


def filled(text: str, results: pd.DataFrame, looks: pd.DataFrame) -> str:
    """README with its tables made anew."""
    return fill(
        text,
        {
            "tasks": tasks(results),
            "families": families(results),
            "layouts": layouts(results),
            "sizes": sizes(results),
            "captions": captions(results),
            "looks": looked(looks),
            "cost": cost(results),
        },
    )


def points(values: Any, bounds: tuple[float, float] | None = None) -> str:
    """Mean and Student's interval of shares, in points."""
    mean, low, high = (100 * value for value in mean_interval(values, bounds=bounds))
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def differences(
    rows: pd.DataFrame, column: str, first: Any, second: Any, by: Sequence[str]
) -> Iterator[tuple[Any, np.ndarray[Any, Any]]]:
    """(cell, second - first seed by seed) of every cell of `by`, in the table's order."""
    keys = [*by, "seed"]
    wide = rows.pivot_table(index=keys, columns=column, values="value", sort=False)
    apart = wide[second] - wide[first]
    for cell, part in apart.groupby(level=list(range(len(by))), sort=False):
        yield cell, part.to_numpy()


def tasks(results: pd.DataFrame) -> str:
    """Shares of right answers: tasks down, family and layout across, at the lower resolution."""
    rows = main_rows(results)
    rows = rows[rows["image_size"] == rows["image_size"].min()]
    lines = []
    for task, part in rows.groupby("task", sort=False):
        first = part.iloc[0]
        line = [str(task), _share(first["chance"]), _share(first["question_only"])]
        for family in FAMILIES:
            for layout in LAYOUTS:
                mine = part[(part["family"] == family) & (part["layout"] == layout)]
                line.append(points(mine["value"], (0, 1)))
        lines.append(line)
    head = [f"{NAMES[family]}, {layout}" for family in FAMILIES for layout in LAYOUTS]
    return markdown(["task", "chance", "without the image", *head], lines)


def _share(value: float) -> str:
    return "–" if pd.isna(value) else f"{100 * value:.1f}"


def families(results: pd.DataFrame) -> str:
    """Mamba - Transformer in points, by task and layout, seeds as pairs, both resolutions."""
    rows = main_rows(results)
    found = differences(rows, "family", "transformer", "mamba", ("task", "image_size", "layout"))
    return _across(found, "Mamba − Transformer", LAYOUTS)


def layouts(results: pd.DataFrame) -> str:
    """Other layouts - agnostic in points, by task, family and resolution."""
    rows, lines = main_rows(results), []
    parts = {
        layout: dict(differences(rows, "layout", "agnostic", layout, ("task", "image_size", "family")))
        for layout in LAYOUTS[1:]
    }
    for task, size in dict.fromkeys(zip(rows["task"], rows["image_size"], strict=True)):
        cells = [points(parts[layout][task, size, family]) for family in FAMILIES for layout in LAYOUTS[1:]]
        lines.append([str(task), f"{size}", *cells])
    head = [f"{NAMES[family]}, {layout}" for family in FAMILIES for layout in LAYOUTS[1:]]
    return markdown(["task", "px", *head], lines)


def sizes(results: pd.DataFrame) -> str:
    """The higher resolution - the lower, in points, by task and family; image first."""
    rows = main_rows(results)
    rows = rows[rows["layout"] == "agnostic"]
    low, high = sorted(rows["image_size"].unique())
    found = dict(differences(rows, "image_size", low, high, ("task", "family")))
    lines = [
        [str(task), *(points(found[task, family]) for family in FAMILIES)]
        for task in dict.fromkeys(rows["task"])
    ]
    return markdown(["task", *(NAMES[family] for family in FAMILIES)], lines)


def _across(found: Iterator[tuple[Any, Any]], title: str, columns: Sequence[str]) -> str:
    """A line per (task, pixels), a column per layout."""
    cells = dict(found)
    lines = [
        [str(task), str(size), *(points(cells[task, size, layout]) for layout in columns)]
        for task, size in dict.fromkeys(key[:2] for key in cells)
    ]
    return markdown(["task", "px", *(f"{title}, {layout}" for layout in columns)], lines)


def captions(results: pd.DataFrame) -> str:
    """CIDEr (0 .. 10) by family, layout and resolution."""
    rows = results[results["metric"].str.lower() == "cider"]
    lines = []
    for size in sorted(rows["image_size"].unique()):
        for family in FAMILIES:
            mine = rows[(rows["family"] == family) & (rows["image_size"] == size)]
            cells = [between(mine.loc[mine["layout"] == layout, "value"]) for layout in LAYOUTS]
            lines.append([NAMES[family], str(size), *cells])
    return markdown(["model", "px", *LAYOUTS], lines)


def between(values: Any) -> str:
    mean, low, high = mean_interval(values, bounds=(0, 10))
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def ratio(values: Any) -> str:
    """Geometric mean over seeds and its interval."""
    mean, low, high = (np.exp(value) for value in mean_interval(np.log(np.asarray(values, float))))
    return f"{mean:.3g} [{low:.3g}, {high:.3g}]"


def looked(looks: pd.DataFrame) -> str:
    """Target over other shapes, by family, quantity and layer, at the answer; the lower resolution."""
    rows = _at_answer(looks)
    rows = rows[rows["image_size"] == rows["image_size"].min()]
    lines = []
    for (family, quantity, layer), part in rows.groupby(["family", "quantity", "layer"], sort=False):
        cells = [ratio(part.loc[part["layout"] == layout, "ratio"]) for layout in LAYOUTS]
        lines.append([NAMES[family], WORDS[quantity], str(layer), *cells])
    return markdown(["model", "target's patches over other shapes'", "layer", *LAYOUTS], lines)


def _at_answer(looks: pd.DataFrame) -> pd.DataFrame:
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
            [NAMES[family], str(size), f"{part['parameters'].iloc[0]:,}", str(part["steps"].iloc[0]),
             f"{part['seconds'].mean():.0f}"]
        )  # fmt: skip
    head = ["model", "px", "weights", "steps", "seconds of a model, both stages"]
    return markdown(head, lines)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- figures ------------------------------------------------------------------------------------------------


def accuracy(results: pd.DataFrame) -> Any:
    """Right answers by task, family and layout: means over seeds with intervals; a row per resolution."""
    import matplotlib.pyplot as plt

    rows, colors = main_rows(results), family_colors()
    names, pixels = list(dict.fromkeys(rows["task"])), sorted(rows["image_size"].unique())
    figure, axes = plt.subplots(len(pixels), 1, figsize=(DOUBLE * 1.25, 2.5 * len(pixels)), sharex=True)
    looks = [(family, layout) for family in FAMILIES for layout in LAYOUTS]
    for ax, size in zip(axes, pixels, strict=True):
        for i, task in enumerate(names):
            part = rows[(rows["task"] == task) & (rows["image_size"] == size)]
            blind = part[["chance", "question_only"]].max(axis=1).max()
            ax.plot([i - 0.45, i + 0.45], [blind, blind], color="0.2", ls=":", lw=1.2)
            for k, (family, layout) in enumerate(looks):
                values = part.loc[(part["family"] == family) & (part["layout"] == layout), "value"]
                mean, low, high = mean_interval(values, bounds=(0, 1))
                x = i + (k - (len(looks) - 1) / 2) * 0.13
                ax.plot([x, x], [low, high], color=colors[family], lw=1)
                ax.plot(x, mean, MARKS[layout], ms=4, color=colors[family], mfc=_face(layout, colors[family]))
        ax.set_ylim(0, 1)
        ax.set_ylabel(f"right answers, {size} px", fontsize=8)
        ax.tick_params(labelsize=8)
        ax.grid(axis="x", visible=False)
    axes[-1].set_xticks(range(len(names)), names, rotation=25, ha="right")
    legend(figure, _legend(looks) | {"best guess without the image": dict(color="0.2", ls=":")}, width=2.2)
    return figure


def looking(looks: pd.DataFrame) -> Any:
    """Target's patches over other shapes' by layer; a panel per family and quantity, points are seeds."""
    import matplotlib.pyplot as plt

    rows = _at_answer(looks)
    rows = rows[rows["image_size"] == rows["image_size"].min()]
    cells = list(dict.fromkeys(zip(rows["family"], rows["quantity"], strict=True)))
    figure, axes = plt.subplots(1, len(cells), figsize=(DOUBLE * 1.5, 2.9), squeeze=False)
    for ax, (family, quantity) in zip(axes[0], cells, strict=True):
        color = family_colors()[family]
        for k, layout in enumerate(LAYOUTS):
            mine = rows[
                (rows["family"] == family) & (rows["quantity"] == quantity) & (rows["layout"] == layout)
            ]
            shift = (k - 1) * 0.12
            ax.plot(mine["layer"] + shift, mine["ratio"], MARKS[layout], color=color, ms=4, alpha=0.8,
                    mfc=_face(layout, color))  # fmt: skip
            logs = np.log(mine["ratio"]).groupby(mine["layer"]).mean()
            ax.plot(logs.index + shift, np.exp(logs), color=color, lw=0.8, alpha=0.6)
        ax.axhline(1, color="0.3", ls=":", lw=1)
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(_plain)
        ax.yaxis.set_minor_formatter(_plain)
        ax.tick_params(labelsize=7, which="both")
        ax.set_xticks(sorted(rows.loc[rows["family"] == family, "layer"].unique()))
        ax.set_title(f"{NAMES[family]}:\n{WORDS[quantity]}", fontsize=8)
        ax.set_xlabel("layer", fontsize=8)
    axes[0, 0].set_ylabel("target's patches / other shapes' (log)", fontsize=8)
    legend(figure, {layout: dict(marker=MARKS[layout], color="0.3", ls="", mfc=_face(layout, "0.3"))
                    for layout in LAYOUTS})  # fmt: skip
    return figure


def _plain(value: float, _: int) -> str:
    return f"{value:g}"


def _face(layout: str, color: Any) -> Any:
    """Filled where the query comes first."""
    return color if layout == "query-first" else "white"


def _legend(looks: Sequence[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    colors = family_colors()
    return {
        f"{NAMES[family]}, {layout}": dict(
            marker=MARKS[layout], color=colors[family], ls="", ms=5, mfc=_face(layout, colors[family])
        )
        for family, layout in looks
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
