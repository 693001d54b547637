"""JSON values by number: lines of one text and the places where they end, in memory or in a mapped file.

Reading value i neither parses nor holds the others, and processes that read the same file share its memory.
On disk: NAME.jsonl, and NAME.npy with the ends. NAME.npy is written last, so its presence means complete.
"""

from __future__ import annotations

import io
import json
import mmap
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from ssm_retrieval.errors import UserError
from ssm_retrieval.training.store import replacing


class Lines:
    """A sequence of JSON values.

    Args:
        text: All lines.
        ends: (N,) int64, where each line ends, in bytes.
        path: Path of the mapped file; None in memory.
    """

    def __init__(self, text: bytes | mmap.mmap, ends: npt.NDArray[np.int64], path: Path | None = None):
        self.text, self.ends, self.path = text, ends, path

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"line {index} of {len(self)}")
        return json.loads(self.text[self.ends[index - 1] if index else 0 : self.ends[index]])

    def __reduce__(self) -> tuple[Callable[..., Lines], tuple[Any, ...]]:
        return (Lines, (self.text, self.ends)) if self.path is None else (opened, (self.path,))


def in_memory(values: Iterable[Any]) -> Lines:
    """Keep values in memory, about as much as the official files take, and 8 bytes per value."""
    text = io.BytesIO()
    ends = _write(text, values)
    return Lines(text.getvalue(), ends)


def on_disk(path: Path, values: Callable[[], Iterable[Any]]) -> Lines:
    """Return the lines in a file; if it does not exist, one process writes it first while others wait.

    Args:
        path: The file (.jsonl).
        values: Gives the values; called only if they must be written.

    Returns:
        The lines.

    Raises:
        UserError: If a file is damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.with_suffix(".npy").exists():
            for left in path.parent.glob(f".{path.name}.*.tmp"):  # by killed processes
                left.unlink()
            with replacing(path) as temporary, open(temporary, "wb") as file:
                ends = _write(file, values())
            with replacing(path.with_suffix(".npy")) as temporary, open(temporary, "wb") as file:
                np.save(file, ends)
    return opened(path)


def opened(path: Path) -> Lines:
    """Return the lines that `on_disk` wrote.

    Raises:
        UserError: If a file is damaged.
    """
    try:
        ends = np.load(path.with_suffix(".npy"), mmap_mode="r")
        with open(path, "rb") as file:
            text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if ends.ndim != 1 or ends.dtype != np.int64 or ends[-1] != len(text):
            raise UserError(f"{len(text)} bytes do not fit to the lines' ends")
    except (OSError, ValueError, EOFError, IndexError) as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"{path} is damaged ({said}); delete {path.with_suffix('.*')} to make it anew"
        ) from error
    return Lines(text, ends, path)


def _write(file: BinaryIO, values: Iterable[Any]) -> npt.NDArray[np.int64]:
    """Write the lines and return their ends. Raises UserError if there are none."""
    ends = array("q")
    end = 0
    for value in values:
        end += file.write(json.dumps(value, separators=(",", ":")).encode() + b"\n")
        ends.append(end)
    if not end:
        raise UserError("there is nothing to write")
    return np.frombuffer(ends, np.int64)
