"""`python -m vlm.predict RUN IMAGE "question"`: ask a trained VLM about a picture; boxes are drawn on it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from ssm_retrieval.cli import guarded, parse
from ssm_retrieval.errors import UserError
from ssm_retrieval.training import store
from vlm import components, pictures, prompts
from vlm.config import Run
from vlm.data.samples import Sample
from vlm.evaluate import load, say
from vlm.folders import saved_run
from vlm.model import VLM
from vlm.pictures import Picture

OUTSIDE = 8  # pixels; boxes are clipped to this distance from the picture
MOST_ASKED = 1000  # characters of a question
Task = Literal["auto", "vqa", "grounding", "captioning"]
RIGHT, WRONG, SAID = (0, 130, 60), (200, 30, 30), (0, 90, 200)


@dataclass(frozen=True)
class Options:
    """Ask a trained VLM one question about a picture."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A trained run: the folder that vlm.train printed."""
    image: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """A picture in any format that Pillow reads."""
    question: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[QUESTION]")] = ""
    """"Where is the red star?" asks for a box. Without a question the model writes a caption."""
    task: Task = "auto"
    """Wording of the prompt; auto decides by the question."""
    out: Path | None = None
    """Where to write the picture with the answered box. Default: <image>.answer.png in the current folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for bad input."""
    options = parse(Options, argv, "python -m vlm.predict")
    return guarded(lambda: predict(options), out=options.out or ".")


def predict(options: Options) -> int:
    """Answer the question of the command line; returns the exit status."""
    picture = read_picture(options.image)
    run, out = saved_run(options.run)
    said = ask(load(run, out), run, out, picture, options.question, options.task)
    print(said)
    height, width = picture.shape[:2]
    box = prompts.parse_box(said, width, height)
    if box is not None:
        path = options.out or Path(f"{options.image.stem}.answer.png")
        drawn = draw(picture, [(box, SAID, "")], zoom=max(1, 384 // max(width, height)))
        with store.replacing(path) as temporary:
            drawn.save(temporary, format="PNG")
        print(path)
    return 0


def read_picture(path: Path) -> Picture:
    """Read a picture of the user's, upright, as (height, width, 3) uint8 RGB.

    Raises:
        UserError: If it cannot be read.
    """
    return pictures.read(path, f"IMAGE {path}", upright=True)


def wording(question: str, task: Task, width: int, height: int) -> list[prompts.Chunk]:
    """Word a question as in training.

    Args:
        question: The question, in the user's words.
        task: "auto" asks for a caption without a question, and for a box if the question begins with "Where
            is".
        width: Width of the picture, in pixels.
        height: Height of the picture, in pixels.

    Returns:
        The prompt.

    Raises:
        UserError: If a question is needed and missing, or has more than MOST_ASKED characters.
    """
    question = question.strip()
    if len(question) > MOST_ASKED:
        raise UserError(f"the question has {len(question)} characters; ask in at most {MOST_ASKED}")
    if task == "auto":
        task = (
            "captioning"
            if not question
            else "grounding"
            if question.lower().startswith("where is ")
            else "vqa"
        )
    if task == "captioning":
        return prompts.captioning()
    if not question:
        raise UserError(f"--task {task} needs a question; give one after the image")
    if task == "vqa":
        return prompts.vqa([(question, None)])
    start = len("where is ") if question.lower().startswith("where is ") else 0
    return prompts.grounding([(question[start:].rstrip("?"), None)], width, height)


def ask(
    model: VLM, run: Run, out: Path, picture: Picture, question: str, task: Task = "auto", device: str = "cpu"
) -> str:
    """Answer a question about a picture.

    Args:
        model: The trained model, without encoder.
        run: Its run.
        out: Folder of the runs, which has the encoder.
        picture: (height, width, 3) uint8, RGB.
        question: The question, in the user's words.
        task: As for `wording`.
        device: Device of the model.

    Returns:
        The answer, without the end token.
    """
    height, width = picture.shape[:2]
    sample = Sample("0", "picture", "0", task, tuple(wording(question, task, width, height)))
    eyes = components.eyes(run.encoder, run.image_size, out, device)
    ids, _ = components.prompt(run, sample, eyes.side)
    (said,) = say(model, run, torch.tensor([ids], device=device), eyes([picture]))
    return components.text_of(run).decode(said)


def draw(
    picture: Picture, framed: Sequence[tuple[prompts.Box, tuple[int, int, int], str]], zoom: int = 1
) -> Any:
    """Draw boxes on a picture.

    Args:
        picture: (height, width, 3) uint8, RGB.
        framed: Boxes in pixels of the picture, their colours and labels. The frame lies around the box.
        zoom: Factor by which the picture is enlarged.

    Returns:
        A Pillow image.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = picture.shape[:2]
    image = Image.fromarray(picture).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for (x0, y0, x1, y1), colour, label in framed:
        x0, x1, y0, y1 = *sorted((x0 * zoom, x1 * zoom)), *sorted((y0 * zoom, y1 * zoom))
        edges = ((x0 - 2, image.width), (y0 - 2, image.height), (x1 + 1, image.width), (y1 + 1, image.height))
        # a model's box may lie far outside
        corners = [min(max(value, -OUTSIDE), side + OUTSIDE) for value, side in edges]
        pen.rectangle(corners, outline=colour, width=2)
        if label:
            pen.text((corners[0] + 3, corners[1] + 1), label, fill=colour, font=font)
    return image


if __name__ == "__main__":
    sys.exit(main())
