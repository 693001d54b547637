"""Scaled dot-product attention that can be differentiated more than once.

    y_t = sum_s softmax_s( q_t . k_s / sqrt(P) + mask ) v_s

torch's fused CPU kernel has a gradient, but the gradient has none, and there is no tangent. So it is
written here: the kernel's own, or, where it will itself be differentiated, that of the equation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssm_retrieval.ops._route import asked, differentiable_gradients, traced, transformed

FLASH = 1  # torch.nn.attention.SDPBackend.FLASH_ATTENTION, whose import takes long


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """As `F.scaled_dot_product_attention` without dropout.

    Under `ops.backend("reference")` and inside transforms of torch.func all scores exist at once; so they do
    for a gradient of the gradients. On a GPU a fused kernel may lack the latter: torch then says so, and
    `ops.backend("reference")` is the way out.

    Args:
        q: (B, H, L, P).
        k: (B, H, S, P).
        v: As k.
        mask: Boolean, True = may attend, broadcast to (B, H, L, S).
        causal: Whether token t attends to the first t + 1 keys only; not together with `mask`.

    Returns:
        (B, H, L, P).
    """
    if asked("auto") == "reference" or transformed():
        return _reference(q, k, v, mask, causal)
    if _differentiates_flash(q, k, v) and torch._fused_sdp_choice(q, k, v, mask, 0.0, causal) == FLASH:
        return _Attention.apply(q, k, v, mask, causal)
    if causal:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _differentiates_flash(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `_Attention` may be asked: eager, on a CPU, no casts by autocast, and a gradient is wanted."""
    if traced(q, k, v) or q.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


class _Attention(torch.autograd.Function):
    """What autograd does with torch's CPU kernel, and a gradient that is part of the graph."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        added = None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        y, norm = kernel(q, k, v, 0.0, causal, attn_mask=added)
        ctx.save_for_backward(q, k, v, added, y, norm)
        ctx.causal = causal
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:
        q, k, v, added, y, norm = ctx.saved_tensors
        if torch.is_grad_enabled():
            mask = None if added is None else added == 0

            def again(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
                return [_reference(q, k, v, mask, ctx.causal)]

            return *differentiable_gradients(again, (q, k, v), [gy]), None, None
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return *kernel(gy, q, k, v, y, norm, 0.0, ctx.causal, attn_mask=added), None, None
