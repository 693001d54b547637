"""N-gram retrieval: which symbols followed the queried ones? And the same with several right answers.

Source: "Retrievit" (arXiv 2603.02874). In both tasks n = query_size + answer_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil, log
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ssm_retrieval.errors import UserError
from synthetic.tasks.base import Batch, Course, Task
from synthetic.tasks.layouts import NGRAM_LAYOUTS, check_layout
from synthetic.tasks.sampling import IntArray, sample_distinct
from synthetic.vocab import Vocabulary

# Occurrences of a random query expected in a context, at most: beyond that hardly any draw has it once.
MOST_OCCURRENCES = 3.0


@dataclass(frozen=True, kw_only=True)
class Ngram(Task):
    """N symbols drawn with replacement: which r symbols followed the m queried ones?

    Ngram(seq_len=6, num_symbols=8), context 4 1 7 2 5 1, start 1, below each token its label:

        input  <bos> <s4> <s1> <s7> <s2> <s5> <s1> <bos> <query> <s1> <s7> <query> <s2> <s5>
        label      .    .    .    .    .    .    .     .       .    .    .    <s2> <s5> <s1>

    The n-gram (n = m + r) starts anywhere in 0 .. N-n. Context and start are drawn again until the query, its
    first m symbols, stands nowhere else in the context. An answer is right if all its r symbols are.

    The vocabulary does not depend on seq_len, so `at(length)` tests extrapolation to any length. Guessing one
    of the N - n + 1 places is right with chance 1 / (N - n + 1).

    Attributes:
        seq_len: N, the number of context symbols.
        num_symbols: V; 30 in the paper.
        min_seq_len: If given, N is uniform on min_seq_len .. seq_len, drawn once per batch (the paper trains
            on 50 .. 100 and tests at 100 and more); `batch(length=...)` overrides it.
        query_size: m; 2 in the paper.
        answer_size: r; 3 in the paper.
        layout: "suffix", "prefix", "instruction" or "two-pass", see `synthetic.tasks.layouts`.

    Raises:
        UserError: For options that the task cannot have.
    """

    name: ClassVar[str] = "ngram"
    version: ClassVar[int] = 1
    help: ClassVar[str] = "symbols that follow the queried ones"
    paper: ClassVar[Course | None] = Course("linear", 20, 1000)
    layouts: ClassVar[tuple[str, ...]] = tuple(NGRAM_LAYOUTS)

    num_symbols: int = 30
    min_seq_len: int | None = None
    query_size: int = 2
    answer_size: int = 3
    layout: str = "suffix"

    def settle(self) -> None:
        check_layout(self.name, self.layout, self.layouts)
        for option, least in (("num_symbols", 2), ("query_size", 1), ("answer_size", 1)):
            if getattr(self, option) < least:
                raise UserError(f"{option} {getattr(self, option)} must be at least {least}")
        if self.min_seq_len is not None and not self.shortest <= self.min_seq_len <= self.seq_len:
            raise UserError(
                f"min_seq_len {self.min_seq_len} must be in {self.shortest} .. seq_len {self.seq_len}"
            )

    @property
    def shortest(self) -> int:
        return self.query_size + self.answer_size

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.num_symbols, num_positions=0, first_id=self.first_id)

    def lengths(self) -> tuple[int, int]:
        return self.seq_len if self.min_seq_len is None else self.min_seq_len, self.seq_len

    def max_length(self, queries: int = 1) -> int:
        context = 2 * self.seq_len + 1 if self.layout == "two-pass" else self.seq_len
        return context + self.query_size + self.answer_size + 3 + (self.layout == "instruction")

    def check(self, length: int, queries: int) -> None:
        super().check(length, queries)
        # the longest context a batch may draw, whichever length is asked for
        longest = max(length, self.lengths()[1])
        if longest > MOST_OCCURRENCES * self.num_symbols**self.query_size:
            least = ceil((longest / MOST_OCCURRENCES) ** (1 / self.query_size))
            raise UserError(
                f"num_symbols {self.num_symbols} leaves hardly a query of {self.query_size} unique in a "
                f"context of length {longest}: give num_symbols >= {least}"
            )

    def draw(
        self, rng: np.random.Generator, rows: int, length: int, queries: int
    ) -> tuple[IntArray, IntArray]:
        context = np.empty((rows, length), dtype=np.int64)
        start = np.empty((rows, 1), dtype=np.int64)
        again = np.arange(rows)
        while again.size:
            context[again] = rng.integers(0, self.num_symbols, (again.size, length))
            start[again] = rng.integers(0, length - self.shortest + 1, (again.size, 1))
            query = _slice(context[again], start[again], self.query_size)
            again = again[_occurrences(context[again], query) != 1]
        return context, start

    def assemble(self, context: IntArray, target: IntArray) -> Batch:
        return self._assemble(context, target, None)

    def _assemble(self, context: IntArray, start: IntArray, alternatives: IntArray | None) -> Batch:
        n = context.shape[1]
        symbols = context + self.vocabulary.first_symbol
        query = _slice(symbols, start, self.query_size)
        answer = _slice(symbols, start + self.query_size, self.answer_size)
        ids, answer_at = NGRAM_LAYOUTS[self.layout](self.vocabulary, symbols, query, answer)
        return Batch.from_numpy(
            ids,
            answer,
            answer_at,
            start,
            length=n,
            chance=1 / (n - self.query_size - self.answer_size + 1),
            answer_tokens=self.answer_size,
            alternatives=alternatives,
        )

    def log_contexts(self, length: int) -> float:
        """V^N contexts, of which a share e^-(expected occurrences) has any given query only once."""
        return length * log(self.num_symbols) - length / self.num_symbols**self.query_size


@dataclass(frozen=True, kw_only=True)
class NgramDuplicate(Ngram):
    """As `Ngram`, but the query stands in every block of the context, each time followed by other symbols.

    NgramDuplicate(seq_len=10, num_symbols=8, blocks=2, query_size=1), targets 5 1, context
    3 1 0 2 5 1 4 6 0 7:

        input  <bos> <s3> <s1> <s0> <s2> <s5> <s1> <s4> <s6> <s0> <s7> <bos> <query> <s1> <query> <s4> <s6>
        label      .    .    .    .    .    .    .    .    .    .    .     .       .    .    <s4> <s6> <s0>

    It tests which occurrence a model trained on `Ngram` prefers: the earliest, the latest or another one
    (`synthetic.evaluate.evaluate_blocks`). The labels are the answer of a block drawn uniformly, so training
    prefers none, and a perfect model is right with chance 1 / blocks only; `Batch.alternatives` holds all
    answers.

    The context is `blocks` times floor(N / blocks) symbols. In each block the query, whose symbols differ,
    stands at a uniform place that leaves more than answer_size symbols behind it. A block is drawn again
    until its whole n-gram stands there once and its answer differs from those of earlier blocks. As in the
    original, the bare query may occur more often.

    Attributes:
        blocks: Number of blocks M; Retrievit intended 2, 3, 4, 5 and 10, at seq_len 100.
    """

    name: ClassVar[str] = "ngram-duplicate"
    help: ClassVar[str] = "the same; the query stands in several blocks"

    blocks: int = 4

    def settle(self) -> None:
        super().settle()
        if self.num_symbols < self.query_size:
            raise UserError(f"num_symbols {self.num_symbols} is less than query_size {self.query_size}")
        if 2 * self.blocks > self.num_symbols**self.answer_size:
            raise UserError(
                f"blocks {self.blocks} need as many different answers: give more symbols or fewer blocks"
            )

    @property
    def shortest(self) -> int:
        if self.blocks < 1:
            raise UserError(f"blocks {self.blocks} must be at least 1")
        return self.blocks * (self.query_size + self.answer_size + 1)

    def draw(
        self, rng: np.random.Generator, rows: int, length: int, queries: int
    ) -> tuple[IntArray, IntArray]:
        size, m, n = length // self.blocks, self.query_size, self.query_size + self.answer_size
        query = sample_distinct(rng, rows, m, self.num_symbols)
        context = np.empty((rows, self.blocks, size), dtype=np.int64)
        start = np.empty((rows, self.blocks), dtype=np.int64)
        answers = np.full((rows, self.blocks, self.answer_size), -1, dtype=np.int64)
        for b in range(self.blocks):
            again = np.arange(rows)
            while again.size:
                block = rng.integers(0, self.num_symbols, (again.size, size))
                place = rng.integers(0, size - n, (again.size, 1))
                np.put_along_axis(block, place + np.arange(m), query[again], axis=1)
                gram = _slice(block, place, n)
                known = (answers[again, :b] == gram[:, None, m:]).all(-1).any(-1)
                context[again, b], start[again, b] = block, place[:, 0] + b * size
                answers[again, b] = gram[:, m:]
                again = again[known | (_occurrences(block, gram) != 1)]
        order = sample_distinct(rng, rows, self.blocks, self.blocks)
        return context.reshape(rows, -1), np.take_along_axis(start, order, axis=1)

    def assemble(self, context: IntArray, target: IntArray) -> Batch:
        """target: [B, blocks], the n-gram's places in the blocks; the first is labelled."""
        symbols = context + self.vocabulary.first_symbol
        places = np.sort(target, axis=1) + self.query_size
        answers = [_slice(symbols, place[:, None], self.answer_size) for place in places.T]
        return self._assemble(context, target[:, :1], np.stack(answers, axis=1))

    def log_contexts(self, length: int) -> float:
        """The symbols that the n-grams leave free."""
        free = length // self.blocks - self.query_size - self.answer_size
        return self.blocks * free * log(self.num_symbols)


def _slice(rows: IntArray, start: IntArray, size: int) -> IntArray:
    """[B, size] the part of each row [B, N] that begins at start [B, 1]."""
    return np.take_along_axis(rows, start + np.arange(size), axis=1)


def _occurrences(rows: IntArray, gram: IntArray) -> npt.NDArray[np.intp]:
    """[B] how often each row [B, N] contains its gram [B, m]."""
    width = rows.shape[1] - gram.shape[1] + 1
    hit = np.ones((len(rows), width), dtype=bool)
    for i in range(gram.shape[1]):
        hit &= rows[:, i : i + width] == gram[:, i : i + 1]
    return hit.sum(axis=1)
