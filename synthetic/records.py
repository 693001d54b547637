"""Files of a run, read back and checked; see `ssm_retrieval.training.records`.

    records.config(folder)        config.json: asked, settled (its plan), purpose
    records.metrics(folder)       metrics.jsonl, a row per evaluation
    records.by_position(folder)   by_position.jsonl
    records.by_length(folder)     by_length.jsonl
    records.result(folder)        result.json

All raise UserError, in one line, for what is damaged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, create_model

from ssm_retrieval import registry
from ssm_retrieval.errors import UserError
from ssm_retrieval.training.records import (
    CONFIG,
    METRICS,
    REMEDY,
    RESULT,
    Record,
    Row,
    checked,
    json_of,
    read_file,
    read_lines,
    record_of,
    text_of,
    use_modules,
)
from synthetic.identity import Plan

BY_POSITION, BY_LENGTH = "by_position.jsonl", "by_length.jsonl"
# config.json; its plan has the fields of `Plan`, of which those with a default may be missing.
_CONFIG: dict[str, Any] = dict(
    format=(int, 1),
    run=(dict[str, Any], ...),
    plan=(record_of(Plan, complete=False), ...),
    purpose=(Literal["report", "validation"], "report"),
)
RunRecord = create_model("RunRecord", __base__=Record, **_CONFIG)


class LengthRecord(Record):
    """A row of by_length.jsonl: what every evaluation says."""

    model: str
    seed: int
    length: int = Field(ge=1)
    loss: float
    accuracy: float = Field(ge=0, le=1)
    correct: int = Field(ge=0)
    count: int = Field(ge=1)
    ci_low: float
    ci_high: float
    chance: float


class EvaluationRecord(LengthRecord):
    """And when it was made."""

    step: int = Field(ge=0)
    examples: int = Field(ge=0)
    tokens: int = Field(ge=0)
    seconds: float
    train_length: int
    parameters: int | None = None
    parameters_without_embeddings: int | None = None


class MetricsRecord(EvaluationRecord):
    """A row of metrics.jsonl."""

    train_loss: float | None = None
    train_accuracy: float | None = None
    targets: list[Annotated[list[int], Field(min_length=4, max_length=4)]]


class ResultRecord(EvaluationRecord):
    """result.json."""

    format: int = 1
    reached: bool = False
    longest_length: int | None = None
    recalled_length: int | None = None


class PositionRecord(Record):
    """A row of by_position.jsonl."""

    model: str
    position: int = Field(ge=0)
    correct: int = Field(ge=0)
    count: int = Field(ge=1)
    rate: float
    ci_low: float
    ci_high: float
    chance: float


def config(folder: Path) -> Row:
    """What a run was asked for and what that came to; its user's modules (`--import`) are imported again.

    Raises:
        UserError: If it is no run's, damaged, of an older version, or of a model that is not registered.
    """
    path = folder / CONFIG
    if not path.exists():
        raise UserError(f"{folder} has no config.json; give the folder of a run")
    value = json_of(text_of(path), str(path))
    if isinstance(value, dict) and "plans" in value:
        raise UserError(
            f"{folder} is of an older version, which kept several models in one folder; move it away and run "
            "its command again"
        )
    found = checked(value, RunRecord, str(path))
    use_modules(found, path)
    family = found["plan"]["family"]
    if family not in registry.ARCHITECTURES:
        said = registry.ARCHITECTURES.unknown(family, list(registry.ARCHITECTURES))
        raise UserError(f"{path}: plan.family is {family!r}: {said}; else {REMEDY}")
    return found


def metrics(folder: Path) -> list[Row]:
    """A row per evaluation in training, in order."""
    return read_lines(folder / METRICS, MetricsRecord)


def by_position(folder: Path) -> list[Row]:
    """A row per target position of the final evaluation."""
    return read_lines(folder / BY_POSITION, PositionRecord)


def by_length(folder: Path) -> list[Row]:
    """A row per context length of the final evaluation."""
    return read_lines(folder / BY_LENGTH, LengthRecord)


def result(folder: Path) -> Row:
    """The final evaluation."""
    return read_file(folder / RESULT, ResultRecord)
