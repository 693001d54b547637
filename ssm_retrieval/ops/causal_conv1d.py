"""Depthwise causal convolution over time, with the activation fused: the short filter before every scan.

    y_t = act(bias + sum_k weight[:, k] * x_{t - K + 1 + k})       K = d_conv taps, x before the start = 0

`reference` is torch's conv1d between two transposes (`_conv_torch.py`). `cpu` runs the same in the (batch,
length, channels) layout of the rest of the model with the numba vectors of `_simd.py`; after the scan itself
was fast the transposes and the separate silu were the largest item in a Mamba block's profile. `triton` is
ours for GPUs (`_conv_triton.py`), in that layout too. `cuda` is the causal-conv1d package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ssm_retrieval.ops import _conv_triton, _cuda_kernels, _triton
from ssm_retrieval.ops._checks import check_flags, check_name, check_shapes, check_tensor
from ssm_retrieval.ops._conv_cpu import conv_on_cpu
from ssm_retrieval.ops._conv_torch import conv_by_torch, with_history
from ssm_retrieval.ops._route import asked, obstacle, refuse_tracing, require_cpu


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
        backend: "auto" takes the one of the enclosing `ops.backend`, else `cpu` on a CPU and `cuda` or
            `triton` (up to 8 taps) on a GPU, where they are there and take the input, else `reference`, which
            is also "chunks", and what a gradient of our kernels' gradients and transforms of torch.func run.

    Returns:
        y like x; with return_last_state a tuple of it and the last d_conv - 1 inputs.

    Raises:
        ValueError: For wrong shapes, dtypes, devices or names.
        ImportError: If causal-conv1d or Triton is asked for and missing.
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
    elif backend == "triton":
        _require_triton(*tensors)
    silu = activation == "silu"
    if backend == "cuda":
        y = _cuda(x, weight, bias, activation, initial_state)
    elif backend in ("cpu", "triton") and x.numel() > 0:
        run = conv_on_cpu if backend == "cpu" else _conv_triton.conv_on_gpu
        y = run(x, weight, bias, silu, initial_state)
    else:
        y = conv_by_torch(x, weight, bias, silu, initial_state)
    return (y, _last_state(x, initial_state, before[1])) if return_last_state else y


def _choose(x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None) -> str:
    tensors = (x, weight, bias, initial_state)
    if not _triton.on_gpu(x):
        return "cpu" if obstacle(*tensors) is None else "reference"
    if weight.shape[1] > _conv_triton.MAX_TAPS:
        return "reference"
    able = initial_state is None and _kernel_takes(x, weight)
    return _triton.choose("causal_conv1d", "causal_conv1d", able, *tensors, dtypes=_conv_triton.DTYPES)


def _require_triton(x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None) -> None:
    """Raise one line where backend='triton' was asked for and cannot be."""
    _triton.require(x, weight, bias, initial_state, dtypes=_conv_triton.DTYPES)
    if weight.shape[1] > _conv_triton.MAX_TAPS:
        raise ValueError(
            f"backend='triton' takes up to {_conv_triton.MAX_TAPS} taps; got {weight.shape[1]}; use "
            "backend='auto'"
        )


def _kernel_takes(x: Tensor, weight: Tensor) -> bool:
    return _cuda_kernels.takes(x) and weight.shape[1] in (2, 3, 4) and x.shape[2] % 8 == 0


def _last_state(x: Tensor, initial_state: Tensor | None, length: int) -> Tensor:
    """The last `length` inputs; only as much of x is copied as is needed."""
    if x.shape[1] >= length:
        return x[:, x.shape[1] - length :].clone()
    return with_history(x, initial_state, length)[:, x.shape[1] :]


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
