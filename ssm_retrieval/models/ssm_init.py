"""Initial values of an SSM layer: the step sizes of Mamba, and what makes a layer ready to recall.

`ssm_init` of a config is "default", as Mamba's authors initialise, "recall", or some of its three parts
joined by "+", such as "identity+long":

    identity   The convolution returns its input: last tap 1, other taps and bias 0. A token's key is then its
               own, not mixed with its neighbours, which differ between context and query.
    long       The state forgets nothing: A = -exp(-8) and dt = 1 for every token (A_log = -8, no weight
               from the token to dt, bias softplus^-1(1) = 0.5413), so that exp(dt A) = 0.99966.
    tied       C = B for every token: what makes C is copied from what makes B. What is asked with a token
               then points at what was stored with it.

Layers whose decay is made otherwise have a "long" of their own, which their files describe: GLA, Mamba-3.

With all three, y_t is nearly sum_s (B_t . B_s) u_s: causal linear attention with equal queries and keys. This
is the mimetic initialisation of Trockman et al. 2024 (arXiv 2410.11135), which was published without code, in
the form that trained best here. It deviates from the paper in two ways:

* C equals B exactly. The paper makes the two projections correlated, W_C^T W_B near the identity.
* Mamba's convolution is the identity, too. The paper reports that this helps Mamba-2 but not Mamba; to
  retrieve positions Mamba needs it as well.

The identity is wrong where a value follows its key, as in MQAR: there the convolution must bring the two
together. With d_conv=1 it stays the identity up to a scale and bias per channel: no convolution. Nothing is
drawn: with the same seed all other weights are those of "default".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LONG_A_LOG = -8.0
UNIT_DT = math.log(math.expm1(1.0))  # softplus of it is 1


def dt_bias(config: Any, size: int) -> Tensor:
    """(size,) whose softplus is log-uniform in [dt_min, dt_max]; inverse softplus: x + log(1 - exp(-x))."""
    low, high = math.log(config.dt_min), math.log(config.dt_max)
    dt = torch.exp(torch.rand(size) * (high - low) + low).clamp(min=1e-4)
    return dt + torch.log(-torch.expm1(-dt))


def parts_of(ssm_init: str) -> str:
    """The parts that a value of `ssm_init` stands for, as it names them."""
    return "identity+long+tied" if ssm_init == "recall" else ssm_init


@torch.no_grad()
def recall_init(
    ssm_init: str,
    convs: Iterable[nn.Conv1d],
    dt: Sequence[Tensor],
    tied: Iterable[tuple[Tensor, Tensor]],
) -> None:
    """Give a layer the parts that `ssm_init` names, in place.

    Args:
        ssm_init: A value of the config's field.
        convs: The depthwise causal convolutions.
        dt: A_log, the weights that make dt, and dt's bias; empty for a state that never decays.
        tied: Pairs of what makes B and what makes C, such as rows of a projection.
    """
    parts = parts_of(ssm_init)
    if "identity" in parts:
        for conv in convs:
            conv.weight.zero_()[..., -1] = 1.0
            if conv.bias is not None:
                conv.bias.zero_()
    if "long" in parts and dt:
        A_log, weight, bias = dt
        A_log.fill_(LONG_A_LOG)
        weight.zero_()
        bias.fill_(UNIT_DT)
    if "tied" in parts:
        for of_B, of_C in tied:
            of_C.copy_(of_B)
