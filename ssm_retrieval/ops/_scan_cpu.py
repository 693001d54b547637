"""The selective scan by our CPU kernels: their layout, their gradients, and what torch.compile sees of them.

Why numba. Four routes were considered for forward + backward at batch 8, length 1024, d_inner
256, d_state 16, float32, 2 cores (`benchmarks/scan.py` prints today's numbers):
  - a parallel scan in PyTorch (mambapy's) takes more than a second, because it stores the whole trajectory;
  - C++ through torch's extension loader took 64 ms as a prototype, but needs a compiler, headers and a slow
    first build on every machine, and a second implementation where there is none;
  - loops left to numba's auto-vectoriser do not vectorise (the recurrence runs along the outer loop and the
    arrays might alias);
  - numba with explicit 16-lane vectors (`_simd.py`) is at least as fast as the C++ prototype, compiles itself
    in seconds, is cached on disk, and installs as a wheel on every platform: full speed without a compiler.
So there is one fast CPU path, and no fallback to maintain.

A call goes to the kernels by an autograd function; while torch.compile or torch.export record a graph, by the
operators registered at the end, of which each is one node of that graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssm_retrieval.ops import CHUNK, LANES, TILE, scan_group
from ssm_retrieval.ops._arrays import at_positions, blocked, flat, pad_channels, unblocked
from ssm_retrieval.ops._kernel_autograd import differentiable
from ssm_retrieval.ops._scan_arguments import ScanArguments
from ssm_retrieval.ops._scan_chunks import scan_by_chunks
from ssm_retrieval.ops._threads import run_tasks


def scan_on_cpu(
    given: ScanArguments, positions: Sequence[int] | None, return_last_state: bool
) -> list[Tensor]:
    """Bring the arguments of `selective_scan` into the kernels' layout (differentiably) and back."""
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state = given
    dtype, wide, E = u.dtype, given.wide, u.shape[-1]

    def channels(x: Tensor | None) -> Tensor | None:
        return None if x is None else pad_channels(x, wide)

    wanted = None if positions is None else sorted(set(positions))
    arguments = (
        channels(u),
        channels(dt),
        blocked(A.to(wide)),
        B.to(wide).contiguous(),
        C.to(wide).contiguous(),
        channels(D),
        channels(z),
        channels(u.new_zeros(E) if dt_bias is None else dt_bias),
        None if initial_state is None else blocked(initial_state.to(wide)),
    )
    y, last, states, _ = _run(*arguments, dt_softplus, wanted)
    out = [(y if y.shape[-1] == E else y[..., :E]).to(dtype)]
    if return_last_state:
        out.append(unblocked(last, E))
    if positions is not None and wanted is not None:
        out.append(at_positions(unblocked(states, E), wanted, positions))
    return out


def _by_chunks(softplus: bool, positions: list[int] | None, *arguments: Tensor | None) -> list[Tensor]:
    """What `_forward` returns to differentiate, by PyTorch's operations."""
    u, dt, A, B, C, D, z, bias, h0 = arguments
    assert u is not None and dt is not None and A is not None and B is not None and C is not None
    E, h = u.shape[-1], None if h0 is None else unblocked(h0, u.shape[-1])
    given = ScanArguments(u, dt, unblocked(A, E), B, C, D, z, bias, softplus, h)
    y, last, states = scan_by_chunks(given, positions or [], True)
    return [y, blocked(last), blocked(states)]


def _forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor,
    h0: Tensor | None,
    softplus: bool,
    positions: list[int] | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the forward kernel on arguments in its layout: y, last state, states, checkpoints (if `keep`)."""
    from ssm_retrieval.ops import _scan_kernels  # numba: imported on first use only

    b, L, blocks, N, P, chunks = _sizes(u, A, positions, keep)
    y, last = torch.empty_like(u), u.new_empty(b, blocks, N, LANES)
    states, checkpoints = u.new_empty(b, P, blocks, N, LANES), u.new_empty(b, chunks, blocks, N, LANES)
    given = [flat(x, u.dtype) for x in (u, dt, _scaled(A), B, C, D, z, bias, h0)]
    out = [flat(x, u.dtype) for x in (y, checkpoints, states, last)]
    where = np.array(positions or (), np.int64)
    sizes, flags = (L, blocks, N, P), (softplus, D is not None, z is not None, h0 is not None, keep)
    run_tasks(lambda tasks: _scan_kernels.scan_forward(tasks, sizes, flags, *given, where, *out), b * blocks)
    return y, last, states, checkpoints


def _sizes(u: Tensor, A: Tensor, positions: list[int] | None, keep: bool) -> tuple[int, ...]:
    """Batch, length, blocks of channels, d_state, stored positions, stored chunks."""
    (b, L, _), (blocks, N, _) = u.shape, A.shape
    return b, L, blocks, N, len(positions or ()), -(-L // CHUNK) if keep else 0


def _scaled(A: Tensor) -> Tensor:
    """A times log2(e), as the kernels want it: exp(dt A) = 2^(dt A log2(e))."""
    return A.detach() * math.log2(math.e)


def _backward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor,
    checkpoints: Tensor,
    softplus: bool,
    positions: list[int] | None,
    gy: Tensor | None,
    glast: Tensor | None,
    gstates: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernel: the gradients of u, dt, A, B, C, D, z, bias and h0."""
    from ssm_retrieval.ops import _scan_kernels

    b, L, blocks, N, P, _ = _sizes(u, A, positions, True)
    gy = torch.zeros_like(u) if gy is None else gy.contiguous()
    glast = None if glast is None else glast.contiguous()
    gstates = None if gstates is None else gstates.contiguous()
    group, tiles = scan_group(b, blocks), -(-N // TILE)
    groups = -(-blocks // group)
    du, ddt = torch.empty_like(u), torch.empty_like(u)
    dz = torch.empty_like(u) if z is not None else u.new_empty(0)
    dA, dh0 = u.new_empty(b, blocks, N, LANES), u.new_empty(b, blocks, N, LANES)
    dB, dC = (u.new_empty(groups, b, tiles, L + -L % 4, TILE) for _ in range(2))
    dD, dbias = u.new_empty(b, blocks * LANES), u.new_empty(b, blocks * LANES)
    given = [flat(x, u.dtype) for x in (u, dt, _scaled(A), B, C, D, z, bias, checkpoints)]
    grads = [flat(x, u.dtype) for x in (gy, gstates, glast)]
    out = [flat(x, u.dtype) for x in (du, ddt, dA, dB, dC, dD, dz, dbias, dh0)]
    where = np.array(positions or (), np.int64)
    flags = (softplus, D is not None, z is not None, gstates is not None, glast is not None)
    sizes = (L, blocks, N, P, group)
    run_tasks(
        lambda tasks: _scan_kernels.scan_backward(tasks, sizes, flags, *given, where, *grads, *out),
        b * groups,
    )
    dB, dC = (x.sum(0).transpose(1, 2).reshape(b, -1, tiles * TILE)[:, :L, :N] for x in (dB, dC))
    return du, ddt, dA.sum(0), dB.contiguous(), dC.contiguous(), dD.sum(0), dz, dbias.sum(0), dh0


_run, scan_forward, scan_backward = differentiable("selective_scan", _forward, _backward, _by_chunks)


@scan_forward.register_fake
def _(u: Tensor, dt: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, positions, keep = rest
    b, _, blocks, N, P, chunks = _sizes(u, A, positions, keep)
    shapes = ((b, blocks, N, LANES), (b, P, blocks, N, LANES), (b, chunks, blocks, N, LANES))
    last, states, checkpoints = (u.new_empty(shape) for shape in shapes)
    return torch.empty_like(u), last, states, checkpoints


@scan_backward.register_fake
def _(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    z, b, E = rest[2], u.shape[0], u.shape[-1]
    dz = torch.empty_like(u) if z is not None else u.new_empty(0)
    like_u, like_B = torch.empty_like(u), torch.empty_like(B)
    dh0 = u.new_empty(b, *A.shape)
    return (
        like_u, torch.empty_like(u), torch.empty_like(A), like_B, torch.empty_like(B), u.new_empty(E), dz,
        u.new_empty(E), dh0,
    )  # fmt: skip
