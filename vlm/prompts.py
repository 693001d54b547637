"""Prompts and answers of every task, as chunks of text in the published wording.

A prompt is a list of chunks, each tokenised on its own; supervised chunks are answers. The image stands
before all of them ("agnostic"), after the first ("instruction-first", the paper's task-aware condition: the
model knows the kind of task, but not the query) or after everything before the first answer ("query-first",
the stronger condition of the synthetic task). In "two-pass" it stands before all of them twice.

Each function here is one task; the tests have the SHA-256 of the released instructions. With `published=True`
a function prints exactly what the released code prints, also where that harms the text; docs/data.md lists
where the two differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ssm_retrieval.errors import UserError

END = "<|endoftext|>"
Layout = Literal["agnostic", "instruction-first", "query-first", "two-pass"]
LAYOUTS: tuple[Layout, ...] = ("agnostic", "instruction-first", "query-first", "two-pass")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
IMAGE = "<image>"  # where the image stands in conversations of LLaVA
RELEASED_SIZE = 336  # pixels a side to which the released code scales boxes before it prints them

INSTRUCTIONS = {
    "captioning": "Provide a one-sentence caption for the provided image.",
    "grounded captioning": "Provide a one-sentence caption for the image and mention each entity.",
    "vqa": "Answer the question using a single word or phrase.",
    "multiple choice": "Answer with the option's letter from the given choices directly.",
    "dense captioning": "Provide a short description of the region:",
    "grounding": "Locate the region that is described by:",
    "image-text match": "Determine if the image matches the description:",
}

Box = tuple[float, float, float, float]  # x_min, y_min, x_max, y_max in pixels


@dataclass(frozen=True)
class Chunk:
    """A piece of text that is tokenised on its own; `supervised`: whether it is an answer."""

    text: str
    supervised: bool = False


# --- text and boxes -----------------------------------------------------------------------------------------


def sentence(text: str, *, keep_case: bool = False) -> str:
    """Strip a text, make only its first letter upper-case, and end it with a period.

    A text that ends in . ? or ! keeps its end.

    Args:
        text: Any text.
        keep_case: Whether to keep the case, for diagrams and documents (AI2D, DocVQA, InfographicVQA), whose
            capitals mean something.

    Returns:
        The sentence; "" stays "".
    """
    text = text.strip()
    if not text:
        return text
    text = text if keep_case else text.capitalize()
    return text if text.endswith((".", "?", "!")) else text + "."


def answer_text(text: str) -> str:
    """Return a text as `sentence` does, without the period, as choices are printed."""
    return text.strip().capitalize()


def without_marker(text: str) -> str:
    """Return a turn of a conversation without LLaVA's marker of the image."""
    return text.replace(IMAGE, "").strip()


def box_text(box: Box, width: float, height: float, *, published: bool = False) -> str:
    """Print a box as `[x_min,y_min,x_max,y_max]`, as shares of the image with two decimals.

    Args:
        box: The box, in pixels. What lies beyond the right and the lower edge of the image is cut.
        width: Width of the image, in pixels.
        height: Height of the image, in pixels.
        published: Cut nothing, and round as the released code does, which scales boxes to pixels of its
            encoder first: the last digit differs where a share lies half-way between two.

    Returns:
        The text.

    Raises:
        UserError: If a coordinate is negative, or the box or the image is empty.
    """
    if width <= 0 or height <= 0:
        raise UserError(f"an image of {width} x {height} pixels has no boxes; give its size")
    x0, y0, x1, y1 = box
    if min(box) < 0 or x1 <= x0 or y1 <= y0:
        raise UserError(f"box {box} must be x_min < x_max, y_min < y_max, from 0 on; clip or drop it")
    sides = (width, height, width, height)
    if published:
        shares = [v * (RELEASED_SIZE / side) / RELEASED_SIZE for v, side in zip(box, sides, strict=True)]
    else:
        shares = [min(1.0, v / side) for v, side in zip(box, sides, strict=True)]
    return "[" + ",".join(f"{share:.2f}" for share in shares) + "]"


def parse_box(text: str, width: float, height: float) -> Box | None:
    """Read the box in an answer, as the released evaluators do: four finite numbers behind the first bracket.

    They end at the next closing bracket, or with the answer if there is none, but for its full stop. (The
    released code drops the last letter of an answer, even if it is a digit of a box that was cut off.)
    "[[0.1,0.2,0.3,0.4]]" has nothing but a bracket there, so it is no box.

    Args:
        text: The answer.
        width: Width of the image, in pixels.
        height: Height of the image, in pixels.

    Returns:
        The box in pixels; None if the answer has none, which counts as wrong.
    """
    behind = text.rstrip().removesuffix(".").split("[")[1:2]
    parts = behind[0].split("]")[0].split(",") if behind else []
    try:
        x0, y0, x1, y1 = (float(part) for part in parts)
    except ValueError:
        return None
    box = (x0 * width, y0 * height, x1 * width, y1 * height)
    return box if all(math.isfinite(value) for value in box) else None


# --- tasks --------------------------------------------------------------------------------------------------


def captioning(caption: str | None = None) -> list[Chunk]:
    """Ask for one caption; `caption`: the answer, None if it is to be generated."""
    return [Chunk(INSTRUCTIONS["captioning"] + "\n"), *_answer(caption)]


def vqa(
    turns: Sequence[tuple[str, str | None]],
    *,
    ocr: str = "",
    keep_case: bool = False,
    published: bool = False,
) -> list[Chunk]:
    """Ask questions about one image.

    Args:
        turns: Questions and answers; an answer of None is to be generated.
        ocr: Words in the image (TextVQA).
        keep_case: As for `sentence`, but a question begins with a capital.
        published: Leave the first letter of questions that keep their case.

    Returns:
        The prompt.
    """
    first = INSTRUCTIONS["vqa"]
    chunks = [Chunk(f"{first}\nOCR text:\n{ocr}" if ocr else first)]
    for question, answer in turns:
        asked = sentence(question, keep_case=keep_case)
        asked = asked if published else asked[:1].upper() + asked[1:]
        chunks.append(Chunk(f"\nQuestion: {asked}\nAnswer: "))
        chunks += _answer(answer, keep_case=keep_case)
    return chunks


def multiple_choice(
    turns: Sequence[tuple[str, Sequence[str], int | None]],
    *,
    ocr: Sequence[str] = (),
    keep_case: bool = False,
) -> list[Chunk]:
    """Ask for the letters of choices.

    Args:
        turns: (question, choices, index of the right one or None) about one image.
        ocr: Lines of text in the image (AI2D).
        keep_case: As for `sentence`.

    Returns:
        The prompt.
    """
    first = INSTRUCTIONS["multiple choice"]
    chunks = [Chunk(first + "\nOCR text:\n" + "\n".join(ocr) if ocr else first)]
    for question, choices, right in turns:
        chunks.append(Chunk(f"\nQuestion: {sentence(question, keep_case=keep_case)}\n"))
        chunks += _choices([answer_text(choice) for choice in choices], right)
    return chunks


def pointing(
    turns: Sequence[tuple[str, Sequence[Box], int | None]],
    width: float,
    height: float,
    *,
    published: bool = False,
) -> list[Chunk]:
    """Ask for the letter of a printed box (Visual7W pointing).

    Args:
        turns: (question, boxes in pixels, index of the right one or None) about one image.
        width: Width of the image, in pixels.
        height: Height of the image, in pixels.
        published: As for `box_text`.

    Returns:
        The prompt.
    """
    chunks = [Chunk(INSTRUCTIONS["multiple choice"] + "\n")]
    for question, boxes, right in turns:
        chunks.append(Chunk(f"\nQuestion: {sentence(question)}\n"))
        printed = [box_text(box, width, height, published=published) + "." for box in boxes]
        chunks += _choices(printed, right)
    return chunks


def grounding(
    turns: Sequence[tuple[str, Box | None]], width: float, height: float, *, published: bool = False
) -> list[Chunk]:
    """Ask for the boxes of phrases.

    Args:
        turns: Phrases and their boxes in pixels; a box of None is to be generated.
        width: Width of the image, in pixels.
        height: Height of the image, in pixels.
        published: As for `box_text`.

    Returns:
        The prompt.
    """
    chunks = [Chunk(INSTRUCTIONS["grounding"])]
    for phrase, box in turns:
        chunks.append(Chunk(f"\n{sentence(phrase)}\n"))
        if box is not None:
            printed = box_text(box, width, height, published=published)
            chunks.append(Chunk(printed + "." + END, supervised=True))
    return chunks


def dense_captioning(
    turns: Sequence[tuple[Box, str | None]], width: float, height: float, *, published: bool = False
) -> list[Chunk]:
    """Ask what is in boxes; only the last description ends with the end token.

    Args:
        turns: Boxes in pixels and their descriptions; None is to be generated.
        width: Width of the image, in pixels.
        height: Height of the image, in pixels.
        published: As for `box_text`.

    Returns:
        The prompt.
    """
    chunks = [Chunk(INSTRUCTIONS["dense captioning"] + "\n")]
    for i, (box, phrase) in enumerate(turns):
        chunks.append(Chunk(box_text(box, width, height, published=published) + ".\n"))
        if phrase is not None:
            last = END if i == len(turns) - 1 else ""
            chunks.append(Chunk(sentence(phrase) + "\n" + last, supervised=True))
    return chunks


def image_text_match(caption: str, label: bool | None = None) -> list[Chunk]:
    """Ask whether a caption fits the image (VSR); `label`: the answer, or None."""
    chunks = [Chunk(INSTRUCTIONS["image-text match"] + "\n"), Chunk(sentence(caption) + "\n")]
    return chunks if label is None else [*chunks, Chunk(f"{bool(label)}." + END, supervised=True)]


def grounded_captioning(
    caption: str,
    spans: Sequence[tuple[int, int, Sequence[Box]]],
    width: float,
    height: float,
    *,
    published: bool = False,
) -> list[Chunk]:
    """Ask for a caption with the boxes of its phrases, `||phrase [box][box]||`.

    Args:
        caption: The text.
        spans: (start, stop, boxes) of its phrases, in any order. (The released code gave unsorted spans the
            wrong boxes.)
        width: Width of the image, in pixels.
        height: Height of the image, in pixels.
        published: Make the marked caption a sentence: lower-case but for its first character, which may be
            a mark. Boxes are printed as by `box_text`.

    Returns:
        Prompt and answer.

    Raises:
        UserError: If spans overlap or leave the caption.
    """
    text, end = "", 0
    for start, stop, boxes in sorted(spans, key=lambda span: span[:2]):
        if not end <= start < stop <= len(caption):
            raise UserError(
                f"span {start}..{stop} overlaps another or leaves the caption {caption!r}; drop it"
            )
        printed = "".join(box_text(box, width, height, published=published) for box in boxes)
        text += f"{caption[end:start]}||{caption[start:stop]} {printed}||"
        end = stop
    text += caption[end:]
    text = sentence(text) if published else text
    return [Chunk(INSTRUCTIONS["grounded captioning"] + "\n"), Chunk(text + END, supervised=True)]


def chat(turns: Sequence[tuple[str, str]], *, published: bool = False) -> list[Chunk]:
    """Return a conversation of which only the model's turns are supervised.

    Args:
        turns: (role, text), role "human" or "gpt"; `IMAGE` marks the image in the text.
        published: Make a sentence of every turn, lower-case but for its first character, before the marker
            is taken out of the first turn.

    Returns:
        The prompt.

    Raises:
        UserError: If a role is unknown.
    """
    chunks = []
    for i, (role, text) in enumerate(turns):
        if role not in ("human", "gpt"):
            raise UserError(f"role {role!r} is unknown; use 'human' or 'gpt'")
        text = _published_turn(text, i) if published else without_marker(text)
        last = END if i == len(turns) - 1 else ""
        chunks.append(Chunk(text + "\n" + last, supervised=role == "gpt"))
    return chunks


def _published_turn(text: str, number: int) -> str:
    text = sentence(text) or "."
    return text if number else text.replace("\n" + IMAGE, "").replace(IMAGE + "\n", "")


def _answer(text: str | None, *, keep_case: bool = False) -> list[Chunk]:
    return [] if text is None else [Chunk(sentence(text, keep_case=keep_case) + END, supervised=True)]


def _choices(printed: Sequence[str], right: int | None) -> list[Chunk]:
    """`A: ...` a chunk each, the last one with the prompt for the letter, and the letter."""
    if not 2 <= len(printed) <= len(LETTERS):
        raise UserError(f"{len(printed)} choices: a question needs 2 to {len(LETTERS)}")
    lines = [f"{letter}: {choice}\n" for letter, choice in zip(LETTERS, printed, strict=False)]
    chunks = [Chunk(line) for line in lines[:-1]] + [Chunk(lines[-1] + "Answer: ")]
    if right is None:
        return chunks
    if not 0 <= right < len(printed):
        raise UserError(f"right choice {right} must be in 0 .. {len(printed) - 1}")
    return [*chunks, Chunk(f"{LETTERS[right]}." + END, supervised=True)]


# --- where the image stands ---------------------------------------------------------------------------------


def image_place(chunks: Sequence[Chunk], layout: str) -> int:
    """Return the number of chunks before the image.

    With several turns "query-first" has the first query before the image and the later ones after it. A
    prompt whose answer follows its first chunk (captioning) has nothing else to put first.

    Args:
        chunks: The prompt.
        layout: One of LAYOUTS.

    Returns:
        A number from 0 on.

    Raises:
        UserError: If the layout is unknown.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r} is unknown; use {', '.join(LAYOUTS)}")
    if layout in ("agnostic", "two-pass"):
        return 0
    first = next((i for i, chunk in enumerate(chunks) if chunk.supervised), len(chunks))
    return min(1, first) if layout == "instruction-first" else first
