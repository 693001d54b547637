"""Open official files, so that a missing or malformed one is a single line that names it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ssm_retrieval.errors import UserError
from ssm_retrieval.models.unpickle import Plain, scan

K = TypeVar("K")
V = TypeVar("V")
TEXT = "utf-8-sig"  # UTF-8; a byte order mark, which some editors write, is skipped


class WrongFile(UserError):
    """An official file is not what it should be; the message names it."""


class MissingFile(WrongFile, FileNotFoundError):
    """An official file or a picture is missing; the message says what to download."""


def require(folder: str | Path, name: str, what: str) -> Path:
    """Return the path of an official file.

    Args:
        folder: Folder of the data set.
        name: Name of the file.
        what: What to download, in words.

    Returns:
        `folder/name`.

    Raises:
        MissingFile: If it does not exist.
    """
    path = Path(folder) / name
    if not path.exists():
        raise MissingFile(f"{path} is missing: download {what} and put {name} into {folder}")
    return path


@contextmanager
def structure(path: Path) -> Iterator[None]:
    """Turn errors while entries of a file are read into a UserError of one line with its name.

    Raises:
        WrongFile: If an entry lacks a field or has another structure.
    """
    try:
        yield
    except WrongFile:
        raise
    except KeyError as error:
        raise WrongFile(f"{path}: an entry has no {error}; is this the official file?") from error
    except (TypeError, AttributeError, IndexError, ValueError) as error:
        raise WrongFile(f"{path}: not in the official structure ({error})") from error


def entry(table: Mapping[K, V], key: K, path: Path, what: str) -> V:
    """Return the entry of one official file that another one names.

    Args:
        table: Entries of a file by key.
        key: The key.
        path: The file.
        what: What the key names, in words.

    Returns:
        The entry.

    Raises:
        WrongFile: If there is none.
    """
    if key not in table:
        raise WrongFile(f"{path} has no {what} {key}; put files of one release and split together")
    return table[key]


def load_json(path: Path) -> Any:
    """Return the content of a JSON file, with or without a byte order mark.

    Raises:
        WrongFile: If it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding=TEXT))
    except (ValueError, RecursionError) as error:
        raise WrongFile(f"{path} is not a JSON file ({error}); download it again") from error


def text_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file, with or without a byte order mark.

    Raises:
        WrongFile: If it is not UTF-8.
    """
    try:
        with path.open(encoding=TEXT) as lines:
            yield from lines
    except UnicodeDecodeError as error:
        raise WrongFile(f"{path} is not UTF-8 text ({error}); download it again") from error


def json_lines(path: Path) -> Iterator[Any]:
    """Yield the entries of a file with one JSON value per line; blank lines are skipped.

    Raises:
        WrongFile: If a line is not JSON.
    """
    for number, line in enumerate(text_lines(path), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise WrongFile(f"{path} line {number} is not JSON ({error}); download it again") from error


def load_plain_pickle(path: Path) -> Any:
    """Return the content of a pickle of plain containers, text and numbers; no code in it is executed.

    Raises:
        WrongFile: If it is no pickle, or holds anything else.
    """
    content = path.read_bytes()
    try:
        scan(content)
        return Plain(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise almost anything
        raise WrongFile(
            f"{path} is not a pickle of plain data ({error}); download the official file"
        ) from error
