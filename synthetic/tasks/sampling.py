"""Random numbers for the tasks: counter-based streams, distinct draws, the three splits.

Everything takes its generator as an argument; nothing reads or moves a global random state.

Ways to draw N distinct symbols out of V, measured in million tokens/s (one core, NumPy 2.4, batches
of 512 x 16, 128 x 64, 16 x 512 and 8 x 1024 tokens, V = 1024):

    N                                            16     64    512   1024
    redraw duplicates (used for N <= V/3)       102     78     33      -
    Generator.permuted along rows (otherwise)   1.5    7.4     58    113
    argpartition / argsort of random keys       3.6     14    111    120
    Generator.choice, one call a row            3.6     12     46     78
    partial Fisher-Yates, vectorised over rows   27     26      5      2

`permuted` was taken over sorting random keys, which are fast only where NumPy has SIMD sorting and
favour some orders when two float32 keys tie.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import exp, log

import numpy as np
import numpy.typing as npt

from ssm_retrieval.errors import UserError
from ssm_retrieval.streams import SPLITS
from ssm_retrieval.streams import stream as stream

IntArray = npt.NDArray[np.int64]

SHARES = {"train": 7 / 8, "heldout": 1 / 16, "validation": 1 / 16}  # of all contexts
KEPT_BITS = 3  # one context in 2**3 is kept from training ...
VALIDATION_BIT = 53  # ... and this bit of its hash says for which of the other two
# Fewer contexts than this might leave a split empty or nearly so. (Every space of positions that has as many
# has four contexts in each split; other bits of the hash leave some with two.)
MIN_CONTEXTS = 64
# `draw_split` gives up after this many candidates without a row: a split of 1 / 16 is empty by then.
MOST_IN_VAIN = 2**14
# Candidates per round of `draw_split`, in table cells of 8 bytes: bounds its memory to ~32 MB.
_CELLS_PER_ROUND = 2**22


def sample_distinct(rng: np.random.Generator, rows: int, size: int, num: int) -> IntArray:
    """Uniform ordered draws without replacement.

    Args:
        rng: Source of all randomness.
        rows: Number of independent draws.
        size: Integers per draw, at most `num`.
        num: Integers are drawn from 0 .. num - 1.

    Returns:
        [rows, size] int64.
    """
    if 3 * size <= num:
        return _redraw_duplicates(rng, rows, size, num)
    table = np.empty((rows, num), dtype=np.int64)
    table[:] = np.arange(num)
    rng.permuted(table, axis=1, out=table)
    return table[:, :size]


def _redraw_duplicates(rng: np.random.Generator, rows: int, size: int, num: int) -> IntArray:
    """`sample_distinct` by drawing with replacement, then redrawing what occurs twice in a row.

    Exactly uniform: no step depends on which number a symbol is, so renaming the symbols renames the outcome,
    and all ordered draws without repetition are renamings of one another.
    """
    row_start = np.arange(rows, dtype=np.int64)[:, None] * num
    cells = (rng.integers(0, num, (rows, size)) + row_start).ravel()  # cell = (row, symbol)
    slots = np.arange(cells.size, dtype=np.int64)
    owner = np.empty(rows * num, dtype=np.int64)  # never read where not just written
    while True:
        owner[cells] = slots  # of several slots with one symbol the last keeps it
        losers = np.flatnonzero(owner[cells] != slots)
        if losers.size == 0:
            return cells.reshape(rows, size) - row_start
        cells[losers] = losers // size * num + rng.integers(0, num, losers.size)


@lru_cache(maxsize=8)
def _coefficients(count: int) -> npt.NDArray[np.uint64]:
    """`count` fixed 64-bit constants (the splitmix64 sequence), the same in every version."""
    with np.errstate(over="ignore"):
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    constants = _mix(steps)
    constants.flags.writeable = False  # the cache hands out one array
    return constants


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The splitmix64 finaliser: every input bit reaches every output bit."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def split_of(contexts: IntArray) -> npt.NDArray[np.int64]:
    """[rows, N] 0-based symbols -> [rows] int64, the split of each context as an index into SPLITS.

    A hash of the symbols in order decides, whatever the task, seed or number of symbols. So a context belongs
    to one split for ever: no list is kept, and runs of any length cannot leak.
    """
    length = contexts.shape[1]
    constants = _coefficients(length + 1)
    hashed = _mix(contexts.astype(np.uint64) @ constants[:length] + constants[length])
    kept = hashed >> np.uint64(64 - KEPT_BITS) == 0
    validation = hashed >> np.uint64(VALIDATION_BIT) & np.uint64(1)
    return np.where(kept, 1 + validation.astype(np.int64), 0)


def is_heldout(contexts: IntArray) -> npt.NDArray[np.bool_]:
    """[rows, N] 0-based symbols -> [rows] bool, whether a context belongs to the split "heldout"."""
    return split_of(contexts) == SPLITS.index("heldout")


def require_contexts(log_contexts: float, length: int, num_symbols: int) -> None:
    """Check that there are enough different contexts to hold some out.

    Args:
        log_contexts: Natural logarithm of their number.
        length: N, for the message.
        num_symbols: V, for the message.

    Raises:
        UserError: If there are fewer than MIN_CONTEXTS.
    """
    if log_contexts < log(MIN_CONTEXTS):
        raise UserError(
            f"num_symbols {num_symbols} gives only about {exp(log_contexts):.0f} contexts of length "
            f"{length}, too few to hold some out ({MIN_CONTEXTS} needed): give more symbols or a longer "
            "context"
        )


def draw_split(
    draw: Callable[[int], tuple[IntArray, IntArray]], rows: int, split: str, row_cells: int
) -> tuple[IntArray, IntArray]:
    """Independent rows whose context belongs to one split; the others are drawn again.

    Args:
        draw: draw(n) gives contexts [n, N] and targets [n, K].
        rows: Number of rows wanted.
        split: "train", "validation" or "heldout".
        row_cells: Numbers that a candidate row takes in memory while it is drawn; many rows are drawn in
            several rounds.

    Returns:
        Contexts [rows, N] and targets [rows, K].

    Raises:
        UserError: If the split seems to be empty.
    """
    wanted_side, share = SPLITS.index(split), SHARES[split]
    contexts, targets, have, in_vain = [], [], 0, 0
    while have < rows:
        # a little more than expected, because a second round costs more than a few spare rows
        wanted = int((rows - have) / share * 1.1) + 4
        context, target = draw(min(wanted, max(16, _CELLS_PER_ROUND // row_cells)))
        chosen = np.flatnonzero(split_of(context) == wanted_side)[: rows - have]
        in_vain = 0 if chosen.size else in_vain + len(context)
        if in_vain >= MOST_IN_VAIN:
            raise UserError(
                f"no context of length {context.shape[1]} seems to belong to the split {split}: there are "
                "too few different ones; give more symbols or a longer context"
            )
        contexts.append(context[chosen])
        targets.append(target[chosen])
        have += chosen.size
    return np.concatenate(contexts), np.concatenate(targets)
