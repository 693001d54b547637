"""Multi-query associative recall: key-value pairs first, then the keys again at power-law gaps.

Source: Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language Models"
(arXiv 2312.04927).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import lgamma
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ssm_retrieval.errors import UserError
from synthetic.tasks.base import Batch, Task
from synthetic.tasks.layouts import OWN_LAYOUTS, check_layout
from synthetic.tasks.sampling import IntArray, sample_distinct
from synthetic.vocab import WHITE, Vocabulary


@dataclass(frozen=True, kw_only=True)
class Mqar(Task):
    """D key-value pairs, then every key once more among fillers, where the model must give its value.

    Mqar(seq_len=12, num_symbols=8, num_pairs=2, random_fillers=False), pairs 1 4 and 3 7, targets 0 2:

        input  <s1> <s4> <s3> <s7> <s3> <white> <white> <white> <s1> <white> <white> <white>
        label     .    .    .    . <s7>       .       .       . <s4>       .       .       .

    Keys are D different symbols of the lower half of the vocabulary, values D different ones of the upper
    half. A queried key stands 2D + 2(g - 1) symbols from the start, where the g of a row are drawn without
    replacement from 1 .. (N - 2D) / 2 with weights g^(a - 1): mostly close behind the pairs, like repeated
    bigrams in text. Fillers are uniform over all symbols except the row's keys, which Zoology's may repeat by
    accident.

    Query and answer are part of the sequence. In layout "two-pass" the pairs come twice before the rest
    (Zoology's `num_passes`). One of the D values is right, so a guess has chance 1 / D.

    Attributes:
        seq_len: N, the whole sequence with its pairs once: nothing precedes or follows it. Zoology: 64 with 4
            pairs to 512 with 64.
        num_symbols: V; Zoology's default is 8192, and differences between architectures grow with it.
        num_pairs: D, fewer if the context is shorter than 4D; all are queried, or K of them.
        power: A; 1 makes the gaps uniform.
        random_fillers: False puts `<white>` instead of random symbols.
        layout: "suffix" or "two-pass", which makes the sequence 2 D tokens longer.

    Raises:
        UserError: For options that the task cannot have.
    """

    name: ClassVar[str] = "mqar"
    version: ClassVar[int] = 1
    help: ClassVar[str] = "values of many keys (Zoology)"
    layouts: ClassVar[tuple[str, ...]] = OWN_LAYOUTS
    younger: ClassVar[tuple[str, ...]] = ("layout",)

    num_symbols: int = 8192
    num_pairs: int = 8
    power: float = 0.01
    random_fillers: bool = True
    layout: str = "suffix"

    def settle(self) -> None:
        check_layout(self.name, self.layout, self.layouts)
        if self.num_pairs < 1:
            raise UserError(f"num_pairs {self.num_pairs} must be at least 1")
        if 4 * self.num_pairs > self.seq_len:
            raise UserError(
                f"num_pairs {self.num_pairs} and their queries do not fit in seq_len {self.seq_len}: give "
                f"num_pairs <= {self.seq_len // 4} or seq_len >= {4 * self.num_pairs}"
            )
        if self.num_symbols < 2 * self.num_pairs:
            raise UserError(
                f"num_symbols {self.num_symbols} is too few for {self.num_pairs} different keys and values: "
                f"give num_symbols >= {2 * self.num_pairs}"
            )
        if not self.power > 0:
            raise UserError(f"power {self.power} must be positive")

    @property
    def shortest(self) -> int:
        return 4

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.num_symbols, num_positions=0, extra=(WHITE,), first_id=self.first_id)

    def pairs(self, length: int | None = None) -> int:
        """Number of pairs in a context of `length`."""
        return self.num_pairs if length is None else min(self.num_pairs, length // 4)

    def max_queries(self, length: int | None = None) -> int:
        return self.pairs(length)

    def usual_queries(self, length: int | None = None) -> int:
        return self.pairs(length)

    def max_length(self, queries: int = 1) -> int:
        return self.seq_len + self._again(self.pairs())

    def _again(self, pairs: int) -> int:
        """How many tokens are read a second time."""
        return 2 * pairs if self.layout == "two-pass" else 0

    def draw(
        self, rng: np.random.Generator, rows: int, length: int, queries: int
    ) -> tuple[IntArray, IntArray]:
        d, half = self.pairs(length), self.num_symbols // 2
        keys = sample_distinct(rng, rows, d, half)
        values = half + sample_distinct(rng, rows, d, self.num_symbols - half)
        context = np.empty((rows, length), dtype=np.int64)
        context[:, 0 : 2 * d : 2], context[:, 1 : 2 * d : 2] = keys, values
        context[:, 2 * d :] = self._fillers(rng, keys, length - 2 * d)
        # in ascending order, as in Zoology: the earlier a pair, the sooner it tends to be asked for
        asked = np.sort(sample_distinct(rng, rows, queries, d), axis=1)
        at = 2 * d + 2 * power_law(rng, rows, queries, (length - 2 * d) // 2, self.power)
        np.put_along_axis(context, at, np.take_along_axis(keys, asked, axis=1), axis=1)
        return context, 2 * asked

    def _fillers(self, rng: np.random.Generator, keys: IntArray, size: int) -> IntArray:
        rows = len(keys)
        if not self.random_fillers:
            return np.full((rows, size), self.num_symbols, dtype=np.int64)
        is_key = np.zeros((rows, self.num_symbols), dtype=bool)
        np.put_along_axis(is_key, keys, True, axis=1)
        fillers = rng.integers(0, self.num_symbols, (rows, size))
        row, column = np.nonzero(np.take_along_axis(is_key, fillers, axis=1))
        while row.size:
            fillers[row, column] = rng.integers(0, self.num_symbols, row.size)
            bad = is_key[row, fillers[row, column]]
            row, column = row[bad], column[bad]
        return fillers

    def assemble(self, context: IntArray, target: IntArray) -> Batch:
        """context: symbols, with num_symbols for `<white>`; target: [B, K] places of the queried pairs."""
        vocabulary = self.vocabulary
        n = context.shape[1]
        tail = 2 * self.pairs(n)
        # Where each symbol stands after the pairs; queried keys stand there once, and no other entry is read.
        place = np.zeros((len(context), self.num_symbols + 1), dtype=np.int64)
        np.put_along_axis(place, context[:, tail:], np.arange(tail, n)[None, :], axis=1)
        keys = np.take_along_axis(context, target, axis=1)
        answer_at = np.take_along_axis(place, keys, axis=1)
        white = vocabulary.marker(WHITE)
        ids = np.where(context < self.num_symbols, context + vocabulary.first_symbol, white)
        labels = np.take_along_axis(ids, target + 1, axis=1)
        again = self._again(self.pairs(n))
        ids = np.concatenate([ids[:, :again], ids], axis=1)
        return Batch.from_numpy(ids, labels, answer_at + again, target, length=n, chance=1 / self.pairs(n))

    def log_contexts(self, length: int) -> float:
        d, half = self.pairs(length), self.num_symbols // 2
        free = self.num_symbols - half
        keys, values = lgamma(half + 1) - lgamma(half - d + 1), lgamma(free + 1) - lgamma(free - d + 1)
        return keys + values


def power_law(
    rng: np.random.Generator, rows: int, size: int, space: int, power: float
) -> npt.NDArray[np.int64]:
    """Different integers i of 0 .. space - 1, drawn one after the other with weights (i + 1)^(power - 1).

    Sorting exponential waiting times with these rates draws exactly so (Efraimidis and Spirakis 2006).

    Args:
        rng: Source of all randomness.
        rows: Number of independent draws.
        size: Integers per draw, at most `space`.
        space: Number of integers to draw from.
        power: 1 makes them uniform; less favours small ones.

    Returns:
        [rows, size] int64.
    """
    weights = np.arange(1, space + 1) ** (power - 1.0)
    return np.argsort(rng.standard_exponential((rows, space)) / weights, axis=1)[:, :size]
