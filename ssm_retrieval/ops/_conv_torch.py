"""The causal convolution by torch's own: on any device, differentiable without limit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ssm_retrieval.ops._route import without_autocast


def with_history(x: Tensor, initial_state: Tensor | None, length: int) -> Tensor:
    """x after the `length` inputs before it, zeros if there is no initial_state."""
    if initial_state is None:
        return F.pad(x, (0, 0, length, 0))
    return torch.cat([initial_state.to(x.dtype), x], dim=1)


def conv_by_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_state: Tensor | None
) -> Tensor:
    """What `causal_conv1d` returns first."""
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    history = with_history(x, initial_state, weight.shape[1] - 1).to(wide).transpose(1, 2)
    if x.numel() == 0:
        return x + 0.0 * weight.sum().to(dtype)  # nothing to convolve, still part of the graph
    filters, shift = weight.to(wide).unsqueeze(1), None if bias is None else bias.to(wide)
    with without_autocast(x.device.type):
        y = F.conv1d(history, filters, shift, groups=weight.shape[0]).transpose(1, 2)
    return (F.silu(y) if silu else y).to(dtype)
