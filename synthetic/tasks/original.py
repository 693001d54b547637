"""Position retrieval from the files of the original experiment, for those who have them.

Source: "Shaking Up VLMs" (arXiv 2409.05395), whose code (gpantaz/vl_mamba, history) read its synthetic
grounding from one JSON file per split and length, `{train|validation|test}_synthetic_vg_seqlen{N}.json`, with
two lists of equal length: `target_sequences`, each N different symbols, and `target_tokens`, the place of the
queried one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ssm_retrieval.errors import UserError
from synthetic.tasks import sampling
from synthetic.tasks.base import ROW_BLOCK, Batch
from synthetic.tasks.position import Position
from synthetic.tasks.sampling import IntArray

FILE_SPLITS = ("train", "validation", "test")
FILE_OF = {"train": "train", "validation": "validation", "heldout": "test"}  # split of `batch`: its file


def file_name(split: str, length: int) -> str:
    """The original's name for the file of a split (train, validation, test) and length."""
    return f"{split}_synthetic_vg_seqlen{length}.json"


def read(path: Path, length: int) -> tuple[IntArray, IntArray]:
    """Contexts [B, N] and targets [B, 1] of one file; a symbol `<syn_i>` of the original is `<s{i}>` here.

    Raises:
        UserError: Naming file and defect, unless every sequence is `length` different integers >= 0 and every
            target is a place in its sequence.
    """

    def fail(defect: str) -> UserError:
        return UserError(f"{path}: {defect}")

    def integers(value: Any) -> bool:
        return isinstance(value, list) and all(type(x) is int and 0 <= x < 2**31 for x in value)

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise fail("no such file; expected {train|validation|test}_synthetic_vg_seqlen{N}.json") from None
    except OSError as error:
        raise fail(f"cannot be read ({error.strerror})") from None
    except ValueError as error:  # no JSON, or no UTF-8
        raise fail(f"not JSON ({error})") from None
    if not isinstance(content, dict) or not {"target_sequences", "target_tokens"} <= content.keys():
        raise fail("needs the lists target_sequences and target_tokens")
    sequences, targets = content["target_sequences"], content["target_tokens"]
    if not isinstance(sequences, list) or not integers(targets):
        raise fail("target_sequences must be a list of lists and target_tokens one of integers >= 0")
    if len(sequences) != len(targets) or not sequences:
        raise fail(
            f"{len(sequences)} target_sequences but {len(targets)} target_tokens; need as many, and some"
        )
    for i, sequence in enumerate(sequences):
        if not integers(sequence):
            raise fail(f"target_sequences[{i}] is no list of integers >= 0")
        if len(sequence) != length:
            raise fail(f"target_sequences[{i}] has {len(sequence)} symbols instead of {length}")
        if len(set(sequence)) != length:
            raise fail(f"target_sequences[{i}] repeats a symbol")
        if targets[i] >= length:
            raise fail(f"target_tokens[{i}] is {targets[i]}, no place of 0 .. {length - 1}")
    return np.array(sequences, dtype=np.int64), np.array(targets, dtype=np.int64)[:, None]


@dataclass(frozen=True, kw_only=True)
class OriginalFiles(Position):
    """`Position` from files: `folder` holds those of length seq_len.

    OriginalFiles(seq_len=4, num_symbols=6, folder="data"), a file with [[5, 1, 2, 4]] and [1]:

        input  <bos> <s5> <s1> <s2> <s4> <query> <s1>
        label      .    .    .    .    .       . <p1>

    `batch` draws rows from the file of its split (for "heldout" the test file), without repetition within a
    batch; the only query is the file's. `examples` gives the rows in the file's order, and `batches` goes
    once through a whole file, for `synthetic.evaluate.score`. The task is not in the registry, because its
    data are no function of its options.

    Attributes:
        folder: Where the files are.
    """

    name: ClassVar[str] = "original-files"

    folder: str | Path

    @cached_property
    def _files(self) -> dict[str, tuple[IntArray, IntArray]]:
        return {}  # filled by `rows`; every file is read once

    def rows(self, split: str) -> tuple[IntArray, IntArray]:
        """Contexts [B, N] and targets [B, 1] of the file of `split` (train, validation, test).

        Raises:
            UserError: As `read`, for another split, and for symbols that the vocabulary lacks.
        """
        if split not in FILE_SPLITS:
            raise UserError(f"unknown split {split!r}; valid: {', '.join(FILE_SPLITS)}")
        if split not in self._files:
            path = Path(self.folder) / file_name(split, self.seq_len)
            context, target = read(path, self.seq_len)
            highest = int(context.max())
            if highest >= self.vocabulary.num_symbols:
                raise UserError(
                    f"{path}: symbol {highest} is not below num_symbols {self.vocabulary.num_symbols}: "
                    f"give num_symbols >= {highest + 1}"
                )
            self._files[split] = context, target
        return self._files[split]

    def max_queries(self, length: int | None = None) -> int:
        return 1

    def check(self, length: int, queries: int) -> None:
        if length != self.seq_len:
            raise UserError(f"length {length} is not that of the files, {self.seq_len}")
        super().check(length, queries)

    def _draw_side(
        self, rng: np.random.Generator, rows: int, split: str, length: int, queries: int
    ) -> tuple[IntArray, IntArray]:
        context, target = self.rows(FILE_OF[split])
        if rows > len(context):
            raise UserError(f"batch_size {rows} must be in 1 .. {len(context)}, the rows of the file")
        row = sampling.sample_distinct(rng, 1, rows, len(context))[0]
        return context[row], target[row]

    def _block(
        self, seed: int, split: str, block: int, length: int, queries: int
    ) -> tuple[IntArray, IntArray]:
        if split not in FILE_OF:
            raise UserError(f"unknown split {split!r}; valid: {', '.join(FILE_OF)}")
        context, target = self.rows(FILE_OF[split])
        part = slice(block * ROW_BLOCK, (block + 1) * ROW_BLOCK)
        if part.start >= len(context):
            raise UserError(f"the file of {FILE_OF[split]} has {len(context)} rows; ask for no more of them")
        return context[part], target[part]

    def batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        """The rows of the file of `split` (train, validation, test), each once and in order."""
        context, target = self.rows(split)
        for start in range(0, len(context), batch_size):
            part = slice(start, start + batch_size)
            yield self.assemble(context[part], target[part])
