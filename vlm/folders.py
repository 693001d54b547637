"""What a stage leaves in its folder, written by `vlm.stages` and `vlm.train`, and read by everything else.

    <out>/<stage id>/config.json             the runs that end with this stage; else the one that made it
                     environment.json        versions, hardware, commit
                     metrics.jsonl           a row every few steps
                     checkpoint.safetensors  while it trains: weights, optimiser, progress
                     model.safetensors       the weights
                     stage.json              steps and seconds; its presence means finished

Files are checked as they are read: one line names the damaged file, what is wrong in it, and what to do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import nn

from ssm_retrieval.errors import UserError
from ssm_retrieval.training import store
from ssm_retrieval.training.store import CHECKPOINT, CONFIG, ENVIRONMENT, METRICS, WEIGHTS
from vlm import released, schema
from vlm.config import Run, use_modules_of
from vlm.schema import Natural, NonNegative, checked

__all__ = ["CHECKPOINT", "CONFIG", "ENVIRONMENT", "METRICS", "WEIGHTS"]

RESULT = "stage.json"
FORMAT = 2  # of config.json; raise it when an older toolkit could not read it


@checked
class Saved:
    """config.json. run, purpose, format: as `store.prepare` writes them, of no use here."""

    plans: tuple[Run, ...] = Field(min_length=1)
    version: Natural = 1
    format: Natural = 1
    run: Mapping[str, Any] = field(default_factory=dict)
    purpose: str = ""


@checked
class Finished:
    """stage.json."""

    steps: Natural
    seconds: NonNegative


def remedy(folder: Path) -> str:
    """What to do about a damaged file of a stage."""
    return f"delete the folder {folder} and run python -m vlm.train again"


def finished(folder: Path) -> Finished:
    """What a stage has cost. Raises UserError for a missing or damaged file."""
    return schema.read(Finished, folder / RESULT, remedy(folder))


def commit(folder: Path) -> str | None:
    """The project's commit that a stage was trained with.

    Raises:
        UserError: For a missing or damaged file.
    """
    path = folder / ENVIRONMENT
    found = schema.read(dict, path, remedy(folder)).get("commit")
    if found is not None and not isinstance(found, str):
        raise UserError(f"{path} is damaged (commit={schema.shortened(found)} is no text); {remedy(folder)}")
    return found


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of the metrics; a last line that was cut short is left out.

    Raises:
        UserError: For a damaged file.
    """
    path, rows = folder / METRICS, []
    if not path.exists():
        return []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        row = schema.parsed(dict, line, Path(f"{path} line {number}"), remedy(folder))
        if not isinstance(row.get("step"), int):
            raise UserError(f"{path} line {number} is damaged (it has no step); {remedy(folder)}")
        rows.append(row)
    return rows


def load_weights(folder: Path, model: nn.Module) -> None:
    """Copy the weights of a finished stage into a model. Raises UserError for a missing or damaged file."""
    found, _ = schema.tensors(folder / WEIGHTS, remedy(folder))
    wanted = dict(model.named_parameters())
    schema.check_tensors(folder / WEIGHTS, found, wanted, remedy(folder))
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(found[name])


def remember(run: Run, out: Path) -> None:
    """Note in the folder of a run's last stage that it is this run's, as the latest.

    Runs that differ in name, evaluation or the length of answers share a folder. The caller is the only one
    that writes there, or others write the same.
    """
    path = out / run.stage_ids()[-1] / CONFIG
    known = [other for other in _saved(path).plans if other.name != run.name] if path.exists() else []
    ending = [other for other in known if other.stage_ids()[-1] == path.parent.name]
    said = {"version": FORMAT, "plans": [one.to_dict() for one in (*ending, run)]}
    if not path.exists() or store.read_json(path) != json.loads(json.dumps(said)):
        store.write_json(path, said)


def saved_runs(folder: Path) -> list[Run]:
    """The runs whose last stage is in a folder, the latest one last; or the released checkpoint in it.

    Raises:
        UserError: For other folders.
    """
    place = folder.resolve()
    if released.is_one(place):
        return [released.run(place)]
    if not (place / CONFIG).exists() or not (place / RESULT).exists():
        raise UserError(
            f"{folder} holds no trained VLM; give a folder that vlm.train printed, a config file, or the "
            "folder of a released checkpoint"
        )
    finished(place)
    plans = _saved(place / CONFIG).plans
    ends = [run for run in plans if run.stage_ids()[-1] == place.name]
    if ends:
        return ends
    for run in plans:
        names = run.stage_ids()
        if place.name in names:
            raise UserError(
                f"{folder} is stage {names.index(place.name) + 1} of {len(names)} of run {run.name!r}; give "
                f"the last one, {place.parent / names[-1]}"
            )
    raise UserError(
        f"{folder} has a name that its {CONFIG} does not lead to: it was renamed or edited, or written by "
        f"another version of the toolkit; give it back its name, or {remedy(folder)}"
    )


def saved_run(folder: Path) -> tuple[Run, Path]:
    """The latest run whose last stage is in a folder, and the folder of all stages. Raises UserError."""
    return saved_runs(folder)[-1], folder.resolve().parent


def _saved(path: Path) -> Saved:
    content = path.read_bytes()
    _use_modules_of(path, content)
    try:
        return schema.parsed(Saved, content, path, remedy(path.parent))
    except UserError:
        try:
            version = json.loads(content)["version"]
        except (ValueError, TypeError, KeyError, RecursionError):
            version = None
        if isinstance(version, int) and version > FORMAT:
            raise UserError(
                f"{path} has version {version}, newer than {FORMAT}, which this toolkit reads; update it"
            ) from None
        raise


def _use_modules_of(path: Path, content: bytes) -> None:
    """Import what the runs were trained with (`--import`), before they are parsed."""
    try:
        plans = json.loads(content)["plans"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return  # the parser says what is wrong
    use_modules_of(plans, where=str(path.parent))
