"""What every task shares: the `Batch` it makes and the interface that trainers use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from synthetic.tasks import sampling
from synthetic.tasks.sampling import IntArray
from synthetic.vocab import Vocabulary

if TYPE_CHECKING:  # torch takes seconds to import, which listing tasks for a help page can spare
    import torch


@dataclass(frozen=True, eq=False)
class Batch:
    """Token sequences of one layout and length; no padding, so no mask. Tensors are int64.

    input_ids: (B, T).
    labels: (B, A) ids; the logits at sequence index answer_at[j] are scored against labels[:, j].
    answer_at: (A,) indices into the T axis.
    target_index: (B, K) 0-based place of each query in x1..xN. Labels 0..K-1 are the answers to the
        queries in order; labels beyond them (supervise_bos) train but are no retrieval.
    length: N, the number of context symbols.
    chance: accuracy of a guess that knows the possible answers and nothing else.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    answer_at: torch.Tensor
    target_index: torch.Tensor
    length: int
    chance: float

    @classmethod
    def from_numpy(
        cls,
        input_ids: IntArray,
        labels: IntArray,
        answer_at: IntArray,
        target_index: IntArray,
        *,
        length: int,
        chance: float,
    ) -> Batch:
        """A batch that shares the memory of int64 arrays with the shapes above."""
        import torch

        return cls(
            input_ids=torch.from_numpy(input_ids),
            labels=torch.from_numpy(labels),
            answer_at=torch.from_numpy(answer_at),
            target_index=torch.from_numpy(target_index),
            length=length,
            chance=chance,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""
        names = ("input_ids", "labels", "answer_at", "target_index")
        moved = {n: getattr(self, n).to(device, non_blocking=non_blocking) for n in names}
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A generator of labelled token sequences: all options are fields, all randomness arguments.

    A subclass says how to draw contexts and targets (`draw`), how to lay them out (`assemble`), and
    sets `name` (registry key) and `version` (raised whenever the same arguments would give other
    batches; store it with results).
    """

    name: ClassVar[str]
    version: ClassVar[int]

    seq_len: int  # N, the longest context

    @property
    @abstractmethod
    def vocabulary(self) -> Vocabulary:
        """Token strings and ids."""

    @abstractmethod
    def lengths(self) -> tuple[int, int]:
        """Shortest and longest context that `batch` draws when it is given no `length`."""

    @abstractmethod
    def max_queries(self, length: int | None = None) -> int:
        """The most queries a context of `length` allows (None: whatever length `batch` draws)."""

    def dense_queries(self) -> int:
        """How many queries a training sequence can have and still be a sequence of this task."""
        return min(64, self.max_queries(self.seq_len))

    @abstractmethod
    def max_length(self, queries: int = 1) -> int:
        """The most tokens T of a batch with up to `queries` queries: size of a position table."""

    @abstractmethod
    def draw(
        self, rng: np.random.Generator, rows: int, length: int, queries: int
    ) -> tuple[IntArray, IntArray]:
        """`rows` independent contexts (rows, length) of 0-based symbols, targets (rows, queries)."""

    @abstractmethod
    def assemble(self, context: IntArray, target: IntArray) -> Batch:
        """The batch for given contexts (B, N) of 0-based symbols and targets (B, K)."""

    @abstractmethod
    def check(self, length: int, queries: int) -> None:
        """Raise ValueError unless batches of this length with this many queries can be made."""

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    def batch(
        self,
        batch_size: int,
        *,
        seed: int,
        index: int,
        split: str = "train",
        queries: int = 1,
        length: int | None = None,
    ) -> Batch:
        """Batch number `index` of the stream (seed, split).

        A pure function of the task's options and these arguments: no global random state is read or
        moved, any process can make any batch, and a resumed run continues at its next index.
        Contexts of the splits "train" and "heldout" are disjoint (see `sampling.is_heldout`).

        queries: K, number of queries a row, drawn without replacement.
        length: number of context symbols, up to seq_len (for a curriculum); None: the task's own.
        Raises ValueError, in one line, for arguments that cannot be met.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1")
        shortest, longest = self.lengths() if length is None else (length, length)
        self.check(shortest, queries)
        rng = sampling.stream(seed, split, index)
        n = int(rng.integers(shortest, longest + 1)) if shortest < longest else longest
        context, target = sampling.draw_split(
            lambda rows: self.draw(rng, rows, n, queries),
            batch_size,
            split,
            row_cells=max(n, self.vocabulary.num_symbols),
        )
        return self.assemble(context, target)

    def render(self, batch: Batch, row: int = 0) -> str:
        """One row as two aligned lines: tokens, and below each the label scored there, or a dot."""
        tokens = self.vocabulary.decode(batch.input_ids[row].tolist())
        labels = ["."] * len(tokens)
        answers = self.vocabulary.decode(batch.labels[row].tolist())
        for at, answer in zip(batch.answer_at.tolist(), answers, strict=True):
            labels[at] = answer
        widths = [max(len(pair[0]), len(pair[1])) for pair in zip(tokens, labels, strict=True)]
        return "\n".join(
            head + " ".join(s.rjust(w) for s, w in zip(line, widths, strict=True))
            for head, line in (("input  ", tokens), ("label  ", labels))
        )
