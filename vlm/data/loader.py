"""Batches of a mixture: sequences padded to one length, with the features of their images.

Batch number k depends on the seed and k alone, wherever training starts and however many workers prepare it.
Workers read samples and tokenise. Features are fetched by the process that trains, where a cache is mapped
memory and an encoder may have its GPU.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssm_retrieval.errors import UserError
from vlm.data.mixture import Mixture
from vlm.data.samples import Sample, Source
from vlm.layout import BEGIN, IGNORE, ROW, Encode, TooLong, sequence

CACHED_TEXTS = 1 << 14  # instructions, choices and short answers recur
TRIES = 100
log = logging.getLogger(__name__)


class Features(Protocol):
    """Features of a source's images (`vlm.data.cache`)."""

    def get(self, source: Source, images: Sequence[str]) -> Tensor:
        """Return features (B, P, F) of images by key."""
        ...


@dataclass(frozen=True)
class VLMBatch:
    """A batch.

    Attributes:
        input_ids: (B, L) int64, padded on the right with 0; patches are negative placeholders (`vlm.layout`).
        labels: (B, L) int64, not shifted; -100 = not supervised.
        features: (B, P, F).
        samples: B samples.
        sources: B names, as the mixture has them.
    """

    input_ids: Tensor
    labels: Tensor
    features: Tensor
    samples: tuple[Sample, ...]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class _Text:
    """A batch without its images."""

    input_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    sources: tuple[str, ...]  # as the mixture names them
    samples: tuple[Sample, ...]


def batches(
    mixture: Mixture,
    features: Features,
    *,
    batch_size: int,
    start: int,
    stop: int,
    seed: int,
    encode: Encode,
    side: int,
    layout: str | Sequence[str],
    markers: tuple[int, int] = (BEGIN, ROW),
    max_length: int | None = None,
    group: int = 1,
    workers: int = 0,
) -> Iterator[VLMBatch]:
    """Yield batches number start .. stop - 1 of a mixture's order under `seed`.

    If a prompt leaves no room for the image or an answer, the next example of its source takes its place, and
    a warning is logged.

    Args:
        mixture: The sources.
        features: Features of their images.
        batch_size: B, examples per batch.
        start: Number of the first batch.
        stop: Number after the last batch.
        seed: Seed of the order.
        encode: Text -> ids, without special tokens.
        side: Patches along one side of an image.
        layout: As for `vlm.layout.sequence`. With several layouts consecutive windows (see `group`) take
            turns.
        markers: As for `vlm.layout.sequence`.
        max_length: As for `vlm.layout.sequence`.
        group: Batches per window. The examples of a window are sorted by length and cut into batches, and
            these are shuffled.
        workers: Processes that prepare windows ahead. If processes are not forked, `mixture` and `encode`
            must be picklable.

    Yields:
        Batches.

    Raises:
        UserError: If `batch_size` or `group` is below 1, `start` is negative, or reading samples fails.
    """
    if min(batch_size, group) < 1 or start < 0:
        raise UserError(
            f"batch_size={batch_size}, group={group} must be at least 1, start={start} at least 0"
        )
    layouts = (layout,) if isinstance(layout, str) else tuple(layout)
    windows = _Windows(mixture, batch_size, seed, encode, side, layouts, markers, max_length, group)
    numbers = range(start // group, -(-max(start, stop) // group))
    made: Iterable[list[_Text] | Exception] = map(windows.__getitem__, numbers)
    if workers:
        made = DataLoader(
            windows,
            batch_size=None,
            sampler=cast(Any, numbers),
            num_workers=workers,
            collate_fn=_same,
            generator=torch.Generator().manual_seed(0),  # so that it does not draw from the global one
        )
    for window, texts in zip(numbers, made, strict=True):
        if isinstance(texts, Exception):
            raise texts
        for k, text in enumerate(texts, window * group):
            if start <= k < stop:
                yield VLMBatch(
                    torch.from_numpy(text.input_ids),
                    torch.from_numpy(text.labels),
                    _fetch(mixture, features, text),
                    text.samples,
                    text.sources,
                )


@dataclass
class _Windows(Dataset):
    """Windows of `group` batches, by number."""

    mixture: Mixture
    batch_size: int
    seed: int
    encode: Encode
    side: int
    layouts: tuple[str, ...]
    markers: tuple[int, int]
    max_length: int | None
    group: int

    def __getitem__(self, window: int) -> list[_Text] | Exception:
        """The batches of a window, or the error: a worker's traceback would hide its one line."""
        try:
            return self._batches(window)
        except (ValueError, OSError) as error:
            return error

    def _batches(self, window: int) -> list[_Text]:
        size = self.group * self.batch_size
        order = self.mixture.order(self.seed, window * size, (window + 1) * size)
        layout = self.layouts[window % len(self.layouts)]
        rows = [(name, *self._fitting(name, index, layout)) for name, index in order]
        if self.group == 1:
            return [_padded(rows)]
        by_length = sorted(rows, key=lambda row: len(row[2]))  # stable, so ties stay in their random order
        cut = [by_length[i : i + self.batch_size] for i in range(0, size, self.batch_size)]
        return [_padded(rows) for rows in random.Random(f"{self.seed} {window}").sample(cut, self.group)]

    @cached_property
    def cached_encode(self) -> Encode:
        return lru_cache(CACHED_TEXTS)(self.encode)

    def _fitting(self, name: str, index: int, layout: str) -> tuple[Sample, list[int], list[int]]:
        """The first sample from `index` on that fits max_length, with its ids and labels."""
        source = self.mixture.sources[name]
        tries = min(TRIES, len(source))
        for tried in range(tries):
            sample = source[(index + tried) % len(source)]
            try:
                return sample, *sequence(
                    sample.chunks, self.cached_encode, self.side, layout, self.max_length, self.markers
                )
            except TooLong as error:
                log.warning("%s %s is left out: %s", name, sample.id, error)
        raise UserError(
            f"{name}: {tries} examples in a row from number {index} on leave no room for the image or an "
            f"answer in max_length={self.max_length}; raise it"
        )


def _padded(rows: Sequence[tuple[str, Sample, list[int], list[int]]]) -> _Text:
    longest = max(len(ids) for _, _, ids, _ in rows)
    input_ids = np.zeros((len(rows), longest), np.int64)
    labels = np.full((len(rows), longest), IGNORE, np.int64)
    for i, (_, _, ids, supervised) in enumerate(rows):
        input_ids[i, : len(ids)] = ids
        labels[i, : len(ids)] = supervised
    return _Text(input_ids, labels, tuple(row[0] for row in rows), tuple(row[1] for row in rows))


def _fetch(mixture: Mixture, features: Features, text: _Text) -> Tensor:
    """Features in the order of the batch; one request per source."""
    rows: dict[str, list[int]] = {}
    for i, name in enumerate(text.sources):
        rows.setdefault(name, []).append(i)
    found = {
        name: features.get(mixture.sources[name], [text.samples[i].image for i in places])
        for name, places in rows.items()
    }
    if len(found) == 1:
        return next(iter(found.values()))
    first = next(iter(found.values()))
    result = first.new_empty((len(text.samples), *first.shape[1:]))
    for name, places in rows.items():
        result[places] = found[name]
    return result


def _same(value: Any) -> Any:
    return value
