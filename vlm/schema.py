"""What comes from outside, checked where it enters: config files, and files that the toolkit wrote itself.

The rules are pydantic's, declared beside the fields; this file turns what breaks them into one line that
names the file or the class, the field, its value and what to do.
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
MOST_NAME = 150  # bytes: names of files hold more beside it

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
    """A frozen dataclass that checks its fields' types and ranges when it is made; strict, no extra fields.

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
    """The first thing that is wrong: field, value, rule; and how many more there are.

    names: of the fields, for what was given by position.
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
    """repr of a value in one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def parsed(kind: type[T], content: bytes, path: Path, remedy: str) -> T:
    """JSON as an instance of a checked class. Raises UserError that names file, field, value and remedy."""
    try:
        return _adapter(cast(Any, kind)).validate_json(content)
    except ValidationError as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); {remedy}") from None
    except UserError as error:  # of a class inside
        raise UserError(f"{path} is damaged ({error}); {remedy}") from None


def read(kind: type[T], path: Path, remedy: str) -> T:
    """As `parsed`, from a file."""
    if not path.is_file():
        raise UserError(f"{path} is missing; {remedy}")
    return parsed(kind, path.read_bytes(), path, remedy)


def tensors(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As `store.load_tensors`, with what to do about a missing or damaged file. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path} is missing; {remedy}")
    return store.load_tensors(path, remedy)


def check_tensors(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], remedy: str) -> None:
    """Raises UserError where a file lacks one of the wanted tensors, or has another shape or no numbers."""
    for name, target in wanted.items():
        if name not in found:
            raise UserError(f"{path} has no tensor {name}; {remedy}")
        if found[name].shape != target.shape:
            shapes = f"{tuple(found[name].shape)} instead of {tuple(target.shape)}"
            raise UserError(f"{path}: tensor {name} has shape {shapes}; {remedy}")
        if found[name].is_floating_point() != target.is_floating_point() or not found[name].isfinite().all():
            raise UserError(f"{path}: tensor {name} holds no finite numbers; {remedy}")


def remove_left(path: Path) -> None:
    """Remove what killed processes have left while replacing a file; the caller holds its lock."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)
