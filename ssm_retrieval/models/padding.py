"""Padding, on either side or between two turns of a sequence, changes nothing at the real tokens.

Each kind of layer has one rule:

    attention   a padded key is never attended to; positions count real tokens only
    SSM         a padded token enters the convolution as zero and has dt = 0, the identity on the state

The convolution assumes zeros before a sequence, so padding on the left needs no care, and what stands on the
right is never read. One case is left: padding between two real tokens of a sequence, which a window of the
convolution would read. It arises when a call continues a cache and pads its rows on the left, or when a row
padded on the right is continued. `real_first` finds it, and `convolve` then runs on rows whose real tokens
have been moved together.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ssm_retrieval.ops._route import values_are_known
from ssm_retrieval.ops.causal_conv1d import causal_conv1d


class Padding(Protocol):
    """The part of `ssm_retrieval.models.common.Context` that says which tokens are real."""

    @property
    def mask(self) -> Tensor | None:
        """(B, L) bool, True = real token; None = all are real."""

    @property
    def order(self) -> Tensor | None:
        """`real_first` of the mask."""


def real_first(mask: Tensor, cached: bool, kept: bool) -> Tensor | None:
    """For each row the indices of its real tokens, then those of its padding.

    Args:
        mask: (B, L) bool, True = real token.
        cached: Whether tokens came before this call.
        kept: Whether more may come after it.

    Returns:
        (B, L) int64, or None if no padding stands between two real tokens of a sequence, so that rows can
        stay as they are.
    """
    edge = mask.new_zeros(len(mask), 1)
    line = torch.cat([edge, edge | cached, mask, edge | kept], dim=1)
    runs = (line[:, 1:] & ~line[:, :-1]).sum(dim=1)  # of real tokens, those before and after included
    if values_are_known(mask) and bool((runs <= 1).all()):
        return None
    return torch.argsort((~mask).byte(), dim=1, stable=True)


def fill_padding(x: Tensor, mask: Tensor | None, value: float = 0.0) -> Tensor:
    """x with another value at padding.

    Args:
        x: (B, L, E).
        mask: (B, L) bool, True = real token; None = all are real.
        value: The value at padding.

    Returns:
        (B, L, E); x itself without a mask.
    """
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), value)


def attention_mask(L: int, key_mask: Tensor | None, S: int, device: torch.device, window: int = 0) -> Tensor:
    """Which keys a query may attend to: real ones that are not later than it.

    A query at padding may attend to itself, otherwise its softmax would be over nothing (NaN).

    Args:
        L: Queries, the last L of the keys.
        key_mask: (B, S) bool, True = real token; None = all are real.
        S: Keys.
        device: Where to make the mask.
        window: How many real tokens a query may attend to, itself included; 0 = all.

    Returns:
        (B or 1, 1, L, S) bool, True = may attend.
    """
    causal = torch.ones(L, S, dtype=torch.bool, device=device).tril(S - L)
    if key_mask is None:
        return (causal.triu(S - L - window + 1) if window else causal)[None, None]
    if window:
        place = key_mask.long().cumsum(1)  # counts real tokens
        near = place[:, S - L :, None] - place[:, None, :] < window
        causal = (causal & near).unsqueeze(1)
    itself = torch.eye(S, dtype=torch.bool, device=device)[S - L :]
    return (causal & key_mask[:, None, None, :]) | itself


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Padding,
    cache: dict[str, Tensor] | None,
    activation: str | None = "silu",
) -> Tensor:
    """silu(conv(x)), or conv(x), of a depthwise causal convolution, as if padding were not there.

    Args:
        x: (B, L, E), zero at padding.
        weight: Its taps as nn.Conv1d keeps them, (E, 1, d_conv).
        bias: (E,).
        padding: Which tokens are real.
        cache: Its `conv`, the last d_conv - 1 real inputs (B, d_conv - 1, E), stands before x and is replaced
            by the last inputs of x.
        activation: "silu", or None for none.

    Returns:
        (B, L, E); meaningless at padding.
    """
    mask, order = padding.mask, padding.order
    weight = weight.squeeze(1)
    before = None if cache is None else cache.get("conv")
    if order is None:
        y = causal_conv1d(x, weight, bias, activation, before, return_last_state=cache is not None)
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
    y = causal_conv1d(x, weight, bias, activation, before)
    return y.take_along_dim(order.argsort(dim=1).unsqueeze(-1), dim=1)
