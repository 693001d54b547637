"""The delta rule in plain PyTorch by chunks of tokens: on any device, differentiable without limit.

Within a chunk that begins with the state S, let g_t be the product of its decays up to t and
u_t = beta_t (v_t - a_t h_{t-1} k_t) what token t writes. Then

    h_t = g_t S + sum_{s <= t} (g_t / g_s) u_s k_s^T
    u_t = beta_t (v_t - g_t S k_t - sum_{s < t} (g_t / g_s) (k_s . k_t) u_s)

The second line is a triangular system for all u of the chunk, U = (I + T)^-1 (W - Y S^T), whose solutions for
W and Y do not need S: all chunks are solved at once (the WY form of Yang et al. 2024, arXiv 2406.06484). Then
S goes from chunk to chunk. The quotients are exponentials of sums of logarithms, which never exceed 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64  # tokens of a chunk if a head has one decay
SMALL_CHUNK = 16  # if every channel of the key has its own: pairs of tokens times channels are stored


class DeltaArguments(NamedTuple):
    """The arguments of `delta_rule` that decide y, with its shapes."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    log_decay: Tensor | None
    erase: bool
    initial_state: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them that may be tensors, q first and initial_state last."""
        return (*self[:5], self.initial_state)

    @property
    def wide(self) -> torch.dtype:
        """What is computed in: float32, or float64 for float64 inputs."""
        return torch.promote_types(self.v.dtype, torch.float32)

    def widened(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, beta, log_decay (..., 1 or N) and the first state, none of them None, in `wide`."""
        q, k, v = (x.to(self.wide) for x in (self.q, self.k, self.v))
        b, L, H, P = v.shape
        beta = v.new_ones(b, L, H) if self.beta is None else self.beta.to(self.wide)
        log = v.new_zeros(b, L, H) if self.log_decay is None else self.log_decay.to(self.wide)
        h = v.new_zeros(b, H, P, k.shape[-1]) if self.initial_state is None else self.initial_state
        return q, k, v, beta, log if log.dim() == 4 else log.unsqueeze(-1), h.to(self.wide)


def delta_by_chunks(
    given: DeltaArguments, positions: Sequence[int] | None, return_last_state: bool
) -> list[Tensor]:
    """What `delta_rule` returns, in a list. positions: in [0, length), in any order."""
    q, k, v, beta, log_decay, S = given.widened()
    L, Q = q.shape[1], CHUNK if log_decay.shape[-1] == 1 else SMALL_CHUNK
    Q = max(1, min(Q, L))
    chunks = -(-L // Q)

    def split(x: Tensor) -> Tensor:  # (b, H, chunks, Q, ...); added tokens do nothing: beta 0, decay 1
        x = F.pad(x, (0, 0, 0, 0, 0, chunks * Q - L)).unflatten(1, (chunks, Q))
        return x.permute(0, 3, 1, 2, 4)

    q, k, v, beta, log_decay = (split(x) for x in (q, k, v, beta.unsqueeze(-1), log_decay))
    log = log_decay.cumsum(3)  # of g, (b, H, chunks, Q, 1 or N)
    from_start, to_end = log.exp(), (log[..., -1:, :] - log).exp()
    between = _between(log)
    write = v * beta
    if given.erase:
        overlap = (beta * _products(k, k, between)).tril(-1)
        both = torch.cat([write, beta * from_start * k], dim=-1)
        solved = torch.linalg.solve_triangular(overlap, both, upper=False, unitriangular=True)
        write, seen = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    before, writes = [], []
    for c in range(chunks):
        before.append(S)
        u = write[:, :, c]
        if given.erase:
            u = u - seen[:, :, c] @ S.transpose(-1, -2)
        writes.append(u)
        S = from_start[:, :, c, -1:] * S + u.transpose(-1, -2) @ (to_end * k)[:, :, c]
    y = v
    if chunks:
        u, start = torch.stack(writes, dim=2), torch.stack(before, dim=2)
        y = _products(q, k, between) @ u + (from_start * q) @ start.transpose(-1, -2)
    out = [y.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :L].to(given.v.dtype)]
    if return_last_state:
        out.append(S)
    if positions is not None:
        found = []
        for t in positions:
            c, i = divmod(t, Q)
            part = (log[:, :, c, i : i + 1] - log[:, :, c, : i + 1]).exp() * k[:, :, c, : i + 1]
            added = writes[c][:, :, : i + 1].transpose(-1, -2) @ part
            found.append(from_start[:, :, c, i : i + 1] * before[c] + added)
        out.append(torch.stack(found, dim=1) if found else S.new_empty(len(S), 0, *S.shape[1:]))
    return out


def _between(log: Tensor) -> Tensor:
    """g_t / g_s for s <= t, otherwise 0: (..., Q, 1 or N) -> (..., Q, Q, 1 or N)."""
    Q = log.shape[-2]
    causal = torch.ones(Q, Q, dtype=torch.bool, device=log.device).tril().unsqueeze(-1)
    return (log.unsqueeze(-2) - log.unsqueeze(-3)).masked_fill(~causal, -torch.inf).exp()


def _products(x: Tensor, k: Tensor, between: Tensor) -> Tensor:
    """sum_n x_t[n] k_s[n] (g_t / g_s)[n]: (..., Q, N) each -> (..., Q, Q)."""
    if between.shape[-1] == 1:
        return x @ k.transpose(-1, -2) * between.squeeze(-1)
    return ((x.unsqueeze(-2) * between) * k.unsqueeze(-3)).sum(-1)
