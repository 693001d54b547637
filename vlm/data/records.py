"""What readers yield: one frozen record per question, caption set, expression or conversation.

Boxes are (x_min, y_min, x_max, y_max) in pixels of the original image. `image` is the image's path below the
folder of images as the official files name it, with "/" between parts. Readers never open images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import PurePosixPath

from ssm_retrieval.errors import UserError
from vlm.prompts import Box


@dataclass(frozen=True, kw_only=True)
class Record:
    """Fields that every record has. `width` and `height` are None if the official files lack them."""

    id: str
    source: str
    split: str
    image: str
    width: int | None = None
    height: int | None = None

    def __post_init__(self) -> None:
        path = PurePosixPath(self.image)
        if not self.image or path.is_absolute() or ".." in path.parts:
            raise UserError(
                f"{self.source} {self.id}: image {self.image!r} is not a path inside the image folder"
            )


@dataclass(frozen=True, kw_only=True)
class Captioned(Record):
    """An image with all its reference captions (none in hidden test sets); NoCaps adds the domain."""

    captions: tuple[str, ...]
    domain: str | None = None
    ocr: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Question(Record):
    """An open question; `answers` has every annotator's answer as written, none in hidden test sets."""

    question: str
    answers: tuple[str, ...]
    kind: str | None = None
    ocr: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Choice(Record):
    """A multiple-choice question. `answer` indexes `choices`; None in hidden test sets.

    In pointing questions `choices` are the names of the boxes in `boxes`, which is empty otherwise.
    """

    question: str
    choices: tuple[str, ...]
    answer: int | None
    boxes: tuple[Box, ...] = ()
    kind: str | None = None
    ocr: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answer is not None and not 0 <= self.answer < len(self.choices):
            raise UserError(
                f"{self.source} {self.id}: answer {self.answer} is no index of {len(self.choices)} choices"
            )
        if self.boxes and len(self.boxes) != len(self.choices):
            raise UserError(
                f"{self.source} {self.id}: {len(self.boxes)} boxes for {len(self.choices)} choices"
            )


@dataclass(frozen=True, kw_only=True)
class Statement(Record):
    """A caption that fits the image or does not."""

    statement: str
    label: bool
    relation: str


@dataclass(frozen=True, kw_only=True)
class Grounded(Record):
    """A phrase and the box it refers to."""

    phrase: str
    box: Box


@dataclass(frozen=True, kw_only=True)
class Span:
    """Characters `start:end` of a caption, all boxes of that chunk, and the best score among them."""

    start: int
    end: int
    boxes: tuple[Box, ...]
    score: float


@dataclass(frozen=True, kw_only=True)
class GroundedCaption(Record):
    """A caption with spans that refer to boxes, sorted by start; each box is with its own span.

    `original` is the picture's width and height before it was downloaded at another size; None if the file
    does not say.
    """

    caption: str
    spans: tuple[Span, ...]
    original: tuple[int, int] | None = None


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation; `role` is "human" or "assistant"."""

    role: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Conversation(Record):
    """Turns that alternate, human first, as written: `vlm.prompts.IMAGE` marks the image in one of them."""

    turns: tuple[Turn, ...]


def xywh_box(x: float, y: float, width: float, height: float) -> Box:
    """Return the corners of a box given by corner and size, in pixels; negative corners are clipped to 0.

    Args:
        x: Left edge.
        y: Upper edge.
        width: Width of the box.
        height: Height of the box.

    Returns:
        x_min, y_min, x_max, y_max.

    Raises:
        UserError: If nothing of the box is left, or a number is not finite.
    """
    box = (max(0.0, float(x)), max(0.0, float(y)), float(x) + float(width), float(y) + float(height))
    if not all(map(math.isfinite, box)) or box[2] <= box[0] or box[3] <= box[1]:
        raise UserError(f"box x={x} y={y} width={width} height={height} is empty")
    return box
