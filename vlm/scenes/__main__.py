"""Draw a sheet of scenes, one per task, each with its question and answer.

python -m vlm.scenes --out docs/images/scenes.png --seed 0
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageDraw, ImageFont

from ssm_retrieval.cli import guarded, parse
from ssm_retrieval.training.store import replacing
from vlm.scenes import TASKS, Example, make_example, render, sample_scene

_COLUMNS, _ZOOM, _PAD, _TEXT = 5, 2, 12, 150


def contact_sheet(seed: int, split: str) -> Image.Image:
    """Draw scene k with a question of task k; the boxes of its answer are framed.

    Args:
        seed: Seed of the scenes.
        split: "train", "heldout" or "combination".

    Returns:
        An RGB image.
    """
    font = ImageFont.load_default(14)
    examples = [make_example(sample_scene(seed, split, k), task) for k, task in enumerate(TASKS)]
    side = examples[0].scene.size * _ZOOM
    rows = -(-len(examples) // _COLUMNS)
    sheet = Image.new(
        "RGB", (_COLUMNS * (side + _PAD) + _PAD, rows * (side + _TEXT + _PAD) + _PAD), (255, 255, 255)
    )
    for k, example in enumerate(examples):
        row, column = divmod(k, _COLUMNS)  # captions, the longest texts, come first
        x, y = _PAD + column * (side + _PAD), _PAD + row * (side + _TEXT + _PAD)
        sheet.paste(_framed(example, font), (x, y))
        lines = [f"{example.task}", *textwrap.wrap(example.question, 36), *textwrap.wrap(example.answer, 38)]
        ImageDraw.Draw(sheet).multiline_text((x, y + side + 4), "\n".join(lines), fill=(0, 0, 0), font=font)
    return sheet


def _framed(example: Example, font: Any) -> Image.Image:
    side = example.scene.size * _ZOOM
    image = Image.fromarray(render(example.scene)).resize((side, side), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    if example.task == "caption":  # every object: frames would only hide the scene
        return image
    for k, (x1, y1, x2, y2) in enumerate(example.boxes):
        frame = (x1 * _ZOOM - 2, y1 * _ZOOM - 2, x2 * _ZOOM + 1, y2 * _ZOOM + 1)
        draw.rectangle(frame, outline=(0, 160, 160), width=2)
        if example.choices:
            corner = (frame[0] + 2, frame[1] + 2)
            draw.rectangle((*corner, corner[0] + 14, corner[1] + 16), fill=(255, 255, 255))
            draw.text((corner[0] + 2, corner[1]), example.choices[k], fill=(0, 100, 100), font=font)
    return image


@dataclass(frozen=True)
class Options:
    """Draw rendered scenes, one per task, each with its question and answer below it."""

    out: Path
    """PNG file to write."""
    seed: int = 0
    """Seed of the scenes."""
    split: Literal["train", "heldout", "combination"] = "train"
    """train: scenes of training. heldout: with handwritten digits that training never uses. combination: \
with pairs of colour and shape that training never shows."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for bad input."""
    options = parse(Options, argv, "python -m vlm.scenes")
    return guarded(lambda: draw(options), out=options.out)


def draw(options: Options) -> int:
    """Draw the sheet of the command line; returns the exit status."""
    sheet = contact_sheet(options.seed, options.split)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(options.out) as temporary:
        sheet.save(temporary, format="PNG")
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
