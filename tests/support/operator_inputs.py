"""Arguments of the scan and the convolution for tests, and what they make of them."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssm_retrieval.ops.selective_scan import selective_scan

NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


def inputs(b, L, E, N, dtype=torch.float64, seed=0, absent=()):
    """Arguments of a scan by name, with gradients, as a Mamba block has them: A negative."""
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(u=(b, L, E), dt=(b, L, E), A=(E, N), B=(b, L, N), C=(b, L, N), D=(E,), z=(b, L, E))
    shapes |= dict(dt_bias=(E,), initial_state=(b, E, N))
    made = {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
    made["A"] = -torch.exp(made["A"])
    return {name: t.requires_grad_() for name, t in made.items() if name not in absent}


def outputs(arguments, backend, positions, softplus=True):
    """y, the last state and the states at `positions`."""
    return selective_scan(
        **arguments, dt_softplus=softplus, states_at=positions, return_last_state=True, backend=backend
    )


def gradients(arguments, results, seed=1):
    """Gradients of a random linear function of every result."""
    generator = torch.Generator().manual_seed(seed)
    total = sum((r * torch.randn(r.shape, generator=generator, dtype=r.dtype)).sum() for r in results)
    return torch.autograd.grad(total, list(arguments.values()), allow_unused=True, materialize_grads=True)


def conv_inputs(b, L, E, K, dtype=torch.float64):
    """Arguments of a convolution by name, with gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = dict(x=(b, L, E), weight=(E, K), bias=(E,), initial_state=(b, K - 1, E))
    return {k: torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for k, s in shapes.items()}


class Largest(TorchDispatchMode):
    """The most numbers that one tensor made meanwhile has; bytes are copies of Triton's interpreter."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.dtype != torch.uint8:
                self.numel = max(self.numel, x.numel())
        return out
