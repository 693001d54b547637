"""Pictures of the demo: boxes on what was shown, and heat maps of patches over it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vlm.demo.asking import Question, Reply
from vlm.pictures import Picture
from vlm.predict import RIGHT, SAID, draw
from vlm.prompts import Box, parse_box

SIDE = 320  # pixels of the longer side; about what fits the page
MAP, OPAQUE = "YlOrRd", 0.9  # colours, and opacity of the largest value


def fitted(picture: Picture) -> tuple[Picture, float]:
    """Return a picture with a longer side of SIDE pixels, and the factor it was scaled by."""
    from PIL import Image

    height, width = picture.shape[:2]
    factor = SIDE / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    how = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(picture).resize(size, how)), factor


def subjects(asked: Question) -> list[tuple[Box, str]]:
    """Return the boxes that a scene's question is about, with the letters of those to choose from."""
    if asked.example is None or asked.example.task == "caption":
        return []
    letters = asked.example.choices or ("",) * len(asked.example.boxes)
    return list(zip(asked.example.boxes, letters, strict=True))


def answered(picture: Picture, reply: Reply) -> Picture:
    """Return the picture with the question's objects framed in green and the answered box in blue."""
    shown, factor = fitted(picture)
    height, width = picture.shape[:2]
    framed = [(_scaled(box, factor), RIGHT, letter) for box, letter in subjects(reply.question)]
    box = parse_box(reply.said, width, height)
    if box is not None:
        framed.append((_scaled(box, factor), SAID, ""))
    return np.asarray(draw(shown, framed))


def heat(picture: Picture, values: npt.NDArray[np.float64], boxes: Sequence[Box] = ()) -> Picture:
    """Lay a heat map of patches over a pale picture.

    Args:
        picture: (height, width, 3) uint8, RGB.
        values: (side, side), at least 0; the colours run from 0 to the largest value.
        boxes: Boxes to frame, in pixels of the picture.

    Returns:
        The drawn picture.
    """
    import matplotlib

    shown, factor = fitted(picture)
    pale = 120 + 0.53 * shown.mean(axis=2, keepdims=True)
    strength = values / values.max() if values.max() > 0 else values
    height, width = shown.shape[:2]
    rows = (np.arange(height) * values.shape[0]) // height
    columns = (np.arange(width) * values.shape[1]) // width
    colours = matplotlib.colormaps[MAP](strength)[rows][:, columns, :3] * 255
    opaque = OPAQUE * strength[rows][:, columns, None]
    mixed = pale + (colours - pale) * opaque
    framed = [(_scaled(box, factor), RIGHT, "") for box in boxes]
    return np.asarray(draw(mixed.astype(np.uint8), framed))


def _scaled(box: Box, factor: float) -> Box:
    x0, y0, x1, y1 = (value * factor for value in box)
    return x0, y0, x1, y1


def colour_scale() -> str:
    """Return CSS of the heat maps' colours on white, from nothing to the most."""
    import matplotlib

    shares = np.linspace(0, 1, 9)
    colours = matplotlib.colormaps[MAP](shares)[:, :3]
    mixed = 1 + (colours - 1) * (OPAQUE * shares[:, None])
    stops = ", ".join(matplotlib.colors.to_hex(colour) for colour in mixed)
    return f"linear-gradient(to right, {stops})"
