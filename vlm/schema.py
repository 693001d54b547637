"""Check what comes from outside: config files, and files that the toolkit wrote itself.

The rules are pydantic's, declared beside the fields. This file turns a violation into one line that names the
file or the class, the field, its value and what to do.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import pydantic
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import Tensor
from typing_extensions import dataclass_transform

from ssm_retrieval.errors import UserError
from ssm_retrieval.training import store

T = TypeVar("T")
MOST_SHOWN = 60  # characters of a wrong value
MOST_NAME = 150  # bytes; file names add to it

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def _file_name(name: str) -> str:
    if not name.strip() or ".." in name or name[0] in ". " or any(c in "/\\" or ord(c) < 32 for c in name):
        raise ValueError(
            "it names files, so it must not be empty, begin with '.' or have '/', '\\' or '..' in it"
        )
    if len(name.encode(errors="surrogateescape")) > MOST_NAME:
        raise ValueError(f"it names files, so it must have at most {MOST_NAME} bytes")
    return name


FileName = Annotated[str, AfterValidator(_file_name)]
Positive = Annotated[int, Field(ge=1, le=2**40)]
Natural = Annotated[int, Field(ge=0, le=2**40)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
NonNegative = Annotated[float, Field(ge=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


@dataclass_transform(frozen_default=True, field_specifiers=(Field, pydantic.fields.Field))
def checked(cls: type[T]) -> type[T]:
    """Make a frozen dataclass that checks its fields' types and ranges; strict, no extra fields.

    Its `__init__` raises UserError, one line that names class, field and value.
    """
    made: Any = pydantic_dataclass(frozen=True, config=STRICT)(cls)
    check = made.__init__

    @functools.wraps(check)
    def __init__(self: Any, *values: Any, **named: Any) -> None:
        try:
            check(self, *values, **named)
        except ValidationError as error:
            names = [field.name for field in dataclasses.fields(made)]
            given = dict(zip(names, values, strict=False)) | named
            which = f"{cls.__name__} {shortened(given['name'])}" if "name" in given else cls.__name__
            raise UserError(f"{which}: {first_line(error, names)}") from None

    made.__init__ = __init__
    return made


def first_line(error: ValidationError, names: Sequence[str] = ()) -> str:
    """Describe the first violation: field, value, rule, and how many more there are.

    Args:
        error: Pydantic's error.
        names: Names of the fields, for values given by position.

    Returns:
        One line.
    """
    errors = error.errors(include_url=False)
    first = errors[0]
    place = list(first["loc"])
    if place and isinstance(place[0], int) and place[0] < len(names):
        place[0] = names[place[0]]
    where = ".".join(map(str, place))
    said = first["msg"].removeprefix("Value error, ")
    nothing = first["type"] in ("missing", "missing_argument", "unexpected_keyword_argument", "json_invalid")
    value = "" if nothing else f"={shortened(first['input'])}"
    said = said[0].lower() + said[1:]
    more = f" ({len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{where}{value}: {said}{more}" if where else f"{said}{more}"


def shortened(value: Any) -> str:
    """Return the repr of a value in one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def parsed(kind: type[T], content: bytes, path: Path, remedy: str) -> T:
    """Parse JSON as an instance of a checked class.

    Args:
        kind: The class.
        content: The JSON.
        path: The file that errors name.
        remedy: What errors say to do.

    Returns:
        The instance.

    Raises:
        UserError: Naming file, field, value and remedy.
    """
    try:
        return _adapter(cast(Any, kind)).validate_json(content)
    except ValidationError as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); {remedy}") from None
    except UserError as error:  # raised by a nested class
        raise UserError(f"{path} is damaged ({error}); {remedy}") from None


def read(kind: type[T], path: Path, remedy: str) -> T:
    """Read a file as `parsed` does.

    Args:
        kind: The class.
        path: The file.
        remedy: What errors say to do.

    Returns:
        The instance.

    Raises:
        UserError: If the file is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; {remedy}")
    return parsed(kind, path.read_bytes(), path, remedy)


def tensors(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file as `store.load_tensors` does.

    Args:
        path: The file.
        remedy: What errors say to do.

    Returns:
        The tensors by name, and the metadata.

    Raises:
        UserError: If the file is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; {remedy}")
    return store.load_tensors(path, remedy)


def check_tensors(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], remedy: str) -> None:
    """Check that a file has all tensors of a model.

    Args:
        path: The file that errors name.
        found: Its tensors.
        wanted: The model's tensors.
        remedy: What errors say to do.

    Raises:
        UserError: If a tensor is missing, has another shape, or holds numbers that are not finite.
    """
    for name, target in wanted.items():
        if name not in found:
            raise UserError(f"{path} has no tensor {name}; {remedy}")
        if found[name].shape != target.shape:
            shapes = f"{tuple(found[name].shape)} instead of {tuple(target.shape)}"
            raise UserError(f"{path}: tensor {name} has shape {shapes}; {remedy}")
        if found[name].is_floating_point() != target.is_floating_point() or not found[name].isfinite().all():
            raise UserError(f"{path}: tensor {name} holds no finite numbers; {remedy}")


def remove_left(path: Path) -> None:
    """Remove what killed processes left while replacing a file; the caller holds its lock."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)
