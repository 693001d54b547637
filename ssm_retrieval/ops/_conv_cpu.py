"""The causal convolution by our CPU kernels: their layout, their gradients, and torch.compile's operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssm_retrieval.ops import LANES
from ssm_retrieval.ops._arrays import flat, pad_channels
from ssm_retrieval.ops._conv_torch import conv_by_torch
from ssm_retrieval.ops._kernel_autograd import differentiable_map
from ssm_retrieval.ops._threads import run_tasks


def conv_on_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_state: Tensor | None
) -> Tensor:
    """Bring the arguments of `causal_conv1d` into the kernels' layout (differentiably) and back."""
    dtype, wide, E = x.dtype, torch.promote_types(x.dtype, torch.float32), x.shape[-1]
    shift = x.new_zeros(E) if bias is None else bias
    before = None if initial_state is None else pad_channels(initial_state, wide)
    arguments = [pad_channels(t, wide) for t in (x, weight.t(), shift)]
    y = _run(*arguments, before, silu)
    return (y if y.shape[-1] == E else y[..., :E]).to(dtype)


def _forward(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None, silu: bool) -> Tensor:
    """Run the forward kernel; weight (d_conv, channels), channels a multiple of 16."""
    from ssm_retrieval.ops._conv_kernels import conv_forward  # numba: imported on first use only

    b, L, E = x.shape
    y, sizes = torch.empty_like(x), (L, E // LANES, weight.shape[0])
    given = [flat(t, x.dtype) for t in (x, weight, bias, before, y)]
    run_tasks(lambda tasks: conv_forward(tasks, sizes, silu, *given), b * sizes[1])
    return y


def _backward(
    x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None, silu: bool, gy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernel: the gradients of x, weight, bias and before (empty where that is absent)."""
    from ssm_retrieval.ops._conv_kernels import conv_backward

    b, L, E = x.shape
    K = weight.shape[0]
    dx = torch.empty_like(x)
    dweight, dbias = x.new_empty(b, K, E), x.new_empty(b, E)
    dbefore = x.new_empty(0) if before is None else torch.empty_like(before)
    given = [flat(t, x.dtype) for t in (x, weight, bias, before, gy.contiguous())]
    out = [flat(t, x.dtype) for t in (dx, dweight, dbias, dbefore)]
    sizes = (L, E // LANES, K)
    run_tasks(lambda tasks: conv_backward(tasks, sizes, silu, *given, *out), b * sizes[1])
    return dx, dweight.sum(0), dbias.sum(0), dbefore


def _by_torch(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None, silu: bool) -> Tensor:
    return conv_by_torch(x, weight.t(), bias, silu, before)


_run, conv_forward, conv_backward = differentiable_map("causal_conv1d", _forward, _backward, _by_torch)


@conv_forward.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@conv_backward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    dbefore = x.new_empty(0) if before is None else torch.empty_like(before)
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias), dbefore
