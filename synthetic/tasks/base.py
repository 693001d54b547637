"""What every task shares: the interface that trainers use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ssm_retrieval.errors import UserError
from synthetic.tasks import sampling
from synthetic.tasks.batch import Batch as Batch
from synthetic.tasks.sampling import IntArray
from synthetic.vocab import Vocabulary

if TYPE_CHECKING:  # torch takes seconds to import, which listing tasks for a help page can spare
    import torch

# Where a context lies that is shorter than seq_len (`synthetic.curricula`): at the first positions, with
# queries right behind or where they are at full length; or at a random place, alone or among `<bos>`.
Place = Literal["first", "gap", "window", "filled"]

# Rows that `Task.examples` draws from one random stream: few, because contexts can be a million symbols long.
ROW_BLOCK = 16


@dataclass(frozen=True)
class Course:
    """How a task's paper trains, for `--protocol paper`.

    Attributes:
        schedule: Schedule of the learning rate.
        warmup: The warm-up takes 1 / warmup of all steps.
        evaluations: How many evaluations a run has, at equal distances.
        switches: Options of the task that are True with this protocol and False by default.
    """

    schedule: str
    warmup: int
    evaluations: int
    switches: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A generator of labelled token sequences: all options are fields, all randomness is an argument.

    A subclass says how to draw contexts and targets (`draw`) and how to lay them out (`assemble`).

    Attributes:
        name: Registry key, used by `--task` and in the names of runs.
        version: Raise it whenever the same arguments would give other batches; part of a run's identity.
        help: Half a line for `--help`.
        paper: How its paper trains; None means that `--protocol paper` is refused.
        layouts: Values of the option `layout`, see `synthetic.tasks.layouts`; empty without such an option.
        younger: Options that came after runs of the task, which keep their names: at its default such an
            option is no part of a run's identity.
        seq_len: N, the longest context.
        first_id: Id of the vocabulary's first token; lower ids of a model's table belong to other tokens.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    help: ClassVar[str]
    paper: ClassVar[Course | None] = None
    layouts: ClassVar[tuple[str, ...]] = ()
    younger: ClassVar[tuple[str, ...]] = ()

    seq_len: int  # N, the longest context
    first_id: int = 0  # of the vocabulary: how many ids of a model's table belong to other tokens

    @property
    @abstractmethod
    def vocabulary(self) -> Vocabulary:
        """Token strings and ids."""

    @property
    def positional(self) -> bool:
        """Whether answers are positions."""
        return self.vocabulary.num_positions > 0

    def lengths(self) -> tuple[int, int]:
        """Shortest and longest context that `batch` draws if it is given no `length`."""
        return self.seq_len, self.seq_len

    def max_queries(self, length: int | None = None) -> int:
        """The most queries that a context of `length` allows; None: of any length that `batch` draws."""
        return 1

    def usual_queries(self, length: int | None = None) -> int:
        """Queries per sequence by default, and always in evaluation: one, or as many as the task defines."""
        return 1

    def dense_queries(self) -> int:
        """How many queries a training sequence can have and still be a sequence of this task."""
        return max(self.usual_queries(self.seq_len), min(64, self.max_queries(self.seq_len)))

    @abstractmethod
    def max_length(self, queries: int = 1) -> int:
        """The most tokens T of a batch with up to `queries` queries: the size of a position table."""

    @abstractmethod
    def draw(
        self, rng: np.random.Generator, rows: int, length: int, queries: int
    ) -> tuple[IntArray, IntArray]:
        """Independent contexts and targets, of any split.

        Args:
            rng: Source of all randomness.
            rows: B.
            length: N.
            queries: K.

        Returns:
            Contexts [B, N] of 0-based symbols and targets [B, K], int64.
        """

    @abstractmethod
    def assemble(self, context: IntArray, target: IntArray) -> Batch:
        """The batch of given contexts [B, N] of 0-based symbols and targets [B, K]."""

    @abstractmethod
    def log_contexts(self, length: int) -> float:
        """Natural logarithm of the number of different contexts, or of a lower bound."""

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
        """Check that batches of this length with this many queries can be made.

        Raises:
            UserError: If they cannot.
        """
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
        place: Place = "first",
    ) -> Batch:
        """Batch number `index` of the stream (seed, split).

        A pure function of the task's options and these arguments: no global random state is read or changed,
        any process can make any batch, and a resumed run continues with its next index. Contexts of the
        splits "train", "validation" and "heldout" are disjoint (`sampling.split_of`).

        Args:
            batch_size: B, number of rows.
            seed: Seed of the stream.
            index: Number of the batch in the stream.
            split: "train", "validation" or "heldout".
            queries: K, queries per row, drawn without replacement; None: `usual_queries`.
            length: Context symbols, at most seq_len (for a curriculum); None: the task's own.
            place: Where a context of `length` symbols lies; the contexts are the same whatever the place.

        Returns:
            The batch.

        Raises:
            UserError: For arguments that the task cannot meet.
        """
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} must be at least 1")
        shortest, longest = self.lengths() if length is None else (length, length)
        queries = self.usual_queries(length) if queries is None else queries
        self.check(shortest, queries)
        rng = sampling.stream(seed, split, index)
        n = int(rng.integers(shortest, longest + 1)) if shortest < longest else longest
        context, target = self._draw_side(rng, batch_size, split, n, queries)
        if place == "first":
            return self.assemble(context, target)
        if place == "gap":
            return self.part(self.assemble(context, target))
        unit = self.unit()[0]
        start = unit * rng.integers(0, (self.seq_len - n) // unit + 1, batch_size)
        return self.fill(context, target, start) if place == "filled" else self.move(context, target, start)

    def unit(self) -> tuple[int, int]:
        """By how many symbols a context can be moved, and how many tokens these are."""
        return 1, 1

    def part(self, batch: Batch) -> Batch:
        """The same batch, but what follows the contexts has the positions that it has after seq_len symbols.

        Raises:
            UserError: For tasks whose answers are no positions.
        """
        raise UserError(f"task {self.name} cannot part queries from contexts: its answers are no positions")

    def move(self, context: IntArray, target: IntArray, start: IntArray) -> Batch:
        """`assemble` as if `start` symbols stood before each context: in `position_ids` and in the answers.

        Args:
            context: [B, N'] 0-based symbols, N' <= seq_len.
            target: [B, K].
            start: [B] at most seq_len - N', multiples of the first number of `unit`.

        Returns:
            The batch, with as many tokens as `assemble` gives.
        """
        import torch

        batch = self.assemble(context, target)
        v, (symbols, tokens) = self.vocabulary, self.unit()
        by = torch.from_numpy(start)[:, None]

        def moved(ids: torch.Tensor) -> torch.Tensor:
            answers = (v.first_position <= ids) & (ids < v.first_position + v.num_positions)
            return ids + by * answers

        places = torch.arange(batch.input_ids.shape[1]) + by // symbols * tokens
        return replace(
            batch, input_ids=moved(batch.input_ids), labels=moved(batch.labels), position_ids=places
        )

    def fill(self, context: IntArray, target: IntArray, start: IntArray) -> Batch:
        """`assemble` with contexts of seq_len positions that hold `<bos>` where `context` does not lie.

        Args:
            context: [B, N'] 0-based symbols, N' <= seq_len.
            target: [B, K].
            start: [B] where in seq_len positions each context begins.

        Returns:
            The batch, with as many tokens as at full length; `length` is that of `context`.

        Raises:
            UserError: For tasks whose answers are no positions.
        """
        raise UserError(f"task {self.name} cannot be filled up to seq_len: its answers are no positions")

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
        place: Place = "first",
    ) -> Iterator[Batch]:
        """Rows start .. start + count - 1 of the stream (seed, split).

        Row i is a function of the task's options, seed, split, length, queries and i. So sets of different
        sizes are nested, whatever their batch sizes, and sets without a common row number are independent
        draws.

        Args:
            count: Number of rows.
            seed: Seed of the stream.
            split: "train", "validation" or "heldout".
            length: Context symbols.
            queries: K, queries per row; None: `usual_queries`.
            start: Number of the first row.
            batch_size: The most rows per batch.
            place: "first" or "gap", as in `batch`.

        Yields:
            Batches of up to `batch_size` rows, in order.

        Raises:
            UserError: For arguments that the task cannot meet.
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
                    batch = self.assemble(context[rows], target[rows])
                    yield self.part(batch) if place == "gap" else batch
                contexts, targets, have = [context[whole:]], [target[whole:]], have - whole

    def _block(
        self, seed: int, split: str, block: int, length: int, queries: int
    ) -> tuple[IntArray, IntArray]:
        """Contexts and targets of the ROW_BLOCK rows from row ROW_BLOCK * block on."""
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
        """A task with the same vocabulary whose contexts can have `length` symbols, also beyond seq_len.

        `synthetic.evaluate` tests with it how a model trained on short contexts extrapolates to longer ones.

        Raises:
            UserError: If answers in longer contexts need tokens that the vocabulary lacks.
        """
        if length <= self.seq_len:
            return self
        if self.positional:
            raise UserError(
                f"task {self.name} with seq_len {self.seq_len} has no answer tokens for length {length}: "
                f"build it with seq_len={length} and train with batch(length={self.seq_len})"
            )
        return replace(self, seq_len=length)

    def render(self, batch: Batch, row: int = 0) -> str:
        """One row as two aligned lines: the tokens, and below each the label scored there, or a dot."""
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
