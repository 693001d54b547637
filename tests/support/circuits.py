"""Tiny systems built by hand, of which probes have known answers: diagonal SSMs, and heads that copy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from probes.scan import Scan

SHARP = 1e4  # score of a match; exp(-SHARP) is 0 in float64 too, so that attention is exactly one-hot


def random_scan(
    kind: str, B: int = 2, L: int = 70, heads: int = 4, N: int = 5, P: int = 3, groups: int = 2,
    dtype: torch.dtype = torch.float64, seed: int = 0,
) -> Scan:  # fmt: skip
    """A Scan as a trained layer gives it: dt in about 0.01 .. 1, A in -1 .. -N.

    Args:
        kind: "mamba" or "mamba2".
        B: Sequences.
        L: Tokens.
        heads: H, of Mamba the channels.
        N: States of a head.
        P: Width of a Mamba-2 head.
        groups: G, of Mamba-2.
        dtype: Of all tensors.
        seed: Of the numbers.

    Returns:
        The recurrence.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype)

    dt = torch.nn.functional.softplus(normal(B, L, heads) - 2)
    if kind == "mamba":
        A = -torch.arange(1, N + 1, dtype=dtype).repeat(heads, 1)
        return Scan.mamba(A, dt, normal(B, L, N), normal(B, L, N), normal(B, L, heads))
    A = -torch.exp(normal(heads))
    return Scan.mamba2(A, dt, normal(B, L, groups, N), normal(B, L, groups, N), normal(B, L, heads, P))


def constant_decay(a: float, u: Tensor, N: int = 1) -> Scan:
    """h_t = a h_{t-1} + u_t in each channel and state: A = ln a, dt = B = C = 1.

    Args:
        a: The decay, in (0, 1].
        u: (B, L, E).
        N: States of a channel.

    Returns:
        The recurrence.
    """
    B, L, E = u.shape
    one = u.new_ones(B, L, N)
    return Scan.mamba(u.new_full((E, N), math.log(a)), torch.ones_like(u), one, one, u)


def leaky_integrator(tau: float, u: Tensor) -> Scan:
    """h_t = exp(-1 / tau) h_{t-1} + u_t / tau, for u (B, L, 1): A = -1, dt = 1 / tau."""
    one = u.new_ones(*u.shape[:2], 1)
    return Scan.mamba(-u.new_ones(1, 1), torch.full_like(u, 1 / tau), one, one, u)


def one_token_store(tokens: Tensor, flag: Tensor, vocab: int, kind: str = "mamba") -> Scan:
    """A store of the flagged token: dt is 1 there and 0 elsewhere, so only it is written and then kept.

    Args:
        tokens: (B, L) ids.
        flag: (B, L) bool, one per sequence.
        vocab: Channels, one for each id.
        kind: "mamba" or "mamba2".

    Returns:
        The recurrence; the state of channel v is 1 once v was stored, else 0.
    """
    u = torch.nn.functional.one_hot(tokens, vocab).double()
    one, dt = u.new_ones(*tokens.shape, 1), flag.double()
    if kind == "mamba":
        return Scan.mamba(-u.new_ones(vocab, 1), dt[..., None].expand_as(u), one, one, u)
    return Scan.mamba2(-u.new_ones(1), dt[..., None], one[..., None], one[..., None], u[:, :, None])


def attention(query: Tensor, key: Tensor) -> Tensor:
    """(B, 1, L, L) causal softmax(q k^T) for (B, L, d) queries and keys."""
    scores = query @ key.transpose(-1, -2)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)[:, None]


def previous_token_head(tokens: Tensor) -> Tensor:
    """Pattern of a head with W_Q W_K^T = SHARP * (shift by one) on one-hot positions: position t reads t - 1.

    tokens: (B, L); position 0 can only read itself.
    """
    B, L = tokens.shape
    positions = torch.eye(L, dtype=torch.float64).expand(B, L, L)
    W = SHARP * torch.eye(L, dtype=torch.float64).roll(-1, 1)  # W[t, t - 1] = SHARP
    return attention(positions @ W, positions)


def copying_head(tokens: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """A head that answers queries: token vocab + v asks for the earlier v.

    The embedding of v is e_v, of its query e_{vocab + v}. W_Q sends e_{vocab + v} to SHARP e_v, W_K keeps e_v
    and drops queries, W_O W_V is the identity.

    Args:
        tokens: (B, L) ids below 2 vocab.
        vocab: Symbols.

    Returns:
        Pattern (B, 1, L, L), and output (B, L, 2 vocab): exactly e_v where v occurs once before its query.
    """
    x = torch.nn.functional.one_hot(tokens, 2 * vocab).double()
    W_Q = torch.zeros(2 * vocab, vocab, dtype=torch.float64)
    W_Q[vocab:] = SHARP * torch.eye(vocab, dtype=torch.float64)
    W_K = torch.eye(2 * vocab, vocab, dtype=torch.float64)
    pattern = attention(x @ W_Q, x @ W_K)
    return pattern, (pattern @ x[:, None])[:, 0]


def induction_head(tokens: Tensor, vocab: int) -> Tensor:
    """Pattern (B, 1, L, L) of the second of two layers: the previous-token head writes token t - 1 beside
    token t, and this head's query, token t, is compared with that. Reads what followed the token before."""
    x = torch.nn.functional.one_hot(tokens, vocab).double()
    before = (previous_token_head(tokens) @ x[:, None])[:, 0]
    before[:, 0] = 0  # position 0 read itself, for want of a token before
    return attention(SHARP * x, before)
