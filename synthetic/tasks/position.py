"""Position retrieval, the synthetic grounding task: at which place does the queried symbol stand?

Source: "Shaking Up VLMs" (arXiv 2409.05395), synthetic visual grounding (a context of 576 symbols
stands for 576 image patches), and its successor "Retrievit" (arXiv 2603.02874).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import lgamma, log
from typing import ClassVar

import numpy as np

from ssm_retrieval.errors import UserError
from synthetic.tasks.base import Batch, Course, Task
from synthetic.tasks.layouts import LAYOUTS, check_layout
from synthetic.tasks.sampling import IntArray, sample_distinct
from synthetic.vocab import Vocabulary

BLANK = -1  # in a context: no symbol, but `<bos>`


@dataclass(frozen=True, kw_only=True)
class Position(Task):
    """N different symbols in random order: at which place (0-based) is the queried one?

    Position(seq_len=4, num_symbols=6), context 5 1 2 4, target 1, below each token its label:

        input  <bos> <s5> <s1> <s2> <s4> <query> <s1>
        label      .    .    .    .    .       . <p1>

    Guessing one of the N places is right with chance 1 / N.

    Attributes:
        seq_len: N, the number of context symbols and of position tokens.
        num_symbols: V >= N symbols, from which each context draws N without repetition; default N, so that a
            context is a permutation of all symbols, as in the papers.
        layout: "suffix", "prefix", "instruction" or "two-pass", see `synthetic.tasks.layouts`.
        supervise_bos: Append the answer and train the `<bos>` that ends the sequence as a second target (the
            papers' loss; single query only).

    Raises:
        UserError: For options that the task cannot have.
    """

    name: ClassVar[str] = "position"
    version: ClassVar[int] = 1
    help: ClassVar[str] = "place of the queried symbol; all symbols differ"
    paper: ClassVar[Course | None] = Course("cosine", 10, 100, switches=("supervise_bos",))
    layouts: ClassVar[tuple[str, ...]] = tuple(LAYOUTS)

    seq_len: int
    num_symbols: int | None = None
    layout: str = "suffix"
    supervise_bos: bool = False

    def settle(self) -> None:
        check_layout(self.name, self.layout, self.layouts)
        if self.num_symbols is None:
            object.__setattr__(self, "num_symbols", self.seq_len)
        self._check_symbols()

    @cached_property
    def vocabulary(self) -> Vocabulary:
        num_symbols = self.seq_len if self.num_symbols is None else self.num_symbols
        return Vocabulary(num_symbols, num_positions=self.seq_len, first_id=self.first_id)

    def max_queries(self, length: int | None = None) -> int:
        return self.lengths()[0] if length is None else length

    def max_length(self, queries: int = 1) -> int:
        """The most tokens T; queries beyond `max_queries(seq_len)` count as that many."""
        k = max(1, min(queries, self.max_queries(self.seq_len)))
        blank = np.empty((0, k), dtype=np.int64)
        context = self._arrange(np.empty((0, self.seq_len), dtype=np.int64))
        ids, _ = LAYOUTS[self.layout](self.vocabulary, context, blank, blank)
        return ids.shape[1] + self.supervise_bos

    def draw(
        self, rng: np.random.Generator, rows: int, length: int, queries: int
    ) -> tuple[IntArray, IntArray]:
        context = sample_distinct(rng, rows, length, self.vocabulary.num_symbols)
        return context, sample_distinct(rng, rows, queries, length)

    def assemble(self, context: IntArray, target: IntArray) -> Batch:
        vocabulary = self.vocabulary
        symbols = np.where(context == BLANK, vocabulary.bos, context + vocabulary.first_symbol)
        answers = target + vocabulary.first_position
        queries = np.take_along_axis(symbols, target, axis=1)
        ids, answer_at = LAYOUTS[self.layout](vocabulary, self._arrange(symbols), queries, answers)
        labels = answers
        if self.supervise_bos:  # in every layout the single answer follows the last input token
            answer_at = np.append(answer_at, ids.shape[1])
            ids = np.concatenate([ids, answers], axis=1)
            labels = np.concatenate([answers, np.full_like(answers, vocabulary.bos)], axis=1)
        n = context.shape[1]
        return Batch.from_numpy(ids, labels, answer_at, target, length=n, chance=1 / n)

    def part(self, batch: Batch) -> Batch:
        import torch

        (rows, tokens), queries = batch.input_ids.shape, batch.target_index.shape[1]
        gap = self.max_length(queries) - tokens
        # how many tokens follow the context
        behind = (queries - 1 if self.layout == "prefix" else queries + 1) + self.supervise_bos
        places = torch.arange(tokens).repeat(rows, 1)
        places[:, tokens - behind :] += gap
        if self.layout == "two-pass":  # each reading is followed by half of the gap
            places[:, (tokens - behind) // 2 : tokens - behind] += gap // 2
        return replace(batch, position_ids=places)

    def fill(self, context: IntArray, target: IntArray, start: IntArray) -> Batch:
        rows, n = context.shape
        filled = np.full((rows, self.seq_len), BLANK, dtype=np.int64)
        np.put_along_axis(filled, start[:, None] + np.arange(n), context, axis=1)
        batch = self.assemble(filled, target + start[:, None])
        return replace(batch, length=n, chance=1 / n)

    def dense_queries(self) -> int:
        """One if it comes first: to keep a list of queries in mind is another task than the one evaluated."""
        return 1 if self.layout == "prefix" else super().dense_queries()

    def check(self, length: int, queries: int) -> None:
        super().check(length, queries)
        if self.supervise_bos and queries > 1:
            raise UserError(f"queries {queries}: supervise_bos allows only queries 1")

    def _arrange(self, symbols: IntArray) -> IntArray:
        """The tokens (B, n) that show the symbols (B, N) to the model."""
        return symbols

    def _check_symbols(self) -> None:
        if self.vocabulary.num_symbols < self.seq_len:
            raise UserError(
                f"num_symbols {self.num_symbols} is less than seq_len {self.seq_len}, but no symbol "
                f"may occur twice: give num_symbols >= {self.seq_len}, or leave it out"
            )

    def log_contexts(self, length: int) -> float:
        """log of the number of different contexts, V! / (V - N)!."""
        v = self.vocabulary.num_symbols
        return lgamma(v + 1) - lgamma(v - length + 1)


@dataclass(frozen=True, kw_only=True)
class PositionVarlen(Position):
    """As `Position`, but only the queried symbol is unique: distractors are drawn with replacement.

    PositionVarlen(seq_len=5, num_symbols=4), context 2 2 1 2 3, target 4:

        input  <bos> <s2> <s2> <s1> <s2> <s3> <query> <s3>
        label      .    .    .    .    .    .       . <p4>

    The query is uniform over V symbols, the other N-1 context symbols over the V-1 remaining ones, its place
    uniform over 0 .. N-1 (Retrievit's repeated-symbol variant, which its scripts train with V = 30 at N =
    200). With K queries each of the K symbols occurs exactly once and the distractors avoid all of them, so V
    > K.

    Attributes:
        min_seq_len: If given, the number of distractors is uniform on min_seq_len .. seq_len - 1, drawn once
            per batch, so contexts have min_seq_len + 1 .. seq_len symbols (the original counts so);
            `batch(length=...)` overrides it.
    """

    name: ClassVar[str] = "position-varlen"
    help: ClassVar[str] = "the same; the other symbols repeat"

    min_seq_len: int | None = None

    def lengths(self) -> tuple[int, int]:
        shortest = self.seq_len if self.min_seq_len is None else self.min_seq_len + 1
        return shortest, self.seq_len

    def max_queries(self, length: int | None = None) -> int:
        return min(super().max_queries(length), self.vocabulary.num_symbols - 1)

    def dense_queries(self) -> int:
        """At most a quarter of the symbols, because distractors avoid the queried ones."""
        return min(super().dense_queries(), max(1, self.vocabulary.num_symbols // 4))

    def draw(
        self, rng: np.random.Generator, rows: int, length: int, queries: int
    ) -> tuple[IntArray, IntArray]:
        v = self.vocabulary.num_symbols
        queried = sample_distinct(rng, rows, queries, v)
        target = sample_distinct(rng, rows, queries, length)
        # Distractors as ranks among the symbols that are not queried ...
        context = rng.integers(0, v - queries, (rows, length))
        # ... and rank -> symbol: step over every queried symbol at or below, lowest first.
        for symbol in np.sort(queried, axis=1).T[:, :, None]:
            context += context >= symbol
        np.put_along_axis(context, target, queried, axis=1)
        return context, target

    def _check_symbols(self) -> None:
        if self.vocabulary.num_symbols < 2:
            raise UserError("num_symbols 1 leaves no symbol for distractors: give at least 2")
        if self.min_seq_len is not None and not 1 <= self.min_seq_len < self.seq_len:
            raise UserError(
                f"min_seq_len {self.min_seq_len} counts distractors and must be in "
                f"1 .. seq_len - 1 = {self.seq_len - 1}"
            )

    def log_contexts(self, length: int) -> float:
        """Natural logarithm of a lower bound on the number of contexts with a symbol that occurs once.

        There are N V (V-1)^(N-1) pairs of context and unique symbol; a context is in at most min(N, V) of
        them."""
        v = self.vocabulary.num_symbols
        return log(length) + log(v) + (length - 1) * log(v - 1) - log(min(length, v))
