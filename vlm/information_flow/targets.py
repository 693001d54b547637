"""The patches of the object that a question asks for, compared with those of the scene's other shapes.

The shape asked for is drawn among the shapes of a scene, so the two are alike wherever patches are read and
written without regard to the question.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ssm_retrieval.errors import UserError
from ssm_retrieval.statistics import ratio_of_means
from vlm import components
from vlm.answering import alike, load
from vlm.config import Run, Scenes
from vlm.information_flow.flow import answer_places, layer_flows
from vlm.layout import readings
from vlm.scenes.encoder import annotation
from vlm.scenes.patches import coverage
from vlm.scenes.scene import Box, Scene, sample_scene

if TYPE_CHECKING:
    import pandas as pd

BATCH = 16
COLUMNS = {
    "run": ("string", "name in the config file"),
    "family": ("string", "mamba, transformer, ..."),
    "layout": ("string", "where the image stands: `vlm.prompts.LAYOUTS`"),
    "image_size": ("int64", "pixels a side that the encoder sees"),
    "seed": ("int64", "of weights and order of data"),
    "layer": ("int64", "block, 0-based"),
    "quantity": ("string", "attention, write, kept or share"),
    "at": (
        "string",
        "where it is read: first = where the answer's first token is predicted; answer = mean over the "
        "positions that predict the right answer's tokens; patch = at the patch itself",
    ),
    "example": ("int64", "scene of the held-out split"),
    "target": ("float64", "mean over the patches of the object asked for"),
    "distractor": ("float64", "mean over the scene's other shapes of the same"),
    "background": ("float64", "mean over the patches that show no object"),
    "target_relative": ("float64", "as target, of values divided by the mean over examples at that patch"),
    "distractor_relative": ("float64", "as distractor, of such values"),
}
KEYS = (
    "run",
    "family",
    "layout",
    "image_size",
    "seed",
    "layer",
    "quantity",
    "at",
)


def patches_of(box: Box, size: int, side: int) -> npt.NDArray[np.bool_]:
    """Return the patches that a box covers by more than half, or the one it covers most if there are none.

    Args:
        box: The box, in pixels.
        size: Pixels a side of the image.
        side: Patches along one side.

    Returns:
        (side^2,) bool.
    """
    cover = coverage([value / size for value in box], side).reshape(-1)
    return cover > 0.5 if (cover > 0.5).any() else cover == cover.max()


def group_weights(scene: Scene, target: Box, side: int) -> dict[str, npt.NDArray[np.float64]]:
    """Return weights that average over the patches of the target, of the other shapes, and of the background.

    Each of the other shapes counts alike, whatever its size. The digit and the word are left out because no
    question asks for their boxes; only so is the target one of the shapes by chance.

    Args:
        scene: The scene.
        target: Box of one of its shapes, in pixels.
        side: Patches along one side.

    Returns:
        "target", "distractor" and "background" -> (side^2,) float64, summing to 1.
    """
    shapes = {item.box: _mean(patches_of(item.box, scene.size, side)) for item in scene.shapes}
    others = [weights for box, weights in shapes.items() if box != target]
    nothing = annotation(scene, side)[0]["kind"] == 0
    return {"target": shapes[target], "distractor": np.mean(others, axis=0), "background": _mean(nothing)}


def _mean(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    return mask / mask.sum()


def target_table(run: Run, out: Path, examples: int = 100, device: str = "cpu") -> pd.DataFrame:
    """Measure a trained run on grounding questions about held-out scenes, followed by the right answers.

    Args:
        run: The run.
        out: Folder of the runs.
        examples: Number of questions.
        device: Device of the model.

    Returns:
        COLUMNS; one row per example, layer, quantity and `at`.

    Raises:
        UserError: If the run is not trained in `out`, or its layout shows the image twice.
    """
    import pandas as pd

    if readings(run.layout) > 1:
        raise UserError(
            f"run {run.name!r} reads the image twice (layout={run.layout!r}), so that a patch has no single "
            "place; ask for a run of another layout"
        )

    model, seen = load(run, out, device), components.eyes_of(run, out, device)
    source: Any = Scenes("grounding", examples, "heldout").build(answers=True)
    features = components.features(run, run.image_size, out, device)
    features.fill(source, progress=False)
    values: dict[tuple[int, str, str], npt.NDArray[np.float64]] = defaultdict(
        lambda: np.zeros((examples, seen.side**2))
    )
    for numbers, input_ids, at in _prompts(run, source, seen.side):
        ids = torch.tensor(input_ids, device=device)
        flows = layer_flows(model, ids, features.get(source, [str(i) for i in numbers]).to(device), at)
        for layer, found in flows.items():
            for quantity, read in found.quantities().items():
                for name, value in _by_place(quantity, read).items():
                    values[layer, quantity, name][numbers] = value.double().cpu().numpy()
    weights = [
        group_weights(sample_scene(0, "heldout", i), tuple(source[i].target["box"]), seen.side)
        for i in range(examples)
    ]
    fixed = dict(run=run.name, family=run.family, layout=run.layout, image_size=run.image_size, seed=run.seed)
    rows = [
        fixed | dict(layer=layer, quantity=quantity, at=at, example=i) | group
        for (layer, quantity, at), each in sorted(values.items())
        for i, group in enumerate(_groups(each, weights))
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _groups(
    values: npt.NDArray[np.float64], weights: Sequence[Mapping[str, npt.NDArray[np.float64]]]
) -> Iterator[dict[str, float]]:
    """The columns from "target" on, example by example, of values (examples, P)."""
    usual = values.mean(0)
    relative = np.divide(values, usual, out=np.ones_like(values), where=usual > 0)
    for value, share, means in zip(values, relative, weights, strict=True):
        found = {name: float(value @ mean) for name, mean in means.items()}
        yield found | {f"{name}_relative": float(share @ means[name]) for name in ("target", "distractor")}


def _by_place(quantity: str, values: Tensor) -> dict[str, Tensor]:
    """(B, A, P) as values of the column `at`, each (B, P)."""
    return (
        {"patch": values[:, 0]} if quantity == "write" else {"first": values[:, 0], "answer": values.mean(1)}
    )


def _prompts(run: Run, source: Any, side: int) -> Iterator[tuple[list[int], list[list[int]], list[int]]]:
    """Batches of equal length: numbers of samples, their input_ids, and the positions of their answers."""
    prompts = [components.prompt(run, source[number].chunks, side) for number in range(len(source))]
    places = [answer_places(labels) for _, labels in prompts]
    for numbers in alike(((len(prompts[i][0]), *at) for i, at in enumerate(places)), BATCH):
        yield numbers, [prompts[i][0] for i in numbers], places[numbers[0]]


def target_ratios(table: pd.DataFrame, by: Sequence[str] = KEYS, confidence: float = 0.95) -> pd.DataFrame:
    """Return the ratio of the target to the other shapes, by layer and quantity.

    It is 1 if the question does not matter. `ratio` is of the relative columns, which leave out the effect of
    the place in the image (an SSM keeps less of early patches); `raw` is of the others. Both are ratios of
    means over examples, because a mean of ratios exceeds 1 even if target and other shapes are alike.

    Args:
        table: Result of `target_table`, for one run or several.
        by: Columns to group by.
        confidence: Confidence of the intervals.

    Returns:
        Columns `by`, ratio, low, high, raw, raw_low, raw_high, examples.
    """
    import pandas as pd

    rows = []
    groups: Any = table.groupby(list(by), sort=False)
    for key, group in groups:
        row = dict(zip(by, key, strict=True))
        for columns, names in (
            (("target_relative", "distractor_relative"), ("ratio", "low", "high")),
            (("target", "distractor"), ("raw", "raw_low", "raw_high")),
        ):
            above, below = (group[column].to_numpy() for column in columns)
            row |= dict(zip(names, ratio_of_means(above, below, confidence), strict=True))
        rows.append(row | dict(examples=len(group)))
    return pd.DataFrame(rows)
