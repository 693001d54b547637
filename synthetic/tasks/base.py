"""What every task shares: the `Batch` it makes and the interface that trainers use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ssm_retrieval.errors import UserError
from synthetic.tasks import sampling
from synthetic.tasks.sampling import IntArray
from synthetic.vocab import Vocabulary

if TYPE_CHECKING:  # torch takes seconds to import, which listing tasks for a help page can spare
    import torch

# Rows that `Task.examples` draws from one random stream: few, because contexts can be a million symbols long.
ROW_BLOCK = 16


@dataclass(frozen=True, eq=False)
class Batch:
    """Token sequences of one layout and length; no padding, so no mask. Tensors are int64.

    input_ids: (B, T).
    labels: (B, A) ids; the logits at sequence index answer_at[j] are scored against labels[:, j].
    answer_at: (A,) indices into the T axis, or (B, A) where they differ from row to row.
    target_index: (B, K) 0-based place of each query in x1..xN. The first K * answer_tokens labels are the
        answers to the queries in order; labels beyond them (supervise_bos) train but are no retrieval.
    length: N, the number of context symbols.
    chance: accuracy of a guess that knows the possible answers and nothing else.
    answer_tokens: r, tokens an answer consists of; it is right only if all of them are.
    alternatives: (B, M, r) the M answers that are equally right, in order of their place in the context,
        where a query has several; the labels are then one of them.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    answer_at: torch.Tensor
    target_index: torch.Tensor
    length: int
    chance: float
    answer_tokens: int = 1
    alternatives: torch.Tensor | None = None

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
        answer_tokens: int = 1,
        alternatives: IntArray | None = None,
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
            answer_tokens=answer_tokens,
            alternatives=None if alternatives is None else torch.from_numpy(alternatives),
        )

    @property
    def retrieved(self) -> int:
        """How many labels, counted from the first, are answers to queries."""
        return self.target_index.shape[1] * self.answer_tokens

    def right(self, predicted: torch.Tensor) -> torch.Tensor:
        """(B, K) bool: which answers are right, all their tokens, given (B, retrieved or more) ids."""
        equal = predicted[:, : self.retrieved] == self.labels[:, : self.retrieved]
        return equal.unflatten(1, (-1, self.answer_tokens)).all(-1)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""
        moved = {n: t.to(device, non_blocking=non_blocking) for n, t in self._tensors().items()}
        return replace(self, **moved)

    def split(self, parts: int) -> list[Batch]:
        """The rows in `parts` nearly equal shares, in order; the last are empty if there are too few."""
        shared = ("answer_at",) if self.answer_at.dim() == 1 else ()
        pieces: dict[str, Any] = {
            n: t.tensor_split(parts) for n, t in self._tensors().items() if n not in shared
        }
        return [replace(self, **{n: piece[i] for n, piece in pieces.items()}) for i in range(parts)]

    def _tensors(self) -> dict[str, Any]:
        names = ("input_ids", "labels", "answer_at", "target_index", "alternatives")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}


@dataclass(frozen=True)
class Course:
    """How a task's paper trains, for `--protocol paper`.

    schedule: of the learning rate; warmup, evaluations: of all steps a share of 1 / warmup is warm-up, and an
    evaluation follows every 1 / evaluations of them. switches: options of the task that are True in it, and
    False in every other run.
    """

    schedule: str
    warmup: int
    evaluations: int
    switches: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A generator of labelled token sequences: all options are fields, all randomness arguments.

    A subclass says how to draw contexts and targets (`draw`), how to lay them out (`assemble`), and
    sets

        name      registry key: what `--task` and folders call it
        version   raised whenever the same arguments would give other batches; part of a run's identity
        help      what `--help` says of it, half a line
        paper     how its paper trains; None: `--protocol paper` is refused
    """

    name: ClassVar[str]
    version: ClassVar[int]
    help: ClassVar[str]
    paper: ClassVar[Course | None] = None

    seq_len: int  # N, the longest context
    first_id: int = 0  # of the vocabulary: how many ids of a model's table belong to other tokens

    @property
    @abstractmethod
    def vocabulary(self) -> Vocabulary:
        """Token strings and ids."""

    def lengths(self) -> tuple[int, int]:
        """Shortest and longest context that `batch` draws when it is given no `length`."""
        return self.seq_len, self.seq_len

    def max_queries(self, length: int | None = None) -> int:
        """The most queries a context of `length` allows (None: whatever length `batch` draws)."""
        return 1

    def usual_queries(self, length: int | None = None) -> int:
        """Queries a sequence has unless told otherwise, and always in evaluation: one, or as many as the
        task's definition says."""
        return 1

    def dense_queries(self) -> int:
        """How many queries a training sequence can have and still be a sequence of this task."""
        return max(self.usual_queries(self.seq_len), min(64, self.max_queries(self.seq_len)))

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
    def log_contexts(self, length: int) -> float:
        """log of the number of different contexts, or of a lower bound."""

    @property
    def shortest(self) -> int:
        """The fewest context symbols for which the task makes sense."""
        return 1

    def settle(self) -> None:  # noqa: B027  tasks without such options need none
        """Check the options and fill in those that depend on others."""

    def __post_init__(self) -> None:
        if self.seq_len < self.shortest:
            raise UserError(f"seq_len {self.seq_len} must be at least {self.shortest}")
        self.settle()
        length = self.lengths()[0]
        self.check(length, self.usual_queries(length))

    def check(self, length: int, queries: int) -> None:
        """Raise UserError unless batches of this length with this many queries can be made."""
        num_symbols = self.vocabulary.num_symbols
        if not self.shortest <= length <= self.seq_len:
            raise UserError(f"length {length} must be in {self.shortest} .. seq_len {self.seq_len}")
        if not 1 <= queries <= self.max_queries(length):
            raise UserError(
                f"queries {queries} must be in 1 .. {self.max_queries(length)} for task {self.name}, "
                f"length {length}, num_symbols {num_symbols}"
            )
        sampling.require_contexts(self.log_contexts(length), length, num_symbols)

    @property
    def vocab_size(self) -> int:
        """Number of tokens; ids are below first_id + vocab_size."""
        return len(self.vocabulary)

    def batch(
        self,
        batch_size: int,
        *,
        seed: int,
        index: int,
        split: str = "train",
        queries: int | None = None,
        length: int | None = None,
    ) -> Batch:
        """Batch number `index` of the stream (seed, split).

        A pure function of the task's options and these arguments: no global random state is read or
        moved, any process can make any batch, and a resumed run continues at its next index.
        Contexts of the splits "train", "validation" and "heldout" are disjoint (`sampling.split_of`).

        queries: K, number of queries a row, drawn without replacement; None: `usual_queries`.
        length: number of context symbols, up to seq_len (for a curriculum); None: the task's own.
        Raises UserError, in one line, for arguments that cannot be met.
        """
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} must be at least 1")
        shortest, longest = self.lengths() if length is None else (length, length)
        queries = self.usual_queries(length) if queries is None else queries
        self.check(shortest, queries)
        rng = sampling.stream(seed, split, index)
        n = int(rng.integers(shortest, longest + 1)) if shortest < longest else longest
        return self.assemble(*self._draw_side(rng, batch_size, split, n, queries))

    def examples(
        self,
        count: int,
        *,
        seed: int,
        split: str,
        length: int,
        queries: int | None = None,
        start: int = 0,
        batch_size: int = 256,
    ) -> Iterator[Batch]:
        """Rows start .. start + count - 1 of the stream (seed, split), in batches of `batch_size` at most.

        Row i is a function of the task's options, seed, split, length, queries and i: sets of different
        sizes are nested, whatever the sizes of their batches, and sets that share no row number are
        independent draws. Other arguments and errors as in `batch`.
        """
        for name, value, least in (("count", count, 1), ("batch_size", batch_size, 1), ("start", start, 0)):
            if value < least:
                raise UserError(f"{name} {value} must be at least {least}")
        queries = self.usual_queries(length) if queries is None else queries
        self.check(length, queries)
        end, contexts, targets, have = start + count, [], [], 0
        for block in range(start // ROW_BLOCK, -(-end // ROW_BLOCK)):
            first = block * ROW_BLOCK
            part = slice(max(start - first, 0), min(end - first, ROW_BLOCK))
            context, target = self._block(seed, split, block, length, queries)
            contexts.append(context[part])
            targets.append(target[part])
            have += len(contexts[-1])
            last = first + ROW_BLOCK >= end
            if have >= batch_size or last:
                context, target = np.concatenate(contexts), np.concatenate(targets)
                whole = have if last else have - have % batch_size
                for at in range(0, whole, batch_size):
                    rows = slice(at, min(at + batch_size, whole))
                    yield self.assemble(context[rows], target[rows])
                contexts, targets, have = [context[whole:]], [target[whole:]], have - whole

    def _block(
        self, seed: int, split: str, block: int, length: int, queries: int
    ) -> tuple[IntArray, IntArray]:
        """Contexts and targets of rows ROW_BLOCK * block and the ROW_BLOCK - 1 behind it."""
        return self._draw_side(sampling.stream(seed, split, block), ROW_BLOCK, split, length, queries)

    def _draw_side(
        self, rng: np.random.Generator, rows: int, split: str, length: int, queries: int
    ) -> tuple[IntArray, IntArray]:
        """Contexts and targets of `rows` rows whose context belongs to `split`."""
        return sampling.draw_split(
            lambda rows: self.draw(rng, rows, length, queries),
            rows,
            split,
            row_cells=max(length, self.vocabulary.num_symbols),
        )

    def at(self, length: int) -> Task:
        """A task of the same vocabulary that can make contexts of `length` symbols, also longer than its own:
        how a model trained on short contexts is tested for extrapolation (`synthetic.evaluate`).

        Raises UserError if answers in longer contexts need tokens that the vocabulary does not have.
        """
        if length <= self.seq_len:
            return self
        if self.vocabulary.num_positions:
            raise UserError(
                f"task {self.name} with seq_len {self.seq_len} has no answer tokens for length {length}: "
                f"build it with seq_len={length} and train with batch(length={self.seq_len})"
            )
        return replace(self, seq_len=length)

    def render(self, batch: Batch, row: int = 0) -> str:
        """One row as two aligned lines: tokens, and below each the label scored there, or a dot."""
        tokens = self.vocabulary.decode(batch.input_ids[row].tolist())
        labels = ["."] * len(tokens)
        answers = self.vocabulary.decode(batch.labels[row].tolist())
        places = batch.answer_at if batch.answer_at.dim() == 1 else batch.answer_at[row]
        for at, answer in zip(places.tolist(), answers, strict=True):
            labels[at] = answer
        widths = [max(len(pair[0]), len(pair[1])) for pair in zip(tokens, labels, strict=True)]
        return "\n".join(
            head + " ".join(s.rjust(w) for s, w in zip(line, widths, strict=True))
            for head, line in (("input  ", tokens), ("label  ", labels))
        )
