"""Arrange an image and chunks of text as one sequence of token ids, and put the image's vectors into it.

    ### patches && patches && ... patches ###

Ordinary tokens of the GPT-NeoX vocabulary mark begin, end and rows. Patches are placeholders that `splice`
replaces. A grid of g x g patches takes g (g + 1) + 1 tokens: 601 at 336 pixels, 1,191 at 480.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ssm_retrieval.errors import UserError
from vlm.prompts import Chunk, image_place

if TYPE_CHECKING:
    from torch import Tensor

BEGIN = 4118  # "###"
ROW = 10494  # "&&"
PLACEHOLDER = -200  # id of a patch, no token
IGNORE = -100  # label of tokens that are not supervised
Encode = Callable[[str], list[int]]


class TooLong(ValueError):
    """A prompt leaves no room for the image or for an answer."""


def grid_side(pixels: int, patch: int = 14) -> int:
    """Return the number of patches along one side of an image; pixels left over (4 of 480) are not seen.

    Raises:
        UserError: If the image is smaller than one patch.
    """
    if pixels < patch:
        raise UserError(f"an image of {pixels} pixels has no patch of {patch}; use a larger one")
    return pixels // patch


def image_ids(side: int, markers: tuple[int, int] = (BEGIN, ROW)) -> list[int]:
    """Return the token ids of an image; a separator stands between two rows.

    Args:
        side: Patches along one side.
        markers: Ids of begin and end, and of the row separator. The default is GPT-NeoX's vocabulary.

    Returns:
        Side (side + 1) + 1 ids.
    """
    edge, row_mark = markers
    ids = [edge]
    for row in range(side):
        ids += [PLACEHOLDER] * side + [row_mark if row < side - 1 else edge]
    return ids


def readings(layout: str) -> int:
    """Return how many times an image stands in a prompt of a layout."""
    return 2 if layout == "two-pass" else 1


def sequence(
    chunks: Sequence[Chunk],
    encode: Encode,
    side: int,
    layout: str = "agnostic",
    max_length: int | None = None,
    markers: tuple[int, int] = (BEGIN, ROW),
) -> tuple[list[int], list[int]]:
    """Return the token ids of an image and its chunks of text, and their labels.

    Args:
        chunks: Prompt and answers.
        encode: Text -> ids, without special tokens.
        side: Patches along one side of the image.
        layout: Where the image stands (`vlm.prompts.Layout`).
        max_length: Cut the sequence to this many tokens, as published training does.
        markers: As for `image_ids`.

    Returns:
        input_ids and labels, of equal length. Labels are not shifted; -100 = not supervised.

    Raises:
        UserError: If `max_length` cuts every image of this size.
        TooLong: If only this prompt has its image cut or loses all its supervised tokens.
    """
    place, image = image_place(chunks, layout), image_ids(side, markers) * readings(layout)
    ids: list[int] = []
    labels: list[int] = []
    for i in range(len(chunks) + 1):
        if i == place:
            ids += image
            labels += [IGNORE] * len(image)
            image_stop = len(ids)
        if i < len(chunks):
            found = encode(chunks[i].text)
            ids += found
            labels += found if chunks[i].supervised else [IGNORE] * len(found)
    if max_length is None or len(ids) <= max_length:
        return ids, labels
    if image_stop > max_length:
        error = TooLong if len(image) <= max_length else UserError
        raise error(
            f"max_length={max_length} cuts the image, which ends at token {image_stop}; use at least that"
        )
    answered = any(label != IGNORE for label in labels)
    ids, labels = ids[:max_length], labels[:max_length]
    if answered and all(label == IGNORE for label in labels):
        raise TooLong(f"max_length={max_length} leaves no token of an answer; shorten the prompt or raise it")
    return ids, labels


def splice(table: Tensor, input_ids: Tensor, patches: Tensor) -> Tensor:
    """Look up token vectors, and put patches in place of the placeholders.

    Args:
        table: (V, D) token embedding.
        input_ids: (B, L) int64 with exactly P negative ids per row, or 2 P where the image stands twice.
        patches: (B, P, D) vectors, in the order of the placeholders.

    Returns:
        (B, L, D) in the dtype of `table`; differentiable with respect to `table` and `patches`.

    Raises:
        UserError: If placeholders and patches differ in number.
    """
    holes = input_ids < 0
    counts = sorted(set(holes.sum(1).tolist()))
    if counts == [2 * patches.shape[1]]:
        patches = patches.repeat(1, 2, 1)
    elif counts != [patches.shape[1]]:
        raise UserError(f"{counts} placeholders a row for {patches.shape[1]} patches; they must be equal")
    vectors = table[input_ids.clamp(min=0)]
    return vectors.masked_scatter(holes[..., None], patches.to(vectors.dtype))
