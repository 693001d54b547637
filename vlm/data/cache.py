"""Features of a source's pictures: stored on disk once and memory-mapped, or computed on the fly.

    <folder>/<name>.npy    (N, P, F), one row per picture in the order of the source's keys
             <name>.json   what the array holds, and how many rows, from the first, are filled

A picture of 576 patches takes 1.2 MB in float16 with an encoder of width 1,024: 0.66 TB for 558 thousand.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from rich.markup import escape
from rich.progress import Progress
from torch import Tensor

from ssm_retrieval.errors import UserError
from ssm_retrieval.training.store import read_json, replacing, write_json
from vlm.data.samples import Source
from vlm.pictures import Picture
from vlm.schema import remove_left, shortened

EncodePictures = Callable[[Sequence[Picture]], Tensor]
RECORDED_EVERY = 1.0  # seconds; a killed fill loses at most that


def pictures(source: Source, images: Sequence[str]) -> list[Picture]:
    """Return a source's pictures (height, width, 3) uint8 by key, opened by several threads."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(source.picture, images))


@dataclass
class _Opened:
    source: Source  # kept alive, so that its id stays unique
    path: Path
    rows: dict[str, int]
    done: int = 0
    features: np.memmap | None = None


class FeatureCache:
    """Features on disk. Several processes may read a cache, even while one of them fills it.

    A source's array is found by its fingerprint, its keys, `encoder_key` and `dtype`, so sources with the
    same pictures share it.

    Args:
        folder: Folder of the arrays.
        encoder_key: Names everything but the picture that features depend on: encoder, weights, image size.
        encode: Pictures (height, width, 3) uint8, of any sizes -> (B, P, F).
        dtype: NumPy dtype of the stored features.
    """

    def __init__(
        self,
        folder: str | Path,
        encoder_key: str,
        encode: EncodePictures,
        dtype: npt.DTypeLike = np.float16,
    ):
        self.folder = Path(folder)
        self.encoder_key = encoder_key
        self.encode = encode
        self.dtype = np.dtype(dtype)
        self._opened: dict[int, _Opened] = {}

    def fill(self, source: Source, progress: bool = True, batch_size: int = 32) -> None:
        """Encode the pictures that are missing; an interrupted call continues where it stopped.

        Waits for another process that fills the same array.

        Args:
            source: Source whose pictures to encode.
            progress: Whether to show a bar.
            batch_size: Pictures encoded together.

        Raises:
            UserError: If a file is damaged, or `encode` returns another shape.
            OSError: If the disk is full.
        """
        opened = self._open(source)
        keys = list(opened.rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(opened.path.with_suffix(".lock")), Progress(disable=not progress) as bar:
            for path in (opened.path, opened.path.with_suffix(".json")):
                remove_left(path)
            self._read_progress(opened)
            task = bar.add_task(escape(f"features of {source.name}"), total=len(keys), completed=opened.done)
            done, recorded = opened.done, time.monotonic()
            try:
                while done < len(keys):
                    images = keys[done : done + batch_size]
                    encoded = self.encode(pictures(source, images)).detach().float().cpu().numpy()
                    if encoded.ndim != 3 or len(encoded) != len(images):
                        raise UserError(
                            f"encode gave {encoded.shape} for {len(images)} pictures, not (B, P, F)"
                        )
                    self._write(opened, done, encoded.astype(self.dtype))
                    done += len(images)
                    bar.advance(task, len(images))
                    if time.monotonic() - recorded > RECORDED_EVERY:
                        self._record(opened, done)
                        recorded = time.monotonic()
            finally:
                if done > opened.done:
                    self._record(opened, done)

    def get(self, source: Source, images: Sequence[str]) -> Tensor:
        """Return the features of pictures, in memory of their own.

        Args:
            source: Source of the pictures.
            images: B keys.

        Returns:
            (B, P, F).

        Raises:
            UserError: If a picture is unknown or not encoded yet.
        """
        opened = self._open(source)
        try:
            rows = [opened.rows[image] for image in images]
        except KeyError as error:
            raise UserError(f"{source.name} has no picture {error}") from None
        if opened.features is None or max(rows) >= opened.done:
            self._read_progress(opened)
            if max(rows) >= opened.done:
                missing = images[rows.index(max(rows))]
                raise UserError(
                    f"{opened.path} has no features of {missing!r} of {source.name} yet ({opened.done} of "
                    f"{len(opened.rows)} are done); fill the cache first"
                )
            opened.features = self._mapped(opened)
        return torch.from_numpy(opened.features[rows])

    def _open(self, source: Source) -> _Opened:
        if id(source) not in self._opened:
            keys = source.keys()
            parts = [source.fingerprint, self.encoder_key, str(self.dtype), *keys]
            name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]
            rows = {key: i for i, key in enumerate(keys)}
            self._opened[id(source)] = _Opened(source, self.folder / f"{name}.npy", rows)
        return self._opened[id(source)]

    def _write(self, opened: _Opened, first: int, rows: npt.NDArray[Any]) -> None:
        """Rows from number `first` on. Plain writes, not mapped memory, so a full disk is an error."""
        if first == 0:
            shape = (len(opened.rows), *rows.shape[1:])
            header = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
            with replacing(opened.path) as temporary, open(temporary, "wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                file.truncate(file.tell() + math.prod(shape) * self.dtype.itemsize)
        stored = self._mapped(opened)
        if stored.shape[1:] != rows.shape[1:]:
            raise UserError(
                f"{opened.path} holds features {stored.shape[1:]}, and encode gives {rows.shape[1:]}; give "
                f"another encoder_key than {self.encoder_key!r}"
            )
        with open(opened.path, "rb+") as file:
            file.seek(stored.offset + first * rows[0].nbytes)
            file.write(rows.tobytes())

    def _record(self, opened: _Opened, done: int) -> None:
        """Note that `done` rows are filled, once they are on the disk."""
        with open(opened.path, "rb+") as file:
            os.fsync(file.fileno())
        about = {"pictures": opened.source.fingerprint, "encoder": self.encoder_key, "done": done}
        write_json(opened.path.with_suffix(".json"), about)
        opened.done = done

    def _read_progress(self, opened: _Opened) -> None:
        """How many rows are done: none if there is no array yet; checks that the array is whole."""
        about = opened.path.with_suffix(".json")
        if not about.exists():
            opened.done = 0
            return
        try:
            done = read_json(about)["done"]
            if type(done) is not int or not 0 <= done <= len(opened.rows):
                raise ValueError(f"done={shortened(done)} of {len(opened.rows)} rows")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise _damaged(about, error, opened.path) from error
        opened.done = done
        self._mapped(opened)

    def _mapped(self, opened: _Opened) -> np.memmap:
        try:
            features = np.load(opened.path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise _damaged(opened.path, error) from error
        if len(features) != len(opened.rows) or features.dtype != self.dtype or features.ndim != 3:
            raise _damaged(opened.path, ValueError(f"it holds {features.shape} {features.dtype}"))
        return features


def _damaged(path: Path, error: Exception, array: Path | None = None) -> UserError:
    said = " ".join(str(error).split())
    beside = (array or path).with_suffix(".*")
    return UserError(f"{path} is damaged ({said}); delete {beside} to encode these pictures anew")


class Uncached:
    """The interface of `FeatureCache`, without files; features are computed on the fly.

    An encoder's rounding may depend on which pictures it gets together, so resumed training can differ in the
    last bits of features. With a cache on disk it cannot.

    Args:
        encode: As for `FeatureCache`.
        size: Number of pictures whose features stay in memory.
    """

    def __init__(self, encode: EncodePictures, size: int = 256):
        self.encode, self.size = encode, size
        self._known: OrderedDict[tuple[str, str], Tensor] = OrderedDict()

    def fill(self, source: Source, progress: bool = True, batch_size: int = 32) -> None:
        """Do nothing.

        Args:
            source: As for `FeatureCache.fill`.
            progress: As for `FeatureCache.fill`.
            batch_size: As for `FeatureCache.fill`.
        """

    def get(self, source: Source, images: Sequence[str]) -> Tensor:
        """Return the features (B, P, F) of a source's pictures by key."""
        known = self._known
        missing = [image for image in dict.fromkeys(images) if (source.fingerprint, image) not in known]
        if missing:
            encoded = self.encode(pictures(source, missing)).detach()
            known |= {(source.fingerprint, image): row for image, row in zip(missing, encoded, strict=True)}
        for image in images:
            known.move_to_end((source.fingerprint, image))
        result = torch.stack([known[source.fingerprint, image] for image in images])
        while len(known) > self.size:
            known.popitem(last=False)
        return result
