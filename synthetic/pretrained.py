"""Runs that start from published weights: `--init`.

The task's tokens become new rows behind all those that the checkpoint's table has, as in the paper's first
experiment, so their ids begin at its vocabulary's size (`Task.first_id`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssm_retrieval import models
from ssm_retrieval.errors import UserError
from ssm_retrieval.models.checkpoints import Checkpoint, examine, outline
from ssm_retrieval.models.registry import architecture_of
from ssm_retrieval.training import store
from synthetic.checks import check

if TYPE_CHECKING:
    from synthetic.config import Plan, RunConfig
    from synthetic.tasks import Task

# Options that the checkpoint settles
SHAPE_OPTIONS = ("preset", "d_model", "layers", "heads", "d_state", "d_conv", "window", "ssm_init",
                 "position", "rotary_pct")  # fmt: skip


@dataclass(frozen=True)
class Start:
    """A checkpoint that a run starts from.

    Attributes:
        family: Its architecture.
        config: Config of its model.
        record: Its path or name, and the hash of its contents.
    """

    family: str
    config: Any
    record: dict[str, str]

    def model(self, task: Task) -> tuple[str, dict[str, Any], int]:
        """Registry name, overrides and width of the model with the task's tokens: all of its config."""
        grown = self.config.replace(vocab_size=self.config.vocab_size + task.vocab_size)
        return self.family, grown.to_dict(), grown.d_model


def find(config: RunConfig, init: str, family: str) -> Start:
    """What --init names.

    Args:
        config: What was asked for.
        init: A folder, or the name of a checkpoint on the hub.
        family: The architecture that was asked for.

    Returns:
        The checkpoint, read but for its weights.

    Raises:
        UserError: If there is no such checkpoint, or options contradict it.
    """
    for name in SHAPE_OPTIONS:
        value = getattr(config, name)
        check(
            value == getattr(type(config), name),
            f"--{name.replace('_', '-')} {value} contradicts --init {init}, which has its own; leave one out",
        )
    try:
        checkpoint = examine(init)
        outline(checkpoint)
    except UserError as error:
        raise UserError(f"--init {init}: {error}") from error
    found = architecture_of(checkpoint.config).name
    check(
        family == found,
        f"--model {family} contradicts --init {init}, which is a {found}; use --model {found}",
    )
    path = Path(init)
    record = {"path": str(path.resolve()) if path.is_dir() else init, "sha256": fingerprint(checkpoint)}
    return Start(found, checkpoint.config, record)


def first_model(plan: Plan, device: Any) -> models.LanguageModel:
    """The model that a plan with `init` starts from, in float32.

    Args:
        plan: The plan.
        device: Where it is to live; on "meta" no weight is read.

    Returns:
        The model.

    Raises:
        UserError: If the checkpoint has changed since the run was planned.
    """
    assert plan.init is not None
    if str(device) == "meta":
        return models.build(plan.model, device=device, **plan.model_overrides)
    path = plan.init["path"]
    check(
        fingerprint(examine(path)) == plan.init["sha256"],
        f"--init {path} has changed since this run was planned; run the command again",
    )
    model = models.load(path, dtype=torch.float32, device=device)
    rows = plan.model_overrides["vocab_size"] - model.config.vocab_size
    return models.grow_vocabulary(model, rows, seed=plan.seed)


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of config.json and every byte of the weights, wherever they lie.

    Of a run's config.json only the model counts: what the run was for may be written anew.
    """
    head = checkpoint.folder / "config.json"
    ours = "plan" in store.read_json(head)
    files = [*([] if ours else [head]), *checkpoint.files]
    digests = [_digest(file.resolve(), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    if ours:
        digests.insert(0, json.dumps(checkpoint.config.to_dict(), sort_keys=True))
    return hashlib.sha256("".join(digests).encode()).hexdigest()


@lru_cache(maxsize=256)
def _digest(file: Path, size: int, changed: int) -> str:
    """Of a file's contents, read once as long as its size and time of change stay."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while part := opened.read(2**20):
            digest.update(part)
    return digest.hexdigest()
