"""What every token does to the state of a selective SSM: what it writes, what it erases, how long that lasts.

Functions of a layer's recurrence, `probes.scan.Scan`, by token and, at the end, by the tokens' roles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probes.scan import BUDGET, Scan, chunks, inside, iterate_states
from ssm_retrieval.errors import UserError
from ssm_retrieval.statistics import mean_interval


@torch.no_grad()
def write_norm(scan: Scan, per_head: bool = False) -> Tensor:
    """Frobenius norm of the write dt_t x_t B_t^T over the layer's state.

    A write has rank one, so its norm in a head is dt |x| |B|.

    Args:
        scan: The layer's recurrence.
        per_head: Norms of every head.

    Returns:
        (B, L), per head (B, L, H).
    """
    norms = scan.dt * scan.x.norm(dim=-1) * scan.by_head(scan.Bt.norm(dim=-1, keepdim=True)).squeeze(-1)
    return norms if per_head else norms.norm(dim=-1)


@dataclass(frozen=True)
class Decay:
    """What positions keep of the state before them, (B, L), per head (B, L, H).

    Attributes:
        mean: Of exp(dt_t A) over all entries of the state.
        norm: Frobenius norm of these entries. norm / sqrt(H P N) compares layers of different size: 1 keeps
            all.
    """

    mean: Tensor
    norm: Tensor


@torch.no_grad()
def decay(scan: Scan, per_head: bool = False, budget: int = BUDGET) -> Decay:
    """What every position keeps of the state before it, exp(dt_t A).

    Args:
        scan: The layer's recurrence.
        per_head: Of every head.
        budget: Bytes of working memory, about.

    Returns:
        Mean and norm of the decays.
    """
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
    """Size of the state and of its change, (B, L), per head (B, L, H).

    Attributes:
        norm: ||h_t||, the Frobenius norm.
        update: ||h_t - h_{t-1}||.
    """

    norm: Tensor
    update: Tensor

    @property
    def relative(self) -> Tensor:
        """||h_t - h_{t-1}|| / ||h_{t-1}||; nan where h_{t-1} = 0, as before the first token."""
        before = torch.cat([torch.zeros_like(self.norm[:, :1]), self.norm[:, :-1]], dim=1)
        return torch.where(before > 0, self.update / before, torch.nan)


@torch.no_grad()
def state_changes(scan: Scan, per_head: bool = False, budget: int = BUDGET) -> Changes:
    """Size of the state and of its change at every position, from one pass of `iterate_states`.

    Args:
        scan: The layer's recurrence.
        per_head: Of every head.
        budget: Bytes of working memory, about.

    Returns:
        Norms of states and updates.
    """
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
    """How long the state at some positions lasts, both (B, positions, H, N or 1).

    Attributes:
        steps: float64, tokens until it has decayed to 1/e.
        reached: bool. False where the sequence ended before: steps is then what was left of it
            (right-censored, as `ssm_retrieval.statistics.median_time` takes it).
    """

    steps: Tensor
    reached: Tensor


@torch.no_grad()
def horizon(scan: Scan, at: Any) -> Horizon:
    """How long the state at some positions lasts, in every channel and state.

    The number k of steps with prod_{at < s <= at+k} exp(dt_s A) = 1/e. The logarithm of the product is
    interpolated within a step, so a constant decay a gives `constant_horizon`, -1 / ln a, exactly. The
    product is below 1/e after floor(k) + 1 whole steps.

    Args:
        scan: The layer's recurrence.
        at: (positions,) ints.

    Returns:
        Steps, and whether the decay was reached within the sequence.

    Raises:
        UserError: `at` is not a list, or a position lies outside the sequence.
    """
    positions = inside(torch.as_tensor(at, device=scan.x.device), scan.x.shape[1])
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
    """The horizon -1 / ln a = -1 / (dt A) of a constant decay a = exp(dt A).

    `constant_horizon(scan.dt.mean((0, 1))[:, None], scan.A)` is (H, N or 1).

    Args:
        dt: Step sizes; dt and A broadcast.
        A: At most 0.

    Returns:
        Tokens; inf where dt A = 0.
    """
    rate = -(dt * A)
    return torch.where(rate > 0, 1 / rate, torch.inf)


# --- by role ----------------------------------------------------------------------------------------------


def role_means(values: Any, roles: Any, names: Mapping[Any, str] | None = None) -> pd.DataFrame:
    """The mean of every sequence over the positions of each role.

    Args:
        values: (B, L) float; nan is left out.
        roles: (B, L), or (L,) if all sequences have the same, ints or strings.
        names: Role to the name it gets in the table; other roles are left out. None: all, as they are.

    Returns:
        A row per sequence and role that it has: role, sequence, value, positions (how many).

    Raises:
        UserError: Shapes differ.
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
    """The mean of every role over sequences, one row each.

    Each sequence counts by its own mean, because positions of one sequence are not independent.

    Args:
        values: (B, L) float, as in `role_means`.
        roles: (B, L) or (L,).
        names: Role to name.
        confidence: Of the intervals.

    Returns:
        Columns role, mean with Student's low, high (nan for a single sequence), sequences, positions.
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
