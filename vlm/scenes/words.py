"""Scenes in words, place by place: what a language model can read of a scene before it has eyes.

The picture of a VLM is a square of patches, and a patch shows an object with all its attributes at once.
Here each place of that square has the *words* of its object instead, such as

    red star small striped left:0.12 top:0.40 right:0.31 bottom:0.58

and their vectors are added, as a place has room for one. So a language model pretrained on scenes in words
knows everything that questions ask for, and stage 1 of a VLM, the connector alone, has to find only how a
patch says the same words. Corners are hundredths of the picture's side. A corner spreads over its neighbours
(SPREAD), so that near numbers get near vectors, as near places get near features from an encoder of pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ssm_retrieval.errors import UserError
from vlm.scenes.patches import owners
from vlm.scenes.scene import Object, Scene

EDGES = ("left", "top", "right", "bottom")
NOTHING = "nothing:"  # a place without an object
CORNERS = tuple(f"{edge}:{i / 100:.2f}" for edge in EDGES for i in range(101))
SPREAD = 2.0  # hundredths, standard deviation
CORNER_WEIGHT = 1.5  # of the words of a corner together; every other word weighs 1

Encode = Callable[[str], list[int]]


def words(item: Object) -> tuple[str, ...]:
    """Return the words of an object but for its corners, as they stand in sentences: with a space."""
    if item.kind == "shape":
        return tuple(f" {word}" for word in (item.colour, item.name, item.size, item.texture))
    return (f" {item.colour}", f" {item.kind}", item.name if item.kind == "digit" else f" {item.name}")


def place(item: Object, size: int) -> dict[str, float]:
    """Return the words that stand in the place of an object, with their weights.

    Args:
        item: The object.
        size: Pixels of the scene's side.

    Returns:
        Weights by word.
    """
    weights = dict.fromkeys(words(item), 1.0)
    for edge, corner in zip(EDGES, item.box, strict=True):
        bell = _bell(round(100 * corner / size))
        weights |= {f"{edge}:{i / 100:.2f}": weight for i, weight in enumerate(bell) if weight > 1e-3}
    return weights


@lru_cache(maxsize=101)
def _bell(centre: int) -> list[float]:
    bell = torch.exp(-0.5 * ((torch.arange(101) - centre) / SPREAD) ** 2)
    return (CORNER_WEIGHT * bell / bell.sum()).tolist()


class Told:
    """Features of scenes in words, with the interface of `vlm.data.cache.FeatureCache`.

    Args:
        encode: Text -> ids of the language model that reads them.
        vocabulary: V, the number of ids.
        side: Places along one side.
    """

    def __init__(self, encode: Encode, vocabulary: int, side: int):
        self.encode, self.vocabulary, self.side = lru_cache(maxsize=None)(encode), vocabulary, side

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
        """Return the weights of words (B, P, V), float32, in the places of scenes by key."""
        return torch.stack([self.of(source.scene(image)) for image in images])

    def of(self, scene: Scene) -> Tensor:
        """Return the weights of words (P, V), float32, in the places of a scene."""
        told = [place(item, scene.size) for item in scene.objects]
        found = torch.zeros(self.side**2, self.vocabulary)
        for row, owner in zip(found, owners(scene, self.side).reshape(-1).tolist(), strict=True):
            for word, weight in (told[owner] if owner >= 0 else {NOTHING: 1.0}).items():
                (number,) = self.encode(word)
                row[number] = weight
        return found
