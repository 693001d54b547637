"""Selective copying: remember symbols that stand among noise, and repeat them in order.

Source: Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752,
section 4.1 and appendix E.1); symbols, noise and markers as in S4's copying task (state-spaces/s4).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import lgamma, log
from typing import ClassVar

import numpy as np

from ssm_retrieval.errors import UserError
from synthetic.tasks.base import Batch, Task
from synthetic.tasks.layouts import OWN_LAYOUTS, check_layout
from synthetic.tasks.sampling import IntArray, sample_distinct
from synthetic.vocab import COPY, WHITE, Vocabulary


@dataclass(frozen=True, kw_only=True)
class SelectiveCopy(Task):
    """Some symbols among noise, then as many markers, at which the model must repeat the symbols in order.

    SelectiveCopy(seq_len=6, num_tokens=3), context - 5 - - 2 9, below each token its label:

        input  <white> <s5> <white> <white> <s2> <s9> <copy> <copy> <copy>
        label        .    .       .       .    .    .   <s5>   <s2>   <s9>

    Every symbol counts as a query of its own, so accuracy is the share of symbols copied rightly, and "by
    position" means by place in the context. The question is part of the sequence. In layout "two-pass"
    symbols and noise come twice before the markers. A guess is right with chance 1 / V.

    Attributes:
        seq_len: N, the symbols and the noise; 4096 in the paper.
        num_symbols: V, different symbols; the paper's 16 tokens are 14 symbols, the noise and the marker.
        num_tokens: How many symbols are to be copied; 16 in the paper. They are drawn with replacement and
            stand at uniform places. A context shorter than this consists of symbols only.
        layout: "suffix" or "two-pass".

    Raises:
        UserError: For options that the task cannot have.
    """

    name: ClassVar[str] = "selective-copy"
    version: ClassVar[int] = 1
    help: ClassVar[str] = "symbols that stand among noise, in order (Mamba)"
    layouts: ClassVar[tuple[str, ...]] = OWN_LAYOUTS
    younger: ClassVar[tuple[str, ...]] = ("layout",)

    num_symbols: int = 14
    num_tokens: int = 16
    layout: str = "suffix"

    def settle(self) -> None:
        check_layout(self.name, self.layout, self.layouts)
        if not 1 <= self.num_tokens <= self.seq_len:
            raise UserError(f"num_tokens {self.num_tokens} must be in 1 .. seq_len {self.seq_len}")

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.num_symbols, num_positions=0, extra=(WHITE, COPY), first_id=self.first_id)

    def max_queries(self, length: int | None = None) -> int:
        return self.num_tokens if length is None else min(self.num_tokens, length)

    def usual_queries(self, length: int | None = None) -> int:
        return self.max_queries(length)

    def max_length(self, queries: int = 1) -> int:
        return self.seq_len * (1 + (self.layout == "two-pass")) + self.num_tokens

    def check(self, length: int, queries: int) -> None:
        super().check(length, queries)
        if queries < self.max_queries(length):
            raise UserError(
                f"queries {queries}: task {self.name} asks for all {self.max_queries(length)} tokens"
            )

    def draw(
        self, rng: np.random.Generator, rows: int, length: int, queries: int
    ) -> tuple[IntArray, IntArray]:
        target = np.sort(sample_distinct(rng, rows, queries, length), axis=1)
        context = np.full((rows, length), self.num_symbols, dtype=np.int64)
        np.put_along_axis(context, target, rng.integers(0, self.num_symbols, target.shape), axis=1)
        return context, target

    def assemble(self, context: IntArray, target: IntArray) -> Batch:
        """context: symbols, with num_symbols for noise; target: [B, num_tokens] places, ascending."""
        (rows, n), k = context.shape, target.shape[1]
        vocabulary = self.vocabulary
        ids = np.empty((rows, n + k), dtype=np.int64)
        noise = vocabulary.marker(WHITE)
        ids[:, :n] = np.where(context < self.num_symbols, context + vocabulary.first_symbol, noise)
        ids[:, n:] = vocabulary.marker(COPY)
        labels = np.take_along_axis(ids, target, axis=1)
        if self.layout == "two-pass":
            ids = np.concatenate([ids[:, :n], ids], axis=1)
        answer_at = ids.shape[1] - k + np.arange(k, dtype=np.int64)
        return Batch.from_numpy(ids, labels, answer_at, target, length=n, chance=1 / self.num_symbols)

    def log_contexts(self, length: int) -> float:
        """V^K sequences at C(N, K) choices of places."""
        k = self.max_queries(length)
        places = lgamma(length + 1) - lgamma(k + 1) - lgamma(length - k + 1)
        return places + k * log(self.num_symbols)
