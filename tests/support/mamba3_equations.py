"""Mamba-3 by the paper's own equations (arXiv 2603.15569, section 3): a complex state, and nothing turned."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def as_complex(x: Tensor) -> Tensor:
    """Channels 2i and 2i + 1 as one complex number, (..., N) -> (..., ceil(N / 2))."""
    return torch.view_as_complex(F.pad(x, (0, x.shape[-1] % 2)).unflatten(-1, (-1, 2)).contiguous())


def mamba3(Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D, Z, **_):
    """`mamba3_siso_combined` of mamba_ssm: y * silu(Z), with A = -rate + i turn in the exponent.

    Args:
        Q: C, (B, L, G, N).
        K: B, likewise.
        V: x, (B, L, H, P).
        ADT: dt times the real part of A, (B, H, L).
        DT: Step sizes, (B, H, L).
        Trap: lam before the sigmoid, (B, H, L).
        Q_bias: (H, N).
        K_bias: (H, N).
        Angles: (B, L, H, S), before the tanh.
        D: (H,).
        Z: (B, L, H, P).
        **_: What decides speed only.

    Returns:
        (B, L, H, P).
    """
    H, L = V.shape[2], V.shape[1]
    c, b = (as_complex(x.repeat_interleave(H // x.shape[2], 2) + y) for x, y in ((Q, Q_bias), (K, K_bias)))
    turn = F.pad(math.pi * torch.tanh(Angles), (0, c.shape[-1] - Angles.shape[-1]))  # (B, L, H, N / 2)
    h, ys = torch.zeros_like(V[:, 0, :, :, None] * b[:, 0, :, None]), []
    for t in range(L):
        lam, dt = torch.sigmoid(Trap[:, :, t]), DT[:, :, t]
        last = V[:, t - 1, :, :, None] * b[:, t - 1, :, None] if t else torch.zeros_like(h)
        alpha = torch.exp(
            torch.complex(ADT[:, :, t, None].expand_as(turn[:, t]), -dt[..., None] * turn[:, t])
        )
        beta, gamma = (1 - lam) * dt, lam * dt
        h = alpha[:, :, None] * (h + beta[..., None, None] * last)
        h = h + gamma[..., None, None] * V[:, t, :, :, None] * b[:, t, :, None]
        ys.append((c[:, t, :, None].conj() * h).real.sum(-1) + D[:, None] * V[:, t])
    return torch.stack(ys, 1) * F.silu(Z)
