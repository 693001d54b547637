"""Norms and other small parts that architectures share; letters as in `ssm_retrieval.models.common`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_retrieval.models.configuration import require
from ssm_retrieval.ops._route import values_are_known


def widen(x: Tensor) -> Tensor:
    """x in float32, or in its own dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019).

    Computed in float32 or wider and returned in the dtype of `weight`: a float32 residual stream thus
    reaches the projections of a bfloat16 model in bfloat16.
    """

    def __init__(self, d: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(widen(x), x.shape[-1:], eps=self.eps)
        return y.to(self.weight.dtype) * self.weight


class LayerNorm(nn.LayerNorm):
    """LayerNorm that also accepts a float32 residual stream in a model of lower precision."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def init_normal(weight: Tensor, std: float) -> None:
    """Fill with normal(0, std), drawn in float32 on the CPU: the same whatever device and precision."""
    with torch.no_grad():
        device = "meta" if weight.is_meta else "cpu"
        drawn = torch.empty(weight.shape, device=device, dtype=torch.float32)
        weight.copy_(drawn.normal_(std=std))


def make_norm(config: Any) -> nn.Module:
    """A norm for the residual stream: `config.norm` is "rms" or "layer"."""
    return {"rms": RMSNorm, "layer": LayerNorm}[config.norm](config.d_model, eps=config.norm_eps)


def learned_positions(config: Any) -> nn.Embedding:
    """A table of `config.max_position_embeddings` vectors, drawn as the embedding is."""
    table = nn.Embedding(config.max_position_embeddings, config.d_model)
    init_normal(table.weight, std=config.embedding_std)
    return table


def add_learned_positions(x: Tensor, positions: Tensor, table: nn.Embedding) -> Tensor:
    """x plus a learned vector for each position.

    Args:
        x: (B, L, D).
        positions: (L,) or (B, L) int64.
        table: max_position_embeddings vectors of D numbers.

    Returns:
        (B, L, D).

    Raises:
        UserError: If the sequence is longer than the table.
    """
    if values_are_known(positions):
        limit = table.num_embeddings
        longest = int(positions.max()) + 1 if positions.numel() else 0
        require(
            longest <= limit,
            f"sequence of {longest} tokens exceeds max_position_embeddings={limit}; build a model with more",
        )
    return x + table(positions)
