"""Files that the toolkit wrote, read back: one schema a kind of file, one line for what is wrong with one.

Here is what is the same for every training: values checked against a schema (`checked`), schemas made of
dataclasses (`record_of`), and `environment`, a session each time a training was started. The files of a tool
are its own (`synthetic.records`).

All raise UserError naming file, field and remedy for what is damaged, incomplete, of another kind, or written
by a newer version (`FORMAT`). What they return is plain JSON values, checked. A last line that a crash cut
short is left out. Tables of the results store are read by `training.tables.load`.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, create_model

from ssm_retrieval import registry
from ssm_retrieval.errors import UserError

# Of all these files; raised when an older version would misread what a newer one writes. 2: one model a run.
FORMAT = 2
# Names of these files, which `training.store` writes
CONFIG, ENVIRONMENT, METRICS = "config.json", "environment.json", "metrics.jsonl"
RESULT = "result.json"  # its presence means finished
Row = dict[str, Any]
Count = Annotated[int, Field(ge=0)]
REMEDY = "move the run's folder away and run its command again"


class Record(BaseModel):
    """A row or file; keys that it does not name are kept, unless a kind of file says otherwise."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class Closed(Record):
    """One that has no other fields than those that are named."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@cache
def record_of(fields: type, complete: bool = True) -> type[Record]:
    """The schema of a dataclass as JSON, without any other field.

    Args:
        fields: A dataclass. `Annotated` types say what values may be, as `Count` does.
        complete: Whether a field with a default must be there as well.

    Returns:
        What `checked` takes.
    """
    hints = typing.get_type_hints(fields, include_extras=True)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(fields):
        kind, default = hints[field.name], ... if complete else field.default
        if typing.get_origin(kind) is tuple:  # a list, in JSON
            kind = Annotated[kind, Strict(False)]
        found[field.name] = (kind, ... if default is dataclasses.MISSING else default)
    return create_model(fields.__name__, __base__=Closed, **found)


class SessionRecord(Record):
    """Where and with what a training was started or resumed."""

    python: str
    platform: str
    threads: int
    packages: dict[str, str | None]
    commit: str | None = None


class EnvironmentRecord(Record):
    """environment.json."""

    format: int = 1
    sessions: list[SessionRecord] = Field(min_length=1)


# --- what a file's text says -----------------------------------------------------------------------------


def text_of(path: Path) -> str:
    """A file's text.

    Raises:
        UserError: If it is no text.
        OSError: As the system gives it.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: no UTF-8 text at byte {error.start}; {REMEDY}") from error


def json_of(text: str, where: str, first_line: int = 1) -> Any:
    """The JSON value of a text.

    Args:
        text: Text of a file or of a line.
        where: The file.
        first_line: The number of the text's first line in it.

    Returns:
        Dictionaries, lists, strings and numbers.

    Raises:
        UserError: Naming the line, if it is no JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{where} is damaged: no JSON in line {line} ({error.msg}); {REMEDY}") from error
    except RecursionError as error:
        raise UserError(f"{where} is damaged: JSON nested too deep; {REMEDY}") from error


def json_lines(path: Path) -> list[Any]:
    """Values of a JSON Lines file, without a last line that a crash cut short."""
    lines = text_of(path).split("\n")[:-1]
    return [json_of(line, str(path), number) for number, line in enumerate(lines, 1) if line]


def checked(value: Any, kind: type[Record], where: str, remedy: str = REMEDY) -> Row:
    """`value` as it is, if `kind` describes it.

    Args:
        value: Parsed JSON.
        kind: The schema.
        where: The file, and the row in it.
        remedy: What to do about it.

    Returns:
        The value.

    Raises:
        UserError: For another kind of value, or naming the first field that is wrong.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where} holds {short(value)} instead of an object with fields; {remedy}")
    newer = value.get("format", FORMAT)
    if isinstance(newer, int) and newer > FORMAT:
        raise UserError(
            f"{where} was written by a newer version (format {newer}; this one reads up to {FORMAT}); "
            "update ssm-retrieval"
        )
    try:
        kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise UserError(f"{where} lacks {field}; {remedy}") from error
        if first["type"] == "extra_forbidden":
            unknown = f"{where}: {field} is unknown, of a newer version perhaps; update, or {remedy}"
            raise UserError(unknown) from error
        said = first["msg"].lower().removesuffix(".")
        raise UserError(f"{where}: {field} is {short(first['input'])} ({said}); {remedy}") from error
    return value


def short(value: Any) -> str:
    """A value in an error's line."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def read_file(path: Path, kind: type[Record]) -> Row:
    """A JSON file that `kind` describes. Raises UserError for a damaged one."""
    return checked(json_of(text_of(path), str(path)), kind, str(path))


def read_lines(path: Path, kind: type[Record]) -> list[Row]:
    """Rows of a JSON Lines file, each of which `kind` describes; none if there is no file.

    Raises UserError for a damaged one.
    """
    if not path.exists():
        return []
    return [checked(row, kind, f"{path}, row {i}") for i, row in enumerate(json_lines(path), 1)]


# --- a kind of file each ---------------------------------------------------------------------------------


def environment(folder: Path) -> Row:
    """The sessions of a training; a file of before there were several counts as one.

    Raises UserError for a missing or damaged file.
    """
    path = folder / ENVIRONMENT
    value = json_of(text_of(path), str(path))
    if isinstance(value, dict) and "sessions" not in value and "packages" in value:
        value = {"format": 1, "sessions": [value]}
    return checked(value, EnvironmentRecord, str(path))


def finished(folder: Path) -> bool:
    """Whether a run has its result."""
    return (folder / RESULT).exists()


def use_modules(config: Row, path: Path) -> None:
    """Import again the modules of its user (`--import`) that a run was made with.

    Args:
        config: What the run's config.json holds.
        path: Path of the file.

    Raises:
        UserError: If they are no list of names, or cannot be imported.
    """
    asked = config.get("run")
    modules = asked.get("imports", []) if isinstance(asked, dict) else []
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise UserError(f"{path}: run.imports is {short(modules)}, not a list of names; {REMEDY}")
    registry.use(modules, where=str(path.parent))
