"""Small training sessions and what can be seen of them from outside: batches, gradients, optimizer steps.

Everything here watches through torch's own hooks, so that it sees what the trainer does, whatever it says.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synthetic import trainer
from synthetic.config import Plan, RunConfig, plan

FAMILIES = ("transformer", "mamba", "mamba2", "hybrid")
SMALL = RunConfig(
    seq_len=16, num_symbols=40, queries=4, curriculum=4, steps=12, warmup=4, batch_tokens=128,
    eval_every=1000, eval_examples=8, final_eval_examples=8, device="cpu", precision="float32",
)  # fmt: skip
WIDTH = {"d_model": 32, "n_layer": 2}
NARROW: dict[str, dict[str, int]] = {
    "transformer": WIDTH | {"n_head": 2},
    "mamba": WIDTH | {"d_state": 4},
    "mamba2": WIDTH | {"d_state": 4, "headdim": 16},
    "hybrid": WIDTH | {"n_head": 2, "d_state": 4, "n_layer": 3},
}


def small(family: str, **changed: Any) -> Plan:
    """The plan of a session whose steps take milliseconds. changed: fields of RunConfig or of Plan."""
    names = {f.name for f in dataclasses.fields(RunConfig)}
    asked = {name: value for name, value in changed.items() if name in names}
    p = plan(dataclasses.replace(SMALL, **asked), family)
    p = dataclasses.replace(p, model_overrides=p.model_overrides | NARROW[family])
    return dataclasses.replace(p, **{name: value for name, value in changed.items() if name not in names})


def session(p: Plan, folder: Path, events: list[dict[str, Any]] | None = None) -> trainer.Session:
    """A fresh session in `folder`; events: receives the rows of its steps."""

    def listener(event: str, row: dict[str, Any]) -> None:
        if events is not None and event == "step":
            events.append(row)

    folder.mkdir(parents=True, exist_ok=True)
    return trainer.Session(p, folder, listener)


@dataclasses.dataclass
class Handed:
    """What the optimizer had in its hands as it was asked for a step."""

    groups: list[dict[str, Any]]
    gradients: dict[str, Tensor]

    def norm(self) -> float:
        """Of all gradients together, in float64."""
        return float(torch.cat([g.double().flatten() for g in self.gradients.values()]).norm())


def watch_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Handed]:
    """A list that receives what the optimizer is handed in every step from now on."""
    seen: list[Handed] = []

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        seen.append(Handed(groups, gradients))

    optimizer.register_step_pre_hook(hook)
    return seen


@dataclasses.dataclass
class Read:
    """Token ids that a model's embedding was given, and whether gradients were wanted."""

    input_ids: Tensor
    training: bool


def watch_inputs(model: Any) -> list[Read]:
    """A list that receives the token ids of every forward pass from now on."""
    seen: list[Read] = []

    def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(Read(args[0].clone(), torch.is_grad_enabled()))

    model.embedding.register_forward_pre_hook(hook)
    return seen
