"""Induction heads: what followed the special token when it stood here before?

Source: Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752,
section 4.1 and appendix E.1), after the task of H3 (Fu et al. 2022, arXiv 2212.14052).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import log
from typing import ClassVar

import numpy as np

from synthetic.tasks.base import Batch, Task
from synthetic.tasks.layouts import OWN_LAYOUTS, check_layout
from synthetic.tasks.sampling import IntArray
from synthetic.vocab import Vocabulary


@dataclass(frozen=True, kw_only=True)
class Induction(Task):
    """A special token stands among random symbols and again at the end: what followed it before?

    Induction(seq_len=6, num_symbols=8), context 3 1 - 5 1 7, target 2, below each token its label:

        input  <s3> <s1> <query> <s5> <s1> <s7> <query>
        label     .    .       .    .    .    .    <s5>

    The question is part of the sequence. In layout "two-pass" the first N tokens come twice. A guess is right
    with chance 1 / V.

    Attributes:
        seq_len: N, the symbols and the first special token, whose place is uniform on 0 .. N-2. The paper
            trains at 256 and tests up to 2^20 (`at(length)`).
        num_symbols: V; 16 in the paper. The special token, here `<query>`, is not one of them.
        layout: "suffix" or "two-pass".

    Raises:
        UserError: For options that the task cannot have.
    """

    name: ClassVar[str] = "induction"
    version: ClassVar[int] = 1
    help: ClassVar[str] = "symbol that followed a special token (Mamba)"
    layouts: ClassVar[tuple[str, ...]] = OWN_LAYOUTS
    younger: ClassVar[tuple[str, ...]] = ("layout",)

    num_symbols: int = 16
    layout: str = "suffix"

    def settle(self) -> None:
        check_layout(self.name, self.layout, self.layouts)

    @property
    def shortest(self) -> int:
        return 2

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.num_symbols, num_positions=0, first_id=self.first_id)

    def max_length(self, queries: int = 1) -> int:
        return self.seq_len * (1 + (self.layout == "two-pass")) + 1

    def draw(
        self, rng: np.random.Generator, rows: int, length: int, queries: int
    ) -> tuple[IntArray, IntArray]:
        context = rng.integers(0, self.num_symbols, (rows, length))
        target = rng.integers(0, length - 1, (rows, 1))
        np.put_along_axis(context, target, self.num_symbols, axis=1)
        return context, target

    def assemble(self, context: IntArray, target: IntArray) -> Batch:
        """context: symbols, with num_symbols for the special token, which stands at target [B, 1]."""
        rows, n = context.shape
        vocabulary = self.vocabulary
        ids = np.full((rows, n + 1), vocabulary.query, dtype=np.int64)
        ids[:, :n] = np.where(context < self.num_symbols, context + vocabulary.first_symbol, vocabulary.query)
        labels = np.take_along_axis(ids, target + 1, axis=1)
        if self.layout == "two-pass":
            ids = np.concatenate([ids[:, :n], ids], axis=1)
        answer_at = np.array([ids.shape[1] - 1], dtype=np.int64)
        return Batch.from_numpy(ids, labels, answer_at, target, length=n, chance=1 / self.num_symbols)

    def log_contexts(self, length: int) -> float:
        return log(length - 1) + (length - 1) * log(self.num_symbols)
