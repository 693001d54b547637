"""Scenes in words, place by place: what a language model can learn of scenes before it has eyes.

The picture of a VLM is a square of patches, and a patch shows an object with all its attributes at once. Here
each place of that square has the *words* of its object instead, such as

    red star small striped left:0.12 top:0.40 right:0.31 bottom:0.58

as a vector of VOCABULARY with a number for every word: what an encoder would give that makes no mistakes. Its
connector adds the words' vectors, which begin as those of the language model, so that "red" in a question is
from the start the "red" in a place. So a language model learns to look things up, count and compare, and
stage 1 of a VLM, the connector alone, has only to find how a patch says the words. Corners are hundredths of
the picture's side. A corner spreads over its neighbours (SPREAD), so that near numbers are near each other,
as in features of pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

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


_NUMBERS = {word: i for i, word in enumerate(VOCABULARY)}


@lru_cache(maxsize=2**16)
def row(words: tuple[str, ...], corners: tuple[int, ...]) -> Tensor:
    """Return the features of a place.

    Args:
        words: Words that are said whole.
        corners: Left, top, right and bottom in hundredths; () for no object.

    Returns:
        (F,) float32.
    """
    found = torch.zeros(len(VOCABULARY))
    found[[_NUMBERS[word] for word in words]] = 1.0
    for edge, corner in zip(EDGES, corners, strict=False):
        first = _NUMBERS[f"{edge}:0.00"]
        bell = torch.exp(-0.5 * ((torch.arange(101) - corner) / SPREAD) ** 2)
        found[first : first + 101] = CORNER * bell / bell.sum()
    return found


def told(item: Object, size: int) -> Tensor:
    """Return the features (F,) of an object; `size`: pixels of the scene's side."""
    more = (item.size, item.texture) if item.kind == "shape" else (item.kind,)
    corners = tuple(round(100 * corner / size) for corner in item.box)
    return row((item.colour, item.name, *more), corners)


def connector(table: Tensor, encode: Callable[[str], list[int]]) -> nn.Sequential:
    """Make the connector of words: (..., F) -> (..., D), the sum of their vectors.

    Args:
        table: (V, D), the vectors of a language model's tokens. Words that are tokens begin as these; the
            corners, which are none, begin at random with the same spread.
        encode: Text -> ids of the language model.

    Returns:
        A linear map.

    Raises:
        UserError: If the tokenizer splits a word.
    """
    layer = nn.Linear(len(VOCABULARY), table.shape[1], bias=False)
    with torch.no_grad():
        layer.weight.normal_(std=float(table.std()))
        for number, word in enumerate(VOCABULARY):
            if ":" in word or word == NOTHING:
                continue
            ids = encode(word if word.isdigit() else f" {word}")  # as words stand in sentences
            if len(ids) != 1:
                raise UserError(f"encoder='words' needs a tokenizer with a token for {word!r}; use 'scenes'")
            layer.weight[:, number] = table[ids[0]]
    return nn.Sequential(layer)


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
        """Return features (P, F), float32, of a scene."""
        rows = [told(item, scene.size) for item in scene.objects]
        nothing = row((NOTHING,), ())
        belongs = owners(scene, self.side).reshape(-1).tolist()
        return torch.stack([rows[owner] if owner >= 0 else nothing for owner in belongs])
