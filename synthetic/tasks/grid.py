"""Token retrieval on a 2-D grid: which patch of the image holds the queried symbol?

Source: the synthetic grounding of "Shaking Up VLMs" (arXiv 2409.05395), whose 576 symbols stand for 24 x 24
image patches, in the layout in which that paper's vision-language models see an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from typing import ClassVar

import numpy as np

from ssm_retrieval.errors import UserError
from synthetic.tasks.position import Position
from synthetic.tasks.sampling import IntArray
from synthetic.vocab import IMAGE, ROW, Vocabulary


@dataclass(frozen=True, kw_only=True)
class Grid(Position):
    """As `Position`, but the context is an image of g rows of g patches: `###` row `&&` row .. row `###`.

    Grid(seq_len=4, num_symbols=6), context 5 1 2 4, target 2, below each token its label:

        input  <bos> ### <s5> <s1> && <s2> <s4> ### <query> <s2>
        label      .   .    .    .  .    .    .   .       . <p2>

    The answer is the number of the patch in raster order, 0 .. g * g - 1. So one task asks for both row and
    column, and separators, which are no patches, must not be counted.

    A context shorter than seq_len (`batch(length=...)`, a curriculum) is the top of the image: rows of g
    patches, of which the last may be cut short.

    Attributes:
        seq_len: N = g * g patches; the image takes g * (g + 1) + 1 tokens, 601 for 576 patches.
    """

    name: ClassVar[str] = "grid"
    help: ClassVar[str] = "the same in an image of rows; --seq-len is a square"

    @property
    def side(self) -> int:
        """g, patches per row."""
        return isqrt(self.seq_len)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        num_symbols = self.seq_len if self.num_symbols is None else self.num_symbols
        return Vocabulary(num_symbols, num_positions=self.seq_len, extra=(IMAGE, ROW), first_id=self.first_id)

    def settle(self) -> None:
        g = self.side
        if g * g != self.seq_len:
            raise UserError(
                f"seq_len {self.seq_len} is no square of patches: give {g * g} or {(g + 1) * (g + 1)}"
            )
        super().settle()

    def unit(self) -> tuple[int, int]:
        """Rows: g patches, which are g + 1 tokens."""
        return self.side, self.side + 1

    def _arrange(self, symbols: IntArray) -> IntArray:
        rows, n = symbols.shape
        patch = np.arange(n)
        at = 1 + patch + patch // self.side  # after the begin marker and a separator a full row before it
        image = np.full((rows, int(at[-1]) + 2), self.vocabulary.marker(ROW), dtype=np.int64)
        image[:, at] = symbols
        image[:, [0, -1]] = self.vocabulary.marker(IMAGE)
        return image
