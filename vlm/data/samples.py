"""What training and evaluation read: prompts with the picture they are about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vlm.prompts import Chunk


@dataclass(frozen=True)
class Sample:
    """One sequence: the turns about one image.

    Attributes:
        id: Unique within its source.
        source: Name of its source.
        image: Key of its picture in the source.
        task: Kind of question, such as "grounding".
        chunks: Prompt and answers (`vlm.prompts`); without the last answer in evaluation.
        target: What metrics need to know of the right answer, by name; JSON values only.
    """

    id: str
    source: str
    image: str
    task: str
    chunks: tuple[Chunk, ...]
    target: Mapping[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """Samples by number and their pictures by key; reading one must not depend on what was read before.

    Attributes:
        name: Name of the source.
        fingerprint: Identifies the pictures (a seed and a split, a folder), so that a cache of features can
            tell two sources apart.
    """

    name: str
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def picture(self, image: str) -> npt.NDArray[np.uint8]:
        """Return a picture, (height, width, 3) uint8, RGB."""
        ...

    def keys(self) -> Sequence[str]:
        """Return every picture's key once, in a fixed order."""
        ...
