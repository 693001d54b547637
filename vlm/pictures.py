"""Read pictures as RGB bytes; a picture that cannot be read is one line that names the file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ssm_retrieval.errors import MissingPackage, UserError

Picture = npt.NDArray[np.uint8]
T = TypeVar("T")
ADVICE = "give a PNG or JPEG file"


def read(path: str | Path, what: str = "", advice: str = ADVICE, *, upright: bool = False) -> Picture:
    """Read a picture in any format of Pillow.

    Channels of 16 bits are scaled to 8. Transparency is dropped.

    Args:
        path: The file.
        what: What errors call the picture; default: its path.
        advice: How errors end.
        upright: Turn the picture as its EXIF data say, as browsers do.

    Returns:
        (height, width, 3) uint8, RGB.

    Raises:
        UserError: If the picture is missing, damaged or too large, or its pixels have no fixed range (float,
            32 bits).
    """
    return _taken(path, lambda image: rgb(image, upright), what or str(path), advice)


def size(path: str | Path, what: str = "", advice: str = ADVICE) -> tuple[int, int]:
    """Return width and height of a picture; only its header is read.

    Args:
        path: The file.
        what: What errors call the picture; default: its path.
        advice: How errors end.

    Returns:
        Width and height in pixels.

    Raises:
        UserError: As `read`.
    """
    return _taken(path, lambda image: (image.width, image.height), what or str(path), advice)


def rgb(image: Any, upright: bool = False) -> Picture:
    """Return a Pillow image as `read` does.

    Raises:
        ValueError: If the pixels have no fixed range.
    """
    from PIL import ImageOps

    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):  # 16-bit PNGs are I
        kind = "floating-point numbers" if image.mode == "F" else "numbers of 32 bits"
        raise ValueError(f"its pixels are {kind}, which have no fixed white: save it with 8 or 16 bits")
    if upright:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # white is 65535; convert("RGB") would clip at 255
        grey = (np.asarray(image).astype(np.int64) + 128) // 257
        return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


def _taken(path: str | Path, take: Callable[[Any], T], what: str, advice: str) -> T:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingPackage('pictures need Pillow: pip install -e ".[vlm]"') from error
    try:
        with Image.open(path) as image:
            return take(image)
    except FileNotFoundError:
        raise UserError(f"{what} does not exist; {advice}") from None
    except UnidentifiedImageError:
        raise UserError(
            f"{what} cannot be read as a picture (no format that Pillow knows); {advice}"
        ) from None
    except Exception as error:  # a damaged picture can raise almost anything
        said = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.errno is not None:
            said = os.strerror(error.errno)
        raise UserError(f"{what} cannot be read as a picture ({said}); {advice}") from error
