"""The recurrences of layers with a state, in one form that can be run in pieces, from any state.

`instrumented.hooked_scan` runs them where a probe edits a state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ssm_retrieval.ops.delta_rule import delta_rule as fused_delta_rule
from ssm_retrieval.ops.selective_scan import selective_scan as fused_scan
from ssm_retrieval.ops.ssd import ssd as fused_ssd
from ssm_retrieval.ops.trapezoid import rank_one
from ssm_retrieval.ops.trapezoid import trapezoid as fused_trapezoid


class Recurrence(Protocol):
    """A linear recurrence with its arguments, to be run in pieces.

        h_t = decay_t * h_{t-1} + write_t            y_t = read(h_t)

    States are (B, *state), outputs (B, length, *out).
    """

    @property
    def length(self) -> int:
        """Tokens."""

    def scan(self, start: int, stop: int, h: Tensor | None, at: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens start .. stop - 1 on the fast path.

        Args:
            start: The first token.
            stop: The token after the last.
            h: The state before `start`, (B, *state); None is zeros.
            at: Positions, counted from `start`, whose states are wanted.

        Returns:
            y, the last state, and the wanted states (B, len(at), *state).
        """

    def decay(self, positions: list[int]) -> Tensor:
        """A_bar at these positions, (B, len(positions), ...)."""

    def step(self, t: int, h: Tensor | None, decay: Tensor) -> Tensor:
        """One step, written out.

        Args:
            t: The token.
            h: The state before it, (B, *state); None is zeros.
            decay: A_bar of this token, (B, ...).

        Returns:
            The state after it, (B, *state).
        """

    def read(self, t: int, h: Tensor) -> Tensor:
        """y_t (B, 1, *out) from h_t."""


@dataclass(frozen=True)
class SelectiveRecurrence:
    """The arguments of one `selective_scan` as a `Recurrence`: states (B, E, N), y (B, L, E)."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    dt_bias: Tensor | None = None
    dt_softplus: bool = False

    @property
    def length(self) -> int:
        return self.u.shape[1]

    def scan(self, start: int, stop: int, h: Tensor | None, at: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        if at:
            return self._run(start, stop, h, at, True)
        y, last = self._run(start, stop, h, None, True)  # CUDA's kernel returns no states
        return y, last, last.new_empty(last.shape[0], 0, *last.shape[1:])

    def output(self, h: Tensor | None, return_last_state: bool) -> Any:
        """What `selective_scan` returns for these arguments."""
        return self._run(0, self.length, h, None, return_last_state)

    def _run(self, start: int, stop: int, h: Tensor | None, at: list[int] | None, last: bool) -> Any:
        u, dt, B, C = (x[:, start:stop] for x in (self.u, self.dt, self.B, self.C))
        z = None if self.z is None else self.z[:, start:stop]
        bias, softplus = self.dt_bias, self.dt_softplus
        return fused_scan(u, dt, self.A, B, C, self.D, z, bias, softplus, h, at, last)

    def delta(self, dt: Tensor) -> Tensor:
        """The step sizes that the scan makes from dt (B, ..., E)."""
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = dt.to(wide) if self.dt_bias is None else dt.to(wide) + self.dt_bias.to(wide)
        return F.softplus(dt) if self.dt_softplus else dt

    def decay(self, positions: list[int]) -> Tensor:
        return torch.exp(self.delta(self.dt[:, positions]).unsqueeze(-1) * self.A)  # (B, P, E, N)

    def step(self, t: int, h: Tensor | None, decay: Tensor) -> Tensor:
        write = (self.delta(self.dt[:, t]) * self.u[:, t]).unsqueeze(-1) * self.B[:, t, None]
        return write if h is None else decay * h + write

    def read(self, t: int, h: Tensor) -> Tensor:
        y = (h * self.C[:, t, None]).sum(-1)
        y = y if self.D is None else y + self.D.to(h.dtype) * self.u[:, t]
        y = y if self.z is None else y * F.silu(self.z[:, t].to(h.dtype))
        return y.to(self.u.dtype).unsqueeze(1)


@dataclass(frozen=True)
class DualRecurrence:
    """The arguments of one `ssd` as a `Recurrence`: states (B, H, P, N), y (B, L, H, P)."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    chunk_size: int

    @property
    def length(self) -> int:
        return self.x.shape[1]

    def scan(self, start: int, stop: int, h: Tensor | None, at: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        x, dt, B, C = (t[:, start:stop] for t in (self.x, self.dt, self.B, self.C))
        return fused_ssd(x, dt, self.A, B, C, h, self.chunk_size, return_last_state=True, states_at=at)

    def decay(self, positions: list[int]) -> Tensor:
        return torch.exp(self.dt[:, positions] * self.A)  # (B, positions, H)

    def _by_head(self, x: Tensor) -> Tensor:
        """(B, G, N) -> (B, H, N)"""
        return x.repeat_interleave(self.x.shape[2] // x.shape[1], dim=1)

    def step(self, t: int, h: Tensor | None, decay: Tensor) -> Tensor:
        scaled = self.dt[:, t].unsqueeze(-1) * self.x[:, t]  # (B, H, P)
        write = scaled.unsqueeze(-1) * self._by_head(self.B[:, t]).unsqueeze(-2)
        return write if h is None else decay[..., None, None] * h + write

    def read(self, t: int, h: Tensor) -> Tensor:
        y = (h @ self._by_head(self.C[:, t]).to(h.dtype).unsqueeze(-1)).squeeze(-1)
        return y.to(self.x.dtype).unsqueeze(1)


@dataclass(frozen=True)
class DeltaRecurrence:
    """The arguments of one `delta_rule` as a `Recurrence`: states (B, H, P, N), y (B, L, H, P)."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    log_decay: Tensor | None
    erase: bool = True

    @property
    def length(self) -> int:
        return self.q.shape[1]

    def scan(self, start: int, stop: int, h: Tensor | None, at: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        part = slice(start, stop)
        whole = (self.q, self.k, self.v, self.beta, self.log_decay)
        inputs: Any = (None if x is None else x[:, part] for x in whole)
        return fused_delta_rule(
            *inputs, erase=self.erase, initial_state=h, states_at=at, return_last_state=True
        )

    def decay(self, positions: list[int]) -> Tensor:
        if self.log_decay is None:
            return self.v.new_ones(()).expand(self.v[:, positions, :, 0].shape)
        return torch.exp(self.log_decay[:, positions])  # (B, positions, H), or (B, positions, H, N)

    def step(self, t: int, h: Tensor | None, decay: Tensor) -> Tensor:
        v, k = self.v[:, t], self.k[:, t].unsqueeze(-2)  # (B, H, P), (B, H, 1, N)
        if h is not None:
            h = (decay[..., None, None] if decay.dim() == 2 else decay.unsqueeze(-2)) * h
            v = v - (h * k).sum(-1) if self.erase else v
        v = v if self.beta is None else self.beta[:, t].unsqueeze(-1) * v
        write = v.unsqueeze(-1) * k
        return write if h is None else h + write

    def read(self, t: int, h: Tensor) -> Tensor:
        y = (h * self.q[:, t].unsqueeze(-2).to(h.dtype)).sum(-1)
        return y.to(self.v.dtype).unsqueeze(1)


@dataclass(frozen=True)
class TrapezoidRecurrence:
    """The arguments of one `trapezoid` as a `Recurrence`: states (B, H, P, N), y (B, L, H, P)."""

    q: Tensor
    k: Tensor
    v: Tensor
    now: Tensor
    late: Tensor
    log_decay: Tensor

    @property
    def length(self) -> int:
        return self.q.shape[1]

    def _before(self, t: int, h: Tensor | None) -> Tensor | None:
        """h with the second part of the write before token t, which token t adds."""
        if h is None or t == 0:  # what came before the first token is no part of the recurrence
            return h
        return h + rank_one(self.late[:, t - 1, :, None] * self.v[:, t - 1], self.k[:, t - 1])

    def scan(self, start: int, stop: int, h: Tensor | None, at: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        whole = (self.q, self.k, self.v, self.now, self.late, self.log_decay)
        inputs: Any = (x[:, start:stop] for x in whole)
        return fused_trapezoid(
            *inputs, initial_state=self._before(start, h), states_at=at, return_last_state=True
        )

    def decay(self, positions: list[int]) -> Tensor:
        return torch.exp(self.log_decay[:, positions])  # (B, positions, H)

    def step(self, t: int, h: Tensor | None, decay: Tensor) -> Tensor:
        h, write = self._before(t, h), rank_one(self.now[:, t, :, None] * self.v[:, t], self.k[:, t])
        return write if h is None else decay[..., None, None] * h + write

    def read(self, t: int, h: Tensor) -> Tensor:
        y = (h * self.q[:, t].unsqueeze(-2).to(h.dtype)).sum(-1)
        return y.to(self.v.dtype).unsqueeze(1)
