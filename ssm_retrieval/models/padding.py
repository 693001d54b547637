"""Padding, on either side or between two turns of a sequence, changes nothing at its real tokens.

One rule for each kind of layer:

    attention   a padded key is never attended to; positions count real tokens only
    SSM         a padded token enters the convolution as zero and has dt = 0, the identity on the state

Zeros are what the convolution takes to stand before a sequence, so padding on the left is right as it is, and
what stands on the right is never read. One case is left: padding between two real tokens of a sequence, which
windows of the convolution would reach into. It arises when a call continues a cache and pads its rows on the
left, or when a row padded on the right is continued. `real_first` finds it, and `convolve` then runs on rows
whose real tokens have been moved together.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from ssm_retrieval.ops._route import values_are_known
from ssm_retrieval.ops.causal_conv1d import causal_conv1d


class Padding(Protocol):
    """Of `ssm_retrieval.models.common.Context`: which tokens are real, and `real_first` of that."""

    @property
    def mask(self) -> Tensor | None: ...

    @property
    def order(self) -> Tensor | None: ...


def real_first(mask: Tensor, cached: bool, kept: bool) -> Tensor | None:
    """For each row the indices of its real tokens, then those of its padding: (B, L) int64.

    None where no padding stands between two real tokens of a sequence, so that rows can stay as they are.
    mask: (B, L) bool, True = real token; cached: tokens came before this call; kept: more may come after it.
    """
    edge = mask.new_zeros(len(mask), 1)
    line = torch.cat([edge, edge | cached, mask, edge | kept], dim=1)
    runs = (line[:, 1:] & ~line[:, :-1]).sum(dim=1)  # of real tokens, those before and after included
    if values_are_known(mask) and bool((runs <= 1).all()):
        return None
    return torch.argsort((~mask).byte(), dim=1, stable=True)


def fill_padding(x: Tensor, mask: Tensor | None, value: float = 0.0) -> Tensor:
    """x (B, L, E) with `value` where mask (B, L) is False; x itself without a mask."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), value)


def attention_mask(L: int, key_mask: Tensor | None, S: int, device: torch.device) -> Tensor:
    """(B or 1, 1, L, S) bool, True = may attend: causal, and real keys only.

    Every query may see itself even on padding, else its softmax would be over nothing (NaN).
    """
    causal = torch.ones(L, S, dtype=torch.bool, device=device).tril(S - L)
    if key_mask is None:
        return causal[None, None]
    itself = torch.eye(S, dtype=torch.bool, device=device)[S - L :]
    return (causal & key_mask[:, None, None, :]) | itself


def convolve(x: Tensor, conv: nn.Conv1d, padding: Padding, cache: dict[str, Tensor] | None) -> Tensor:
    """silu(conv(x)) of the real tokens of x (B, L, E), which is zero at padding; E: channels of `conv`.

    padding: which tokens are real. cache: its `conv`, the last d_conv - 1 real inputs (B, d_conv - 1, E),
    goes before x and is replaced by the last ones of x.
    """
    mask, order = padding.mask, padding.order
    weight, bias = conv.weight.squeeze(1), conv.bias
    before = None if cache is None else cache.get("conv")
    if order is None:
        y = causal_conv1d(x, weight, bias, "silu", before, return_last_state=cache is not None)
        if cache is not None:
            y, cache["conv"] = y
        return y
    assert mask is not None
    x = x.take_along_dim(order.unsqueeze(-1), dim=1)
    if cache is not None:
        width = weight.shape[1] - 1
        start = x.new_zeros(len(x), width, x.shape[2]) if before is None else before.to(x.dtype)
        # in `start` and x the last real inputs of a row with n of them begin at n
        last = mask.sum(dim=1, keepdim=True) + torch.arange(width, device=x.device)
        cache["conv"] = torch.cat([start, x], dim=1).take_along_dim(last.unsqueeze(-1), dim=1)
    y = causal_conv1d(x, weight, bias, "silu", before)
    return y.take_along_dim(order.argsort(dim=1).unsqueeze(-1), dim=1)
