"""Counter-based random streams: what is drawn depends on (seed, split, index) and nothing else."""

from __future__ import annotations

import numpy as np

from ssm_retrieval.errors import UserError

SPLITS = ("train", "heldout", "validation")  # the order is part of every random stream


def stream(seed: int, split: str, index: int) -> np.random.Generator:
    """The random stream of a batch, a function of the three arguments only.

    Philox is a cipher of a counter (Salmon et al. 2011): streams with different keys, or with counters
    2**192 apart as here, do not overlap, so any worker can make any batch.

    Args:
        seed: 0 .. 2**64 - 1.
        split: One of `SPLITS`.
        index: Number of the batch, 0 .. 2**64 - 1.

    Returns:
        A generator at the stream's start.

    Raises:
        UserError: For an unknown split, and for a seed or index out of range.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; valid: {', '.join(SPLITS)}")
    for name, value in (("seed", seed), ("index", index)):
        if not 0 <= value < 2**64:
            raise UserError(f"{name} {value} must be in 0 .. 2**64 - 1")
    key = np.array([seed, SPLITS.index(split)], dtype=np.uint64)
    counter = np.array([0, 0, 0, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
