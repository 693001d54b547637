"""Affine maps in float32 at the speed of the machine.

On a CPU torch multiplies float32 matrices with Intel's MKL, which does not use the AVX-512 units of AMD's
processors; oneDNN, which torch also carries, does: 470 against 190 GFLOP/s on two Zen 5 cores. `linear`
therefore goes to oneDNN there, and is torch's `F.linear` everywhere else (other processors, devices, dtypes,
autocast, compilers and transforms of torch.func).

Which of the two runs is decided once, by `_onednn_is_faster` when this module is imported, so a run repeats
itself bit for bit. The choice is one of speed. Both multiply and add in float32 and differ in the order in
which the K products of an entry are added, so each is within K * 2^-23 * sum_k |x_k w_k| of the exact result
(Higham 2002, section 3.1), as MKL itself is on different processors.
"""

from __future__ import annotations

import platform
import sys
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_retrieval.ops._checks import check_shapes, check_tensor
from ssm_retrieval.ops._route import asked, transformed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, as `F.linear`, differentiable any number of times.

    Results depend on the processor by the rounding of float32 sums only. Under torch.compile this is
    `F.linear`, whatever the processor.

    Args:
        x: (..., K), floating.
        weight: (N, K).
        bias: (N,).

    Returns:
        (..., N).

    Raises:
        ValueError: For other shapes, dtypes or devices.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # they know it, and would break at ours
        return F.linear(x, weight, bias)
    _check(x, weight, bias)
    able = x.numel() > 0 and weight.numel() > 0 and not torch.is_autocast_enabled("cpu")
    if able and by_onednn(x.dtype, x.device):
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def by_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of this kind go to oneDNN: where it is faster or `ops.backend("cpu")` asks for it."""
    wanted = {"auto": ONEDNN_IS_FASTER, "cpu": HAS_ONEDNN}.get(asked("auto"), False)
    return wanted and dtype == torch.float32 and device.type == "cpu" and not transformed()


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


def dtype_of(layer: nn.Module) -> torch.dtype:
    """Return the dtype of activations that an affine layer takes: of its weights, unless it says another."""
    dtype: torch.dtype = getattr(layer, "dtype", None) or cast(Tensor, layer.weight).dtype
    return dtype


class Linear(nn.Linear):
    """`nn.Linear` that multiplies with `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def _processor() -> str:
    if sys.platform.startswith("linux"):
        try:
            with open("/proc/cpuinfo") as file:
                return file.read(4096)
        except OSError:
            return ""
    return platform.processor()


def _onednn_is_faster() -> bool:
    """Whether this is an AMD processor with AVX-512, and a torch that uses MKL on it."""
    mkl, capability = torch.backends.mkl.is_available(), torch.backends.cpu.get_cpu_capability()
    return HAS_ONEDNN and mkl and capability == "AVX512" and "AuthenticAMD" in _processor()


HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
ONEDNN_IS_FASTER = _onednn_is_faster()


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias by oneDNN, without gradient.

    Args:
        a: (M, K) float32. Of a transposed slice of a wider matrix oneDNN makes a thousand times the work.
        b: (N, K) float32, likewise.
        bias: (N,) float32 or None.

    Returns:
        (M, N) float32.
    """
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def outer(g: Tensor, x: Tensor) -> Tensor:
    """g^T x for g (M, N) and x (M, K). The smaller of N and K becomes oneDNN's rows, which is faster."""
    g, x = g.contiguous(), x.contiguous()
    return matmul(g.t(), x.t()) if g.shape[1] <= x.shape[1] else matmul(x.t(), g.t()).t()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        y = matmul(x.reshape(-1, x.shape[-1]), weight, bias)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        g, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        again = torch.is_grad_enabled()  # these products will be differentiated: by torch's own
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = (g @ weight if again else matmul(g, weight.t())).view(x.shape)
        if ctx.needs_input_grad[1]:
            dweight = g.t() @ rows if again else outer(g, rows)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            dbias = g.sum(0)
        return dx, dweight, dbias
