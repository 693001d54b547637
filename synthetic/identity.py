"""What decides a run's numbers, in one form for every way to ask for it: `Plan`, `normal`, `run_id`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

# Raise it whenever the trainer comes to other numbers for the same plan: it is part of every run's identity.
TRAINING_VERSION = 2  # 2: a validation split decides when training stops, and is asked twice
NEVER = 1.01  # a --stop-at that no accuracy reaches
# Fields of a plan that its architecture settles, and options that decide some of them: runs that agree in all
# other fields, and in these options, are one comparison of architectures.
OF_A_MODEL = ("family", "model", "model_overrides", "lr", "ssm_lr", "growth", "init")
ASKED_OF_A_MODEL = ("lr", "preset", "d_model", "layers", "growth", "init")


@dataclass(frozen=True)
class Plan:
    """One model's training, every value settled. Its hash names the run.

    config.json of a run holds these fields, and is checked by their types (`synthetic.records`).
    """

    family: str
    model: str  # registry name
    model_overrides: dict[str, Any]
    task: str
    task_options: dict[str, Any]
    seq_len: Annotated[int, Field(ge=1)]
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
    betas: tuple[float, float]
    eval_examples: int
    final_eval_examples: int
    seed: int
    device: str
    precision: str
    # Younger than the first runs: not in the dictionary at their defaults, so that those keep their names.
    optimizer: str = "adamw"
    accumulate: int = 1
    checkpointing: bool = False
    lora: int = 0
    label_smoothing: float = 0.0
    ssm_lr: float = 1.0  # factor on the rate of a recurrence's own parameters
    flat: int | None = None  # steps at the peak before the decay; None: the decay begins with the first step
    growth: str = "prefix"  # how short contexts grow (`synthetic.curricula`)
    init: dict[str, str] | None = None  # path and sha256 of the checkpoint that training starts from

    def __post_init__(self) -> None:
        """1, 1.0 and NumPy's 1 are one number: a field has the type that it is declared with."""
        for name, kind in typing.get_type_hints(Plan).items():
            value = getattr(self, name)
            number = next((n for n in (int, float) if kind in (n, n | None)), None)
            if number is not None and value is not None:
                object.__setattr__(self, name, number(value))
        object.__setattr__(self, "betas", tuple(map(float, self.betas)))

    def to_dict(self) -> dict[str, Any]:
        late = {f.name: f.default for f in dataclasses.fields(self) if f.default is not dataclasses.MISSING}
        found = dataclasses.asdict(self)
        return {name: value for name, value in found.items() if name not in late or value != late[name]}

    def identity(self) -> dict[str, Any]:
        """What decides the numbers: where a checkpoint lies does not, what is in it does."""
        fields = self.to_dict()
        return fields if self.init is None else fields | {"init": self.init["sha256"]}


def normal(plan: Plan) -> Plan:
    """The plan without what has no effect, so that runs of equal numbers have one name.

    Casting by type is `Plan`'s own; aliases of presets and options of the task are resolved before.
    """
    changed: dict[str, Any] = {}
    if plan.curriculum >= plan.seq_len:
        changed["curriculum"] = 0  # either way training is at seq_len from the first step
    if changed.get("curriculum", plan.curriculum) == 0:
        changed["growth"] = "prefix"  # nothing grows
    if plan.warmup == 1:
        changed["warmup"] = 0  # the first step has the full rate either way
        changed["flat"] = None if plan.flat is None else plan.flat + 1  # and so the decay begins when it did
    elif plan.warmup == 0 and plan.flat == 0:
        changed["flat"] = None
    if plan.stop_at > 1:
        changed["stop_at"] = NEVER
    if plan.batch_size is not None:
        changed["batch_tokens"] = 0  # the number of sequences is fixed
    if "rotary_pct" in plan.model_overrides and plan.init is None:
        changed["model_overrides"] = {**plan.model_overrides, "rotary_pct": _rotary_pct(plan)}
    return dataclasses.replace(plan, **changed)


def _rotary_pct(plan: Plan) -> float:
    """The smallest share that rotates as many dimensions of a head, an even number, as the one asked for."""
    from ssm_retrieval import models

    config: Any = models.config(plan.model, **plan.model_overrides)
    attention = config.attention_config() if hasattr(config, "attention_config") else config
    rotated, all_of_them = attention.rotary_dims, attention.d_head
    share = rotated / all_of_them
    return share if int(all_of_them * share) == rotated else math.nextafter(share, 1)


def comparison(plan: Plan, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a run has in common with those that differ from it in nothing but the architecture.

    Args:
        plan: The run's plan.
        asked: The options that it was started with.

    Returns:
        A dictionary that is equal for two runs of one comparison, whatever their architectures.
    """
    settled = {name: value for name, value in plan.to_dict().items() if name not in OF_A_MODEL}
    return settled | {f"asked {name}": asked.get(name) for name in ASKED_OF_A_MODEL}


def run_id(plan: Plan) -> str:
    """Readable name plus a hash over everything that decides the numbers."""
    from synthetic import tasks

    versions = [TRAINING_VERSION, tasks.TASKS[plan.task].version]
    text = json.dumps([versions, plan.identity()], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    layout = f"-{plan.task_options['layout']}" if "layout" in plan.task_options else ""
    return f"{plan.task}{layout}-L{plan.seq_len}-{plan.family}-s{plan.seed}-{digest}"
