"""Files that the toolkit wrote, read back: one schema a kind of file, one line for what is wrong with one.

    records.config(folder)        config.json of a run: asked, settled (its plan), purpose
    records.environment(folder)   environment.json: a session each time the run was started
    records.metrics(folder)       metrics.jsonl, a row per evaluation
    records.by_position(folder)   by_position.jsonl
    records.result(folder)        result.json

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
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, create_model

from ssm_retrieval import registry
from ssm_retrieval.errors import UserError

# Of all these files; raised when an older version would misread what a newer one writes. 2: one model a run.
FORMAT = 2
Row = dict[str, Any]
Count = Annotated[int, Field(ge=0)]
REMEDY = "move the run's folder away and run its command again"


class Record(BaseModel):
    """A row or file; keys that it does not name are kept, unless a kind of file says otherwise."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Closed(Record):
    """One that has no other fields than those that are named."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@cache
def record_of(fields: type, complete: bool = True) -> type[Record]:
    """The schema of a dataclass as JSON, without any other field.

    Args:
        fields: a dataclass. `Annotated` types say what values may be, as `Count` does.
        complete: whether a field with a default must be there as well.
    """
    hints = typing.get_type_hints(fields, include_extras=True)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(fields):
        kind, default = hints[field.name], ... if complete else field.default
        if typing.get_origin(kind) is tuple:  # a list, in JSON
            kind = Annotated[kind, Strict(False)]
        found[field.name] = (kind, ... if default is dataclasses.MISSING else default)
    return create_model(fields.__name__, __base__=_Closed, **found)


class PlanRecord(Record):
    """`identity.Plan` as JSON; what is not in the file has its default."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    family: str
    model: str
    model_overrides: dict[str, Any]
    task: str
    task_options: dict[str, Any]
    seq_len: int = Field(ge=1)
    queries: int
    curriculum: int
    lr: float
    steps: int | None
    budget: int | None
    stop_at: float
    batch_tokens: int
    batch_size: int | None
    weight_decay: float
    warmup: int
    schedule: str
    grad_clip: float
    eval_every: int
    betas: list[float]
    eval_examples: int
    final_eval_examples: int
    seed: int
    device: str
    precision: str
    optimizer: str = "adamw"
    accumulate: int = 1
    checkpointing: bool = False
    lora: int = 0
    init: dict[str, str] | None = None


class RunRecord(Record):
    format: int = 1
    run: dict[str, Any]
    plan: PlanRecord
    purpose: Literal["report", "validation"] = "report"


class SessionRecord(Record):
    python: str
    platform: str
    threads: int
    packages: dict[str, str | None]
    commit: str | None = None


class EnvironmentRecord(Record):
    format: int = 1
    sessions: list[SessionRecord] = Field(min_length=1)


class EvaluationRecord(Record):
    model: str
    seed: int
    step: int = Field(ge=0)
    examples: int = Field(ge=0)
    tokens: int = Field(ge=0)
    seconds: float
    train_length: int
    length: int = Field(ge=1)
    loss: float
    accuracy: float = Field(ge=0, le=1)
    correct: int = Field(ge=0)
    count: int = Field(ge=1)
    ci_low: float
    ci_high: float
    chance: float
    parameters: int | None = None
    parameters_without_embeddings: int | None = None


class MetricsRecord(EvaluationRecord):
    train_loss: float | None = None
    train_accuracy: float | None = None
    targets: list[Annotated[list[int], Field(min_length=4, max_length=4)]]


class ResultRecord(EvaluationRecord):
    format: int = 1
    reached: bool = False
    longest_length: int | None = None


class PositionRecord(Record):
    model: str
    position: int = Field(ge=0)
    correct: int = Field(ge=0)
    count: int = Field(ge=1)
    rate: float
    ci_low: float
    ci_high: float
    chance: float


# --- what a file's text says -----------------------------------------------------------------------------


def text_of(path: Path) -> str:
    """Raises UserError for what is no text; OSError as the system gives it."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: no UTF-8 text at byte {error.start}; {REMEDY}") from error


def json_of(text: str, where: str, first_line: int = 1) -> Any:
    """The JSON value of `text`. Raises UserError naming the line."""
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
    """`value`, which `kind` describes. Raises UserError naming the first field that it does not."""
    if not isinstance(value, dict):
        raise UserError(f"{where} holds {_short(value)} instead of an object with fields; {remedy}")
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
        raise UserError(f"{where}: {field} is {_short(first['input'])} ({said}); {remedy}") from error
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _file(path: Path, kind: type[Record]) -> Row:
    return checked(json_of(text_of(path), str(path)), kind, str(path))


def _lines(path: Path, kind: type[Record]) -> list[Row]:
    if not path.exists():
        return []
    return [checked(row, kind, f"{path}, row {i}") for i, row in enumerate(json_lines(path), 1)]


# --- a kind of file each ---------------------------------------------------------------------------------


def config(folder: Path) -> Row:
    """What a run was asked for and what that came to; its users' modules (`--import`) are imported again."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} has no config.json; give the folder of a run")
    value = json_of(text_of(path), str(path))
    if isinstance(value, dict) and "plans" in value:
        raise UserError(
            f"{folder} is of an older version, which kept several models in one folder; move it away and run "
            "its command again"
        )
    found = checked(value, RunRecord, str(path))
    modules = found["run"].get("imports", [])
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise UserError(f"{path}: run.imports is {_short(modules)}, not a list of names; {REMEDY}")
    registry.use(modules, where=str(folder))
    family = found["plan"]["family"]
    if family not in registry.ARCHITECTURES:
        said = registry.ARCHITECTURES.unknown(family, list(registry.ARCHITECTURES))
        raise UserError(f"{path}: plan.family is {family!r}: {said}; else {REMEDY}")
    return found


def environment(folder: Path) -> Row:
    """{"sessions": [...]}; the one dictionary that releases before it wrote is one session."""
    path = folder / "environment.json"
    value = json_of(text_of(path), str(path))
    if isinstance(value, dict) and "sessions" not in value and "packages" in value:
        value = {"format": 1, "sessions": [value]}
    return checked(value, EnvironmentRecord, str(path))


def metrics(folder: Path) -> list[Row]:
    return _lines(folder / "metrics.jsonl", MetricsRecord)


def by_position(folder: Path) -> list[Row]:
    return _lines(folder / "by_position.jsonl", PositionRecord)


def result(folder: Path) -> Row:
    return _file(folder / "result.json", ResultRecord)
