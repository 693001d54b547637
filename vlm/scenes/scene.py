"""Scenes: which objects, and where. A scene is a function of seed, split, index and size only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ssm_retrieval.errors import UserError
from ssm_retrieval.streams import stream
from vlm.prompts import Box
from vlm.scenes.stamps import COLOURS, GRID, MARGIN, SHAPES, SIZES, TEXTURES, WORDS, digit_images, stamp

# train; the same distribution with unseen digit images; colour x shape pairs that training never shows
SPLITS = ("train", "heldout", "combination")
MIN_SIZE = 96
MAX_INDEX = 2**41  # streams of higher indices are for the questions
# One colour occurs once, one twice, one three times, three never: every scene has the counts 0 .. 3.
COLOUR_COUNTS = (1, 2, 3)
MOST_SHAPES = sum(COLOUR_COUNTS)
_COMBINATION_INDEX = 2**62  # keeps the random streams of `combination` apart from those of `heldout`
# Each colour has one held-out shape, and each shape one held-out colour.
HELDOUT_PAIRS = frozenset((colour, SHAPES[(i + 1) % len(SHAPES)]) for i, colour in enumerate(COLOURS))


@dataclass(frozen=True)
class Object:
    """An object of a scene.

    Attributes:
        kind: "shape", "digit" or "word".
        name: The shape, digit or word.
        colour: One of COLOURS.
        size: "small" or "large".
        texture: "solid", "striped" or "dotted".
        box: x_min, y_min, x_max, y_max in whole pixels; x_max and y_max are the first pixels outside.
        source: Index of the digit's image; -1 for others.
    """

    kind: str
    name: str
    colour: str
    size: str
    texture: str
    box: Box
    source: int = -1


@dataclass(frozen=True)
class Scene:
    """A scene.

    Attributes:
        objects: The objects, in reading order of their cells.
        size: Pixels a side.
        ground: Grey level of the background.
        seed: Seed of the scene.
        split: Split of the scene.
        index: Index of the scene.
    """

    objects: tuple[Object, ...]
    size: int
    ground: int
    seed: int
    split: str
    index: int

    @property
    def shapes(self) -> tuple[Object, ...]:
        """The objects that are shapes."""
        return tuple(item for item in self.objects if item.kind == "shape")


def scene_stream(seed: int, split: str, index: int) -> np.random.Generator:
    """Return the random stream of a scene (`ssm_retrieval.streams.stream`).

    Args:
        seed: Seed of the scenes.
        split: One of SPLITS.
        index: Index of the scene.

    Returns:
        The generator.

    Raises:
        UserError: If the split or the seed is invalid.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; valid: {', '.join(SPLITS)}")
    if split == "combination":
        return stream(seed, "heldout", index + _COMBINATION_INDEX)
    return stream(seed, split, index)


@lru_cache(maxsize=len(SPLITS) * 10)
def digit_sources(split: str, digit: int) -> npt.NDArray[np.int64]:
    """Return the indices of the handwritten images of a digit that a split uses.

    Every fifth image is never in training, counted within the digit, because the data set lists the digits in
    turn for long stretches.
    """
    images = np.flatnonzero(digit_images()[1] == digit)
    return images[(np.arange(images.size) % 5 == 4) == (split != "train")]


def sample_scene(seed: int, split: str, index: int, size: int = 128, shapes: int = MOST_SHAPES) -> Scene:
    """Make a scene: six shapes, a handwritten digit and a word, in eight of the image's nine cells.

    Colour and shape together identify one shape of a scene.

    Args:
        seed: Seed of the scenes.
        split: One of SPLITS.
        index: Index of the scene.
        size: Pixels a side.
        shapes: How many of the shapes to keep; the others are missing, and nothing else changes.

    Returns:
        The scene.

    Raises:
        UserError: If the split, seed or index is invalid, or the image is too small to read.
    """
    if size < MIN_SIZE:
        raise UserError(f"size {size} is too small to read words in: give at least {MIN_SIZE} pixels")
    if not 0 <= index < MAX_INDEX:
        raise UserError(f"index {index} must be in 0 .. 2**41 - 1")
    if not 1 <= shapes <= MOST_SHAPES or (split == "combination" and shapes < MOST_SHAPES):
        raise UserError(f"shapes={shapes} must be in 1 .. {MOST_SHAPES}, and {MOST_SHAPES} for 'combination'")
    rng = scene_stream(seed, split, index)
    items = [(("shape", shape, colour), -1) for colour, shape in _draw_pairs(rng, split)]
    digit = int(rng.integers(10))
    sources = digit_sources(split, digit)
    source = int(sources[rng.integers(sources.size)])
    colours = list(COLOURS)
    items.append((("digit", str(digit), colours[rng.integers(len(colours))]), source))
    items.append((("word", WORDS[rng.integers(len(WORDS))], colours[rng.integers(len(colours))]), -1))
    cells = rng.permutation(GRID * GRID)[: len(items)]
    objects = []
    for k in np.argsort(cells):
        (kind, name, colour), source = items[k]
        textured = kind == "shape"
        item = Object(
            kind, name, colour,
            SIZES[rng.integers(len(SIZES))] if textured else "large",
            TEXTURES[rng.integers(len(TEXTURES))] if textured else "solid",
            (0, 0, 0, 0), source,
        )  # fmt: skip
        objects.append(_place(rng, item, int(cells[k]), size))
    ground = int(rng.integers(225, 250))
    if shapes < MOST_SHAPES:
        which = [k for k, item in enumerate(objects) if item.kind == "shape"]
        gone = set(rng.permutation(which)[shapes:].tolist())
        objects = [item for k, item in enumerate(objects) if k not in gone]
    return Scene(tuple(objects), size, ground, seed, split, index)


def _draw_pairs(rng: np.random.Generator, split: str) -> list[tuple[str, str]]:
    """Six distinct (colour, shape); in `combination` each colour shows its held-out shape once."""
    colours = list(COLOURS)
    pairs: list[tuple[str, str]] = []
    for colour_number, count in zip(rng.permutation(len(colours)), COLOUR_COUNTS, strict=False):
        colour = colours[colour_number]
        usual = [(colour, shape) for shape in SHAPES if (colour, shape) not in HELDOUT_PAIRS]
        unseen = [(colour, shape) for shape in SHAPES if (colour, shape) in HELDOUT_PAIRS]
        chosen = unseen if split == "combination" else []
        order = rng.permutation(len(usual))[: count - len(chosen)]
        pairs += chosen + [usual[k] for k in order]
    return pairs


def _place(rng: np.random.Generator, item: Object, cell_number: int, size: int) -> Object:
    """`item` at a uniform place of its cell, with MARGIN free pixels around: boxes never touch."""
    height, width = stamp(item, size)[0].shape
    cell = size // GRID
    row, column = divmod(cell_number, GRID)
    x = column * cell + MARGIN + int(rng.integers(cell - 2 * MARGIN - width + 1))
    y = row * cell + MARGIN + int(rng.integers(cell - 2 * MARGIN - height + 1))
    box = (x, y, x + width, y + height)
    return Object(item.kind, item.name, item.colour, item.size, item.texture, box, item.source)
