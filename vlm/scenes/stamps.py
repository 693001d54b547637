"""Pixels: cached masks of shapes, digits and words, and the rendering of a scene.

Masks are binary and cropped to their ink, so the box of an object is exactly the pixels that it changes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ssm_retrieval.errors import MissingPackage

if TYPE_CHECKING:
    from vlm.scenes.scene import Object, Scene

Mask = npt.NDArray[np.bool_]

COLOURS = {
    "red": (214, 39, 40),
    "green": (30, 140, 50),
    "blue": (40, 80, 220),
    "orange": (255, 140, 0),
    "purple": (140, 60, 180),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
SIZES = ("small", "large")
TEXTURES = ("solid", "striped", "dotted")
WORDS = (
    "bird", "boat", "cake", "door", "fish", "gate", "hill", "king",
    "lake", "leaf", "nest", "road", "sail", "tree", "tile", "salt",
)  # fmt: skip
GRID = 3  # cells along one side, at most one object in each
MARGIN = 2  # pixels that stay free at every side of a cell
_PIXELS_PER_SIZE = {"small": 0.42, "large": 0.76}  # of a cell


def stamp(item: Object, size: int) -> tuple[Mask, Mask]:
    """Return the masks of an object.

    Args:
        item: The object.
        size: Size of the image, pixels a side.

    Returns:
        (h, w) pixels of the object, and (h, w) those among them in its full colour.
    """
    cell = size // GRID
    if item.kind == "digit":
        mask = _digit_mask(item.source, cell)
        return mask, mask
    if item.kind == "word":
        mask = _word_mask(item.name, cell)
        return mask, mask
    return _shape_stamp(item.name, item.size, item.texture, cell)


def render(scene: Scene) -> npt.NDArray[np.uint8]:
    """Render a scene, (size, size, 3) uint8 RGB: objects on a background of the scene's own light grey."""
    image = np.full((scene.size, scene.size, 3), scene.ground, dtype=np.uint8)
    for item in scene.objects:
        mask, full = stamp(item, scene.size)
        x1, y1, x2, y2 = item.box
        view = image[y1:y2, x1:x2]
        if full is not mask:
            view[mask] = shade(item.colour)
        view[full] = COLOURS[item.colour]
    return image


def shade(colour: str) -> tuple[int, int, int]:
    """Return the light form of a colour, between the stripes and dots of a textured object."""
    red, green, blue = ((value + 2 * 190) // 3 for value in COLOURS[colour])
    return red, green, blue


@lru_cache(maxsize=512)
def _shape_stamp(shape: str, size: str, texture: str, cell: int) -> tuple[Mask, Mask]:
    side = round(cell * _PIXELS_PER_SIZE[size])
    y, x = np.mgrid[:side, :side]
    u, v = (x + 0.5) / side * 2 - 1, (y + 0.5) / side * 2 - 1  # pixel centres, -1 .. 1
    mask = _crop(_inside(shape, u, v))
    rows, columns = np.indices(mask.shape)
    if texture == "solid":
        return mask, mask
    period = max(4, cell // 10)
    if texture == "striped":
        pattern = rows % period < period / 2
    else:
        pattern = (rows % period < period / 2) & (columns % period < period / 2)
    return mask, mask & pattern


def _inside(shape: str, u: npt.NDArray[np.float64], v: npt.NDArray[np.float64]) -> Mask:
    """Whether points of the square -1 .. 1 (v downwards) lie inside a shape."""
    if shape == "circle":
        return u**2 + v**2 <= 1
    if shape == "square":
        return np.maximum(abs(u), abs(v)) <= 0.88
    if shape == "triangle":
        return abs(u) <= (v + 1) / 2
    if shape == "diamond":
        return abs(u) + abs(v) <= 1
    if shape == "cross":
        return np.minimum(abs(u), abs(v)) <= 0.33
    radius, turn = np.hypot(u, v), np.arctan2(u, -v)  # star: five points, one up
    wedge = abs((turn + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)  # angle from the nearest point
    tip, notch = 1.0, 0.42
    # the edge from a tip to the next notch is a straight line in these polar coordinates
    edge = tip * notch * np.sin(np.pi / 5) / (
        notch * np.sin(np.pi / 5 - wedge) + tip * np.sin(wedge)
    )  # fmt: skip
    return radius <= edge


def _crop(mask: Mask) -> Mask:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    cropped = np.ascontiguousarray(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    cropped.flags.writeable = False  # the cache returns the same array each time
    return cropped


@lru_cache(maxsize=1)
def digit_images() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return scikit-learn's handwritten digits: (1797, 8, 8) uint8 ink 0 .. 255, and (1797,) int64 digits.

    Raises:
        MissingPackage: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingPackage('scenes need scikit-learn: pip install -e ".[vlm]"') from error
    data = load_digits()
    return (data.images * (255 / 16)).astype(np.uint8), data.target.astype(np.int64)


@lru_cache(maxsize=4096)
def _digit_mask(source: int, cell: int) -> Mask:
    from PIL import Image

    side = round(cell * _PIXELS_PER_SIZE["large"])
    picture = Image.fromarray(digit_images()[0][source]).resize((side, side), Image.Resampling.BICUBIC)
    return _crop(np.asarray(picture) >= 128)


@lru_cache(maxsize=512)
def _word_mask(word: str, cell: int) -> Mask:
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("L", (2 * cell, cell))
    font = ImageFont.load_default(int(cell * 0.4))  # the font inside Pillow: the same on every machine
    ImageDraw.Draw(picture).text((4, 4), word, fill=255, font=font)
    return _crop(np.asarray(picture) >= 110)
