"""Scenes in words, place by place: what a language model can learn of scenes before it has eyes.

The picture of a VLM is a square of patches, and a patch shows an object with all its attributes at once. Here
each place of that square has the *words* of its object instead, such as

    red star small striped left:0.12 top:0.40 right:0.31 bottom:0.58

as a vector of VOCABULARY with a number for every word: what an encoder would give that makes no mistakes. So
a language model learns to look things up, count and compare from words, and stage 1 of a VLM, the connector
alone, has only to find how a patch says them. Corners are hundredths of the picture's side. A corner spreads
over its neighbours (SPREAD), so that near numbers are near each other, as in features of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssm_retrieval.errors import UserError
from vlm.scenes.patches import owners
from vlm.scenes.scene import Object, Scene
from vlm.scenes.stamps import COLOURS, SHAPES, SIZES, TEXTURES, WORDS

EDGES = ("left", "top", "right", "bottom")
NOTHING = "nothing"  # a place without an object
VOCABULARY = (
    NOTHING, *COLOURS, *SHAPES, *SIZES, *TEXTURES, "digit", "word", *map(str, range(10)), *WORDS,
    *(f"{edge}:{i / 100:.2f}" for edge in EDGES for i in range(101)),
)  # fmt: skip
SPREAD = 2.0  # hundredths, standard deviation
CORNER = 1.5  # weight of a corner, all its words together; every other word weighs 1


def words(item: Object, size: int) -> dict[str, float]:
    """Return the words of an object with their weights.

    Args:
        item: The object.
        size: Pixels of the scene's side.

    Returns:
        Weights by word of VOCABULARY.
    """
    more = (item.size, item.texture) if item.kind == "shape" else (item.kind,)
    weights = dict.fromkeys((item.colour, item.name, *more), 1.0)
    for edge, corner in zip(EDGES, item.box, strict=True):
        bell = _bell(round(100 * corner / size))
        weights |= {f"{edge}:{i / 100:.2f}": weight for i, weight in enumerate(bell)}
    return weights


@lru_cache(maxsize=101)
def _bell(centre: int) -> list[float]:
    bell = torch.exp(-0.5 * ((torch.arange(101) - centre) / SPREAD) ** 2)
    return (CORNER * bell / bell.sum()).tolist()


class Told:
    """Features of scenes in words, with the interface of `vlm.data.cache.FeatureCache`.

    Args:
        side: Places along one side.
    """

    def __init__(self, side: int):
        self.side = side

    def fill(self, source: Any, progress: bool = True, batch_size: int = 32) -> None:
        """Do nothing: words cost less than files of them.

        Args:
            source: Samples of scenes.
            progress: As for `FeatureCache.fill`.
            batch_size: As for `FeatureCache.fill`.

        Raises:
            UserError: If the source has no scenes.
        """
        if not hasattr(source, "scene"):
            raise UserError(f"encoder='words' reads scenes, and {source.name!r} has none; use another one")

    def get(self, source: Any, images: Sequence[str]) -> Tensor:
        """Return features (B, P, F), float32, of scenes by key."""
        return torch.stack([self.of(source.scene(image)) for image in images])

    def of(self, scene: Scene) -> Tensor:
        """Return features (P, F), float32, of a scene, each as long as a normed one: sqrt(F)."""
        rows = [_row(tuple(words(item, scene.size).items())) for item in scene.objects]
        nothing = _row(((NOTHING, 1.0),))
        belongs = owners(scene, self.side).reshape(-1).tolist()
        return torch.stack([rows[owner] if owner >= 0 else nothing for owner in belongs])


_NUMBERS = {word: i for i, word in enumerate(VOCABULARY)}


def _row(weights: tuple[tuple[str, float], ...]) -> Tensor:
    row = torch.zeros(len(VOCABULARY))
    row[[_NUMBERS[word] for word, _ in weights]] = torch.tensor([weight for _, weight in weights])
    return F.normalize(row, dim=0) * len(VOCABULARY) ** 0.5
