"""Affine maps in float32 at the speed of the machine.

On a CPU torch multiplies float32 matrices with Intel's MKL, which does not use the AVX-512 units of AMD's
processors; oneDNN, which torch also carries, does: 470 against 190 GFLOP/s on two Zen 5 cores. `linear`
therefore goes to oneDNN there, and is torch's `F.linear` everywhere else (other processors, devices, dtypes,
autocast). Which of the two runs depends on the machine only, so that a run repeats itself bit for bit.
"""

from __future__ import annotations

import platform
import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_retrieval.ops._checks import check_shapes, check_tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias. x: (..., K), weight: (N, K), bias: (N,); returns (..., N). As `F.linear`.

    Raises ValueError for other shapes, dtypes or devices.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # they know it, and would break at ours
        return F.linear(x, weight, bias)
    _check(x, weight, bias)
    able = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0 and weight.numel() > 0
    if able and not torch.is_autocast_enabled("cpu") and onednn_is_faster():
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    dim = x.dim() if isinstance(x, Tensor) and not x.is_nested else 2
    check_tensor("x", x, ["..."] * (max(dim, 1) - 1) + ["in_features"])
    check_tensor("weight", weight, ("out_features", "in_features"))
    check_shapes(x, weight=(weight, (weight.shape[0], x.shape[-1])), bias=(bias, (weight.shape[0],)))
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return  # which casts them all
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.dtype != x.dtype:
            raise ValueError(f"{name} is {other.dtype}, x is {x.dtype}; cast one of them")


class Linear(nn.Linear):
    """`nn.Linear` that multiplies with `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


@lru_cache(maxsize=1)
def onednn_is_faster() -> bool:
    """Whether this is an AMD processor with AVX-512 and a torch that uses MKL on it."""
    able = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    if not able or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return "AuthenticAMD" in _processor() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _processor() -> str:
    if sys.platform.startswith("linux"):
        try:
            with open("/proc/cpuinfo") as file:
                return file.read(4096)
        except OSError:
            return ""
    return platform.processor()


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias of float32 matrices (M, K), (N, K) by oneDNN; matrices that are neither
    contiguous nor transposed are copied there."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        y = matmul(x.reshape(-1, x.shape[-1]), weight, bias)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = matmul(g, weight.t()).view(x.shape)
        if ctx.needs_input_grad[1]:
            dweight = outer(g, x.reshape(-1, x.shape[-1]))
        if ctx.has_bias and ctx.needs_input_grad[2]:
            dbias = g.sum(0)
        return dx, dweight, dbias


def outer(g: Tensor, x: Tensor) -> Tensor:
    """g^T x for g: (M, N), x: (M, K), the smaller of N and K as oneDNN's rows, which is faster."""
    return matmul(g.t(), x.t()) if g.shape[1] <= x.shape[1] else matmul(x.t(), g.t()).t()
