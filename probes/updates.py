"""What every token does to the state of a selective SSM: what it writes, what it erases, how long that lasts.

Functions of recorded tensors. `Scan` holds those of one layer in one form for both families, with H heads of
width P: Mamba (arXiv 2312.00752) is a layer of H = d_inner heads of width P = 1 with a decay for each of N
states, Mamba-2 (arXiv 2405.21060) has one decay per head. In both

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        h_t: (H, P, N), h_{-1} = 0
    y_t = h_t C_t

and dt_t x_t B_t^T, of rank one in each head, is called the write of token t.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ssm_retrieval.errors import UserError
from ssm_retrieval.statistics import mean_interval

BUDGET = 128 * 2**20  # bytes of working memory, for the functions that pass through states


@dataclass(frozen=True)
class Scan:
    """The tensors of one layer's recurrence, after softplus and convolution; made by `mamba` or `mamba2`.

    A: (H, N), or (H, 1) where all states of a head decay alike; at most 0. dt: (B, L, H), at least 0, and 0
    at padding. Bt, Ct: (B, L, G, N), group g shared by heads g H/G .. (g+1) H/G - 1. x: (B, L, H, P), the
    input u of the scan. Kept without gradients as float32, or float64 if x is. Raises UserError for
    shapes or signs that do not fit.
    """

    A: Tensor
    dt: Tensor
    Bt: Tensor
    Ct: Tensor
    x: Tensor

    @classmethod
    def mamba(cls, A: Tensor, dt: Tensor, Bt: Tensor, Ct: Tensor, u: Tensor) -> Scan:
        """A: (E, N); dt, u: (B, L, E); Bt, Ct: (B, L, N). Its heads are the E channels."""
        return cls(A, dt, Bt.unsqueeze(-2), Ct.unsqueeze(-2), u.unsqueeze(-1))

    @classmethod
    def mamba2(cls, A: Tensor, dt: Tensor, Bt: Tensor, Ct: Tensor, x: Tensor) -> Scan:
        """A: (H,); dt: (B, L, H); Bt, Ct: (B, L, G, N); x: (B, L, H, P)."""
        return cls(A.unsqueeze(-1), dt, Bt, Ct, x)

    def __post_init__(self) -> None:
        dtype = torch.promote_types(self.x.dtype, torch.float32)
        for field in fields(self):
            object.__setattr__(self, field.name, getattr(self, field.name).detach().to(dtype))
        if self.x.dim() != 4 or self.Bt.dim() != 4:
            raise UserError(
                f"x must have dimensions (B, L, H, P) and Bt (B, L, G, N), not shapes {tuple(self.x.shape)} "
                f"and {tuple(self.Bt.shape)}; use Scan.mamba or Scan.mamba2"
            )
        b, length, heads, _ = self.x.shape
        groups, n = self.Bt.shape[2:]
        shapes = dict(dt=(b, length, heads), Bt=(b, length, groups, n), Ct=(b, length, groups, n))
        shapes["A"] = (heads, self.A.shape[-1] if self.A.shape[-1:] == (1,) else n)
        for name, shape in shapes.items():
            if tuple(getattr(self, name).shape) != shape:
                raise UserError(f"{name} must have shape {shape}, not {tuple(getattr(self, name).shape)}")
        if heads % groups:
            raise UserError(f"{groups} groups of Bt do not divide the {heads} heads")
        if (self.A > 0).any() or (self.dt < 0).any():
            raise UserError("A must be at most 0 and dt at least 0: give -exp(A_log) and dt after softplus")

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(B, L, H, P, N)."""
        return (*self.x.shape, self.Bt.shape[-1])

    def by_head(self, shared: Tensor) -> Tensor:
        """(B, L, G, N), as Bt or Ct -> (B, L, H, N). A view where there is one group."""
        heads, groups = self.x.shape[2], shared.shape[2]
        if groups == 1:
            return shared.expand(-1, -1, heads, -1)
        return shared.repeat_interleave(heads // groups, dim=2)

    def elapsed(self) -> Tensor:
        """(B, L, H) float64, e_t = sum_{s <= t} dt_s: prod_{i < s <= t} exp(dt_s A) = exp(A (e_t - e_i)).

        Float64 because differences of late sums would lose the digits that float32 has.
        """
        return self.dt.double().cumsum(1)


def chunks(length: int, bytes_each: int, budget: int) -> Iterator[slice]:
    """Slices that cover range(length), as long as `budget` bytes allow, at least 1."""
    step = max(1, budget // max(bytes_each, 1))
    for start in range(0, length, step):
        yield slice(start, min(length, start + step))


@torch.no_grad()
def iterate_states(scan: Scan, budget: int = BUDGET) -> Iterator[tuple[slice, Tensor]]:
    """The states h_t in order, as (positions, h of shape (B, positions, H, P, N)); the recurrence as written.

    Holds one chunk of positions, about `budget` bytes with what is made on the way, or a single position if
    that is more; never all L.
    """
    B, L, H, P, N = scan.shape
    h = scan.x.new_zeros(B, H, P, N)
    for at in chunks(L, 3 * h.numel() * h.element_size(), budget):
        dt = scan.dt[:, at].unsqueeze(-1)  # (B, q, H, 1)
        decay = torch.exp(dt * scan.A).unsqueeze(-2)  # (B, q, H, 1, N or 1)
        Bt = scan.by_head(scan.Bt[:, at])
        states = (dt * scan.x[:, at]).unsqueeze(-1) * Bt.unsqueeze(-2)  # the writes, until the next lines
        for t in range(states.shape[1]):
            states[:, t].addcmul_(decay[:, t], h)
            h = states[:, t]
        h = h.clone()  # the caller may change the chunk, and drop it
        yield at, states


@torch.no_grad()
def write_norm(scan: Scan, per_head: bool = False) -> Tensor:
    """(B, L) Frobenius norm of the write dt_t x_t B_t^T over the layer's state; (B, L, H) per head.

    A write has rank one: its norm in a head is dt |x| |B|.
    """
    norms = scan.dt * scan.x.norm(dim=-1) * scan.by_head(scan.Bt.norm(dim=-1, keepdim=True)).squeeze(-1)
    return norms if per_head else norms.norm(dim=-1)


@dataclass(frozen=True)
class Decay:
    """mean: of exp(dt_t A) over all entries of the state; norm: Frobenius norm of those entries. Both (B, L).

    Per head (B, L, H). norm / sqrt(H P N) is comparable between layers of unlike size: 1 keeps everything.
    """

    mean: Tensor
    norm: Tensor


@torch.no_grad()
def decay(scan: Scan, per_head: bool = False, budget: int = BUDGET) -> Decay:
    """What every position keeps of the state before it: exp(dt_t A), by chunks of about `budget` bytes."""
    B, L, H, P, N = scan.shape
    means, squares = scan.x.new_empty(B, L, H), scan.x.new_empty(B, L, H)
    for at in chunks(L, 2 * B * scan.A.numel() * scan.A.element_size(), budget):
        kept = torch.exp(scan.dt[:, at].unsqueeze(-1) * scan.A)  # (B, q, H, N or 1)
        means[:, at] = kept.mean(-1)
        squares[:, at] = kept.square().mean(-1) * (P * N)
    if per_head:
        return Decay(means, squares.sqrt())
    return Decay(means.mean(-1), squares.sum(-1).sqrt())


@dataclass(frozen=True)
class Changes:
    """norm: ||h_t||; update: ||h_t - h_{t-1}||. Frobenius norms, (B, L), or (B, L, H) per head."""

    norm: Tensor
    update: Tensor

    @property
    def relative(self) -> Tensor:
        """||h_t - h_{t-1}|| / ||h_{t-1}||; nan where h_{t-1} = 0, as before the first token."""
        before = torch.cat([torch.zeros_like(self.norm[:, :1]), self.norm[:, :-1]], dim=1)
        return torch.where(before > 0, self.update / before, torch.nan)


@torch.no_grad()
def state_changes(scan: Scan, per_head: bool = False, budget: int = BUDGET) -> Changes:
    """Size of the state and of its change at every position, from one pass of `iterate_states`."""
    B, L, H, P, N = scan.shape
    norm, update = scan.x.new_empty(B, L, H), scan.x.new_empty(B, L, H)
    last = scan.x.new_zeros(B, 1, H, P, N)
    for at, states in iterate_states(scan, budget):
        norm[:, at] = torch.linalg.vector_norm(states, dim=(-2, -1))
        steps = states - torch.cat([last, states[:, :-1]], dim=1)
        update[:, at] = torch.linalg.vector_norm(steps, dim=(-2, -1))
        last = states[:, -1:].clone()
    return Changes(norm, update) if per_head else Changes(norm.norm(dim=-1), update.norm(dim=-1))


# --- effective memory horizon -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Horizon:
    """steps: (B, positions, H, N or 1) float64, tokens until what is there has decayed to 1/e.

    reached: bool, of the same shape; False where the sequence ended before, and steps is how much of it was
    left (right-censored, as `ssm_retrieval.statistics.median_time` takes it).
    """

    steps: Tensor
    reached: Tensor


@torch.no_grad()
def horizon(scan: Scan, at: Any) -> Horizon:
    """How long the state at positions `at`, (positions,) ints, lasts in every channel and state.

    The number k of steps with prod_{at < s <= at+k} exp(dt_s A) = 1/e, where the logarithm of the product is
    interpolated within a step, so that a constant decay a gives `constant_horizon`, -1 / ln a, exactly; the
    product is below 1/e after floor(k) + 1 whole steps. Raises UserError for positions outside the sequence.
    """
    positions = _inside(torch.as_tensor(at, device=scan.x.device), scan.x.shape[1])
    if positions.dim() != 1:
        raise UserError(f"at must be a list of positions, not of shape {tuple(positions.shape)}")
    (B, L, H), M = scan.dt.shape, scan.A.shape[1]
    elapsed = scan.elapsed().transpose(1, 2).contiguous()  # (B, H, L)
    start = elapsed[..., positions].unsqueeze(-1)  # (B, H, positions, 1)
    goal = start - 1 / scan.A.double()[:, None]
    goal = torch.where(scan.A[:, None] == 0, torch.inf, goal)  # the sign of a zero must not decide
    index = torch.searchsorted(elapsed, goal.flatten(2)).view(B, H, -1, M)  # first t with elapsed_t >= goal
    reached = index < L
    index = torch.maximum(index, positions[:, None] + 1)  # where dt A is so large that goal rounds to start
    after = elapsed.gather(2, index.clamp(max=L - 1).flatten(2)).view_as(goal)
    before = elapsed.gather(2, (index - 1).clamp(max=L - 1).flatten(2)).view_as(goal)
    part = ((goal - before) / (after - before)).clamp(0, 1)
    left = (L - 1 - positions)[:, None].to(part)
    steps = torch.where(reached, index - 1 - positions[:, None] + part, left)
    return Horizon(steps.transpose(1, 2), reached.transpose(1, 2))


def constant_horizon(dt: Tensor, A: Tensor) -> Tensor:
    """-1 / ln a = -1 / (dt A), the horizon of a constant decay a = exp(dt A); inf where dt A = 0.

    dt and A broadcast: `constant_horizon(scan.dt.mean((0, 1))[:, None], scan.A)` is (H, N or 1).
    """
    rate = -(dt * A)
    return torch.where(rate > 0, 1 / rate, torch.inf)


def _inside(positions: Tensor, length: int) -> Tensor:
    """positions, unchanged. Raises UserError unless they are integers in [0, length)."""
    if positions.is_floating_point() or positions.dtype == torch.bool:
        raise UserError(f"positions must be integers, not {positions.dtype}")
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < length:
        raise UserError(
            f"positions must lie in 0 .. {length - 1}, but run from {int(positions.min())} to "
            f"{int(positions.max())}"
        )
    return positions


# --- by role ----------------------------------------------------------------------------------------------


def role_means(values: Any, roles: Any, names: Mapping[Any, str] | None = None) -> pd.DataFrame:
    """One row per sequence and role: role, sequence, value (mean over positions), positions (how many).

    values: (B, L) float; nan is left out, as are roles that a sequence lacks. roles: (B, L), or (L,) if all
    sequences have the same, ints or strings; with `names` only its keys are kept, under the names it gives.
    Raises UserError for shapes that differ.
    """
    numbers = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=float)
    kinds = np.asarray(roles.detach().cpu() if isinstance(roles, Tensor) else roles)
    if numbers.ndim != 2 or kinds.shape not in (numbers.shape, numbers.shape[1:]):
        raise UserError(f"values must be (B, L) and roles like it, not {numbers.shape} and {kinds.shape}")
    kinds = np.broadcast_to(kinds, numbers.shape)
    rows: list[dict[str, Any]] = []
    for role in names if names is not None else np.unique(kinds).tolist():
        chosen = (kinds == role) & ~np.isnan(numbers)
        count = chosen.sum(1)
        total = np.where(chosen, numbers, 0).sum(1)
        label = names[role] if names is not None else role
        rows += [
            dict(role=label, sequence=int(i), value=float(total[i] / count[i]), positions=int(count[i]))
            for i in np.flatnonzero(count)
        ]
    return pd.DataFrame(rows, columns=["role", "sequence", "value", "positions"])


def split_by_role(
    values: Any, roles: Any, names: Mapping[Any, str] | None = None, confidence: float = 0.95
) -> pd.DataFrame:
    """One row per role: role, mean, low, high, sequences, positions; arguments as `role_means`.

    The mean is over sequences, each represented by its own mean, because positions of one sequence are not
    independent; the interval is Student's (nan bounds for a single sequence).
    """
    rows = []
    for role, group in role_means(values, roles, names).groupby("role", sort=False):
        mean, low, high = mean_interval(group["value"], confidence)
        rows.append(
            dict(
                role=role,
                mean=mean,
                low=low,
                high=high,
                sequences=len(group),
                positions=int(group["positions"].sum()),
            )
        )
    return pd.DataFrame(rows, columns=["role", "mean", "low", "high", "sequences", "positions"])
