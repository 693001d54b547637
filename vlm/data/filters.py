"""What the published training data leave out of GRIT, OCR-VQA and Visual Genome's regions.

A filter is a function (read, annotations, images) -> records (`DataSet.keep`). It calls `read` once or twice.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import cast

import numpy as np

from ssm_retrieval.errors import UserError
from vlm import pictures
from vlm.data.declaration import Read
from vlm.data.files import load_json, require, structure
from vlm.data.records import Grounded, GroundedCaption, Record

LARGEST_REGION = 16384  # square pixels
SMALLEST_SIDE = 100  # pixels, of GRIT
FEWEST, MOST = 3, 8  # images per phrase
COVER_SIDE = 350  # pixels; covers must be larger
PLAIN = 0.85  # share of a cover's pixels that one colour may take
ARTICLES = re.compile(r"\b(a|an|the|some)\b")


def small_regions(read: Read, annotations: Path, images: Path) -> Iterator[Grounded]:
    """Keep regions of at most LARGEST_REGION square pixels.

    Args:
        read: Gives all records.
        annotations: Folder of the official files.
        images: Folder of the pictures.

    Yields:
        Records.
    """
    for record in cast("Iterable[Grounded]", read()):
        x0, y0, x1, y1 = record.box
        if (x1 - x0) * (y1 - y0) <= LARGEST_REGION:
            yield record


def balanced(read: Read, annotations: Path, images: Path) -> Iterator[GroundedCaption]:
    """Keep images that are and were not small, and that at least one of their phrases keeps.

    A phrase, without case and articles, with fewer than FEWEST images keeps none; one with more than MOST
    keeps MOST of them, drawn by a hash of phrase and image. All phrases are held in memory.

    Args:
        read: Gives all records; called twice.
        annotations: Folder of the official files.
        images: Folder of the pictures.

    Yields:
        Records.
    """
    counts: Counter[str] = Counter()
    kept: dict[str, list[int]] = defaultdict(list)  # heap of a phrase's smallest draws, negated
    for record in _large(cast("Iterable[GroundedCaption]", read())):
        for phrase in _phrases(record):
            counts[phrase] += 1
            push = heapq.heappush if len(kept[phrase]) < MOST else heapq.heappushpop
            push(kept[phrase], -_draw(phrase, record))
    for record in _large(cast("Iterable[GroundedCaption]", read())):
        if any(counts[p] >= FEWEST and _draw(p, record) <= -kept[p][0] for p in _phrases(record)):
            yield record


def legible(read: Read, annotations: Path, images: Path) -> Iterator[Record]:
    """Keep books whose cover has an address of its own in the split and shows something.

    That is a picture that is large and not nearly plain. All pictures are opened.

    Args:
        read: Gives all records.
        annotations: Folder of the official files.
        images: Folder of the pictures.

    Yields:
        Records.
    """
    path = require(annotations, "dataset.json", "OCR-VQA's dataset.json")
    with structure(path):
        addresses = {key: row["imageURL"] for key, row in load_json(path).items()}
    counts = Counter(addresses[key] for key in {Path(record.image).stem for record in read()})
    for image, group in groupby(read(), lambda record: record.image):
        if counts[addresses[Path(image).stem]] == 1 and _shows_something(images / image):
            yield from group


def _shows_something(path: Path) -> bool:
    try:
        if min(pictures.size(path)) <= COVER_SIDE:
            return False
        pixels = pictures.read(path).astype(np.int64)
    except UserError:
        return False
    _, counts = np.unique(pixels @ np.array([1 << 16, 1 << 8, 1]), return_counts=True)
    return bool(counts.max() <= PLAIN * counts.sum())


def _large(records: Iterable[GroundedCaption]) -> Iterator[GroundedCaption]:
    """Those that are large enough, and were so before they were downloaded at another size."""
    for record in records:
        sides = (record.width or 0, record.height or 0, *(record.original or ()))
        if min(sides) >= SMALLEST_SIDE:
            yield record


def _phrases(record: GroundedCaption) -> set[str]:
    said = (record.caption[span.start : span.end].lower() for span in record.spans)
    return {" ".join(ARTICLES.sub("", phrase).split()) for phrase in said}


def _draw(phrase: str, record: Record) -> int:
    return int.from_bytes(blake2b(f"{phrase}\n{record.image}".encode(), digest_size=8).digest(), "big")
