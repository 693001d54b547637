"""Depthwise causal convolution over time, with the activation fused: the short filter before every scan.

    y_t = act(bias + sum_k weight[:, k] * x_{t - K + 1 + k})       K = d_conv taps, x before the start = 0

`reference` is torch's conv1d between two transposes. `cpu` runs the same in the (batch, length, channels)
layout of the rest of the model with the numba vectors of `_simd.py`; after the scan itself was fast the
transposes and the separate silu were the largest item in a Mamba block's profile.
`cuda` is the causal-conv1d package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssm_retrieval.ops import LANES, _cuda_kernels
from ssm_retrieval.ops._arrays import flat, pad_channels
from ssm_retrieval.ops._checks import check_flags, check_name, check_shapes, check_tensor
from ssm_retrieval.ops._route import (
    asked,
    differentiable_gradients,
    obstacle,
    refuse_tracing,
    require_cpu,
    traced,
    transformed,
    without_autocast,
)
from ssm_retrieval.ops._threads import run_tasks


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    backend: str = "auto",
) -> Any:
    """Convolve every channel of every sequence with its own causal filter.

    Computed in float32 (float64 for float64 x).

    Args:
        x: (batch, length, channels), floating.
        weight: (channels, d_conv).
        bias: (channels,).
        activation: None or "silu".
        initial_state: The inputs before x, (batch, d_conv - 1, channels).
        return_last_state: Whether to return the inputs that a continuation needs.
        backend: "auto" takes the one of the enclosing `ops.backend`, else `cpu` or `cuda` where they take the
            input, else `reference`, which is also "chunks", and what a gradient of `cpu`'s gradients and
            transforms of torch.func run.

    Returns:
        y like x; with return_last_state a tuple of it and the last d_conv - 1 inputs.

    Raises:
        ValueError: For wrong shapes, dtypes, devices or names.
        ImportError: If causal-conv1d is asked for and missing.
        NotImplementedError: Under torch.jit.trace.
    """
    refuse_tracing("causal_conv1d")
    backend = asked(backend)
    check_name("activation", activation, (None, "silu"))
    check_flags(return_last_state=return_last_state)
    check_tensor("x", x, ("batch", "length", "channels"))
    check_tensor("weight", weight, ("channels", "d_conv"))
    (b, _, E), K = x.shape, weight.shape[1]
    if K < 1:
        raise ValueError("weight has no taps; d_conv must be at least 1")
    before = (b, K - 1, E)
    check_shapes(x, weight=(weight, (E, K)), bias=(bias, (E,)), initial_state=(initial_state, before))
    tensors = (x, weight, bias, initial_state)
    if backend == "auto":
        backend = _choose(*tensors)
    elif backend == "cpu":
        require_cpu(*tensors)
    if backend == "cuda":
        y = _cuda(x, weight, bias, activation, initial_state)
    elif backend == "cpu" and x.numel() > 0:
        y = _cpu(x, weight, bias, activation, initial_state)
    else:
        y = _reference(x, weight, bias, activation, initial_state)
    return (y, _last_state(x, initial_state, before[1])) if return_last_state else y


def _choose(x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None) -> str:
    if x.device.type == "cuda" and not transformed():
        able = initial_state is None and _kernel_takes(x, weight)
        return "cuda" if able and _cuda_kernels.installed("causal_conv1d") else "reference"
    return "cpu" if obstacle(x, weight, bias, initial_state) is None else "reference"


def _kernel_takes(x: Tensor, weight: Tensor) -> bool:
    return _cuda_kernels.takes(x) and weight.shape[1] in (2, 3, 4) and x.shape[2] % 8 == 0


def _with_history(x: Tensor, initial_state: Tensor | None, length: int) -> Tensor:
    if initial_state is None:
        return F.pad(x, (0, 0, length, 0))
    return torch.cat([initial_state.to(x.dtype), x], dim=1)


def _last_state(x: Tensor, initial_state: Tensor | None, length: int) -> Tensor:
    """The last `length` inputs; only as much of x is copied as is needed."""
    if x.shape[1] >= length:
        return x[:, x.shape[1] - length :].clone()
    return _with_history(x, initial_state, length)[:, x.shape[1] :]


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, initial_state: Tensor | None
) -> Tensor:
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    history = _with_history(x, initial_state, weight.shape[1] - 1).to(wide).transpose(1, 2)
    if x.numel() == 0:
        return x + 0.0 * weight.sum().to(dtype)  # nothing to convolve, still part of the graph
    filters, shift = weight.to(wide).unsqueeze(1), None if bias is None else bias.to(wide)
    with without_autocast(x.device.type):
        y = F.conv1d(history, filters, shift, groups=weight.shape[0]).transpose(1, 2)
    return (F.silu(y) if activation == "silu" else y).to(dtype)


def _cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, initial_state: Tensor | None
) -> Tensor:
    dtype, wide, E = x.dtype, torch.promote_types(x.dtype, torch.float32), x.shape[-1]
    shift = x.new_zeros(E) if bias is None else bias
    before = None if initial_state is None else pad_channels(initial_state, wide)
    arguments = [pad_channels(t, wide) for t in (x, weight.t(), shift)]
    run: Any = conv_forward if traced(*arguments, before) else _Conv.apply
    y = run(*arguments, before, activation == "silu")
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


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    if torch.is_grad_enabled():  # of the backward pass itself, whose own gradient somebody will want

        def again(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None) -> list[Tensor]:
            return [_reference(x, weight.t(), bias, "silu" if ctx.silu else None, before)]

        return (*differentiable_gradients(again, tensors, [gy]), None)
    run: Any = conv_backward if traced(*tensors) else _backward
    found = run(*tensors, ctx.silu, gy)
    return (*(None if x is None else grad for x, grad in zip(tensors, found, strict=True)), None)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save(ctx, inputs, y := _forward(*inputs))
        return y

    backward = staticmethod(_gradients)


# One node each of the graphs of torch.compile and torch.export; a call that none records goes past them
conv_forward = torch.library.custom_op("ssm_retrieval::causal_conv1d", _forward, mutates_args=())
conv_backward = torch.library.custom_op("ssm_retrieval::causal_conv1d_backward", _backward, mutates_args=())
conv_forward.register_autograd(_gradients, setup_context=_save)


@conv_forward.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@conv_backward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    dbefore = x.new_empty(0) if before is None else torch.empty_like(before)
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias), dbefore


def _cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, initial_state: Tensor | None
) -> Tensor:
    if initial_state is not None:
        raise ValueError("backend='cuda' does not take initial_state in this layout; use backend='auto'")
    if not _kernel_takes(x, weight):
        raise ValueError(
            "backend='cuda' takes float32, bfloat16 or float16, channels in multiples of 8 and 2 to 4 taps; "
            f"got {x.dtype} {tuple(x.shape)} and {weight.shape[1]} taps; use backend='auto'"
        )
    convolve = _cuda_kernels.kernel("causal_conv1d", "causal_conv1d_fn", "activation")
    _cuda_kernels.on_gpu(x)
    return in_causal_conv1d_layout(convolve, x, weight, bias, activation)


def in_causal_conv1d_layout(
    kernel: Callable[..., Any], x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """Call a function of causal-conv1d's signature: channels before time, everything in x's dtype.

    The kernel wants strides that are multiples of 8, which slices need not have.

    Args:
        kernel: `causal_conv1d_fn`, or a function with its arguments.
        x: (batch, length, channels).
        weight: (channels, d_conv).
        bias: (channels,) or None.
        activation: None or "silu".

    Returns:
        (batch, length, channels), in x's dtype.
    """
    shift = None if bias is None else bias.to(x.dtype)
    turned = _cuda_kernels.packed(x).transpose(1, 2)
    return kernel(turned, weight.to(x.dtype), shift, activation=activation).transpose(1, 2)
