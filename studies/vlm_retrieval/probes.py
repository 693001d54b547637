"""Probes of this study's models: `python -m studies.vlm_retrieval.probes RUNS` writes the tables beside it.

    changed.csv   right boxes when the patch of the object asked for is exchanged with another object's, or
                  made empty, beside what it does to empty another object's patch
    places.csv    right boxes by the place of the object in the picture: is what was read first still there?
    looks.csv     what each layer reads from, and writes of, the patches of the object asked for

`exchanged` sets two answers against each other. A model that looks up *what* a patch shows finds the object's
features, which say where the object was, wherever they stand. A model that goes by *place* answers the box of
the object that was there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from ssm_retrieval.training import store
from studies.vlm_retrieval.runs import CELLS, SEEDS, run
from vlm import answering, components
from vlm.config import Run, Scenes
from vlm.evaluate import answer_all
from vlm.information_flow import target_ratios, target_table
from vlm.metrics.boxes import above_half, iou
from vlm.prompts import parse_box
from vlm.results import answers_path
from vlm.scenes.patches import owners
from vlm.scenes.scene import Box, Scene

HERE = Path(__file__).parent
Array = npt.NDArray[np.float64]
PROBED = ("base", "image-first", "query-first")
QUESTIONS = 200
FAR, NEAR = 0.15, 0.07  # of edges, in shares of the side: half a patch, a fifth of one
CHANGES = ("intact", "target empty", "other empty", "exchanged")


@dataclass(frozen=True)
class Places:
    """Which patches of a picture show what: one patch each.

    Attributes:
        target: The object asked for.
        other: Another shape.
        other_box: Its box.
        empty: A patch that shows nothing.
    """

    target: int
    other: int
    other_box: Box
    empty: int

    @staticmethod
    def of(scene: Scene, target: Box, side: int) -> Places | None:
        """Find them where each object has one patch, and one is left; None otherwise."""
        belongs = owners(scene, side).reshape(-1)
        places = {item.box: np.flatnonzero(belongs == k) for k, item in enumerate(scene.objects)}
        empty = np.flatnonzero(belongs < 0)
        others = [item.box for item in scene.shapes if item.box != target and places[item.box].size == 1]
        if places[target].size != 1 or not others or not empty.size:
            return None
        other = others[scene.index % len(others)]
        return Places(int(places[target][0]), int(places[other][0]), other, int(empty[0]))

    def change(self, patches: Tensor, how: str) -> Tensor:
        """Return the features (P, F) of a picture after one of CHANGES."""
        changed = patches.clone()
        if how == "target empty":
            changed[self.target] = patches[self.empty]
        elif how == "other empty":
            changed[self.other] = patches[self.empty]
        elif how == "exchanged":
            changed[self.target], changed[self.other] = patches[self.other], patches[self.target]
        return changed


class Changed:
    """Features of a source whose patches are changed; the interface of `vlm.data.cache.FeatureCache`."""

    def __init__(self, features: Any, places: dict[str, Places], how: str):
        self.features, self.places, self.how = features, places, how

    def get(self, source: Any, images: Sequence[str]) -> Tensor:
        """Return features (B, P, F) of pictures by key."""
        whole = self.features.get(source, images)
        return torch.stack([self.places[i].change(w, self.how) for i, w in zip(images, whole, strict=True)])


def changed(one: Run, out: Path) -> pd.DataFrame:
    """Return which boxes are answered after each change: the target's, or the other object's.

    The columns `target_x` to `other_y` say it of left edges and of top edges alone (`edges_near`).
    """
    source: Any = Scenes("grounding", 2 * QUESTIONS, "heldout").build(answers=False)
    side = components.eyes_of(one, out, "cpu").side
    samples = [source[i] for i in range(2 * QUESTIONS)]
    found = {s.image: Places.of(source.scene(s.image), tuple(s.target["box"]), side) for s in samples}
    samples = [s for s in samples if found[s.image] is not None][:QUESTIONS]
    where = {s.image: place for s in samples if (place := found[s.image]) is not None}
    features = components.features(one, one.image_size, out, "cpu")
    features.fill(source, progress=False)
    model, rows = answering.load(one, out), []
    size = samples[0].target["width"]
    wanted = {
        "target": np.array([s.target["box"] for s in samples]) / size,
        "other": np.array([where[s.image].other_box for s in samples]) / size,
    }
    for how in CHANGES:
        said = answer_all(model, one, Changed(features, where, how), source, samples, side, "cpu")
        read = [parse_box(text, 1, 1) or (np.nan,) * 4 for text in said]
        row: dict[str, Any] = {"change": how, "questions": len(samples)}
        row |= {name: above_half(iou(read, boxes)).mean() for name, boxes in wanted.items()}
        rows.append(row | edges_near(np.array(read), **wanted))
    return _about(one, pd.DataFrame(rows))


def edges_near(said: Array, target: Array, other: Array) -> dict[str, float]:
    """Return how often the left and the top edge of an answer are those of two boxes.

    Args:
        said: (N, 4), boxes as shares of the side; NaN where an answer is none.
        target: (N, 4).
        other: (N, 4).

    Returns:
        `target_x`, `other_x` (left edges), `target_y`, `other_y` (top edges): shares of the boxes that differ
        by more than FAR in that edge, of which the answer is nearer than NEAR.
    """
    found = {}
    for axis, letter in enumerate("xy"):
        differ = np.abs(target[:, axis] - other[:, axis]) > FAR
        for name, box in (("target", target), ("other", other)):
            near = np.abs(said[differ, axis] - box[differ, axis]) < NEAR
            found[f"{name}_{letter}"] = float(near.mean())
    return found


def places(one: Run, out: Path) -> pd.DataFrame:
    """Return right boxes by the row and column of the object asked for, of three rows and columns."""
    rows = []
    for answer in store.read_rows(answers_path(out, one.name)):
        if answer["task"] == "grounding":
            x0, y0, x1, y1 = answer["target"]["box"]
            width, height = answer["target"]["width"], answer["target"]["height"]
            place = int(3 * (y0 + y1) / 2 / height) * 3 + int(3 * (x0 + x1) / 2 / width)
            rows.append({"place": place, "right": answer["right"]})
    table = pd.DataFrame(rows).groupby("place")["right"].agg(["mean", "size"]).reset_index()
    return _about(one, table.rename(columns={"mean": "right", "size": "questions"}))


def _about(one: Run, table: pd.DataFrame) -> pd.DataFrame:
    """The table with columns family, cell and seed before its own."""
    cell = next(cell for cell in CELLS if run(cell, one.family, one.seed).name == one.name)
    about: dict[str, Any] = {"family": one.family, "cell": cell.name, "seed": one.seed}
    for name, value in reversed(about.items()):
        table.insert(0, name, value)
    return table


def main(out: Path) -> None:
    """Write the three tables, of the runs that are evaluated so far."""
    torch.set_num_threads(1)
    cells = [cell for cell in CELLS if cell.name in PROBED]
    runs = [run(cell, family, seed) for cell in cells for seed in SEEDS for family in cell.families]
    made: dict[str, list[pd.DataFrame]] = {"changed": [], "places": [], "looks": []}
    for one in (one for one in runs if answers_path(out, one.name).exists()):
        made["changed"].append(changed(one, out))
        made["places"].append(places(one, out))
        if one.family != "gated-deltanet":  # information_flow knows attention and selective scans
            looks = target_ratios(target_table(one, out, QUESTIONS))
            made["looks"].append(_about(one, looks.drop(columns=["family", "seed"])))
        print(one.name)
    for name, tables in made.items():
        text = pd.concat(tables).to_csv(index=False, float_format="%.5g")
        store.write_bytes(HERE / f"{name}.csv", text.encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
