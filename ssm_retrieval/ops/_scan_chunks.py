"""The selective scan in plain PyTorch by blocks of tokens: on any device, differentiable without limit.

A block of 64 tokens is 8 groups of 8. With a_t = exp(delta_t A), w_t = delta_t B_t u_t, and sums and products
over the tokens of t's group up to t:

    local_t = a_t local_{t-1} + w_t                 local = 0 before each group; 8 steps, all groups at once
    reach_t = exp(A sum_s delta_s)                  how much of the state before the group is left at t
    h_t     = local_t + reach_t h_{before group}    which is passed on from group to group in 8 steps

Every factor is the exponential of a sum of steps, so where A is negative none exceeds 1, and none is divided
by. States of one block exist at a time. Where gradients are wanted a block keeps the state that it starts
from and is computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ssm_retrieval.ops._route import transformed
from ssm_retrieval.ops._scan_arguments import ScanArguments, skipped_and_gated, widened

BLOCK, GROUP = 64, 8


def scan_by_chunks(
    given: ScanArguments, positions: Sequence[int] | None, return_last_state: bool
) -> list[Tensor]:
    """What `selective_scan` returns, in a list. positions: in [0, length), in any order."""
    u, delta, A, B, C, h = widened(given)
    again = u.shape[1] > BLOCK and torch.is_grad_enabled()
    again = again and not (transformed() or torch.compiler.is_compiling())  # which cannot compute it twice
    ys: list[Tensor] = []
    found: dict[int, Tensor] = {}
    for start in range(0, u.shape[1], BLOCK):
        part = slice(start, start + BLOCK)
        wanted = sorted({t - start for t in positions or () if start <= t < start + BLOCK})
        inside = (h, u[:, part], delta[:, part], A, B[:, part], C[:, part], wanted)
        if again:
            y, h, states = checkpoint(_block, *inside, use_reentrant=False, preserve_rng_state=False)
        else:
            y, h, states = _block(*inside)
        ys.append(y)
        found |= {start + t: state for t, state in zip(wanted, states.unbind(1), strict=True)}
    out = [skipped_and_gated(torch.cat(ys, dim=1) if ys else u, given)]
    if return_last_state:
        out.append(h)
    if positions is not None:
        none = h.new_empty(h.shape[0], 0, *h.shape[1:])
        out.append(torch.stack([found[t] for t in positions], dim=1) if positions else none)
    return out


def _block(
    h: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, wanted: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """y (batch, tokens, d_inner), the state after the last token and those after the tokens `wanted`."""
    L = u.shape[1]
    groups = -(-L // GROUP)

    def grouped(x: Tensor) -> Tensor:  # tokens added at the end have delta = 0, the identity on the state
        return F.pad(x, (0, 0, 0, groups * GROUP - L)).unflatten(1, (groups, GROUP))

    delta, write, B = grouped(delta), grouped(delta * u), grouped(B)  # (batch, groups, GROUP, ...)
    decay = torch.exp(delta.unsqueeze(-1) * A)  # (batch, groups, GROUP, d_inner, d_state)
    writes = write.unsqueeze(-1) * B.unsqueeze(-2)
    local = [writes[:, :, 0]]
    for t in range(1, GROUP):
        local.append(decay[:, :, t] * local[-1] + writes[:, :, t])
    reach = torch.exp(delta.cumsum(2).unsqueeze(-1) * A)
    before = []
    for group in range(groups):
        before.append(h)
        h = reach[:, group, -1] * h + local[-1][:, group]
    states = torch.stack(local, dim=2) + reach * torch.stack(before, dim=1).unsqueeze(2)
    states = states.flatten(1, 2)[:, :L]
    return (states * C.unsqueeze(2)).sum(-1), h, states[:, wanted]
