"""The optimizers of training and what a checkpoint keeps of them.

    adamw        torch's fused AdamW: two float32 moments, 8 bytes a parameter
    adamw-8bit   bitsandbytes' (Dettmers et al. 2022, arXiv 2110.02861): moments in blocks of 256 bytes with
                 a scale each, about 2 bytes a parameter; tensors below 4,096 numbers keep float32
    adafactor    torch's (Shazeer & Stern 2018, arXiv 1804.04235): a row and a column of every matrix;
                 its steps are relative to the size of the weights, so --lr means something else

Whatever the precision of the products, weights are float32 and so their own master weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ssm_retrieval.errors import MissingPackage

if TYPE_CHECKING:
    from ssm_retrieval.models import LanguageModel

EXEMPT = ("A_log", "embed_pos", "conv1d", "B_bias", "C_bias")  # of weight decay, as all biases
# Parts of the names of a recurrence's own parameters: A, D, and the bias and projection of dt. (Mamba-2's
# projection of dt is a part of in_proj, which learns at the common rate.)
RECURRENCE = {"A_log", "D", "dt_bias", "dt_proj"}
EIGHT_BIT_HELP = (
    "--optimizer adamw-8bit needs bitsandbytes: pip install bitsandbytes (or --optimizer adafactor)"
)


class Settings(Protocol):
    """What a run's plan says of its optimizer."""

    @property
    def optimizer(self) -> str: ...
    @property
    def lr(self) -> float: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def ssm_lr(self) -> float: ...


def make_optimizer(model: LanguageModel, plan: Settings) -> torch.optim.Optimizer:
    """An optimizer for the parameters that train.

    Weight decay acts on matrices only, and neither on embeddings nor on what Mamba's authors exempt. The
    parameters of a recurrence may learn at a rate of their own, as in S4 (Gu et al. 2022, arXiv 2111.00396).

    Args:
        model: Model whose parameters it gets.
        plan: Says which optimizer, with which learning rate, betas and weight decay. Its ssm_lr is the factor
            on the rate of the recurrence.

    Returns:
        The optimizer, in two groups: with weight decay and without. If ssm_lr is not 1, the recurrence has
        two more, whose `lr_factor` it is (see `loop.set_rate`).

    Raises:
        MissingPackage: If its library is missing.
    """
    embeddings = {id(p) for part in (model.embedding, model.head) for p in part.parameters()}

    def pair(named: list[tuple[str, nn.Parameter]], **options: Any) -> list[dict[str, Any]]:
        decayed: list[Tensor] = []
        plain: list[Tensor] = []
        for name, p in named:
            spared = p.dim() < 2 or id(p) in embeddings or any(word in name for word in EXEMPT)
            (plain if spared else decayed).append(p)
        return [
            {"params": decayed, "weight_decay": plan.weight_decay, **options},
            {"params": plain, "weight_decay": 0.0, **options},
        ]

    own = [] if plan.ssm_lr == 1 else [(name, p) for name, p in trained(model) if recurrent(name)]
    names = {name for name, _ in own}
    groups = pair([(name, p) for name, p in trained(model) if name not in names])
    groups += pair(own, lr_factor=plan.ssm_lr) if own else []
    if plan.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=plan.lr)
    if plan.optimizer == "adamw-8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise MissingPackage(EIGHT_BIT_HELP) from error
        return AdamW8bit(groups, lr=plan.lr, betas=plan.betas)
    return torch.optim.AdamW(groups, lr=plan.lr, betas=plan.betas, fused=True)


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that train: those that are not frozen."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def recurrent(name: str) -> bool:
    """Whether a parameter of this name is the recurrence's own."""
    return not RECURRENCE.isdisjoint(name.split("."))


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `<what>.<parameter>`: exp_avg.*, row_var.*, state1.*, ...

    Left out are the number of steps, which the checkpoint's progress has, and bitsandbytes' tables of
    quantiles (qmap*), which are constants that all parameters share.
    """
    return {
        f"{what}.{name}": value
        for name, parameter in trained(model)
        for what, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor) and what != "step" and not what.startswith("qmap")
    }


@torch.no_grad()
def make_state(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Let a new optimizer make its state, to be filled with what `state_tensors` gave.

    This moves the weights: restore them afterwards. Every optimizer makes its state in its first step, each
    in its own form; so it does one on zero gradients.

    Args:
        model: Model that the optimizer was made for.
        optimizer: A new one.
        step: How many steps the state stands for.
    """
    for _, parameter in trained(model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for _, parameter in trained(model):
        state: dict[str, Any] = optimizer.state[parameter]
        if isinstance(state["step"], Tensor):
            state["step"].fill_(step)
        else:
            state["step"] = step
