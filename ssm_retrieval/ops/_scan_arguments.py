"""What every form of the selective scan is given, and the parts that its forms in plain PyTorch share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class ScanArguments(NamedTuple):
    """The arguments of `selective_scan` that decide y, with its shapes."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    dt_softplus: bool
    initial_state: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them that may be tensors, u first and initial_state last."""
        return (*self[:8], self.initial_state)

    @property
    def wide(self) -> torch.dtype:
        """What the scan computes in: float32, or float64 for float64 inputs."""
        return torch.promote_types(self.u.dtype, torch.float32)


def widened(given: ScanArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, delta = softplus(dt + dt_bias), A, B, C and the state before the first token, in `given.wide`."""
    u, dt, A, B, C = (x.to(given.wide) for x in given[:5])
    delta = dt if given.dt_bias is None else dt + given.dt_bias.to(given.wide)
    delta = F.softplus(delta) if given.dt_softplus else delta
    h = given.initial_state
    return u, delta, A, B, C, u.new_zeros(u.shape[0], *A.shape) if h is None else h.to(given.wide)


def skipped_and_gated(y: Tensor, given: ScanArguments) -> Tensor:
    """(y + D u) * silu(z), in u's dtype; y: C . h, in `given.wide`."""
    if given.D is not None:
        y = y + given.D.to(given.wide) * given.u.to(given.wide)
    if given.z is not None:
        y = y * F.silu(given.z.to(given.wide))
    return y.to(given.u.dtype)
