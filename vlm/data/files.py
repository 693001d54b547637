"""Open official files, so that a missing or malformed one is a single line that names it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssm_retrieval.errors import UserError
from ssm_retrieval.models.unpickle import Plain, scan


class MissingFile(UserError, FileNotFoundError):
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
        UserError: If an entry lacks a field or has another structure.
    """
    try:
        yield
    except KeyError as error:
        raise UserError(f"{path}: an entry has no {error}; is this the official file?") from error
    except (TypeError, AttributeError, IndexError, ValueError) as error:
        if str(path) in str(error):  # the message names the file already
            raise
        raise UserError(f"{path}: not in the official structure ({error})") from error


def load_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        UserError: If it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file ({error}); download it again") from error


def json_lines(path: Path) -> Iterator[Any]:
    """Yield the entries of a file with one JSON value per line; blank lines are skipped.

    Raises:
        UserError: If a line is not JSON.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(
                        f"{path} line {number} is not JSON ({error}); download it again"
                    ) from error


def load_plain_pickle(path: Path) -> Any:
    """Return the content of a pickle of plain containers, text and numbers; no code in it is executed.

    Raises:
        UserError: If it is no pickle, or holds anything else.
    """
    content = path.read_bytes()
    try:
        scan(content)
        return Plain(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise almost anything
        raise UserError(
            f"{path} is not a pickle of plain data ({error}); download the official file"
        ) from error
