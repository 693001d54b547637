"""Which example comes when in training: a pure function of the seed and the example's number.

Nothing as large as a data set is stored: an epoch's order is a keyed permutation (a Feistel network whose
walks stay below the length), so example n costs the same whether training starts there or at 0.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ssm_retrieval.errors import UserError
from vlm.data.samples import Source

ROUNDS = 8
GOLDEN = 0x9E3779B97F4A7C15
SHARE_BITS = 30  # of a weight; products with numbers below 2^33 stay below 2^63

Integers = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]


class Mixture:
    """Examples of several sources in one endless order.

    Without weights the sources are laid end to end and shuffled anew every epoch, as published. With weights
    each source is shuffled by itself and starts again when it is used up. The sources take turns at fixed,
    evenly spread places, so any stretch of examples has the shares to within a few examples.

    Args:
        sources: Sources by name.
        weights: Share of the examples that each source gets, in any unit; weight 0 leaves a source out.

    Raises:
        UserError: If there are no sources, a source is empty, or weights are not shares of exactly these
            sources.
    """

    def __init__(self, sources: Mapping[str, Source], weights: Mapping[str, float] | None = None):
        if not sources:
            raise UserError("a mixture needs at least one source")
        for name, source in sources.items():
            if not len(source):
                raise UserError(f"source {name!r} has no examples; leave it out")
        self.sources = dict(sources)
        self.weights = None if weights is None else _checked(weights, self.sources)
        self.used = [name for name in self.sources if self.weights is None or self.weights[name] > 0]
        self.lengths = [len(self.sources[name]) for name in self.used]

    def __len__(self) -> int:
        """Number of examples of all sources in use; without weights, of an epoch."""
        return sum(self.lengths)

    def order(self, seed: int, start: int, stop: int) -> list[tuple[str, int]]:
        """Return the examples numbered start .. stop - 1.

        Args:
            seed: Seed of the order.
            start: First number.
            stop: Number after the last.

        Returns:
            (source, index) of each example.

        Raises:
            UserError: If `start` is negative.
        """
        if start < 0:
            raise UserError(f"start={start}: examples are numbered from 0")
        numbers = np.arange(start, max(start, stop), dtype=np.int64)
        which, places = self._shuffled(seed, numbers) if self.weights is None else self._turns(seed, numbers)
        names = self.used
        return [(names[i], place) for i, place in zip(which.tolist(), places.tolist(), strict=True)]

    def _shuffled(self, seed: int, numbers: Integers) -> tuple[Integers, Integers]:
        """Source (as number in `used`) and index of examples of the sources laid end to end."""
        epochs, places = np.divmod(numbers, len(self))
        places = permuted(places, len(self), _keys(seed, "", epochs))
        ends = np.cumsum(np.array(self.lengths, np.int64))
        which = np.searchsorted(ends, places, side="right")
        return which, places - np.insert(ends, 0, 0)[which]

    def _turns(self, seed: int, numbers: Integers) -> tuple[Integers, Integers]:
        """As `_shuffled`, by weight: a source against the rest, the next against what remains, ..."""
        assert self.weights is not None
        which, places = np.zeros_like(numbers), np.zeros_like(numbers)
        open_, left = np.arange(len(numbers)), numbers
        for i, name in enumerate(self.used):
            rest = math.fsum(self.weights[other] for other in self.used[i:])
            share = round(self.weights[name] / rest * (1 << SHARE_BITS))
            # examples of this source before each number, and after it
            before, after = _taken(left, share), _taken(left + 1, share)
            mine = after > before
            epochs, at = np.divmod(before[mine], self.lengths[i])
            which[open_[mine]] = i
            places[open_[mine]] = permuted(at, self.lengths[i], _keys(seed, name, epochs))
            open_, left = open_[~mine], (left - before)[~mine]
        return which, places


def permuted(places: Integers, length: int, keys: Keys) -> Integers:
    """Permute 0 .. length - 1.

    A balanced Feistel network on the next power of 4, walked until it is below `length` (Black & Rogaway
    2002, Ciphers with Arbitrary Finite Domains): fewer than 4 steps on average, and no memory.

    Args:
        places: int64, numbers to permute.
        length: Length of the permutation.
        keys: uint64, same shape as `places`; name the permutation.

    Returns:
        int64, same shape as `places`.
    """
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    rounds = [_scrambled(keys + np.uint64(GOLDEN * i % 2**64)) for i in range(1, ROUNDS + 1)]
    x = places.astype(np.uint64)
    todo = np.arange(len(x))
    while len(todo):
        left, right = x[todo] >> half, x[todo] & mask
        for key in rounds:
            left, right = right, left ^ (_scrambled(key[todo] + right) & mask)
        x[todo] = (left << half) | right
        todo = todo[x[todo] >= length]
    return x.astype(np.int64)


def _scrambled(x: Keys) -> Keys:
    """splitmix64's finaliser: 64 bits that depend on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(seed: int, name: str, epochs: Integers) -> Keys:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return _scrambled(np.frombuffer(digest[:8], "<u8") + epochs.astype(np.uint64) * np.uint64(GOLDEN))


def _taken(numbers: Integers, share: int) -> Integers:
    """How many of the first `numbers` examples a share (of 2^SHARE_BITS) takes, rounded to the nearest."""
    return (numbers * share + (1 << (SHARE_BITS - 1))) >> SHARE_BITS


def _checked(weights: Mapping[str, float], sources: Mapping[str, Source]) -> dict[str, float]:
    if weights.keys() != sources.keys():
        odd = ", ".join(sorted(weights.keys() ^ sources.keys()))
        raise UserError(f"weights and sources must have the same names; only one of them has {odd}")
    wrong = [name for name, w in weights.items() if not (math.isfinite(w) and w >= 0)]
    if wrong or not any(weights.values()):
        said = f"weight {weights[wrong[0]]} of {wrong[0]!r}" if wrong else "weights that are all 0"
        raise UserError(f"{said}: give finite shares of at least 0, one of them above")
    return {name: float(weights[name]) for name in sources}
