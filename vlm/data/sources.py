"""Official files as a `Source`: samples by number, pictures by name."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ssm_retrieval.errors import UserError
from vlm import pictures
from vlm.data import lines, registry
from vlm.data.files import MissingFile
from vlm.data.records import Record
from vlm.data.samples import Sample
from vlm.data.turns import Rules, samples
from vlm.prompts import INSTRUCTIONS, Chunk

VERSION = 3  # raise it when records lead to other samples; indices on disk are then rebuilt


class FileSource:
    """One split of a data set of `vlm.data.registry`, as samples.

    Official files are read once, in their order, and their samples written as lines with an index of where
    each one stands. Sample i is then one look-up, so training can resume at any place of any order.

    Without `index_folder` the lines stay in memory, about as large as the official files. With it they stay
    on disk for the next run, mapped and shared between processes, and memory holds 8 bytes per sample: for
    Visual Genome, GRIT and LLaVA. That costs the disk and one pass over the files, and another pass whenever
    files, rules or options change. (A JSON file is parsed whole; GRIT, with one file per image, is read shard
    by shard.)

    Args:
        name: Name of the data set.
        annotation_folder: Folder with the official files.
        image_folder: Folder with the pictures, by the names that the official files use.
        split: Split of the data set.
        rules: How records become samples; for training by default.
        filtered: Leave out what the published training data leave out (`DataSet.keep`).
        index_folder: Folder for an index of the lines on disk; None = in memory.
        **options: Options of the reader, such as `expressions="last"`.

    Raises:
        UserError: If a name is unknown, or a file is missing or malformed.
    """

    def __init__(
        self,
        name: str,
        annotation_folder: str | Path,
        image_folder: str | Path,
        split: str,
        *,
        rules: Rules | None = None,
        filtered: bool = False,
        index_folder: str | Path | None = None,
        **options: str,
    ):
        self.name, self.split = name, split
        registry.check(name, split)
        self.annotations, self.images = Path(annotation_folder), Path(image_folder)
        self.rules, self.filtered = rules or Rules(), filtered
        self.options = options
        self.fingerprint = f"files in {self.images.resolve()}"
        if index_folder is None:
            self.lines = lines.in_memory(self._rows())
        else:
            folder = Path(index_folder)
            self.lines = lines.on_disk(folder / f"{name}-{split}-{self._state(folder)}.jsonl", self._rows)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Sample:
        id_, image, task, texts, target = self.lines[index]
        chunks = tuple(Chunk(text, bool(supervised)) for text, supervised in texts)
        return Sample(id_, self.name, image, task, chunks, target)

    def picture(self, image: str) -> npt.NDArray[np.uint8]:
        """Return a picture as stored, (height, width, 3) uint8, RGB.

        Raises:
            UserError: If it is missing or damaged.
        """
        return pictures.read(self._picture_file(image), advice="download it again")

    def keys(self) -> Sequence[str]:
        """Return every picture's key once, in the order of the samples; the first call reads them all."""
        return self._keys

    @cached_property
    def _keys(self) -> list[str]:
        return list(dict.fromkeys(self.lines[i][1] for i in range(len(self))))

    def _rows(self) -> Iterator[Any]:
        """The samples as JSON values."""
        records = self._read()
        dataset = registry.asked_for(registry.DATASETS[self.name], self.rules.regions)
        if self.filtered and dataset.keep is not None:
            records = dataset.keep(self._read, self.annotations, self.images)
        empty = True
        for sample in samples(records, dataset, self.rules, self._size):
            empty = False
            texts = [(chunk.text, int(chunk.supervised)) for chunk in sample.chunks]
            yield sample.id, sample.image, sample.task, texts, sample.target
        if empty:
            what = "to train on" if self.rules.training else "to ask"
            raise UserError(f"{self.name} has nothing {what} in split {self.split!r}; use another split")

    def _read(self) -> Iterable[Record]:
        return registry.read(self.name, self.annotations, self.split, **self.options)

    def _size(self, record: Record) -> tuple[int, int]:
        """Width and height from the header of a picture."""
        return pictures.size(self._picture_file(record.image), advice="download it again")

    def _picture_file(self, image: str) -> Path:
        path = self.images / image
        if not path.exists():
            raise MissingFile(f"{path} is missing: {self.name} needs it; complete the image folder")
        return path

    def _state(self, index_folder: Path) -> str:
        """Hash of what the samples depend on: rules, options, and files and pictures by size and time."""
        files = stamps(self.name, self.annotations, index_folder)
        seen = []
        if registry.DATASETS[self.name].opens_pictures:
            seen = sorted(_stamp(path, self.images) for path in _below(self.images, index_folder))
        folders = [str(self.annotations.resolve()), self.fingerprint]
        state = [VERSION, INSTRUCTIONS, asdict(self.rules), self.filtered, self.options, folders, files, seen]
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:12]


def stamps(name: str, folder: Path, index_folder: Path | None = None) -> list[tuple[str, int, int]]:
    """Return what the official files of a data set are known by without reading them.

    Args:
        name: Name of the data set.
        folder: Folder with its official files.
        index_folder: Left out.

    Returns:
        Path, size and time of the files; of files that are one per image, of their folders.
    """
    files = map(_folder_of_many, registry.DATASETS[name].files)
    patterns = {re.sub(r"\{.*?\}|SHARD", "*", file) for file in files}
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    index = index_folder and index_folder.resolve()
    return [_stamp(path, folder) for path in sorted(found) if path.resolve() != index]


def _folder_of_many(file: str) -> str:
    """The folder of files that are one per image; another file as it is."""
    return file.rpartition("/")[0] if re.search("KEY|IMAGE", file) else file


def _below(folder: Path, without: Path) -> Iterator[Path]:
    """All files in a folder and below, without those of one folder."""
    for inside, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if (Path(inside) / name).resolve() != without.resolve()]
        yield from (Path(inside) / name for name in names)


def _stamp(path: Path, folder: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns
