"""The causal convolution by our Triton kernels: what they are given, gradients, torch.compile's operators.

Fixed tiles and no autotuning: what limits these kernels is memory, which any tile of whole rows keeps busy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssm_retrieval.ops import _triton
from ssm_retrieval.ops._conv_torch import conv_by_torch
from ssm_retrieval.ops._kernel_autograd import differentiable_map

DTYPES = (*_triton.DTYPES, torch.float64)
MAX_TAPS = 8  # loops over taps are unrolled


def conv_on_gpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_state: Tensor | None
) -> Tensor:
    """Bring the arguments of `causal_conv1d` into the kernels' layout (differentiably)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return _run(x, weight.to(wide).t(), bias, initial_state, silu)


def _by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, silu: bool) -> Tensor:
    return conv_by_torch(x, weight.t(), bias, silu, before)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, silu: bool) -> Tensor:
    """Run the forward kernel; weight (d_conv, channels)."""
    from ssm_retrieval.ops import _conv_triton_kernels as kernels  # Triton: imported on first use only

    b, L, E = x.shape
    y, (given, flags) = x.new_empty(b, L, E), _given(x, weight, bias, before)
    with _triton.launching(x):
        kernels.conv_forward[_grid(b, L, E)](*given[:4], y, L, E, *_strides(given), SILU=silu, **flags)
    return y


def _backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, silu: bool, gy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernels: the gradients of x, weight, bias and before (empty where that is absent)."""
    from ssm_retrieval.ops import _conv_triton_kernels as kernels

    (b, L, E), K, tiles = x.shape, weight.shape[0], -(-x.shape[1] // _tile()[0])
    given, flags = _given(x, weight, bias, before)
    gy = _triton.unit_stride(gy)
    g, dx = weight.new_empty(b, L, E), x.new_empty(b, L, E)
    dweight, dbias = weight.new_empty(b, tiles, K, E), weight.new_empty(b, tiles, E)
    dbefore = x.new_empty(0) if before is None else before.new_empty(before.shape)
    with _triton.launching(x):
        made, strides = (g, dweight, dbias), (*_strides(given), gy.stride(0), gy.stride(1))
        kernels.conv_sums[_grid(b, L, E)](*given, gy, *made, L, E, *strides, SILU=silu, **flags)
        del flags["HAS_BIAS"]
        kernels.conv_inputs[_grid(b, L + K - 1, E)](g, given[1], dx, dbefore, L, E, **flags)
    return dx, dweight.sum((0, 1)), dbias.sum((0, 1)), dbefore


def _given(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """x, weight, bias and before as kernels take them, and what they must know when they are compiled.

    In the place of an absent one is x, which is not read there.
    """
    import triton.language as tl

    x = _triton.unit_stride(x)
    wide = tl.float64 if weight.dtype == torch.float64 else tl.float32
    BT, BE = _tile()
    flags = dict(K=weight.shape[0], BT=BT, BE=BE, WIDE=wide, HAS_BIAS=bias is not None)
    flags["HAS_BEFORE"] = before is not None
    bias = x if bias is None else _triton.packed(bias)
    return (x, _triton.packed(weight), bias, x if before is None else _triton.unit_stride(before)), flags


def _strides(given: tuple[Tensor, ...]) -> list[int]:
    """Those of sequences and of tokens of x and before: their channels are neighbours."""
    found = [given[0], given[3]]
    assert all(x.stride(-1) == 1 for x in found)
    return [x.stride(axis) for x in found for axis in (0, 1)]


def _tile() -> tuple[int, int]:
    """Tokens and channels of a tile. In the interpreter small tests are to have several."""
    return (8, 8) if _triton.interpreted() else (32, 64)


def _grid(batch: int, tokens: int, channels: int) -> tuple[int]:
    BT, BE = _tile()
    return (batch * -(-tokens // BT) * -(-channels // BE),)


_run, conv_forward, conv_backward = differentiable_map("causal_conv1d_triton", _forward, _backward, _by_torch)


@conv_forward.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@conv_backward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbefore = x.new_empty(0) if before is None else before.new_empty(before.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(x.shape[2]), dbefore
