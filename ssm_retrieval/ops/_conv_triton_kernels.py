"""The depthwise causal convolution in Triton: a grid over (sequence, tile of tokens, block of channels).

Layouts: x, y, gy and their gradients (batch, length, channels), weight (taps, channels), bias (channels,),
before (batch, taps - 1, channels). x, gy and before have strides of sequences and of tokens; neighbours on
the last axis are neighbours in memory. What grows with batch and length is counted in int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp2(x * -LOG2E))


@triton.jit
def _place(tokens, E, BT: tl.constexpr, BE: tl.constexpr):
    """Sequence, place among all tiles, tokens (int64) and channels of a program, for so many tokens."""
    pid, blocks, tiles = tl.program_id(0), tl.cdiv(E, BE), tl.cdiv(tokens, BT)
    rest = (pid // blocks).to(tl.int64)
    t, e = rest % tiles * BT + tl.arange(0, BT), pid % blocks * BE + tl.arange(0, BE)
    return rest // tiles, rest, t, e


@triton.jit
def _input(
    x, before, b, t, e, L, E, x_b, x_t, before_b, before_t, K: tl.constexpr, HAS_BEFORE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """x_t of a tile's tokens; for t < 0 what came before, or zeros."""
    known = (e < E)[None, :]
    mask = ((t >= 0) & (t < L))[:, None] & known
    got = tl.load(x + b * x_b + t[:, None] * x_t + e[None, :], mask=mask, other=0).to(WIDE)
    if HAS_BEFORE:
        at = before + b * before_b + (t + K - 1)[:, None] * before_t + e[None, :]
        got += tl.load(at, mask=((t < 0) & (t > -K))[:, None] & known, other=0).to(WIDE)
    return got


@triton.jit
def _sum(
    x, weight, bias, before, b, t, e, L, E, x_b, x_t, before_b, before_t,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BEFORE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """bias + sum_k weight_k x_{t - K + 1 + k} of a tile."""
    out = tl.zeros([t.shape[0], e.shape[0]], WIDE)
    if HAS_BIAS:
        out += tl.load(bias + e, mask=e < E, other=0).to(WIDE)[None, :]
    for k in tl.static_range(K):
        tap = tl.load(weight + k * E + e, mask=e < E, other=0)[None, :]
        out += tap * _input(
            x, before, b, t - (K - 1 - k), e, L, E, x_b, x_t, before_b, before_t, K, HAS_BEFORE, WIDE
        )
    return out


@triton.jit
def conv_forward(
    x, weight, bias, before, y, L, E, x_b, x_t, before_b, before_t,
    K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_BEFORE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y = act(bias + sum_k weight_k x_{t - K + 1 + k})."""
    b, _at, t, e = _place(L, E, BT, BE)
    out = _sum(
        x, weight, bias, before, b, t, e, L, E, x_b, x_t, before_b, before_t, K, HAS_BIAS, HAS_BEFORE, WIDE
    )
    if SILU:
        out *= _sigmoid(out)
    mask = (t < L)[:, None] & (e < E)[None, :]
    tl.store(y + (b * L + t[:, None]) * E + e[None, :], out, mask=mask)


@triton.jit
def conv_sums(
    x, weight, bias, before, gy, g, dweight, dbias, L, E, x_b, x_t, before_b, before_t, gy_b, gy_t,
    K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_BEFORE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """g (batch, length, channels), the gradient before the activation, and a tile's part of the sums over it.

    dweight (batch, tiles, taps, channels), dbias (batch, tiles, channels): to be summed by torch. Atomic
    additions would round otherwise in every run.
    """
    b, at, t, e = _place(L, E, BT, BE)
    mask = (t < L)[:, None] & (e < E)[None, :]
    slope = tl.load(gy + b * gy_b + t[:, None] * gy_t + e[None, :], mask=mask, other=0).to(WIDE)
    if SILU:
        out = _sum(
            x, weight, bias, before, b, t, e, L, E, x_b, x_t, before_b, before_t, K, HAS_BIAS, HAS_BEFORE,
            WIDE,
        )  # fmt: skip
        opened = _sigmoid(out)
        slope *= opened * (1 + out * (1 - opened))
    tl.store(g + (b * L + t[:, None]) * E + e[None, :], slope, mask=mask)
    tl.store(dbias + at * E + e, tl.sum(slope, axis=0), mask=e < E)
    for k in tl.static_range(K):
        entered = _input(
            x, before, b, t - (K - 1 - k), e, L, E, x_b, x_t, before_b, before_t, K, HAS_BEFORE, WIDE
        )
        tl.store(dweight + (at * K + k) * E + e, tl.sum(slope * entered, axis=0), mask=e < E)


@triton.jit
def conv_inputs(
    g, weight, dx, dbefore, L, E,
    K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, HAS_BEFORE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dx_t = sum_k weight_k g_{t + K - 1 - k}, and the same for the K - 1 inputs before the first token.

    The grid is one over K - 1 + L tokens, those before included.
    """
    b, _at, t, e = _place(L + K - 1, E, BT, BE)
    t = t - (K - 1)
    known = (e < E)[None, :]
    out = tl.zeros([BT, BE], WIDE)
    for k in tl.static_range(K):
        s = t + (K - 1 - k)
        mask = ((s >= 0) & (s < L))[:, None] & known
        tap = tl.load(weight + k * E + e, mask=e < E, other=0)[None, :]
        out += tap * tl.load(g + (b * L + s[:, None]) * E + e[None, :], mask=mask, other=0)
    mask = ((t >= 0) & (t < L))[:, None] & known
    tl.store(dx + (b * L + t[:, None]) * E + e[None, :], out, mask=mask)
    if HAS_BEFORE:
        at = dbefore + (b * (K - 1) + t + (K - 1))[:, None] * E + e[None, :]
        tl.store(at, out, mask=(t < 0)[:, None] & known)
